//! What a stat said, in one form for all architectures.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, Stat, StatxFlags, statx};
use snapshim_gate::table::FileId;

use super::dirs::as_path;
use crate::store::manifest::{Device, FileRecord, Kind, PathName};

/// The parts of a stat that are recorded or compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) id: FileId,
    /// With the file type bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u64,
    pub(crate) size: u64,
    /// Of a device node: what device it stands for.
    pub(crate) rdev: u64,
    /// ns since 1970.
    pub(crate) mtime_ns: i64,
    /// ns since 1970.
    pub(crate) ctime_ns: i64,
}

impl Seen {
    // The fields' types differ between architectures: what is a cast on one is none on another.
    #[allow(clippy::unnecessary_cast)]
    pub(crate) fn of(stat: &Stat) -> Seen {
        Seen {
            id: FileId {
                dev: stat.st_dev as u64,
                ino: stat.st_ino as u64,
            },
            mode: stat.st_mode as u32,
            uid: stat.st_uid as u32,
            gid: stat.st_gid as u32,
            nlink: stat.st_nlink as u64,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            rdev: stat.st_rdev as u64,
            mtime_ns: nanoseconds(stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            ctime_ns: nanoseconds(stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match FileType::from_raw_mode(self.mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Dir,
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            _ => Kind::Device,
        }
    }

    /// The device a device node stands for.
    pub(crate) fn device(&self) -> Option<Device> {
        let kind = match FileType::from_raw_mode(self.mode) {
            FileType::CharacterDevice => "char",
            FileType::BlockDevice => "block",
            _ => return None,
        };
        Some(Device {
            kind: kind.to_owned(),
            major: rustix::fs::major(self.rdev),
            minor: rustix::fs::minor(self.rdev),
        })
    }

    /// What the manifest says of it. `target` is where a symbolic link points.
    pub(crate) fn record(&self, path: PathBuf, target: Option<&CStr>) -> FileRecord {
        let kind = self.kind();
        FileRecord {
            path: PathName(path),
            kind,
            size: if kind == Kind::File { self.size } else { 0 },
            mode: self.permissions(),
            uid: self.uid,
            gid: self.gid,
            mtime_ns: self.mtime_ns,
            ctime_ns: self.ctime_ns,
            dev: self.id.dev,
            ino: self.id.ino,
            target: target.map(|target| PathName(as_path(target).to_owned())),
            capture: None,
            digest: None,
            device: self.device(),
        }
    }

    /// Permission bits with set-id and sticky bits.
    pub(crate) fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }
}

/// What time it is, as file systems tell it, ns.
pub(crate) fn now_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    #[allow(clippy::unnecessary_cast)] // 32 bits elsewhere
    nanoseconds(now.tv_sec as i64, now.tv_nsec as i64)
}

/// Saturates beyond the years 1677 and 2262, which file systems can store.
pub(crate) fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}
/// When a file was made, ns since 1970, if its file system tells.
pub(crate) fn born_ns(file: impl AsFd) -> Option<i64> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok()?;
    let has = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
    has.then(|| nanoseconds(stat.stx_btime.tv_sec, i64::from(stat.stx_btime.tv_nsec)))
}
