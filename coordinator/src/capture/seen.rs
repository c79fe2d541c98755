//! What a stat said, in one form for all architectures.

use rustix::fs::{FileType, Stat};
use snapshim_gate::table::FileId;

use crate::store::manifest::{Device, Kind};

/// The parts of a stat that are recorded or compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) id: FileId,
    /// With the file type bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) nlink: u64,
    pub(super) size: u64,
    /// Of a device node: what device it stands for.
    pub(super) rdev: u64,
    /// ns since 1970.
    pub(super) mtime_ns: i64,
    /// ns since 1970.
    pub(super) ctime_ns: i64,
}

impl Seen {
    // The fields' types differ between architectures: what is a cast on one is none on another.
    #[allow(clippy::unnecessary_cast)]
    pub(super) fn of(stat: &Stat) -> Seen {
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

    pub(super) fn kind(&self) -> Kind {
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
    pub(super) fn device(&self) -> Option<Device> {
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

    /// Permission bits with set-id and sticky bits.
    pub(super) fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }
}

/// Saturates beyond the years 1677 and 2262, which file systems can store.
fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}
