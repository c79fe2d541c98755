//! The table: every interposed function, what it does at the gate, and what is
//! done where the libc behind us does not have it. `syscall()` stands in
//! [`super::raw`], for it must not have a frame.
//!
//! `tests/tests/symbols.rs` compares it with what libc exports.

use core::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};
use core::sync::atomic::Ordering::Relaxed;

use snapshim_gate::slot::Class::{Copy, Meta, Size, Write};
use snapshim_gate::slot::Seen;

use super::raw::{fcntl as fcntls, ioctl as ioctls};
use super::{
    O_CREAT, O_TRUNC, Outcome, by_path, closes, flocks, hooks, into_memory, lockfs, maps, name,
    names, noted, on, on_call, opens, opens_stream, renames, syncs, syncs_all, truncates,
};
use crate::guard::{Frame, leave, submit};
use crate::sys::{AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_NOFOLLOW, ENOSYS, nr, raw};
use crate::{libc, thread};

type Ptr = *mut c_void;
type Str = *const c_char;

const O_WRONLY: c_int = 1;
const S_IFIFO: c_uint = 0o010000;

/// A kernel's result as libc gives it: -1 and `errno` on failure.
fn libc_result(result: isize) -> isize {
    if (-4095..0).contains(&result) {
        let errno = libc::errno();
        if !errno.is_null() {
            // SAFETY: libc's errno of this thread.
            unsafe { *errno = -result as c_int };
        }
        return -1;
    }
    result
}

/// What a function that this libc lacks returns: -1, ENOSYS.
pub(super) fn no_function() -> isize {
    libc_result(-ENOSYS)
}

/// Calls another name of the same function, where libc has only one of them.
macro_rules! or_twin {
    ($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty, $else:expr) => {
        match behind::$name.get(name!($name)) {
            Some(at) => {
                let call: unsafe extern "C" fn($($ty),*) -> $ret = core::mem::transmute(at);
                call($($arg),*)
            }
            None => $else,
        }
    };
}

/// clone: a thread without a thread pointer of its own shares its creator's slot.
#[inline(always)]
fn clones(flags: c_int) -> Frame {
    const CLONE_VM: c_int = 0x100;
    const CLONE_VFORK: c_int = 0x4000;
    const CLONE_SETTLS: c_int = 0x80000;
    if flags & (CLONE_VM | CLONE_VFORK | CLONE_SETTLS) == CLONE_VM {
        thread::SHARING.store(true, Relaxed);
    }
    Frame::NONE
}

/// The gate for a function that is a system call on the open file in argument `$arg`.
macro_rules! call {
    ($class:expr, $arg:literal, $number:expr, $($a:expr),*) => {{
        let given = [$($a as usize),*];
        let mut args = [0; 6];
        args[..given.len()].copy_from_slice(&given);
        on_call($class, $arg, $number, &args)
    }};
}

