//! Which file a call means: asked only while the gate is not open, for any table
//! of descriptors would go stale (dup, SCM_RIGHTS, calls we do not see).

use core::ffi::c_char;

use snapshim_gate::armed::Change;
use snapshim_gate::slot::{Class, Slot};
use snapshim_gate::table::{FileId, MemberTable};

use crate::sys::{self, Stat};

/// What a call changes.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// An open file.
    Fd(i32),
    /// An open file, by a system call whose number and arguments say which bytes of it.
    Call {
        fd: i32,
        number: usize,
        /// Valid as long as the call is on its way past the gate.
        args: *const [usize; 6],
    },
    /// An open file, from where it stands: stdio.
    Stream(i32),
    /// The file behind a path, from this byte on.
    Truncate { path: *const c_char, len: i64 },
    /// The file that opening `path` with O_CREAT would make (`creates`), or that
    /// opening it would truncate.
    Open {
        dirfd: i32,
        path: *const c_char,
        creates: bool,
        truncates: bool,
        /// Where openat2's `struct open_how` is, which says what it does; 0 for other calls.
        how: usize,
    },
    /// An open file that is mapped, shared and not writable: with mprotect it may become so, if
    /// the file is open for writing.
    Map(i32),
    /// A name, or metadata of the file behind one; not looked at: all such calls wait.
    Name,
    /// The same; a rename.
    Rename,
    /// What cannot be told.
    Any,
}

impl Target {
    /// Whether `table` shuts it.
    pub(crate) fn is_shut(self, class: Class, table: &MemberTable) -> bool {
        match self {
            Target::Fd(fd) | Target::Call { fd, .. } | Target::Stream(fd) => {
                sys::fstat(fd).is_some_and(|s| shuts(class, &s, table))
            }
            Target::Open {
                dirfd,
                path,
                creates,
                ..
            } => {
                // SAFETY: the program passed the path; the kernel checks it.
                match unsafe { sys::fstatat(dirfd, path, 0) } {
                    Ok(stat) => shuts(class, &stat, table),
                    // Absent, or not to be reached: the call will fail or create.
                    Err(_) => creates,
                }
            }
            Target::Map(fd) => sys::is_writable(fd) && Target::Fd(fd).is_shut(class, table),
            Target::Truncate { .. } | Target::Name | Target::Rename | Target::Any => true,
        }
    }
}

impl Target {
    /// What a call of `class` on it changes, if `table` says what the members are.
    pub(crate) fn change(self, class: Class, table: &MemberTable) -> Change {
        let file = |stat: &Stat| match shuts(class, stat, table) {
            true => Change::File(FileId {
                dev: stat.dev,
                ino: stat.ino,
            }),
            false => Change::None,
        };
        match self {
            Target::Fd(fd) | Target::Call { fd, .. } | Target::Stream(fd) => {
                sys::fstat(fd).map_or(Change::None, |stat| file(&stat))
            }
            Target::Open {
                dirfd,
                path,
                creates,
                truncates,
                ..
            } => {
                // SAFETY: the program passed the path; the kernel checks it.
                match unsafe { sys::fstatat(dirfd, path, 0) } {
                    Ok(stat) if truncates => file(&stat),
                    Ok(_) => Change::None,
                    Err(_) if creates => Change::Name,
                    Err(_) => Change::None,
                }
            }
            Target::Name if class == Class::Name => Change::Name,
            Target::Rename => Change::Rename,
            // Making it so is not seen.
            Target::Map(_) => Change::None,
            Target::Truncate { .. } | Target::Name | Target::Any => Change::Unknown,
        }
    }
}

fn shuts(class: Class, stat: &Stat, table: &MemberTable) -> bool {
    // A directory's mode, owner, times and attributes are captured as well.
    let kind = stat.is_regular() || (class == Class::Meta && stat.is_directory());
    kind && table.shuts(FileId {
        dev: stat.dev,
        ino: stat.ino,
    })
}

/// Whether `table` shuts the file of the outermost call in flight in `slot`.
pub(crate) fn outer_is_shut(slot: &Slot, table: &MemberTable) -> bool {
    use core::sync::atomic::Ordering::Relaxed;
    let Some(class) = Class::from_raw(slot.class.load(Relaxed)) else {
        return false;
    };
    match class {
        Class::Write | Class::Size | Class::Copy | Class::Meta => {
            Target::Fd(slot.fd.load(Relaxed) as i32).is_shut(class, table)
        }
        Class::Open | Class::Name | Class::Path | Class::Submit => true,
    }
}
