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

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::fstatfs;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `f_type` of XFS, statfs(2).
pub(super) const XFS_MAGIC: i64 = 0x5846_5342;
/// Smaller files are read faster than mapped.
const SMALL: u64 = 1 << 20;
/// So much is mapped at once, bytes: what was looked at counts as this process's memory.
const LEN: u64 = 4 << 20;

/// A part of a file as it lies in memory.
#[derive(Debug)]
struct Mapping {
    at: *mut c_void,
    begin: u64,
    len: usize,
}

impl Mapping {
    /// `begin` is a multiple of the page size.
    fn new(file: impl AsFd, begin: u64, len: usize) -> Option<Mapping> {
        // SAFETY: no address is asked for: nothing that is there is replaced.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                begin,
            )
        };
        at.ok().map(|at| Mapping { at, begin, len })
    }

    /// Fills `into` from `offset` of the file on; whether it could.
    fn read(&self, into: &mut [u8], offset: u64) -> bool {
        let wanted = into.len();
        let within = |at: &usize| at.checked_add(wanted).is_some_and(|end| end <= self.len);
        let at = offset.checked_sub(self.begin);
        let at = at.and_then(|at| usize::try_from(at).ok()).filter(within);
        let Some(at) = at else {
            return false;
        };
        let from = RemoteIoVec {
            base: self.at as usize + at,
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

/// What a thread looks at that reads one file after the other, each from its beginning.
#[derive(Debug)]
pub(super) struct Window {
    /// The file, by number, and whether it is one to be looked at.
    file: Option<(usize, bool)>,
    mapping: Option<Mapping>,
}

impl Window {
    pub(super) fn new() -> Window {
        Window {
            file: None,
            mapping: None,
        }
    }

    /// Fills `into` with the bytes of a file of `size` bytes, the one with this number, from `offset` on;
    /// `false` if it is to be read.
    pub(super) fn read(
        &mut self,
        number: usize,
        file: impl AsFd,
        size: u64,
        into: &mut [u8],
        offset: u64,
    ) -> bool {
        if self.file.is_none_or(|(other, _)| other != number) {
            let is_xfs = || fstatfs(&file).is_ok_and(|fs| fs.f_type == XFS_MAGIC);
            self.mapping = None;
            self.file = Some((number, size >= SMALL && is_xfs()));
        }
        // In its last page nobody could tell whether the file has become shorter: it is mapped whole.
        let page = rustix::param::page_size() as u64;
        let whole = size.saturating_sub(1) / page * page;
        let end = offset.saturating_add(into.len() as u64);
        if self.file != Some((number, true)) || end > whole {
            return false;
        }
        let is_in = |mapping: &Mapping| {
            mapping.begin <= offset && end <= mapping.begin + mapping.len as u64
        };
        if !self.mapping.as_ref().is_some_and(is_in) {
            let begin = offset - offset % LEN;
            let len = LEN.max(end - begin).min(whole - begin);
            // First the old one goes.
            self.mapping = None;
            self.mapping = usize::try_from(len)
                .ok()
                .and_then(|len| Mapping::new(&file, begin, len));
        }
        self.mapping
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
        let mapping = Mapping::new(&file, 4096, 7 * 4096).unwrap();
        let mut into = vec![0; 4 * 4096];
        assert!(mapping.read(&mut into, 2 * 4096 + 5));
        assert_eq!((into[0], into[4091], into[4 * 4096 - 1]), (2, 3, 6));
        file.write_all_at(&[77; 10], 3 * 4096).unwrap();
        assert!(mapping.read(&mut into, 3 * 4096));
        assert_eq!((into[9], into[10]), (77, 3));
        assert!(!mapping.read(&mut into, 5 * 4096), "past its end");
        assert!(!mapping.read(&mut into, 0), "before its beginning");
    }

    #[test]
    fn a_file_that_becomes_shorter_is_no_signal() {
        let scratch = crate::store::scratch::Scratch::new();
        let file = file(&scratch, 8);
        let mapping = Mapping::new(&file, 0, 8 * 4096).unwrap();
        file.set_len(4096).unwrap();
        let mut into = vec![0; 2 * 4096];
        assert!(!mapping.read(&mut into, 0));
        assert!(mapping.read(&mut into[..4096], 0));
    }

    #[test]
    fn a_window_moves_over_a_file() {
        let scratch = crate::store::scratch::Scratch::new();
        let path = scratch.join("live");
        let size = 9 * (1 << 20) + 100;
        let bytes: Vec<u8> = (0..size).map(|at| (at / 4096 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let mut window = Window::new();
        // As if it were on XFS.
        window.file = Some((3, true));
        let mut into = vec![0; 1 << 16];
        for at in (0..144).map(|chunk| chunk << 16) {
            assert!(window.read(3, &file, size as u64, &mut into, at as u64));
            assert!(into == bytes[at..at + (1 << 16)], "at {at}");
            assert!(window.mapping.as_ref().unwrap().len as u64 <= LEN);
        }
        let mut rest = [0; 100];
        assert!(!window.read(3, &file, size as u64, &mut rest, 9 << 20));
        assert!(window.file.is_some_and(|(_, is_looked_at)| is_looked_at));
    }
}
