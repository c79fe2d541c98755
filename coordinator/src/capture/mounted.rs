//! Which boot and which mounts files are read from.
//!
//! A ctime is as durable as its inode, and the bytes of a file may be more durable: after
//! fdatasync(2) of an overwrite the bytes stay, while the times may be in memory only. When that
//! memory is lost (power, or a file system that was shut down and mounted again), a file has other
//! bytes than before, and the ctime it had before. So a ctime says that nothing has changed only
//! while the file system has been mounted all the time.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::prepare::Scan;
use crate::store::manifest::{Mount, Mounted};

/// `STATX_MNT_ID_UNIQUE`, Linux 6.8: the id of a mount that no other gets until the next boot.
const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// Where what was found is mounted; `None` if that is not known.
pub(super) fn mounted(scan: &Scan) -> Option<Mounted> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let mounts = scan.places().filter_map(|(dev, place)| {
        let mount = mount_at(place, dev)?;
        Some(Mount { dev, mount })
    });
    Some(Mounted {
        boot: boot.trim().to_owned(),
        mounts: mounts.collect(),
    })
}

/// The mount that a place is on, if that is one of this device. Of a file that is a mount point of its
/// own, the place is the directory around it, which is on another one.
fn mount_at(place: &Path, dev: u64) -> Option<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let ask = |wanted: StatxFlags| {
        let stat = rustix::fs::statx(CWD, place, flags, wanted).ok()?;
        let its_dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        let is_told = stat.stx_mask & wanted.bits() != 0;
        (is_told && its_dev == dev).then_some(stat.stx_mnt_id)
    };
    // Before Linux 6.8 an id that may be another's after an unmount: better than none.
    ask(UNIQUE).or_else(|| ask(StatxFlags::MNT_ID))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_place_of_another_device_tells_nothing() {
        let place = std::env::temp_dir();
        let dev = std::fs::metadata(&place).unwrap().dev();
        assert!(mount_at(&place, dev).is_some());
        assert_eq!(mount_at(&place, dev), mount_at(&place, dev));
        assert_eq!(mount_at(&place, dev + 1), None);
        let proc_dev = std::fs::metadata("/proc").unwrap().dev();
        assert_ne!(
            mount_at(Path::new("/proc"), proc_dev),
            mount_at(&place, dev)
        );
        assert_eq!(mount_at(Path::new("/proc"), dev), None);
    }
}
