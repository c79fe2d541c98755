/* paths NAME FILE N
 *
 * Changes FILE, or its directory, again and again by the way NAME: N times, or, if N
 * is 0, about every 0.3 ms until it is ended (at the latest after two minutes). With
 * N the result is always the same. `paths list` prints the names.
 *
 * paths --once NAME FILE I: record I only, by a way that takes a process. */
#include "ways.h"
#include <aio.h>
#include <dlfcn.h>
#include <err.h>
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <locale.h>
#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <wchar.h>
#ifdef WITH_URING
#include <liburing.h>
#endif
#ifdef WITH_AIO
#include <libaio.h>
#endif

static const char *self;
static char **environment;

/* --- calls on descriptors --- */

static void by_write(long i)
{
    lseek(fd, place(i), SEEK_SET);
    check(write(fd, rec, RECORD), "write");
}

static void by_pwrite(long i)
{
    check(pwrite(fd, rec, RECORD, place(i)), "pwrite");
}

static struct iovec *vector(void)
{
    static struct iovec v[2];
    v[0] = (struct iovec){rec, 20};
    v[1] = (struct iovec){rec + 20, RECORD - 20};
    return v;
}

static void by_writev(long i)
{
    lseek(fd, place(i), SEEK_SET);
    check(writev(fd, vector(), 2), "writev");
}

static void by_pwritev(long i)
{
    check(pwritev(fd, vector(), 2, place(i)), "pwritev");
}

static void by_pwritev2(long i)
{
    check(pwritev2(fd, vector(), 2, place(i), RWF_DSYNC * 0), "pwritev2");
}

static int source = -1;

static void by_sendfile(long i)
{
    if (source < 0)
        check(source = memfd_create("source", MFD_CLOEXEC), "memfd_create");
    off_t from = 0;
    check(pwrite(source, rec, RECORD, 0), "pwrite");
    lseek(fd, place(i), SEEK_SET);
    check(sendfile(fd, source, &from, RECORD), "sendfile");
}

static void by_copy_file_range(long i)
{
    /* From the other half of the file itself. */
    loff_t from = SIZE + place(i), to = place(i);
    if (i == 1)
        for (long k = 0; k < RECORDS; k++) {
            fill(k);
            check(pwrite(fd, rec, RECORD, SIZE + place(k)), "pwrite");
        }
    check(copy_file_range(fd, &from, fd, &to, RECORD, 0), "copy_file_range");
}

static int ends[2] = {-1, -1}, more_ends[2];

static void by_splice(long i)
{
    if (ends[0] < 0)
        check(pipe2(ends, O_CLOEXEC), "pipe");
    loff_t to = place(i);
    check(write(ends[1], rec, RECORD), "write");
    check(splice(ends[0], NULL, fd, &to, RECORD, 0), "splice");
}

static void by_vmsplice_tee(long i)
{
    char copy[RECORD];
    if (ends[0] < 0) {
        check(pipe2(ends, O_CLOEXEC), "pipe");
        check(pipe2(more_ends, O_CLOEXEC), "pipe");
    }
    loff_t to = place(i);
    struct iovec all = {rec, RECORD};
    check(vmsplice(ends[1], &all, 1, 0), "vmsplice");
    check(tee(ends[0], more_ends[1], RECORD, 0), "tee");
    check(splice(more_ends[0], NULL, fd, &to, RECORD, 0), "splice");
    check(read(ends[0], copy, RECORD), "read");
}

static void by_ftruncate(long i)
{
    check(ftruncate(fd, SIZE + i % 1000), "ftruncate");
}

static void by_truncate(long i)
{
    check(truncate(file, SIZE + i % 1000), "truncate");
}

static void by_fallocate(long i)
{
    check(fallocate(fd, 0, 0, SIZE + i % 100 * 4096), "fallocate");
    if (i % 100 == 99)
        check(ftruncate(fd, SIZE), "ftruncate");
}

static void by_posix_fallocate(long i)
{
    errno = posix_fallocate(fd, 0, SIZE + i % 100 * 4096);
    check(-errno, "posix_fallocate");
    if (i % 100 == 99)
        check(ftruncate(fd, SIZE), "ftruncate");
}

static void by_punch_hole(long i)
{
    check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, place(i), RECORD), "punch");
}

static void by_zero_range(long i)
{
    check(fallocate(fd, FALLOC_FL_ZERO_RANGE, place(i), RECORD), "zero range");
}

static void by_insert_collapse(long i)
{
    int mode = i % 2 ? FALLOC_FL_INSERT_RANGE : FALLOC_FL_COLLAPSE_RANGE;
    check(fallocate(fd, mode, 4096, 4096), "insert or collapse range");
}

