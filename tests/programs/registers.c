// Makes system calls by instructions of its own and looks at what they leave of
// every register, of the red zone and of the flags' direction: nothing but rax, rcx
// and r11 may change. Several shapes of code around the instruction. Writes to the
// file it is given; prints what was damaged.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct state {
    uint64_t general[16]; // rbx rbp r12 r13 r14 r15 rdi rsi rdx r10 r8 r9, red zone, flags
    unsigned char wide[16][32];
};

static struct state before, after;
// Named by the assembly.
__attribute__((used)) static int has_avx, now_fd;
__attribute__((used)) static long (*now_shape)(void);
__attribute__((used)) static char text[] = "text";

// One function a shape. The callee of `shape` gets: number and arguments in place.
#define SHAPE(name, code)                                                       \
    __attribute__((naked, noinline)) static long name(void) {                   \
        __asm__ volatile(code "\n ret\n");                                      \
    }
SHAPE(easy, "mov $18, %eax\n syscall")
SHAPE(between, "mov $18, %eax\n mov $200, %r10d\n syscall")
SHAPE(dynamic, "mov %rbx, %rax\n syscall\n cmp $-4096, %rax")
SHAPE(red_zone, "movq $77, -16(%rsp)\n mov $18, %eax\n syscall\n cmpq $77, -16(%rsp)\n je 1f\n mov $-1000, %rax\n1:")
SHAPE(after_only, "jmp 1f\n nop\n1: syscall\n test %rax, %rax\n nopl 0(%rax)")

static long run(long (*shape)(void), int fd) {
    static unsigned char data[16][32];
    now_shape = shape;
    now_fd = fd;
    for (int i = 0; i < 16; i++)
        memset(data[i], 0x11 * i + 3, 32);
    memcpy(before.wide, data, sizeof data);
    long result;
    uint64_t saved[8];
    __asm__ volatile(
        // Everything the compiler keeps is put back at the end.
        "mov %%rbx, 0(%[saved])\n mov %%rbp, 8(%[saved])\n mov %%r12, 16(%[saved])\n"
        "mov %%r13, 24(%[saved])\n mov %%r14, 32(%[saved])\n mov %%r15, 40(%[saved])\n"
        "mov %[saved], %%r15\n"
        "sub $256, %%rsp\n"
        "push %[after]\n push %[saved]\n"
        "cmpl $0, has_avx(%%rip)\n je 1f\n"
        ".set i, 0\n .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "vmovdqu i(%[data]), %%ymm\\n\n .set i, i + 32\n .endr\n jmp 2f\n"
        "1:\n .set i, 0\n .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "movdqu i(%[data]), %%xmm\\n\n .set i, i + 32\n .endr\n"
        "2:\n"
        "mov now_shape(%%rip), %%r11\n mov now_fd(%%rip), %%edi\n lea text(%%rip), %%rsi\n mov $4, %%edx\n mov $200, %%r10d\n"
        "mov $0x808, %%r8d\n mov $0x909, %%r9d\n mov $18, %%ebx\n mov $18, %%eax\n"
        "mov $0xb0b, %%ebp\n mov $0xc0c, %%r12d\n mov $0xd0d, %%r13d\n mov $0xe0e, %%r14d\n"
        "call *%%r11\n"
        "mov 8(%%rsp), %%rcx\n"
        "mov %%rbx, 0(%%rcx)\n mov %%rbp, 8(%%rcx)\n mov %%r12, 16(%%rcx)\n mov %%r13, 24(%%rcx)\n"
        "mov %%r14, 32(%%rcx)\n mov %%rdi, 40(%%rcx)\n mov %%rsi, 48(%%rcx)\n mov %%rdx, 56(%%rcx)\n"
        "mov %%r10, 64(%%rcx)\n mov %%r8, 72(%%rcx)\n mov %%r9, 80(%%rcx)\n"
        "pushfq\n pop %%r11\n and $0x400, %%r11\n mov %%r11, 88(%%rcx)\n"
        "pop %%r11\n pop %%rcx\n add $256, %%rsp\n"
        "mov 0(%%r11), %%rbx\n mov 8(%%r11), %%rbp\n mov 16(%%r11), %%r12\n mov 24(%%r11), %%r13\n"
        "mov 32(%%r11), %%r14\n mov 40(%%r11), %%r15\n"
        : "=a"(result)
        : [saved] "r"(saved), [data] "r"(data), [after] "r"(&after)
        : "memory", "cc", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11");
    if (has_avx)
        __asm__ volatile(".set i, 0\n .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
                         "vmovdqu %%ymm\\n, i(%0)\n .set i, i + 32\n .endr\n vzeroupper" ::"r"(after.wide)
                         : "memory");
    else
        __asm__ volatile(".set i, 0\n .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
                         "movdqu %%xmm\\n, i(%0)\n .set i, i + 32\n .endr" ::"r"(after.wide)
                         : "memory");
    const uint64_t expected[] = {18, 0xb0b, 0xc0c, 0xd0d, 0xe0e, (uint64_t)fd, (uint64_t)text,
                                 4,  200,   0x808, 0x909, 0};
    long damaged = 0;
    for (int i = 0; i < 12; i++)
        if (after.general[i] != expected[i])
            damaged++, printf("general %d: %#lx instead of %#lx\n", i, after.general[i], expected[i]);
    for (int i = 0; i < 16; i++)
        if (memcmp(after.wide[i], before.wide[i], has_avx ? 32 : 16))
            damaged++, printf("vector register %d\n", i);
    if (result != 4)
        damaged++, printf("result %ld\n", result);
    return damaged;
}

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    has_avx = __builtin_cpu_supports("avx");
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0)
        return 1;
    long damaged = 0;
    struct { const char *name; long (*shape)(void); } shapes[] = {
        {"easy", easy}, {"between", between}, {"dynamic", dynamic},
        {"red zone", red_zone}, {"after", after_only}};
    for (int round = 0; round < 3; round++)
        for (unsigned i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            long found = run(shapes[i].shape, fd);
            if (found)
                printf("%s: %ld damaged\n", shapes[i].name, found);
            damaged += found;
        }
    printf("%ld damaged\n", damaged);
    return damaged != 0;
}