hooks! {
    // Bytes of an open file.
    write(fd: c_int, buffer: Ptr, len: usize) -> isize: call!(Write, 0, nr::WRITE, fd, buffer, len); else libc_result(raw!(nr::WRITE, fd, buffer, len));
    __write(fd: c_int, buffer: Ptr, len: usize) -> isize: call!(Write, 0, nr::WRITE, fd, buffer, len); else libc_result(raw!(nr::WRITE, fd, buffer, len));
    pwrite(fd: c_int, buffer: Ptr, len: usize, at: i64) -> isize: call!(Write, 0, nr::PWRITE64, fd, buffer, len, at); else libc_result(raw!(nr::PWRITE64, fd, buffer, len, at));
    pwrite64(fd: c_int, buffer: Ptr, len: usize, at: i64) -> isize: call!(Write, 0, nr::PWRITE64, fd, buffer, len, at); else libc_result(raw!(nr::PWRITE64, fd, buffer, len, at));
    __pwrite64(fd: c_int, buffer: Ptr, len: usize, at: i64) -> isize: call!(Write, 0, nr::PWRITE64, fd, buffer, len, at); else libc_result(raw!(nr::PWRITE64, fd, buffer, len, at));
    writev(fd: c_int, parts: Ptr, count: c_int) -> isize: call!(Write, 0, nr::WRITEV, fd, parts, count); else libc_result(raw!(nr::WRITEV, fd, parts, count));
    pwritev(fd: c_int, parts: Ptr, count: c_int, at: i64) -> isize: call!(Write, 0, nr::PWRITEV, fd, parts, count, at, 0); else libc_result(raw!(nr::PWRITEV, fd, parts, count, at, 0));
    pwritev64(fd: c_int, parts: Ptr, count: c_int, at: i64) -> isize: call!(Write, 0, nr::PWRITEV, fd, parts, count, at, 0); else libc_result(raw!(nr::PWRITEV, fd, parts, count, at, 0));
    pwritev2(fd: c_int, parts: Ptr, count: c_int, at: i64, flags: c_int) -> isize: call!(Write, 0, nr::PWRITEV2, fd, parts, count, at, 0, flags); else libc_result(raw!(nr::PWRITEV2, fd, parts, count, at, 0, flags));
    pwritev64v2(fd: c_int, parts: Ptr, count: c_int, at: i64, flags: c_int) -> isize: call!(Write, 0, nr::PWRITEV2, fd, parts, count, at, 0, flags); else libc_result(raw!(nr::PWRITEV2, fd, parts, count, at, 0, flags));
    // Copies inside the kernel. tee and vmsplice fill pipes only, and change no file.
    sendfile(to: c_int, from: c_int, at: Ptr, len: usize) -> isize: call!(Copy, 0, nr::SENDFILE, to, from, at, len); else libc_result(raw!(nr::SENDFILE, to, from, at, len));
    sendfile64(to: c_int, from: c_int, at: Ptr, len: usize) -> isize: call!(Copy, 0, nr::SENDFILE, to, from, at, len); else libc_result(raw!(nr::SENDFILE, to, from, at, len));
    copy_file_range(from: c_int, from_at: Ptr, to: c_int, to_at: Ptr, len: usize, flags: c_uint) -> isize: call!(Copy, 2, nr::COPY_FILE_RANGE, from, from_at, to, to_at, len, flags); else libc_result(raw!(nr::COPY_FILE_RANGE, from, from_at, to, to_at, len, flags));
    splice(from: c_int, from_at: Ptr, to: c_int, to_at: Ptr, len: usize, flags: c_uint) -> isize: call!(Copy, 2, nr::SPLICE, from, from_at, to, to_at, len, flags); else libc_result(raw!(nr::SPLICE, from, from_at, to, to_at, len, flags));
    // Size and allocation.
    ftruncate(fd: c_int, len: i64) -> c_int: call!(Size, 0, nr::FTRUNCATE, fd, len); else libc_result(raw!(nr::FTRUNCATE, fd, len)) as c_int;
    ftruncate64(fd: c_int, len: i64) -> c_int: call!(Size, 0, nr::FTRUNCATE, fd, len); else libc_result(raw!(nr::FTRUNCATE, fd, len)) as c_int;
    truncate(path: Str, len: i64) -> c_int: truncates(path, len); else libc_result(raw!(nr::TRUNCATE, path, len)) as c_int;
    truncate64(path: Str, len: i64) -> c_int: truncates(path, len); else libc_result(raw!(nr::TRUNCATE, path, len)) as c_int;
    fallocate(fd: c_int, mode: c_int, at: i64, len: i64) -> c_int: call!(Size, 0, nr::FALLOCATE, fd, mode, at, len); else libc_result(raw!(nr::FALLOCATE, fd, mode, at, len)) as c_int;
    fallocate64(fd: c_int, mode: c_int, at: i64, len: i64) -> c_int: call!(Size, 0, nr::FALLOCATE, fd, mode, at, len); else libc_result(raw!(nr::FALLOCATE, fd, mode, at, len)) as c_int;
    /// Returns the error number; does not set `errno`.
    posix_fallocate(fd: c_int, at: i64, len: i64) -> c_int: call!(Size, 0, nr::FALLOCATE, fd, 0, at, len); else -raw!(nr::FALLOCATE, fd, 0, at, len) as c_int;
    /// Returns the error number; does not set `errno`.
    posix_fallocate64(fd: c_int, at: i64, len: i64) -> c_int: call!(Size, 0, nr::FALLOCATE, fd, 0, at, len); else -raw!(nr::FALLOCATE, fd, 0, at, len) as c_int;
    // Opening. The variadic mode is read as a third argument: on the supported
    // ABIs a variadic integer is passed like a named one.
    open(path: Str, flags: c_int, mode: c_uint) -> c_int: opens(AT_FDCWD, path, flags); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, flags, mode)) as c_int;
    open64(path: Str, flags: c_int, mode: c_uint) -> c_int: opens(AT_FDCWD, path, flags); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, flags, mode)) as c_int;
    __open(path: Str, flags: c_int, mode: c_uint) -> c_int: opens(AT_FDCWD, path, flags); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, flags, mode)) as c_int;
    __open64(path: Str, flags: c_int, mode: c_uint) -> c_int: opens(AT_FDCWD, path, flags); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, flags, mode)) as c_int;
    __open_2(path: Str, flags: c_int) -> c_int: opens(AT_FDCWD, path, flags); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, flags, 0)) as c_int;
    __open64_2(path: Str, flags: c_int) -> c_int: opens(AT_FDCWD, path, flags); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, flags, 0)) as c_int;
    openat(dirfd: c_int, path: Str, flags: c_int, mode: c_uint) -> c_int: opens(dirfd, path, flags); else libc_result(raw!(nr::OPENAT, dirfd, path, flags, mode)) as c_int;
    open_by_handle_at(mount: c_int, handle: Ptr, flags: c_int) -> c_int: super::opens_handle(flags); else no_function() as c_int;
    process_vm_writev(pid: c_int, from: Ptr, from_len: c_ulong, to: Ptr, to_len: c_ulong, flags: c_ulong) -> isize: into_memory(); else no_function();
    openat64(dirfd: c_int, path: Str, flags: c_int, mode: c_uint) -> c_int: opens(dirfd, path, flags); else libc_result(raw!(nr::OPENAT, dirfd, path, flags, mode)) as c_int;
    __openat_2(dirfd: c_int, path: Str, flags: c_int) -> c_int: opens(dirfd, path, flags); else libc_result(raw!(nr::OPENAT, dirfd, path, flags, 0)) as c_int;
    __openat64_2(dirfd: c_int, path: Str, flags: c_int) -> c_int: opens(dirfd, path, flags); else libc_result(raw!(nr::OPENAT, dirfd, path, flags, 0)) as c_int;
    creat(path: Str, mode: c_uint) -> c_int: opens(AT_FDCWD, path, O_CREAT | O_TRUNC); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, O_CREAT | O_TRUNC | O_WRONLY, mode)) as c_int;
    creat64(path: Str, mode: c_uint) -> c_int: opens(AT_FDCWD, path, O_CREAT | O_TRUNC); else libc_result(raw!(nr::OPENAT, AT_FDCWD, path, O_CREAT | O_TRUNC | O_WRONLY, mode)) as c_int;
    fopen(path: Str, mode: Str) -> Ptr: opens_stream(path, mode); else or_twin!(fopen64(path: Str, mode: Str) -> Ptr, core::ptr::null_mut());
    fopen64(path: Str, mode: Str) -> Ptr: opens_stream(path, mode); else or_twin!(fopen(path: Str, mode: Str) -> Ptr, core::ptr::null_mut());
    freopen(path: Str, mode: Str, stream: Ptr) -> Ptr: opens_stream(path, mode); else or_twin!(freopen64(path: Str, mode: Str, stream: Ptr) -> Ptr, core::ptr::null_mut());
    freopen64(path: Str, mode: Str, stream: Ptr) -> Ptr: opens_stream(path, mode); else or_twin!(freopen(path: Str, mode: Str, stream: Ptr) -> Ptr, core::ptr::null_mut());
    tmpfile() -> Ptr: names(); else or_twin!(tmpfile64() -> Ptr, core::ptr::null_mut());
    tmpfile64() -> Ptr: names(); else or_twin!(tmpfile() -> Ptr, core::ptr::null_mut());
    mkstemp(template: Str) -> c_int: names(); else or_twin!(mkstemp64(template: Str) -> c_int, no_function() as c_int);
    mkstemp64(template: Str) -> c_int: names(); else or_twin!(mkstemp(template: Str) -> c_int, no_function() as c_int);
    mkostemp(template: Str, flags: c_int) -> c_int: names(); else or_twin!(mkostemp64(template: Str, flags: c_int) -> c_int, no_function() as c_int);
    mkostemp64(template: Str, flags: c_int) -> c_int: names(); else or_twin!(mkostemp(template: Str, flags: c_int) -> c_int, no_function() as c_int);
    mkstemps(template: Str, suffix: c_int) -> c_int: names(); else or_twin!(mkstemps64(template: Str, suffix: c_int) -> c_int, no_function() as c_int);
    mkstemps64(template: Str, suffix: c_int) -> c_int: names(); else or_twin!(mkstemps(template: Str, suffix: c_int) -> c_int, no_function() as c_int);
    mkostemps(template: Str, suffix: c_int, flags: c_int) -> c_int: names(); else or_twin!(mkostemps64(template: Str, suffix: c_int, flags: c_int) -> c_int, no_function() as c_int);
    mkostemps64(template: Str, suffix: c_int, flags: c_int) -> c_int: names(); else or_twin!(mkostemps(template: Str, suffix: c_int, flags: c_int) -> c_int, no_function() as c_int);
    shm_open(name: Str, flags: c_int, mode: c_uint) -> c_int: if flags & (O_CREAT | O_TRUNC) == 0 { Frame::NONE } else { names() }; else no_function() as c_int;
    shm_unlink(name: Str) -> c_int: names(); else no_function() as c_int;
    // Directories.
    rename(from: Str, to: Str) -> c_int: renames(); else libc_result(raw!(nr::RENAMEAT2, AT_FDCWD, from, AT_FDCWD, to, 0)) as c_int;
    renameat(from_dir: c_int, from: Str, to_dir: c_int, to: Str) -> c_int: renames(); else libc_result(raw!(nr::RENAMEAT2, from_dir, from, to_dir, to, 0)) as c_int;
    renameat2(from_dir: c_int, from: Str, to_dir: c_int, to: Str, flags: c_uint) -> c_int: renames(); else libc_result(raw!(nr::RENAMEAT2, from_dir, from, to_dir, to, flags)) as c_int;
    link(from: Str, to: Str) -> c_int: names(); else libc_result(raw!(nr::LINKAT, AT_FDCWD, from, AT_FDCWD, to, 0)) as c_int;
    linkat(from_dir: c_int, from: Str, to_dir: c_int, to: Str, flags: c_int) -> c_int: names(); else libc_result(raw!(nr::LINKAT, from_dir, from, to_dir, to, flags)) as c_int;
    symlink(target: Str, path: Str) -> c_int: names(); else libc_result(raw!(nr::SYMLINKAT, target, AT_FDCWD, path)) as c_int;
    symlinkat(target: Str, dirfd: c_int, path: Str) -> c_int: names(); else libc_result(raw!(nr::SYMLINKAT, target, dirfd, path)) as c_int;
    unlink(path: Str) -> c_int: names(); else libc_result(raw!(nr::UNLINKAT, AT_FDCWD, path, 0)) as c_int;
    unlinkat(dirfd: c_int, path: Str, flags: c_int) -> c_int: names(); else libc_result(raw!(nr::UNLINKAT, dirfd, path, flags)) as c_int;
    remove(path: Str) -> c_int: names(); else libc_result(raw!(nr::UNLINKAT, AT_FDCWD, path, 0)) as c_int;
    rmdir(path: Str) -> c_int: names(); else libc_result(raw!(nr::UNLINKAT, AT_FDCWD, path, AT_REMOVEDIR)) as c_int;
    mkdir(path: Str, mode: c_uint) -> c_int: names(); else libc_result(raw!(nr::MKDIRAT, AT_FDCWD, path, mode)) as c_int;
    mkdirat(dirfd: c_int, path: Str, mode: c_uint) -> c_int: names(); else libc_result(raw!(nr::MKDIRAT, dirfd, path, mode)) as c_int;
    mkdtemp(template: Str) -> Ptr: names(); else { no_function(); core::ptr::null_mut() };
    mknod(path: Str, mode: c_uint, dev: u64) -> c_int: names(); else libc_result(raw!(nr::MKNODAT, AT_FDCWD, path, mode, dev)) as c_int;
    mknodat(dirfd: c_int, path: Str, mode: c_uint, dev: u64) -> c_int: names(); else libc_result(raw!(nr::MKNODAT, dirfd, path, mode, dev)) as c_int;
    __xmknod(version: c_int, path: Str, mode: c_uint, dev: *const u64) -> c_int: names(); else libc_result(raw!(nr::MKNODAT, AT_FDCWD, path, mode, *dev)) as c_int;
    __xmknodat(version: c_int, dirfd: c_int, path: Str, mode: c_uint, dev: *const u64) -> c_int: names(); else libc_result(raw!(nr::MKNODAT, dirfd, path, mode, *dev)) as c_int;
    mkfifo(path: Str, mode: c_uint) -> c_int: names(); else libc_result(raw!(nr::MKNODAT, AT_FDCWD, path, mode | S_IFIFO, 0)) as c_int;
    mkfifoat(dirfd: c_int, path: Str, mode: c_uint) -> c_int: names(); else libc_result(raw!(nr::MKNODAT, dirfd, path, mode | S_IFIFO, 0)) as c_int;
    // Captured metadata.
    chmod(path: Str, mode: c_uint) -> c_int: by_path(); else libc_result(raw!(nr::FCHMODAT, AT_FDCWD, path, mode)) as c_int;
    lchmod(path: Str, mode: c_uint) -> c_int: by_path(); else no_function() as c_int;
    fchmod(fd: c_int, mode: c_uint) -> c_int: on(Meta, fd); else libc_result(raw!(nr::FCHMOD, fd, mode)) as c_int;
    fchmodat(dirfd: c_int, path: Str, mode: c_uint, flags: c_int) -> c_int: by_path(); else libc_result(raw!(nr::FCHMODAT, dirfd, path, mode)) as c_int;
    chown(path: Str, user: c_uint, group: c_uint) -> c_int: by_path(); else libc_result(raw!(nr::FCHOWNAT, AT_FDCWD, path, user, group, 0)) as c_int;
    lchown(path: Str, user: c_uint, group: c_uint) -> c_int: by_path(); else libc_result(raw!(nr::FCHOWNAT, AT_FDCWD, path, user, group, AT_SYMLINK_NOFOLLOW)) as c_int;
    fchown(fd: c_int, user: c_uint, group: c_uint) -> c_int: on(Meta, fd); else libc_result(raw!(nr::FCHOWN, fd, user, group)) as c_int;
    fchownat(dirfd: c_int, path: Str, user: c_uint, group: c_uint, flags: c_int) -> c_int: by_path(); else libc_result(raw!(nr::FCHOWNAT, dirfd, path, user, group, flags)) as c_int;
    utime(path: Str, times: Ptr) -> c_int: by_path(); else no_function() as c_int;
    utimes(path: Str, times: Ptr) -> c_int: by_path(); else no_function() as c_int;
    lutimes(path: Str, times: Ptr) -> c_int: by_path(); else no_function() as c_int;
    futimes(fd: c_int, times: Ptr) -> c_int: on(Meta, fd); else no_function() as c_int;
    futimesat(dirfd: c_int, path: Str, times: Ptr) -> c_int: by_path(); else no_function() as c_int;
    futimens(fd: c_int, times: Ptr) -> c_int: on(Meta, fd); else libc_result(raw!(nr::UTIMENSAT, fd, 0, times, 0)) as c_int;
    utimensat(dirfd: c_int, path: Str, times: Ptr, flags: c_int) -> c_int: if path.is_null() { on(Meta, dirfd) } else { by_path() }; else libc_result(raw!(nr::UTIMENSAT, dirfd, path, times, flags)) as c_int;
    setxattr(path: Str, name: Str, value: Ptr, len: usize, flags: c_int) -> c_int: by_path(); else libc_result(raw!(nr::SETXATTR, path, name, value, len, flags)) as c_int;
    lsetxattr(path: Str, name: Str, value: Ptr, len: usize, flags: c_int) -> c_int: by_path(); else libc_result(raw!(nr::LSETXATTR, path, name, value, len, flags)) as c_int;
    fsetxattr(fd: c_int, name: Str, value: Ptr, len: usize, flags: c_int) -> c_int: on(Meta, fd); else libc_result(raw!(nr::FSETXATTR, fd, name, value, len, flags)) as c_int;
    removexattr(path: Str, name: Str) -> c_int: by_path(); else libc_result(raw!(nr::REMOVEXATTR, path, name)) as c_int;
    lremovexattr(path: Str, name: Str) -> c_int: by_path(); else libc_result(raw!(nr::LREMOVEXATTR, path, name)) as c_int;
    fremovexattr(fd: c_int, name: Str) -> c_int: on(Meta, fd); else libc_result(raw!(nr::FREMOVEXATTR, fd, name)) as c_int;
    // Calls with a selector.
    ioctl(fd: c_int, request: c_ulong, arg: usize) -> c_int: ioctls(fd, request as usize); else libc_result(raw!(nr::IOCTL, fd, request, arg)) as c_int;
    fcntl(fd: c_int, command: c_int, arg: usize) -> c_int: fcntls(fd, command as usize, arg); else or_twin!(fcntl64(fd: c_int, command: c_int, arg: usize) -> c_int, libc_result(raw!(nr::FCNTL, fd, command, arg)) as c_int);
    fcntl64(fd: c_int, command: c_int, arg: usize) -> c_int: fcntls(fd, command as usize, arg); else or_twin!(fcntl(fd: c_int, command: c_int, arg: usize) -> c_int, no_function() as c_int);
    __fcntl(fd: c_int, command: c_int, arg: usize) -> c_int: fcntls(fd, command as usize, arg); else or_twin!(fcntl(fd: c_int, command: c_int, arg: usize) -> c_int, no_function() as c_int);
    // Locks: they are never held up, for a thread that waits for a lock held by one
    // that waits at the gate would keep the drain from ending.
    flock(fd: c_int, operation: c_int) -> c_int: flocks(fd, operation); else libc_result(raw!(nr::FLOCK, fd, operation)) as c_int;
    lockf(fd: c_int, command: c_int, len: i64) -> c_int: lockfs(fd, command); else or_twin!(lockf64(fd: c_int, command: c_int, len: i64) -> c_int, no_function() as c_int);
    lockf64(fd: c_int, command: c_int, len: i64) -> c_int: lockfs(fd, command); else or_twin!(lockf(fd: c_int, command: c_int, len: i64) -> c_int, no_function() as c_int);
    // Durability: changes nothing that a snapshot shows.
    fsync(fd: c_int) -> c_int: syncs(fd); else libc_result(raw!(nr::FSYNC, fd)) as c_int;
    fdatasync(fd: c_int) -> c_int: syncs(fd); else libc_result(raw!(nr::FDATASYNC, fd)) as c_int;
    syncfs(fd: c_int) -> c_int: noted(Seen::Sync); else libc_result(raw!(nr::SYNCFS, fd)) as c_int;
    sync() -> (): syncs_all(); else { raw!(nr::SYNC, 0); };
    sync_file_range(fd: c_int, at: i64, len: i64, flags: c_uint) -> c_int: noted(Seen::Sync); else libc_result(raw!(nr::SYNC_FILE_RANGE, fd, at, len, flags)) as c_int;
    msync(at: Ptr, len: usize, flags: c_int) -> c_int: noted(Seen::Sync); else libc_result(raw!(nr::MSYNC, at, len, flags)) as c_int;
    // Descriptors that go away (and POSIX locks with them).
    close(fd: c_int) -> c_int: closes(fd); else libc_result(raw!(nr::CLOSE, fd)) as c_int;
    __close(fd: c_int) -> c_int: closes(fd); else libc_result(raw!(nr::CLOSE, fd)) as c_int;
    dup2(from: c_int, to: c_int) -> c_int: closes(to); else or_twin!(dup2(from: c_int, to: c_int) -> c_int, no_function() as c_int);
    __dup2(from: c_int, to: c_int) -> c_int: closes(to); else or_twin!(dup2(from: c_int, to: c_int) -> c_int, no_function() as c_int);
    dup3(from: c_int, to: c_int, flags: c_int) -> c_int: closes(to); else libc_result(raw!(nr::DUP3, from, to, flags)) as c_int;
    close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int: noted(Seen::Close); else libc_result(raw!(nr::CLOSE_RANGE, first, last, flags)) as c_int;
    closefrom(first: c_int) -> (): noted(Seen::Close); else { raw!(nr::CLOSE_RANGE, first.max(0), u32::MAX, 0); };
    // Mappings: the coordinator finds them from outside; making one that changes a
    // file without a call waits.
    mmap(at: Ptr, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> Ptr: maps(protection as usize, flags as usize, fd); else libc_result(raw!(nr::MMAP, at, len, protection, flags, fd, offset)) as Ptr;
    mmap64(at: Ptr, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> Ptr: maps(protection as usize, flags as usize, fd); else libc_result(raw!(nr::MMAP, at, len, protection, flags, fd, offset)) as Ptr;
    mremap(at: Ptr, len: usize, new_len: usize, flags: c_int, new_at: Ptr) -> Ptr: noted(Seen::Map); else libc_result(raw!(nr::MREMAP, at, len, new_len, flags, new_at)) as Ptr;
    munmap(at: Ptr, len: usize) -> c_int: noted(Seen::Map); else libc_result(raw!(nr::MUNMAP, at, len)) as c_int;
    mprotect(at: Ptr, len: usize, protection: c_int) -> c_int: noted(Seen::Map); else libc_result(raw!(nr::MPROTECT, at, len, protection)) as c_int;
    // Work handed to the kernel, or to libc's helper threads. Being in the call
    // says nothing about the work, so the submission waits and does not count.
    // Not liburing's functions: their library may come and go, or be there twice,
    // and there is no way round it; rings are found from outside.
    io_submit(context: usize, count: c_long, blocks: Ptr) -> c_int: submit(); else raw!(nr::IO_SUBMIT, context, count, blocks) as c_int;
    aio_write(block: Ptr) -> c_int: submit(); else no_function() as c_int;
    aio_write64(block: Ptr) -> c_int: submit(); else no_function() as c_int;
    lio_listio(mode: c_int, list: Ptr, count: c_int, event: Ptr) -> c_int: submit(); else no_function() as c_int;
    lio_listio64(mode: c_int, list: Ptr, count: c_int, event: Ptr) -> c_int: submit(); else no_function() as c_int;
    io_uring_enter(fd: c_uint, submit_count: c_uint, wait: c_uint, flags: c_uint, mask: Ptr) -> c_int: submit(); else raw!(nr::IO_URING_ENTER, fd, submit_count, wait, flags, mask, 8) as c_int;
    io_uring_enter2(fd: c_uint, submit_count: c_uint, wait: c_uint, flags: c_uint, mask: Ptr, len: usize) -> c_int: submit(); else raw!(nr::IO_URING_ENTER, fd, submit_count, wait, flags, mask, len) as c_int;

    // Not gated. (The new thread begins in its own function, not in the hook.)
    clone(entry: Ptr, stack: Ptr, flags: c_int, arg: Ptr, parent: Ptr, tls: Ptr, child: Ptr) -> c_int: clones(flags); else no_function() as c_int;
    __clone(entry: Ptr, stack: Ptr, flags: c_int, arg: Ptr, parent: Ptr, tls: Ptr, child: Ptr) -> c_int: clones(flags); else or_twin!(clone(entry: Ptr, stack: Ptr, flags: c_int, arg: Ptr, parent: Ptr, tls: Ptr, child: Ptr) -> c_int, no_function() as c_int);
}
