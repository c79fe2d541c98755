//! System calls without libc: they leave `errno` alone and cannot be interposed.

use core::ffi::c_char;

pub(crate) use snapshim_gate::nr;

pub(crate) const O_RDONLY: i32 = 0;
pub(crate) const O_CLOEXEC: i32 = 0o2000000;
pub(crate) const O_NONBLOCK: i32 = 0o4000;
#[cfg(target_arch = "x86_64")]
pub(crate) const O_NOFOLLOW: i32 = 0o400000;
#[cfg(target_arch = "aarch64")]
pub(crate) const O_NOFOLLOW: i32 = 0o100000;
pub(crate) const AT_FDCWD: i32 = -100;
pub(crate) const AT_REMOVEDIR: i32 = 0x200;
pub(crate) const AT_SYMLINK_NOFOLLOW: i32 = 0x100;
pub(crate) const ESRCH: isize = 3;
pub(crate) const ENOSYS: isize = 38;

/// Makes a system call with up to six arguments of any integer or pointer kind.
macro_rules! raw {
    ($nr:expr $(, $a:expr)* $(,)?) => {{
        let given = [$($a as usize),*];
        let mut args = [0usize; 6];
        let mut i = 0;
        while i < given.len() && i < args.len() {
            args[i] = given[i];
            i += 1;
        }
        snapshim_gate::sys::syscall6($nr, args)
    }};
}
pub(crate) use raw;

/// The head of the kernel's `struct stat`.
#[cfg(target_arch = "x86_64")]
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Stat {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    links: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    _gid: u32,
    _pad: u32,
    _rdev: u64,
    pub(crate) size: i64,
    _blocks: [u64; 2],
    _times: [u64; 4],
    ctime: [u64; 2],
    _rest: [u64; 3],
}

/// The head of the kernel's `struct stat`.
#[cfg(target_arch = "aarch64")]
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Stat {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) mode: u32,
    links: u32,
    pub(crate) uid: u32,
    _gid: u32,
    _rdev: u64,
    _pad: u64,
    pub(crate) size: i64,
    _blocks: [u64; 2],
    _times: [u64; 4],
    ctime: [u64; 2],
    _rest: [u64; 1],
}

const S_IFMT: u32 = 0o170000;

impl Stat {
    const EMPTY: Stat = {
        // SAFETY: made of integers, for which all-zero is a value.
        unsafe { core::mem::zeroed() }
    };

    /// Number of names; of a directory, two more than directories in it.
    pub(crate) fn links(&self) -> u64 {
        #[allow(clippy::useless_conversion)] // 32 bits on some architectures
        self.links.into()
    }

    /// Time of the last change of anything, ns since 1970.
    pub(crate) fn ctime_ns(&self) -> u64 {
        let [sec, nsec] = self.ctime;
        sec.wrapping_mul(1_000_000_000).wrapping_add(nsec)
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.mode & S_IFMT == 0o100000
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.mode & S_IFMT == 0o040000
    }
}

/// fstat(2); `None` on any error.
pub(crate) fn fstat(fd: i32) -> Option<Stat> {
    let mut stat = Stat::EMPTY;
    // SAFETY: `stat` is as large as the kernel's structure.
    let result = unsafe { raw!(nr::FSTAT, fd, &raw mut stat) };
    (result == 0).then_some(stat)
}

/// What an open file is: device, inode number and kind, the rest is zero. Unlike with fstat, the
/// kernel hands out no ctime: having done that, it (Linux 6.13 and later) gives the next write one of
/// its own, which costs that more than all of this.
pub(crate) fn identity(fd: i32) -> Option<Stat> {
    const AT_EMPTY_PATH: usize = 0x1000;
    const AT_STATX_DONT_SYNC: usize = 0x4000;
    const STATX_TYPE: u32 = 1;
    const STATX_INO: u32 = 0x100;

    /// The head of the kernel's `struct statx`.
    #[repr(C)]
    struct Statx {
        mask: u32,
        _to_mode: [u32; 6],
        mode: u16,
        _pad: u16,
        ino: u64,
        _to_dev: [u64; 12],
        dev_major: u32,
        dev_minor: u32,
        _rest: [u64; 14],
    }
    const _: () = assert!(size_of::<Statx>() == 256);
    const _: () = assert!(core::mem::offset_of!(Statx, dev_major) == 136);

    // SAFETY: made of integers, for which all-zero is a value.
    let mut found: Statx = unsafe { core::mem::zeroed() };
    let flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
    let wanted = STATX_TYPE | STATX_INO;
    // SAFETY: `found` is as large as the kernel's structure; the path is empty.
    let result = unsafe { raw!(nr::STATX, fd, c"".as_ptr(), flags, wanted, &raw mut found) };
    if result != 0 || found.mask & wanted != wanted {
        // A kernel, or a filter of system calls, that does not know it.
        return fstat(fd);
    }
    let (major, minor) = (u64::from(found.dev_major), u64::from(found.dev_minor));
    Some(Stat {
        // As in `struct stat`.
        dev: minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12,
        ino: found.ino,
        mode: u32::from(found.mode),
        ..Stat::EMPTY
    })
}

