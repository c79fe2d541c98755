//! Comparing and copying directory trees, independent of all product code.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::process;

/// One line for each entry under `dir` and what it holds (kind, mode, size,
/// content, target; no times), sorted; entries whose path ends with one of
/// `except` are left out.
pub fn listing(dir: &Path, except: &[&str]) -> Vec<String> {
    let mut lines = Vec::new();
    walk(dir, dir, except, &mut lines);
    lines.sort();
    lines
}

fn walk(root: &Path, dir: &Path, except: &[&str], lines: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a readable directory").flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root).expect("below the root");
        if except.iter().any(|e| name.to_string_lossy().ends_with(e)) {
            continue;
        }
        let Ok(meta) = fs::symlink_metadata(&path) else {
            lines.push(format!("{name:?} vanished"));
            continue;
        };
        let kind = meta.file_type();
        let detail = if kind.is_dir() {
            walk(root, &path, except, lines);
            "dir".to_owned()
        } else if kind.is_symlink() {
            format!("-> {:?}", fs::read_link(&path).expect("a link"))
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else if kind.is_file() {
            let bytes = fs::read(&path).expect("a readable file");
            format!("{} bytes {:016x}", bytes.len(), digest(&bytes))
        } else {
            "other".to_owned()
        };
        lines.push(format!(
            "{:?} {:o} {detail}",
            String::from_utf8_lossy(name.as_os_str().as_bytes()),
            meta.mode() & 0o7777
        ));
    }
}

/// FNV-1a, 64 bits.
fn digest(bytes: &[u8]) -> u64 {
    let step = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// What `rsync` finds different between two trees: bytes, modes, owners, times,
/// links, hard links, ACLs, xattrs, sparseness aside. Empty if nothing.
pub fn rsync_difference(live: &Path, copy: &Path) -> String {
    let with_slash = |p: &Path| format!("{}/", p.display());
    let mut command = Command::new("rsync");
    command
        // Without the window, fractions of seconds are not compared.
        .args(["-aHAXSn", "--modify-window=-1"])
        .args(["--checksum", "--delete", "--itemize-changes"])
        .args(["--numeric-ids", &with_slash(live), &with_slash(copy)]);
    process::run(command, Duration::from_secs(120))
        .ok("rsync")
        .out()
}

/// Copies `from` to `to` the way a user without snapshim would: one clone, or,
/// where the file system has none, one pass of reads and writes.
pub fn copy_plainly(from: &Path, to: &Path) -> io::Result<()> {
    /// `_IOW(0x94, 9, int)`
    const FICLONE: libc::Ioctl = 0x4004_9409;
    let source = File::open(from)?;
    let copy = File::create(to)?;
    // SAFETY: both descriptors are open; the call takes no pointer.
    let done = unsafe { libc::ioctl(copy.as_raw_fd(), FICLONE, source.as_raw_fd()) };
    if done != 0 {
        fs::copy(from, to)?;
    }
    Ok(())
}
