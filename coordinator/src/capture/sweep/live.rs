//! Reading a live file without being in its writers' way.
//!
//! On XFS read(2) holds the file's lock against write(2) (`xfs_file_buffered_read`,
//! fs/xfs/xfs_file.c), also while the reader has lost its processor in the middle of a chunk: the
//! program would wait for our turn. A mapping has the same pages and no such lock. It is
//! never touched here: process_vm_readv(2) looks through it, and says EFAULT where the file has
//! become shorter, instead of SIGBUS.

use std::ffi::c_void;
use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::fstatfs;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `f_type` of XFS, statfs(2).
pub(super) const XFS_MAGIC: i64 = 0x5846_5342;
/// Smaller files are read faster than mapped.
const SMALL: u64 = 1 << 20;

/// The first bytes of a file as they lie in memory.
#[derive(Debug)]
struct Mapping {
    at: *mut c_void,
    len: usize,
}

// SAFETY: only its address is used, by the kernel, which may be asked from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing of it changes until it is dropped.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, size: u64) -> Option<Mapping> {
        let len = usize::try_from(size).ok()?;
        // SAFETY: no address is asked for: nothing that is there is replaced.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        at.ok().map(|at| Mapping { at, len })
    }

    /// Fills `into` from `offset` on; whether it could.
    fn read(&self, into: &mut [u8], offset: u64) -> bool {
        let Some(base) = usize::try_from(offset).ok().filter(|offset| {
            offset
                .checked_add(into.len())
                .is_some_and(|end| end <= self.len)
        }) else {
            return false;
        };
        let wanted = into.len();
        let from = RemoteIoVec {
            base: self.at as usize + base,
            len: wanted,
        };
        let got = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(into)], &[from]);
        got == Ok(wanted)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nobody has a reference into it, as none was ever made.
        let _ = unsafe { munmap(self.at, self.len) };
    }
}

/// A live file that may have to be looked at through a mapping.
#[derive(Debug, Default)]
pub(super) struct Live(OnceLock<Option<Mapping>>);

impl Live {
    /// Fills `into` with the bytes of `file`, which has `size` bytes, from `offset` on; `false` if
    /// it is to be read.
    pub(super) fn look(&self, file: impl AsFd, size: u64, into: &mut [u8], offset: u64) -> bool {
        let mapping = self.0.get_or_init(|| {
            let is_xfs = || fstatfs(&file).is_ok_and(|fs| fs.f_type == XFS_MAGIC);
            (size >= SMALL && is_xfs()).then(|| Mapping::new(&file, size))?
        });
        mapping
            .as_ref()
            .is_some_and(|mapping| mapping.read(into, offset))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(scratch: &crate::store::scratch::Scratch, pages: u8) -> File {
        let path = scratch.join("live");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .unwrap();
        for page in 0..pages {
            file.write_all_at(&[page; 4096], u64::from(page) * 4096)
                .unwrap();
        }
        file
    }

    #[test]
    fn a_mapping_shows_what_is_written() {
        let scratch = crate::store::scratch::Scratch::new();
        let file = file(&scratch, 8);
        let mapping = Mapping::new(&file, 8 * 4096).unwrap();
        let mut into = vec![0; 4 * 4096];
        assert!(mapping.read(&mut into, 2 * 4096 + 5));
        assert_eq!((into[0], into[4091], into[4 * 4096 - 1]), (2, 3, 6));
        file.write_all_at(&[77; 10], 3 * 4096).unwrap();
        assert!(mapping.read(&mut into, 3 * 4096));
        assert_eq!((into[9], into[10]), (77, 3));
        assert!(!mapping.read(&mut into, 5 * 4096), "past its end");
    }

    #[test]
    fn a_file_that_becomes_shorter_is_no_signal() {
        let scratch = crate::store::scratch::Scratch::new();
        let file = file(&scratch, 8);
        let mapping = Mapping::new(&file, 8 * 4096).unwrap();
        file.set_len(4096).unwrap();
        let mut into = vec![0; 2 * 4096];
        assert!(!mapping.read(&mut into, 0));
        assert!(mapping.read(&mut into[..4096], 0));
    }

    #[test]
    fn small_files_are_read() {
        let scratch = crate::store::scratch::Scratch::new();
        let file = file(&scratch, 1);
        assert!(!Live::default().look(&file, 4096, &mut [0; 10], 0));
    }
}
