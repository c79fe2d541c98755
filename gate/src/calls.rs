//! What a system call does to files, told from its number: the one list that the
//! shim gates by, that site tables are computed from, and that the coordinator
//! reads sleeping threads with.

use crate::nr;
use crate::slot::Class;

/// What a system call does, as far as the gate cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Changes the open file in the argument of this number.
    File(Class, u8),
    /// `ioctl`: some requests change the open file in argument 0.
    Ioctl,
    /// Opens the path in argument `.0`, with the flags in argument `.0 + 1`; relative
    /// to argument 0 if the path is not there.
    Open(u8),
    /// `openat2`: path in argument 1. The flags lie in memory, which is not ours to read.
    Open2,
    /// `creat`: path in argument 0.
    Create,
    /// `open_by_handle_at`: flags in argument 2.
    Handle,
    /// Changes a directory.
    Name,
    /// Changes a directory, and may put a new file in the place of an old one.
    Rename,
    /// Changes metadata of a file named by path.
    Path,
    /// `truncate`: path in argument 0, length in argument 1.
    Truncate,
    /// Changes the memory of another process, where a file may be mapped.
    Memory,
    /// `utimensat`: by path, or the open file in argument 0.
    Times,
    /// Hands writes to the kernel to be done later.
    Submit,
    /// `io_uring_enter`: hands over as many as argument 1 says, and may wait.
    Enter,
    /// `io_uring_setup`.
    Ring,
    /// Maps a file, or memory.
    Map,
    /// Changes mappings.
    Remap,
    /// Makes earlier changes of the file in argument 0 durable.
    Sync,
    /// Makes earlier changes of everything durable.
    SyncAll,
    /// Writes back some of what was changed: no promise.
    Flush,
    /// `fcntl`: some commands take or drop a lock.
    Fcntl,
    /// Takes or drops a lock.
    Lock,
    /// Closes the descriptor in the argument of this number (and so may drop locks).
    Close(u8),
    /// Closes many.
    CloseRange,
    /// `prctl`: one option enters a sandbox.
    Prctl,
    /// `seccomp`: operations 0 and 1 enter a sandbox.
    Seccomp,
}

/// Numbers from here on are never of interest.
pub const NUMBERS: usize = 512;

macro_rules! actions {
    ($( $(#[$meta:meta])* $($number:ident)+ => $action:expr; )*) => {
        const fn all() -> [Option<Action>; NUMBERS] {
            use Action::*;
            let mut all = [None; NUMBERS];
            $( $(#[$meta])* { $( all[nr::$number] = Some($action); )+ } )*
            all
        }
    };
}

actions! {
    WRITE PWRITE64 WRITEV PWRITEV PWRITEV2 => File(Class::Write, 0);
    SENDFILE => File(Class::Copy, 0);
    COPY_FILE_RANGE SPLICE => File(Class::Copy, 2);
    FTRUNCATE FALLOCATE => File(Class::Size, 0);
    FCHMOD FCHOWN FSETXATTR FREMOVEXATTR => File(Class::Meta, 0);
    IOCTL => Ioctl;
    OPENAT => Open(1);
    OPENAT2 => Open2;
    RENAMEAT RENAMEAT2 => Rename;
    LINKAT SYMLINKAT UNLINKAT MKDIRAT MKNODAT => Name;
    OPEN_BY_HANDLE_AT => Handle;
    TRUNCATE => Truncate;
    FCHMODAT FCHMODAT2 FCHOWNAT => Path;
    PROCESS_VM_WRITEV => Memory;
    SETXATTR LSETXATTR SETXATTRAT REMOVEXATTR LREMOVEXATTR REMOVEXATTRAT => Path;
    UTIMENSAT => Times;
    IO_SUBMIT => Submit;
    IO_URING_ENTER => Enter;
    IO_URING_SETUP => Ring;
    MMAP => Map;
    MREMAP MUNMAP MPROTECT PKEY_MPROTECT => Remap;
    FSYNC FDATASYNC => Sync;
    SYNC => SyncAll;
    // syncfs: of one file system, which need not be the members'.
    SYNCFS MSYNC SYNC_FILE_RANGE => Flush;
    FCNTL => Fcntl;
    FLOCK => Lock;
    CLOSE => Close(0);
    DUP3 => Close(1);
    CLOSE_RANGE => CloseRange;
    PRCTL => Prctl;
    SECCOMP => Seccomp;
    #[cfg(target_arch = "x86_64")]
    OPEN => Open(0);
    #[cfg(target_arch = "x86_64")]
    CREAT => Create;
    #[cfg(target_arch = "x86_64")]
    RENAME => Rename;
    #[cfg(target_arch = "x86_64")]
    MKDIR RMDIR LINK UNLINK SYMLINK MKNOD => Name;
    #[cfg(target_arch = "x86_64")]
    CHMOD CHOWN LCHOWN UTIME UTIMES FUTIMESAT => Path;
    #[cfg(target_arch = "x86_64")]
    DUP2 => Close(1);
}

static ACTIONS: [Option<Action>; NUMBERS] = all();

/// What system call `number` does; `None` if it is of no interest.
#[inline(always)]
pub fn action(number: usize) -> Option<Action> {
    ACTIONS.get(number).copied().flatten()
}

/// The numbers of interest, a bit each, for assembly.
pub const fn bits() -> [u64; NUMBERS / 64] {
    let all = all();
    let mut bits = [0; NUMBERS / 64];
    let mut number = 0;
    while number < NUMBERS {
        if all[number].is_some() {
            bits[number / 64] |= 1 << (number % 64);
        }
        number += 1;
    }
    bits
}

/// Whether an `ioctl` request changes the bytes of the file it is made on.
pub const fn ioctl_changes(request: usize) -> bool {
    const FICLONE: usize = 0x4004_9409;
    const FICLONERANGE: usize = 0x4020_940d;
    // XFS (fs/xfs/libxfs/xfs_fs.h): ALLOCSP and FREESP, RESVSP and UNRESVSP in
    // both widths, ZERO_RANGE, SWAPEXT, EXCHANGE_RANGE, COMMIT_RANGE.
    let xfs = (request >> 8) & 0xff == b'X' as usize
        && matches!(
            request & 0xff,
            10 | 11 | 36 | 37 | 40..=43 | 57 | 109 | 129 | 131
        );
    // The kernel, and musl's prototype, have 32 bits.
    let request = request & 0xffff_ffff;
    request == FICLONE || request == FICLONERANGE || xfs
}

/// Whether an `fcntl` command takes or drops a lock: POSIX (6, 7) and OFD (37, 38).
pub const fn fcntl_locks(command: usize) -> bool {
    matches!(command, 6 | 7) || fcntl_locks_description(command)
}

/// Whether an `fcntl` command takes or drops a lock of an open file description.
pub const fn fcntl_locks_description(command: usize) -> bool {
    matches!(command, 37 | 38)
}

/// Whether system call `number` may be waiting for a lock.
pub fn waits_for_lock(number: usize, command: usize) -> bool {
    match action(number) {
        Some(Action::Lock) => true,
        // Those that wait are F_SETLKW and F_OFD_SETLKW.
        Some(Action::Fcntl) => matches!(command, 7 | 38),
        _ => false,
    }
}
