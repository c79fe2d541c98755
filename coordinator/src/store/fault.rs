//! What an error of the store's file system means to the user.

use std::path::Path;

use rustix::io::Errno;

use crate::Error;

/// The error of doing `what` to `path`, which is in the store.
pub(crate) fn fault(what: &str, path: &Path, cause: Errno) -> Error {
    let (reason, next) = match cause {
        Errno::NOSPC => (
            "the store's file system is full".to_owned(),
            "free space there, keep fewer snapshots (`snapshim prune`, --keep-last, --min-free), or choose another store with --store",
        ),
        Errno::DQUOT => (
            "the disk quota on the store's file system is used up".to_owned(),
            "free space there, keep fewer snapshots (`snapshim prune`, --keep-last, --min-free), or choose another store with --store",
        ),
        Errno::ROFS => (
            "the store's file system is read-only".to_owned(),
            "choose a store on a writable file system with --store",
        ),
        Errno::ACCESS | Errno::PERM => (
            cause.to_string(),
            "run as the owner of the store, or choose another store with --store",
        ),
        Errno::MFILE | Errno::NFILE => (
            cause.to_string(),
            "raise the limit of open files (ulimit -n)",
        ),
        Errno::IO => (
            cause.to_string(),
            "check the kernel log and the disk under the store",
        ),
        _ => {
            return Error::new(format!("cannot {what} {}: {cause}", path.display()));
        }
    };
    Error::new(format!("cannot {what} {}: {reason}", path.display())).next(next)
}