static void by_ficlone(long i)
{
    if (source < 0) {
        source = open_file(beside("source"), O_RDWR | O_CREAT);
        check(ftruncate(source, SIZE), "ftruncate");
    }
    if (i % 64 == 1)
        check(pwrite(source, rec, RECORD, place(i)), "pwrite");
    check(ioctl(fd, FICLONE, source), "FICLONE");
}

static void by_ficlonerange(long i)
{
    struct file_clone_range range = {.src_fd = 0, .src_length = 4096, .dest_offset = 0};
    if (source < 0) {
        source = open_file(beside("source"), O_RDWR | O_CREAT);
        check(ftruncate(source, SIZE), "ftruncate");
    }
    range.src_fd = source;
    range.dest_offset = (unsigned long long)(i % 4 * 4096);
    check(ioctl(fd, FICLONERANGE, &range), "FICLONERANGE");
}

/* --- names and metadata --- */

static void by_o_trunc(long i)
{
    int opened = open_file(file, O_WRONLY | O_TRUNC);
    check(pwrite(opened, rec, (size_t)(i % RECORD) + 1, 0), "pwrite");
    close(opened);
}

static void by_creat(long i)
{
    int opened = creat(file, 0666);
    check(opened, file);
    check(pwrite(opened, rec, (size_t)(i % RECORD) + 1, 0), "pwrite");
    close(opened);
}

static void by_rename(long i)
{
    (void)i;
    int opened = open_file(beside("new"), O_WRONLY | O_CREAT | O_TRUNC);
    check(write(opened, rec, RECORD), "write");
    close(opened);
    check(rename(beside("new"), file), "rename");
}

static void by_exchange(long i)
{
    if (i == 1)
        close(open_file(beside("other"), O_WRONLY | O_CREAT));
    check(renameat2(AT_FDCWD, file, AT_FDCWD, beside("other"), RENAME_EXCHANGE), "renameat2");
}

static void by_link(long i)
{
    check(i % 2 ? link(file, beside("link")) : unlink(beside("link")), "link");
}

static void by_mkdir(long i)
{
    check(i % 2 ? mkdir(beside("dir"), 0777) : rmdir(beside("dir")), "mkdir");
}

static void by_symlink(long i)
{
    check(i % 2 ? symlink(rec, beside("symlink")) : unlink(beside("symlink")), "symlink");
}

static void by_mkfifo(long i)
{
    check(i % 2 ? mkfifo(beside("fifo"), 0666) : unlink(beside("fifo")), "mkfifo");
}

static void by_chmod(long i)
{
    check(i % 2 ? chmod(file, 0600) : fchmod(fd, 0644), "chmod");
}

static void by_chown(long i)
{
    check(i % 2 ? chown(file, (uid_t)-1, getegid()) : fchown(fd, geteuid(), (gid_t)-1), "chown");
}

static void by_utimens(long i)
{
    struct timespec times[2] = {{i, 0}, {i, 0}};
    check(i % 2 ? utimensat(AT_FDCWD, file, times, 0) : futimens(fd, times), "utimens");
}

static void by_setxattr(long i)
{
    if (i % 3)
        check(setxattr(file, "user.record", rec, RECORD, 0), "setxattr");
    else
        check(fremovexattr(fd, "user.record"), "fremovexattr");
}

/* --- stdio --- */

/* stdout is FILE, and each line is written out. */
static void stdout_to_file(void)
{
    fflush(stdout);
    if (!freopen(file, "r+", stdout))
        die(file);
    setvbuf(stdout, NULL, _IOLBF, 4096);
}

static void back_to_start(FILE *stream, long i)
{
    if (i % RECORDS == 0)
        rewind(stream);
}

static void by_fwrite(long i)
{
    back_to_start(stdout, i);
    if (fwrite(rec, 1, RECORD, stdout) != RECORD)
        die("fwrite");
}

static void by_fprintf(long i)
{
    back_to_start(stdout, i);
    check(fprintf(stdout, "%s %ld\n", name, i), "fprintf");
}

static void by_fputs(long i)
{
    back_to_start(stdout, i);
    check(fputs(rec, stdout), "fputs");
}

static void by_puts(long i)
{
    back_to_start(stdout, i);
    check(puts(name), "puts");
}

static void by_putc(long i)
{
    back_to_start(stdout, i);
    putc('a' + (int)(i % 26), stdout);
    check(putc('\n', stdout), "putc");
}

static void by_wide(long i)
{
    static FILE *wide;
    if (!wide) {
        setlocale(LC_ALL, "C.UTF-8");
        wide = fopen(file, "r+");
        if (!wide)
            die(file);
        fwide(wide, 1);
        setvbuf(wide, NULL, _IOLBF, 4096);
    }
    back_to_start(wide, i);
    check(fwprintf(wide, L"%s \u00e4 %ld\n", name, i), "fwprintf");
}

