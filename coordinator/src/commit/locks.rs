//! Locks, as the kernel shows them for each descriptor (proc_pid_fdinfo(5)).
//!
//! Not `/proc/locks`: that is read a page at a time, and where locks come and go meanwhile, others
//! are left out. What `fdinfo` shows of one file is its state at one moment
//! (`show_fd_locks`, under the lock of the file's list).

/// A lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Whether nobody else may have one with it.
    pub is_write: bool,
    /// Whether it is the open file's, and so everybody's who inherits that.
    pub is_shared: bool,
}

/// The locks in the text of a `fdinfo`: those of this open file, and the process's own
/// (POSIX) on its inode. Leases are none: they keep nobody from anything.
pub fn parse(fdinfo: &str) -> impl Iterator<Item = Lock> {
    let lines = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    lines.filter_map(lock)
}

/// `1: POSIX  ADVISORY  WRITE 3568 fd:00:2531452 0 EOF`.
fn lock(line: &str) -> Option<Lock> {
    let mut words = line.split_whitespace().skip(1);
    match words.next()? {
        kind @ ("POSIX" | "FLOCK" | "OFDLCK") => Some(Lock {
            is_write: words.nth(1)? != "READ",
            is_shared: kind != "POSIX",
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints() {
        let text = "\
pos:\t0
flags:\t0100002
mnt_id:\t29
ino:\t7864448
lock:\t1: POSIX  ADVISORY  READ  5433 08:01:7864448 128 128
lock:\t2: FLOCK  ADVISORY  WRITE 2001 08:01:7864448 0 EOF
lock:\t3: OFDLCK ADVISORY  WRITE -1 08:01:7864448 128 191
lock:\t4: LEASE  ACTIVE    WRITE 12 08:01:7864448 0 EOF
lock:\tnonsense";
        let found: Vec<bool> = parse(text).map(|lock| lock.is_write).collect();
        assert_eq!(found, [false, true, true]);
    }

    #[test]
    fn a_lock_of_ours_is_found() {
        use std::os::fd::AsRawFd;
        let scratch = crate::store::scratch::Scratch::new();
        let file = std::fs::File::create(scratch.join("f")).unwrap();
        let info = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
        let has = || parse(&std::fs::read_to_string(&info).unwrap()).any(|lock| lock.is_write);
        assert!(!has());
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(has());
    }
}
