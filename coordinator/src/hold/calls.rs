//! Which system calls change files, by number: for reading what threads that
//! are asleep in the kernel are doing.

/// What a system call changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// The open file in this argument.
    File(usize),
    /// Whatever a path names; asleep interruptibly it has changed nothing yet.
    Open,
    /// A directory, or a file named by path.
    Name,
    /// Whatever was submitted.
    Submitted,
}

/// fchmodat2, setxattrat, removexattrat: equal on all architectures, and newer than
/// the libc crate.
const NEWER: [i64; 3] = [452, 463, 466];

macro_rules! changes {
    ($( $what:expr => $($name:ident)+; )*) => {
        /// What system call `number` changes; `None` if no file.
        pub fn changes(number: i64) -> Option<Changes> {
            $( if [$(nix::libc::$name),+].contains(&number) { return Some($what); } )*
            if NEWER.contains(&number) {
                return Some(Changes::Name);
            }
            #[cfg(target_arch = "x86_64")]
            {
                use nix::libc::*;
                if [SYS_open, SYS_creat].contains(&number) {
                    return Some(Changes::Open);
                }
                let names = [
                    SYS_rename, SYS_mkdir, SYS_rmdir, SYS_link, SYS_unlink, SYS_symlink,
                    SYS_mknod, SYS_chmod, SYS_chown, SYS_lchown, SYS_utime, SYS_utimes,
                    SYS_futimesat,
                ];
                if names.contains(&number) {
                    return Some(Changes::Name);
                }
            }
            None
        }
    };
}

changes! {
    Changes::File(0) => SYS_write SYS_pwrite64 SYS_writev SYS_pwritev SYS_pwritev2 SYS_sendfile
        SYS_ftruncate SYS_fallocate SYS_fchmod SYS_fchown SYS_fsetxattr SYS_fremovexattr SYS_ioctl;
    Changes::File(2) => SYS_copy_file_range SYS_splice;
    Changes::Open => SYS_openat SYS_openat2;
    Changes::Name => SYS_renameat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_unlinkat SYS_mkdirat
        SYS_mknodat SYS_truncate SYS_fchmodat SYS_fchownat SYS_utimensat SYS_setxattr SYS_lsetxattr
        SYS_removexattr SYS_lremovexattr;
    Changes::Submitted => SYS_io_submit SYS_io_uring_enter;
}

/// Whether a system call makes a process or thread, and may wait for it to let go of
/// its parent's memory (vfork).
pub fn makes_process(number: i64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if number == nix::libc::SYS_vfork {
        return true;
    }
    [nix::libc::SYS_clone, nix::libc::SYS_clone3].contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        assert_eq!(changes(nix::libc::SYS_write), Some(Changes::File(0)));
        assert_eq!(changes(nix::libc::SYS_splice), Some(Changes::File(2)));
        assert_eq!(changes(nix::libc::SYS_openat), Some(Changes::Open));
        assert_eq!(changes(nix::libc::SYS_unlinkat), Some(Changes::Name));
        assert_eq!(changes(nix::libc::SYS_read), None);
        assert_eq!(changes(nix::libc::SYS_futex), None);
        assert!(makes_process(nix::libc::SYS_clone3) && !makes_process(nix::libc::SYS_write));
    }
}