static FILE *buffered(void)
{
    static FILE *stream;
    if (!stream && !(stream = fopen(file, "r+")))
        die(file);
    return stream;
}

static void put(FILE *stream)
{
    if (fwrite(rec, 1, RECORD, stream) != RECORD)
        die("fwrite");
}

static void by_full_buffer(long i)
{
    FILE *stream = buffered();
    if (i % 64 == 0)
        rewind(stream);
    for (int k = 0; k < 100; k++)
        put(stream);
}

static void by_fflush(long i)
{
    FILE *stream = buffered();
    put(stream);
    fflush(i % 2 ? stream : NULL);
    back_to_start(stream, i);
}

static void by_fseek(long i)
{
    FILE *stream = buffered();
    fseek(stream, place(i), SEEK_SET);
    put(stream);
}

static void by_fgetc(long i)
{
    FILE *stream = buffered();
    fseek(stream, place(i), SEEK_SET);
    put(stream);
    fgetc(stream);
}

static void by_input(long i)
{
    /* Asking for input writes out what a line-buffered stdout holds. */
    static FILE *zeros;
    if (!zeros) {
        if (!(zeros = fopen("/dev/zero", "r")))
            die("/dev/zero");
        setvbuf(zeros, NULL, _IONBF, 0);
    }
    back_to_start(stdout, i);
    check(fputs(name, stdout), "fputs");
    getc(zeros);
}

static void by_fclose(long i)
{
    FILE *stream = fopen(file, "r+");
    if (!stream)
        die(file);
    fseek(stream, place(i), SEEK_SET);
    put(stream);
    fclose(stream);
}

static void by_dprintf(long i)
{
    lseek(fd, place(i), SEEK_SET);
    check(dprintf(fd, "%s %ld\n", name, i), "dprintf");
}

static void stderr_to_file(void)
{
    check(true_stderr = dup(2), "dup");
    check(dup2(fd, 2), "dup2");
}

static void by_perror(long i)
{
    lseek(2, place(i), SEEK_SET);
    errno = EAGAIN;
    perror(name);
}

static void by_warn(long i)
{
    lseek(2, place(i), SEEK_SET);
    warnx("%s %ld", name, i);
}

static void by_psignal(long i)
{
    lseek(2, place(i), SEEK_SET);
    psignal(1 + (int)(i % 15), name);
}

static ssize_t cookie_write(void *cookie, const char *bytes, size_t n)
{
    (void)cookie;
    return pwrite(fd, bytes, n, 0);
}

static void by_fopencookie(long i)
{
    static FILE *stream;
    (void)i;
    if (!stream) {
        cookie_io_functions_t functions = {.write = cookie_write};
        if (!(stream = fopencookie(NULL, "w", functions)))
            die("fopencookie");
    }
    put(stream);
    fflush(stream);
}

static void by_memstream(long i)
{
    char *bytes;
    size_t n;
    FILE *stream = open_memstream(&bytes, &n);
    put(stream);
    fclose(stream);
    check(pwrite(fd, bytes, n, place(i)), "pwrite");
    free(bytes);
}

static void by_mkstemp(long i)
{
    char path[4096];
    (void)i;
    snprintf(path, sizeof path, "%s.XXXXXX", file);
    int made = mkstemp(path);
    check(made, "mkstemp");
    check(write(made, rec, RECORD), "write");
    close(made);
    check(rename(path, file), "rename");
}

static void by_tmpfile(long i)
{
    FILE *stream = tmpfile();
    if (!stream)
        die("tmpfile");
    put(stream);
    fflush(stream);
    off_t from = 0;
    lseek(fd, place(i), SEEK_SET);
    check(sendfile(fd, fileno(stream), &from, RECORD), "sendfile");
    fclose(stream);
}

/* --- queues --- */

static void by_aio_write(long i)
{
    struct aiocb block = {.aio_fildes = fd, .aio_buf = rec, .aio_nbytes = RECORD};
    const struct aiocb *list[] = {&block};
    block.aio_offset = place(i);
    check(aio_write(&block), "aio_write");
    while (aio_error(&block) == EINPROGRESS)
        aio_suspend(list, 1, NULL);
    check(aio_return(&block), "aio_return");
}

static void by_lio_listio(long i)
{
    struct aiocb block = {.aio_fildes = fd, .aio_buf = rec, .aio_nbytes = RECORD};
    struct aiocb *list[] = {&block};
    block.aio_offset = place(i);
    block.aio_lio_opcode = LIO_WRITE;
    check(lio_listio(LIO_WAIT, list, 1, NULL), "lio_listio");
}

#ifdef WITH_AIO
static void by_libaio(long i)
{
    static io_context_t context;
    if (!context)
        check(io_setup(8, &context), "io_setup");
    struct iocb block, *blocks[] = {&block};
    struct io_event done;
    io_prep_pwrite(&block, fd, rec, RECORD, place(i));
    check(io_submit(context, 1, blocks) - 1, "io_submit");
    check(io_getevents(context, 1, 1, &done, NULL) - 1, "io_getevents");
}
#endif

