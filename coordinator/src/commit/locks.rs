//! Write locks, as `/proc/locks` shows them (proc_locks(5)).

use crate::hold::process::Pid;

/// A write lock somebody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteLock {
    /// Who; `None` if the kernel names no process (locks of open files, or a process out
    /// of sight).
    pub pid: Option<Pid>,
    /// The file system, as the kernel numbers it, which on btrfs is not as `stat` does.
    pub dev: u64,
    /// The inode.
    pub ino: u64,
}

/// All write locks there are. Leases are none: they keep nobody from anything.
///
/// # Errors
///
/// `/proc/locks` cannot be read.
pub fn held() -> std::io::Result<Vec<WriteLock>> {
    Ok(parse(&std::fs::read_to_string("/proc/locks")?))
}

fn parse(text: &str) -> Vec<WriteLock> {
    text.lines().filter_map(line).collect()
}

/// `1: POSIX  ADVISORY  WRITE 3568 fd:00:2531452 0 EOF`; one that is waited for has `->`
/// behind its number.
fn line(line: &str) -> Option<WriteLock> {
    let mut words = line.split_whitespace().skip(1);
    let kind = words.next()?;
    if !matches!(kind, "POSIX" | "FLOCK" | "OFDLCK") {
        return None;
    }
    if !matches!(words.nth(1)?, "WRITE" | "RW") {
        return None;
    }
    let pid = words.next()?.parse::<i64>().ok()?;
    let mut place = words.next()?.split(':');
    let mut number = |radix| u64::from_str_radix(place.next()?, radix).ok();
    let (major, minor, ino) = (number(16)?, number(16)?, number(10)?);
    Some(WriteLock {
        pid: Pid::try_from(pid).ok().filter(|pid| *pid != 0),
        dev: rustix::fs::makedev(u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        ino,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints() {
        let text = "\
1: POSIX  ADVISORY  READ  5433 08:01:7864448 128 128
2: FLOCK  ADVISORY  WRITE 2001 08:01:7864554 0 EOF
2: -> FLOCK  ADVISORY  WRITE 2003 08:01:7864554 0 EOF
3: POSIX  ADVISORY  WRITE 3568 fd:10:2531452 0 EOF
4: OFDLCK ADVISORY  WRITE -1 08:01:8713209 128 191
5: LEASE  ACTIVE    WRITE 12 08:01:8713209 0 EOF
6: POSIX  MSNFS     READ  5433 08:01:7864448 128 128
7: nonsense";
        let lock = |pid, major, minor, ino| WriteLock {
            pid,
            dev: rustix::fs::makedev(major, minor),
            ino,
        };
        assert_eq!(
            parse(text),
            [
                lock(Some(2001), 8, 1, 7864554),
                lock(Some(3568), 0xfd, 0x10, 2531452),
                lock(None, 8, 1, 8713209),
            ]
        );
    }

    #[test]
    fn a_lock_of_ours_is_found() {
        use std::os::unix::fs::MetadataExt;
        let scratch = crate::store::scratch::Scratch::new();
        let file = std::fs::File::create(scratch.join("f")).unwrap();
        let ino = file.metadata().unwrap().ino();
        let has = || held().unwrap().iter().any(|lock| lock.ino == ino);
        assert!(!has());
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(has());
    }
}