/// fstatat(2); minus the error number on failure.
///
/// # Safety
/// `path` is whatever the program passed: the kernel checks it.
pub(crate) unsafe fn fstatat(dirfd: i32, path: *const c_char, flags: i32) -> Result<Stat, isize> {
    let mut stat = Stat::EMPTY;
    // SAFETY: `stat` is as large as the kernel's structure; the kernel checks `path`.
    let result = unsafe { raw!(nr::NEWFSTATAT, dirfd, path, &raw mut stat, flags) };
    if result == 0 { Ok(stat) } else { Err(result) }
}

/// Opens `path` (NUL-terminated) close-on-exec.
pub(crate) fn open(path: &[u8], flags: i32) -> Option<i32> {
    debug_assert_eq!(path.last(), Some(&0));
    // SAFETY: the path ends with a NUL.
    let fd = unsafe { raw!(nr::OPENAT, AT_FDCWD, path.as_ptr(), flags, 0) };
    (fd >= 0).then_some(fd as i32)
}

pub(crate) fn close(fd: i32) {
    // SAFETY: called only with descriptors that this module just opened.
    unsafe { raw!(nr::CLOSE, fd) };
}

pub(crate) fn read(fd: i32, buffer: &mut [u8]) -> usize {
    // SAFETY: the buffer is writable for its length.
    let n = unsafe { raw!(nr::READ, fd, buffer.as_mut_ptr(), buffer.len()) };
    n.max(0) as usize
}

/// Reads from `offset` until the buffer is full or the file ends.
pub(crate) fn read_at(fd: i32, buffer: &mut [u8], offset: u64) -> usize {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.wrapping_add(done as u64);
        // SAFETY: the buffer is writable for its length.
        let n = unsafe { raw!(nr::PREAD64, fd, rest.as_mut_ptr(), rest.len(), at) };
        if n <= 0 {
            break;
        }
        done += n as usize;
    }
    done
}

/// Whether this process may make a file of `len` bytes: one that is too long is
/// answered with SIGXFSZ, which ends a program.
pub(crate) fn may_make_file(len: usize) -> bool {
    const RLIMIT_FSIZE: usize = 1;
    let mut limit = [0u64; 2];
    // SAFETY: only asks; `limit` is a writable struct rlimit64.
    let result = unsafe { raw!(nr::PRLIMIT64, 0, RLIMIT_FSIZE, 0, limit.as_mut_ptr()) };
    result == 0 && limit[0] >= len as u64
}

/// A file in memory, closed on exec, that may be mapped executable.
pub(crate) fn memory_file(name: &core::ffi::CStr) -> Option<i32> {
    const MFD_CLOEXEC: usize = 1;
    const MFD_EXEC: usize = 0x10; // Linux 6.3; refused before
    [MFD_CLOEXEC | MFD_EXEC, MFD_CLOEXEC]
        .into_iter()
        // SAFETY: a NUL-terminated name.
        .map(|flags| unsafe { raw!(nr::MEMFD_CREATE, name.as_ptr(), flags) })
        .find_map(|fd| (fd >= 0).then_some(fd as i32))
}

/// Writes all of `bytes` at `offset`; for files of ours only.
pub(crate) fn write_all_at(fd: i32, bytes: &[u8], offset: usize) -> bool {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: the bytes are readable.
        let n = unsafe { raw!(nr::PWRITE64, fd, rest.as_ptr(), rest.len(), offset + done) };
        if n <= 0 {
            return false;
        }
        done += n as usize;
    }
    true
}

/// `f_type` of fstatfs(2); 0 on any error.
pub(crate) fn filesystem_type(fd: i32) -> i64 {
    let mut statfs = [0i64; 16];
    // SAFETY: struct statfs is 120 bytes on 64-bit architectures.
    let result = unsafe { raw!(nr::FSTATFS, fd, statfs.as_mut_ptr()) };
    if result == 0 { statfs[0] } else { 0 }
}

/// mmap(2) of `len` bytes, readable and writable; `None` on any error.
pub(crate) fn map(fd: i32, len: usize, flags: i32) -> Option<*mut u8> {
    const PROT_READ_WRITE: i32 = 3;
    // SAFETY: no address is asked for, so nothing mapped is replaced.
    let at = unsafe { raw!(nr::MMAP, 0, len, PROT_READ_WRITE, flags, fd, 0) };
    (!(-4095..=0).contains(&at)).then_some(at as *mut u8)
}

/// mmap(2) of `len` bytes of a file, private and read only; `None` on any error.
pub(crate) fn map_to_read(fd: i32, len: usize) -> Option<*const u8> {
    const PROT_READ: i32 = 1;
    const MAP_PRIVATE: i32 = 2;
    // SAFETY: no address is asked for, so nothing mapped is replaced.
    let at = unsafe { raw!(nr::MMAP, 0, len, PROT_READ, MAP_PRIVATE, fd, 0) };
    (!(-4095..=0).contains(&at)).then_some(at as *const u8)
}