#ifdef WITH_URING
static struct io_uring ring;

static struct io_uring_sqe *ring_entry(unsigned flags)
{
    static int is_ready;
    if (!is_ready) {
        struct io_uring_params params = {.flags = flags, .sq_thread_idle = 2000};
        errno = -io_uring_queue_init_params(8, &ring, &params);
        check(-errno, "io_uring_queue_init");
        struct iovec all = {rec, RECORD};
        errno = -io_uring_register_buffers(&ring, &all, 1);
        check(-errno, "io_uring_register_buffers");
        is_ready = 1;
    }
    return io_uring_get_sqe(&ring);
}

static void ring_finish(void)
{
    struct io_uring_cqe *done;
    io_uring_submit(&ring);
    errno = -io_uring_wait_cqe(&ring, &done);
    check(-errno, "io_uring_wait_cqe");
    errno = -done->res;
    check(done->res, "ring");
    io_uring_cqe_seen(&ring, done);
}

static void by_uring_write(long i)
{
    io_uring_prep_write(ring_entry(0), fd, rec, RECORD, (__u64)place(i));
    ring_finish();
}

static void by_uring_writev(long i)
{
    io_uring_prep_writev(ring_entry(0), fd, vector(), 2, (__u64)place(i));
    ring_finish();
}

static void by_uring_fixed(long i)
{
    io_uring_prep_write_fixed(ring_entry(0), fd, rec, RECORD, (__u64)place(i), 0);
    ring_finish();
}

static void by_uring_sqpoll(long i)
{
    io_uring_prep_write(ring_entry(IORING_SETUP_SQPOLL), fd, rec, RECORD, (__u64)place(i));
    ring_finish();
}

static void by_uring_rename(long i)
{
    (void)i;
    int opened = open_file(beside("new"), O_WRONLY | O_CREAT | O_TRUNC);
    check(write(opened, rec, RECORD), "write");
    close(opened);
    io_uring_prep_rename(ring_entry(0), beside("new"), file);
    ring_finish();
}
#endif

/* A ring without any library. */
static void by_uring_raw(long i)
{
    static int ring_fd = -1;
    static struct io_uring_params p;
    static char *sq, *cq;
    static struct io_uring_sqe *entries;
    if (ring_fd < 0) {
        check(ring_fd = (int)syscall(SYS_io_uring_setup, 4, &p), "io_uring_setup");
        size_t sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
        size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
        int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
        sq = mmap(NULL, sq_size, protection, flags, ring_fd, IORING_OFF_SQ_RING);
        cq = mmap(NULL, cq_size, protection, flags, ring_fd, IORING_OFF_CQ_RING);
        entries = mmap(NULL, p.sq_entries * sizeof *entries, protection, flags, ring_fd,
                       IORING_OFF_SQES);
        if (sq == MAP_FAILED || cq == MAP_FAILED || (void *)entries == MAP_FAILED)
            die("mmap of a ring");
    }
    _Atomic unsigned *tail = (void *)(sq + p.sq_off.tail);
    unsigned at = atomic_load(tail) & *(unsigned *)(void *)(sq + p.sq_off.ring_mask);
    entries[at] = (struct io_uring_sqe){
        .opcode = IORING_OP_WRITE,
        .fd = fd,
        .addr = (__u64)(uintptr_t)rec,
        .len = RECORD,
        .off = (__u64)place(i),
    };
    ((unsigned *)(void *)(sq + p.sq_off.array))[at] = at;
    atomic_fetch_add(tail, 1);
    check(syscall(SYS_io_uring_enter, ring_fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0), "enter");
    _Atomic unsigned *head = (void *)(cq + p.cq_off.head);
    struct io_uring_cqe *done = (void *)(cq + p.cq_off.cqes);
    done += atomic_load(head) & *(unsigned *)(void *)(cq + p.cq_off.ring_mask);
    errno = -done->res;
    check(done->res, "ring");
    atomic_fetch_add(head, 1);
}

/* --- memory --- */

static char *map_file(int protection)
{
    static char *map;
    if (!map) {
        check(ftruncate(fd, SIZE), "ftruncate");
        map = mmap(NULL, SIZE, protection, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED)
            die("mmap");
    }
    return map;
}

static void by_map(long i)
{
    memcpy(map_file(PROT_READ | PROT_WRITE) + place(i), rec, RECORD);
}

static void by_msync(long i)
{
    char *map = map_file(PROT_READ | PROT_WRITE);
    memcpy(map + place(i), rec, RECORD);
    if (i % 16 == 0)
        check(msync(map, SIZE, MS_SYNC), "msync");
}

