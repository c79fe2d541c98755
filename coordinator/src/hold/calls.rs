//! Which system calls change files: for reading what threads that are asleep in
//! the kernel are doing.

use snapshim_gate::calls::{Action, action};

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

/// What system call `number` changes; `None` if no file.
pub fn changes(number: i64) -> Option<Changes> {
    match action(usize::try_from(number).ok()?)? {
        Action::File(_, argument) => Some(Changes::File(argument.into())),
        Action::Ioctl => Some(Changes::File(0)),
        Action::Open(_) | Action::Open2 | Action::Create | Action::Handle => Some(Changes::Open),
        Action::Name
        | Action::Rename
        | Action::Path
        | Action::Truncate
        | Action::Memory
        | Action::Times => Some(Changes::Name),
        Action::Submit | Action::Enter => Some(Changes::Submitted),
        Action::Ring
        | Action::Map
        | Action::Remap
        | Action::Sync
        | Action::SyncAll
        | Action::Flush
        | Action::Fcntl
        | Action::Lock
        | Action::Close(_)
        | Action::CloseRange
        | Action::Prctl
        | Action::Seccomp => None,
    }
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
        assert_eq!(changes(-1), None);
        assert_eq!(changes(i64::MAX), None);
        assert!(makes_process(nix::libc::SYS_clone3) && !makes_process(nix::libc::SYS_write));
    }
}
