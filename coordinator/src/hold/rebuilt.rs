//! Files that programs keep in step through memory and make anew when they are opened
//! after a crash: their bytes say nothing, and changing them through a mapping spoils nothing.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Whether `path` is the index of a write-ahead log of SQLite: `NAME-shm` beside a database
/// `NAME`. The first who opens a database that nobody has open empties it
/// (www.sqlite.org/walformat.html, section 2).
pub fn is_rebuilt(path: &Path) -> bool {
    const MAGIC: &[u8; 16] = b"SQLite format 3\0";
    let Some(database) = database_of(path) else {
        return false;
    };
    let mut head = [0; 16];
    // O_NONBLOCK: it may be a FIFO.
    let flags = rustix::fs::OFlags::RDONLY
        | rustix::fs::OFlags::NONBLOCK
        | rustix::fs::OFlags::NOFOLLOW
        | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(&database, flags, rustix::fs::Mode::empty())
        .is_ok_and(|fd| File::from(fd).read_exact(&mut head).is_ok() && &head == MAGIC)
}

fn database_of(path: &Path) -> Option<PathBuf> {
    let bytes = path.as_os_str().as_bytes().strip_suffix(b"-shm")?;
    Some(PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_beside_a_database() {
        let scratch = crate::store::scratch::Scratch::new();
        let shm = scratch.join("a.db-shm");
        std::fs::write(&shm, "x").unwrap();
        assert!(!is_rebuilt(&shm));
        std::fs::write(scratch.join("a.db"), "SQLite format 4\0 and more").unwrap();
        assert!(!is_rebuilt(&shm));
        std::fs::write(scratch.join("a.db"), "SQLite format 3\0 and more").unwrap();
        assert!(is_rebuilt(&shm));
        assert!(!is_rebuilt(&scratch.join("a.db")));
        assert!(!is_rebuilt(&scratch.join("a.db-wal")));
    }
}