static void by_map_once(long i)
{
    /* A mapping that lives for one store. */
    if (i == 1)
        check(ftruncate(fd, SIZE), "ftruncate");
    char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        die("mmap");
    memcpy(map + place(i), rec, RECORD);
    munmap(map, SIZE);
}

static void by_mremap(long i)
{
    static char *map;
    static size_t size = 4096;
    if (!map) {
        check(ftruncate(fd, SIZE), "ftruncate");
        map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    size_t other = size == 4096 ? SIZE : 4096;
    map = mremap(map, size, other, MREMAP_MAYMOVE);
    if (map == MAP_FAILED)
        die("mremap");
    size = other;
    memcpy(map + (size_t)place(i) % size, rec, RECORD);
}

static void by_mprotect(long i)
{
    char *map = map_file(PROT_READ);
    check(mprotect(map, SIZE, PROT_READ | PROT_WRITE), "mprotect");
    memcpy(map + place(i), rec, RECORD);
    check(mprotect(map, SIZE, PROT_READ), "mprotect");
}

static void by_read_into_map(long i)
{
    /* The kernel stores, for a call that only reads. */
    char *map = map_file(PROT_READ | PROT_WRITE);
    if (ends[0] < 0)
        check(pipe2(ends, O_CLOEXEC), "pipe");
    check(write(ends[1], rec, RECORD), "write");
    check(read(ends[0], map + place(i), RECORD), "read");
}

static void by_proc_mem(long i)
{
    static int mem = -1;
    char *map = map_file(PROT_READ | PROT_WRITE);
    if (mem < 0)
        mem = open_file("/proc/self/mem", O_RDWR);
    check(pwrite(mem, rec, RECORD, (off_t)(uintptr_t)map + place(i)), "/proc/self/mem");
}

/* A child that has the file mapped where we know, and does nothing. */
static pid_t child_with_map(void)
{
    static pid_t child;
    if (child)
        return child;
    map_file(PROT_READ | PROT_WRITE);
    int is_traced = !strcmp(name, "ptrace_poke");
    check(child = fork(), "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (is_traced) {
            ptrace(PTRACE_TRACEME, 0, 0, 0);
            raise(SIGSTOP);
        }
        for (;;)
            pause();
    }
    munmap(map_file(0), SIZE);
    close(fd);
    fd = -1;
    if (is_traced)
        check(waitpid(child, NULL, 0), "waitpid");
    return child;
}

static void by_process_vm_writev(long i)
{
    pid_t child = child_with_map();
    struct iovec from = {rec, RECORD}, to = {map_file(0) + place(i), RECORD};
    check(process_vm_writev(child, &from, 1, &to, 1, 0), "process_vm_writev");
}

static void by_ptrace_poke(long i)
{
    pid_t child = child_with_map();
    long word;
    memcpy(&word, rec + RECORD - 1 - sizeof word, sizeof word);
    check(ptrace(PTRACE_POKEDATA, child, map_file(0) + place(i), word), "PTRACE_POKEDATA");
}

/* --- system calls of other origin --- */

static void by_syscall(long i)
{
    check(syscall(SYS_pwrite64, fd, rec, RECORD, place(i)), "syscall");
}

static void by_asm(long i)
{
    long ret;
    register long r10 __asm__("r10") = place(i);
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(SYS_pwrite64), "D"((long)fd), "S"(rec), "d"((long)RECORD), "r"(r10)
                     : "rcx", "r11", "memory");
    check(ret, "asm");
}

typedef ssize_t pwrite_like(int, const void *, size_t, off_t);

static pwrite_like *found(void *library, const char *symbol)
{
    pwrite_like *function;
    void *address = library ? dlsym(library, symbol) : NULL;
    if (!address) {
        fprintf(stderr, "%s\n", dlerror());
        _exit(3);
    }
    memcpy(&function, &address, sizeof address);
    return function;
}

static void by_dlsym(long i)
{
    static pwrite_like *function;
    if (!function)
        function = found(dlopen("libc.so.6", RTLD_NOW), "pwrite");
    check(function(fd, rec, RECORD, place(i)), "pwrite");
}

static void by_dlmopen(long i)
{
    static pwrite_like *function;
    if (!function)
        function = found(dlmopen(LM_ID_NEWLM, "libc.so.6", RTLD_NOW), "pwrite");
    check(function(fd, rec, RECORD, place(i)), "pwrite");
}

static void by_plugin(long i)
{
    static pwrite_like *function;
    if (!function)
        function = found(dlopen(getenv("PATHS_PLUGIN"), RTLD_NOW), "plugin_pwrite");
    check(function(fd, rec, RECORD, place(i)), "plugin");
}

/* --- processes --- */

static void reap(pid_t child)
{
    int status;
    check(child, "child");
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            die("waitpid");
    if (status != 0) {
        fprintf(stderr, "child: status %x\n", (unsigned)status);
        _exit(3);
    }
}