pub(crate) fn unmap(at: *mut u8, len: usize) {
    // SAFETY: called only with what `map` just returned, before anybody knows it.
    unsafe { raw!(nr::MUNMAP, at, len) };
}

/// madvise(2); whether it worked.
pub(crate) fn advise(at: *const u8, len: usize, advice: i32) -> bool {
    // SAFETY: called only with a page of our own.
    unsafe { raw!(nr::MADVISE, at, len, advice) == 0 }
}

pub(crate) fn getpid() -> u32 {
    // SAFETY: no arguments.
    unsafe { raw!(nr::GETPID, 0) as u32 }
}

pub(crate) fn gettid() -> u32 {
    // SAFETY: no arguments.
    unsafe { raw!(nr::GETTID, 0) as u32 }
}

pub(crate) fn geteuid() -> u32 {
    // SAFETY: no arguments.
    unsafe { raw!(nr::GETEUID, 0) as u32 }
}

/// Whether this process runs in its parent's memory (kcmp(2), KCMP_VM). `false` if
/// the kernel will not say.
pub(crate) fn shares_memory_with_parent() -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: both calls only ask.
    unsafe {
        let parent = raw!(nr::GETPPID, 0);
        raw!(nr::KCMP, getpid(), parent, KCMP_VM, 0, 0) == 0
    }
}

/// Whether there is no thread `tid` in process `pid`.
pub(crate) fn is_dead(pid: u32, tid: u32) -> bool {
    // SAFETY: signal 0 sends nothing.
    unsafe { raw!(nr::TGKILL, pid, tid, 0) == -ESRCH }
}

/// Whether this thread now runs on its alternate signal stack.
pub(crate) fn on_alternate_stack() -> bool {
    const SS_ONSTACK: i32 = 1;
    #[repr(C)]
    struct Stack {
        sp: usize,
        flags: i32,
        size: usize,
    }
    let mut old = Stack {
        sp: 0,
        flags: 0,
        size: 0,
    };
    // SAFETY: asks only; `old` is a writable stack_t.
    let result = unsafe { raw!(nr::SIGALTSTACK, 0, &raw mut old) };
    result != 0 || old.flags & SS_ONSTACK != 0
}

/// The status flags of an open file (F_GETFL).
fn status_flags(fd: i32) -> Option<i32> {
    const F_GETFL: usize = 3;
    // SAFETY: asks, and changes nothing.
    let flags = unsafe { raw!(nr::FCNTL, fd, F_GETFL) };
    (flags >= 0).then_some(flags as i32)
}

/// Where the next read or write of an open file begins.
pub(crate) fn position(fd: i32) -> Option<u64> {
    const SEEK_CUR: usize = 1;
    // SAFETY: asks, and moves nothing.
    let at = unsafe { raw!(nr::LSEEK, fd, 0, SEEK_CUR) };
    u64::try_from(at).ok()
}

/// Whether everything written to it goes to its end.
pub(crate) fn appends(fd: i32) -> Option<bool> {
    const O_APPEND: i32 = 0o2000;
    status_flags(fd).map(|flags| flags & O_APPEND != 0)
}

/// Reads two bytes of this process's memory, which may not be there.
pub(crate) fn peek_u16(at: usize) -> Option<u16> {
    peek(at)
}

/// What [`peek`] can read: made of integers, so that any bytes are a value.
///
/// # Safety
/// They are.
pub(crate) unsafe trait Plain: Copy + Default {}
// SAFETY: an integer.
unsafe impl Plain for u16 {}
// SAFETY: an integer.
unsafe impl Plain for i64 {}
// SAFETY: an array of integers.
unsafe impl Plain for [usize; 2] {}
// SAFETY: an array of integers.
unsafe impl Plain for [u64; 3] {}

/// Reads this process's memory, which may not be there.
pub(crate) fn peek<T: Plain>(at: usize) -> Option<T> {
    let mut value = T::default();
    let here = [&raw mut value as usize, size_of::<T>()];
    let there = [at, size_of::<T>()];
    let pid = crate::attach::page()
        .pid
        .load(core::sync::atomic::Ordering::Relaxed);
    // SAFETY: the kernel checks the address it reads, and writes a whole value or part of
    // one here: any bytes are one.
    let read = unsafe {
        raw!(
            nr::PROCESS_VM_READV,
            pid,
            here.as_ptr(),
            1,
            there.as_ptr(),
            1,
            0
        )
    };
    (read == size_of::<T>() as isize).then_some(value)
}

/// Whether what is written to it is durable when the call returns (O_DSYNC, O_SYNC).
pub(crate) fn is_durable(fd: i32) -> bool {
    const O_DSYNC: i32 = 0o10000;
    status_flags(fd).is_some_and(|flags| flags & O_DSYNC != 0)
}

/// Whether it is open for writing.
pub(crate) fn is_writable(fd: i32) -> bool {
    const O_ACCMODE: i32 = 3;
    status_flags(fd).is_some_and(|flags| flags & O_ACCMODE != O_RDONLY)
}