static void by_fork(long i)
{
    pid_t child = fork();
    if (child == 0) {
        by_pwrite(i);
        _exit(0);
    }
    reap(child);
}

static void by_vfork(long i)
{
    off_t at = place(i);
    pid_t child = vfork();
    if (child == 0)
        _exit(pwrite(fd, rec, RECORD, at) != RECORD);
    reap(child);
}

static void by_clone_raw(long i)
{
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        by_pwrite(i);
        _exit(0);
    }
    reap(child);
}

static void by_clone3(long i)
{
    struct clone_args args = {.exit_signal = SIGCHLD};
    pid_t child = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (child == 0) {
        by_pwrite(i);
        _exit(0);
    }
    reap(child);
}

static long clone_record;
static _Atomic int clone_tid;

static int clone_body(void *unused)
{
    (void)unused;
    by_pwrite(clone_record);
    syscall(SYS_exit, 0);
    return 0;
}

static void by_clone_no_tls(long i)
{
    static char stack[65536] __attribute__((aligned(16)));
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID;
    clone_record = i;
    atomic_store(&clone_tid, -1);
    check(clone(clone_body, stack + sizeof stack, flags, NULL, NULL, NULL, &clone_tid), "clone");
    /* The thread has our thread pointer: keep out of libc. */
    while (atomic_load(&clone_tid) != 0) {
        long number = SYS_sched_yield;
        __asm__ volatile("syscall" : "+a"(number) : : "rcx", "r11", "memory");
    }
}

static char *const *once(const char *way, long i)
{
    static char number[32];
    static char *arguments[6];
    snprintf(number, sizeof number, "%ld", i);
    arguments[0] = (char *)self;
    arguments[1] = "--once";
    arguments[2] = (char *)way;
    arguments[3] = (char *)file;
    arguments[4] = number;
    return arguments;
}

static void by_posix_spawn(long i)
{
    pid_t child;
    errno = posix_spawn(&child, self, NULL, NULL, once("pwrite", i), environment);
    check(-errno, "posix_spawn");
    reap(child);
}

static void by_process(long i)
{
    /* What is to be seen happens at the start or end of a process. */
    pid_t child;
    errno = posix_spawn(&child, self, NULL, NULL, once(name, i), environment);
    check(-errno, "posix_spawn");
    reap(child);
}

static void by_system(long i)
{
    char command[8192];
    snprintf(command, sizeof command, "echo '%s %ld' > '%s'", name, i, file);
    check(-system(command), "system");
}

static void by_popen(long i)
{
    char command[8192];
    snprintf(command, sizeof command, "cat > '%s'", file);
    FILE *stream = popen(command, "we");
    if (!stream)
        die("popen");
    fprintf(stream, "%s %ld\n", name, i);
    check(-pclose(stream), "pclose");
}

static void *thread_body(void *i)
{
    by_pwrite(*(long *)i);
    return NULL;
}

static void by_small_stack(long i)
{
    pthread_attr_t small;
    pthread_t thread;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 16384);
    errno = pthread_create(&thread, &small, thread_body, &i);
    check(-errno, "pthread_create");
    pthread_join(thread, NULL);
}

static void by_thread(long i)
{
    pthread_t thread;
    errno = pthread_create(&thread, NULL, thread_body, &i);
    check(-errno, "pthread_create");
    pthread_join(thread, NULL);
}

static volatile long handler_record;

static void handler(int signal)
{
    (void)signal;
    by_pwrite(handler_record);
}

static void by_handler(long i)
{
    if (i == 1) {
        struct sigaction action = {.sa_handler = handler};
        sigaction(SIGUSR1, &action, NULL);
    }
    handler_record = i;
    raise(SIGUSR1);
}

static void by_altstack(long i)
{
    if (i == 1) {
        stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
        check(sigaltstack(&stack, NULL), "sigaltstack");
        struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
        sigaction(SIGUSR1, &action, NULL);
    }
    handler_record = i;
    raise(SIGUSR1);
}

static void by_seccomp(long i)
{
    static const int allowed[] = {
        SYS_write, SYS_pwrite64, SYS_exit_group, SYS_clock_nanosleep, SYS_rt_sigreturn,
        SYS_close, SYS_getppid,  SYS_fstat,      SYS_newfstatat,
    };
    enum { COUNT = sizeof allowed / sizeof *allowed };
    if (i == 50) {
        struct sock_filter code[2 * COUNT + 2];
        int n = 0;
        code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                                 offsetof(struct seccomp_data, nr));
        for (int k = 0; k < COUNT; k++) {
            code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                                                     (unsigned)allowed[k], 0, 1);
            code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        }
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
        struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
        check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
        check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp");
    }
    by_pwrite(i);
}

/* The descriptor goes to a process without our environment. */
static void by_passed_fd(long i)
{
    static int pair[2];
    static pid_t child;
    if (!child) {
        check(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), "socketpair");
        check(child = fork(), "fork");
        if (child == 0) {
            char *arguments[] = {(char *)self, "--once", "outsider", "-", "0", NULL};
            char *nothing[] = {NULL};
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            dup2(pair[1], 0);
            close(fd);
            execve(self, arguments, nothing);
            _exit(3);
        }
        close(pair[1]);
        fcntl(pair[0], F_SETFD, FD_CLOEXEC);
        char control[CMSG_SPACE(sizeof fd)] = {0};
        struct iovec one = {"x", 1};
        struct msghdr message = {.msg_iov = &one,
                                 .msg_iovlen = 1,
                                 .msg_control = control,
                                 .msg_controllen = sizeof control};
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(head), &fd, sizeof fd);
        check(sendmsg(pair[0], &message, 0), "sendmsg");
        close(fd);
        fd = -1;
    }
    char reply;
    snprintf(rec, sizeof rec, "%-20.20s %042ld\n", name, i);
    check(send(pair[0], rec, RECORD, 0), "send");
    check(recv(pair[0], &reply, 1, 0) - 1, "recv");
}

static int outsider(void)
{
    int passed;
    char control[CMSG_SPACE(sizeof passed)], byte;
    struct iovec one = {&byte, 1};
    struct msghdr message = {.msg_iov = &one,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    check(recvmsg(0, &message, 0), "recvmsg");
    memcpy(&passed, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof passed);
    for (long i = 1; recv(0, rec, RECORD, 0) == RECORD; i++) {
        check(pwrite(passed, rec, RECORD, place(i)), "pwrite");
        check(send(0, "x", 1, 0), "send");
    }
    return 0;
}

/* --- starts and ends of processes --- */

static long once_record;
static FILE *once_stream;

static int is_once(int argc, char **argv, const char *way)
{
    return argc == 5 && !strcmp(argv[1], "--once") && !strcmp(argv[2], way);
}

static void early(int argc, char **argv, const char *way)
{
    if (!is_once(argc, argv, way))
        return;
    name = argv[2];
    long i = atol(argv[4]);
    fill(i);
    int opened = open(argv[3], O_WRONLY | O_CLOEXEC);
    if (opened < 0 || pwrite(opened, rec, RECORD, place(i)) != RECORD)
        _exit(4);
    close(opened);
}

static void preinit(int argc, char **argv, char **envp)
{
    (void)envp;
    early(argc, argv, "preinit");
}

__attribute__((section(".preinit_array"), used)) static void (*preinit_entry)(int, char **,
                                                                             char **) = preinit;

__attribute__((constructor)) static void constructor(int argc, char **argv, char **envp)
{
    (void)envp;
    early(argc, argv, "constructor");
}

__attribute__((destructor)) static void destructor(void)
{
    if (name && once_record && !strcmp(name, "destructor"))
        by_pwrite(once_record);
}

static void at_exit(void)
{
    put(once_stream);
    fflush(once_stream);
}

static void *last_thread(void *unused)
{
    (void)unused;
    struct timespec moment = {0, 100000};
    nanosleep(&moment, NULL);
    put(once_stream);
    return NULL;
}

static int run_once(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    name = argv[2];
    file = argv[3];
    once_record = number(argv[4]);
    if (!strcmp(name, "outsider"))
        return outsider();
    if (!strcmp(name, "preinit") || !strcmp(name, "constructor"))
        return 0;
    fill(once_record);
    fd = open_file(file, O_RDWR);
    if (!strcmp(name, "pwrite")) {
        by_pwrite(once_record);
        return 0;
    }
    if (!strcmp(name, "destructor"))
        return 0;
    if (!(once_stream = fopen(file, "r+")))
        die(file);
    fseek(once_stream, place(once_record), SEEK_SET);
    if (!strcmp(name, "exit_atexit")) {
        atexit(at_exit);
        return 0;
    }
    if (!strcmp(name, "exit_pthread")) {
        pthread_t thread;
        errno = pthread_create(&thread, NULL, last_thread, NULL);
        check(-errno, "pthread_create");
        pthread_exit(NULL);
    }
    put(once_stream);
    if (!strcmp(name, "exit_exit"))
        exit(0);
    return 0; /* exit_main: written out after main */
}

static const struct way ways[] = {
    {"write", by_write, 0},
    {"pwrite", by_pwrite, 0},
    {"writev", by_writev, 0},
    {"pwritev", by_pwritev, 0},
    {"pwritev2", by_pwritev2, 0},
    {"sendfile", by_sendfile, 0},
    {"copy_file_range", by_copy_file_range, 0},
    {"splice", by_splice, 0},
    {"vmsplice_tee", by_vmsplice_tee, 0},
    {"ftruncate", by_ftruncate, 0},
    {"truncate", by_truncate, 0},
    {"fallocate", by_fallocate, 0},
    {"posix_fallocate", by_posix_fallocate, 0},
    {"punch_hole", by_punch_hole, 0},
    {"zero_range", by_zero_range, 0},
    {"insert_collapse", by_insert_collapse, 0},
    {"ficlone", by_ficlone, 0},
    {"ficlonerange", by_ficlonerange, 0},
    {"o_trunc", by_o_trunc, 0},
    {"creat", by_creat, 0},
    {"rename", by_rename, 0},
    {"rename_exchange", by_exchange, 0},
    {"link", by_link, 0},
    {"mkdir", by_mkdir, 0},
    {"symlink", by_symlink, 0},
    {"mkfifo", by_mkfifo, 0},
    {"chmod", by_chmod, 0},
    {"chown", by_chown, 0},
    {"utimens", by_utimens, 0},
    {"setxattr", by_setxattr, 0},
    {"fwrite", by_fwrite, stdout_to_file},
    {"fprintf", by_fprintf, stdout_to_file},
    {"fputs", by_fputs, stdout_to_file},
    {"puts", by_puts, stdout_to_file},
    {"putc", by_putc, stdout_to_file},
    {"wide_stdio", by_wide, 0},
    {"full_buffer", by_full_buffer, 0},
    {"fflush", by_fflush, 0},
    {"fseek_flush", by_fseek, 0},
    {"fgetc_flush", by_fgetc, 0},
    {"input_flush", by_input, stdout_to_file},
    {"fclose", by_fclose, 0},
    {"dprintf", by_dprintf, 0},
    {"perror", by_perror, stderr_to_file},
    {"warn", by_warn, stderr_to_file},
    {"psignal", by_psignal, stderr_to_file},
    {"fopencookie", by_fopencookie, 0},
    {"open_memstream", by_memstream, 0},
    {"mkstemp", by_mkstemp, 0},
    {"tmpfile", by_tmpfile, 0},
    {"aio_write", by_aio_write, 0},
    {"lio_listio", by_lio_listio, 0},
#ifdef WITH_AIO
    {"libaio", by_libaio, 0},
#endif
#ifdef WITH_URING
    {"uring_write", by_uring_write, 0},
    {"uring_writev", by_uring_writev, 0},
    {"uring_fixed", by_uring_fixed, 0},
    {"uring_sqpoll", by_uring_sqpoll, 0},
    {"uring_rename", by_uring_rename, 0},
#endif
    {"uring_raw", by_uring_raw, 0},
    {"map_store", by_map, 0},
    {"map_msync", by_msync, 0},
    {"map_once", by_map_once, 0},
    {"map_mremap", by_mremap, 0},
    {"map_mprotect", by_mprotect, 0},
    {"map_read", by_read_into_map, 0},
    {"proc_self_mem", by_proc_mem, 0},
    {"process_vm_writev", by_process_vm_writev, 0},
    {"ptrace_poke", by_ptrace_poke, 0},
    {"syscall", by_syscall, 0},
    {"asm", by_asm, 0},
    {"dlsym_libc", by_dlsym, 0},
    {"dlopen_plugin", by_plugin, 0},
    {"dlmopen", by_dlmopen, 0},
    {"fork", by_fork, 0},
    {"vfork", by_vfork, 0},
    {"clone_raw", by_clone_raw, 0},
    {"clone3", by_clone3, 0},
    {"clone_no_settls", by_clone_no_tls, 0},
    {"posix_spawn", by_posix_spawn, 0},
    {"system", by_system, 0},
    {"popen", by_popen, 0},
    {"thread", by_thread, 0},
    {"small_stack", by_small_stack, 0},
    {"signal_handler", by_handler, 0},
    {"sigaltstack", by_altstack, 0},
    {"seccomp", by_seccomp, 0},
    {"passed_fd", by_passed_fd, 0},
    {"exit_main", by_process, 0},
    {"exit_exit", by_process, 0},
    {"exit_atexit", by_process, 0},
    {"exit_pthread", by_process, 0},
    {"preinit", by_process, 0},
    {"constructor", by_process, 0},
    {"destructor", by_process, 0},
    {"scrubbed_env", by_pwrite, 0},
};

int main(int argc, char **argv, char **envp)
{
    self = "/proc/self/exe";
    environment = envp;
    static char path[4096];
    if (readlink(self, path, sizeof path - 1) > 0)
        self = path;
    if (argc > 1 && !strcmp(argv[1], "--once"))
        return run_once(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "scrubbed_env") && *envp) {
        char *nothing[] = {NULL};
        execve(self, argv, nothing);
        die("execve");
    }
    return run_way(argc, argv, ways, sizeof ways / sizeof *ways);
}
