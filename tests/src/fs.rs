//! Mounted file systems to test on, one of each kind per test binary.

use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use crate::process;

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fs {
    /// XFS with reflink, in a loop image.
    Xfs,
    /// btrfs, in a loop image.
    Btrfs,
    /// ext4, in a loop image.
    Ext4,
    /// tmpfs.
    Tmpfs,
}

/// All kinds.
pub const ALL: [Fs; 4] = [Fs::Xfs, Fs::Btrfs, Fs::Ext4, Fs::Tmpfs];

/// Names of images and mount points begin with this, then the id and start
/// time of the test process.
const PREFIX: &str = "snapshim-test-";

/// Size of an image; sparse.
static IMAGE_BYTES: AtomicU64 = AtomicU64::new(4 << 30);

/// Whether images are to be like disks: see [`set_like_disks`].
static LIKE_DISKS: AtomicBool = AtomicBool::new(false);

/// Makes the images that are mounted from now on behave more like disks: they are written once, so
/// that no space has to be found for them later, and their loop devices pass requests on (direct I/O),
/// where otherwise a worker of the kernel copies all data into the page cache, with a processor
/// that it keeps.
pub fn set_like_disks() {
    LIKE_DISKS.store(true, Ordering::Relaxed);
}

/// Makes the images that are mounted from now on this large; a tmpfs gets the half of it.
pub fn set_image_bytes(bytes: u64) {
    IMAGE_BYTES.store(bytes, Ordering::Relaxed);
}

/// Unmounts what this process has mounted, so that the next kind has the disk for itself.
pub fn unmount_all() {
    mounts().clear();
}

/// Ends what the test process `pid`, which is gone, has left running: processes whose
/// environment names its directories. They would keep its mounts busy.
pub fn kill_users_of(pid: i32) {
    let tag = format!("SNAPSHIM_DIR=/dev/shm/{PREFIX}{pid}-");
    let users = || process::with_environment_like(&tag);
    for user in users() {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(user),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    process::wait_until(Duration::from_secs(5), || users().is_empty());
}

/// Cleans up after processes of tests and benchmarks that are gone.
pub fn sweep_leftovers() {
    for dir in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        sweep(&dir, is_leftover);
    }
}

static MOUNTS: Mutex<Vec<(Fs, Mount)>> = Mutex::new(Vec::new());

fn mounts() -> MutexGuard<'static, Vec<(Fs, Mount)>> {
    MOUNTS.lock().unwrap_or_else(|e| e.into_inner())
}

/// One mount, undone when dropped.
#[derive(Debug)]
struct Mount {
    point: PathBuf,
    image: Option<PathBuf>,
}

impl Fs {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Fs::Xfs => "xfs",
            Fs::Btrfs => "btrfs",
            Fs::Ext4 => "ext4",
            Fs::Tmpfs => "tmpfs",
        }
    }

    /// Whether it can share blocks between files.
    pub fn has_reflink(self) -> bool {
        matches!(self, Fs::Xfs | Fs::Btrfs)
    }

    /// This test binary's mount of that kind; made when first asked for.
    ///
    /// `None` only if `SNAPSHIM_TEST_NO_MOUNTS=1`, and then it is said.
    #[track_caller]
    pub fn mount(self) -> Option<PathBuf> {
        prepare();
        let mut mounts = mounts();
        if let Some((_, mount)) = mounts.iter().find(|(fs, _)| *fs == self) {
            return Some(mount.point.clone());
        }
        let mount = if crate::flag("SNAPSHIM_TEST_NO_MOUNTS") {
            if self != Fs::Tmpfs {
                eprintln!("SKIPPED on {}: SNAPSHIM_TEST_NO_MOUNTS is set", self.name());
                return None;
            }
            let point = Path::new("/dev/shm").join(tag()).with_extension("tmpfs");
            fs::create_dir_all(&point).expect("a directory in /dev/shm");
            Mount { point, image: None }
        } else {
            // Of memory there is less than of sparse files.
            let image = IMAGE_BYTES.load(Ordering::Relaxed);
            let bytes = if self == Fs::Tmpfs { image / 2 } else { image };
            self.make(&tag(), bytes)
        };
        let point = mount.point.clone();
        mounts.push((self, mount));
        Some(point)
    }

    /// A file system of that kind and of `bytes`, for one test that fills it; unmounted when
    /// it is dropped.
    ///
    /// `None` only if `SNAPSHIM_TEST_NO_MOUNTS=1`, and then it is said.
    #[track_caller]
    pub fn mount_small(self, name: &str, bytes: u64) -> Option<Small> {
        prepare();
        if crate::flag("SNAPSHIM_TEST_NO_MOUNTS") {
            eprintln!("SKIPPED on {}: SNAPSHIM_TEST_NO_MOUNTS is set", self.name());
            return None;
        }
        Some(Small(self.make(&format!("{}.{name}", tag()), bytes)))
    }

    #[track_caller]
    fn make(self, name: &str, bytes: u64) -> Mount {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests mount file systems and need root; \
             set SNAPSHIM_TEST_NO_MOUNTS=1 to leave out what cannot be done without"
        );
        let base = |what: &str| std::env::temp_dir().join(format!("{name}.{what}"));
        let point = base(self.name());
        let mut mount = Mount {
            point: point.clone(),
            image: None,
        };
        fs::create_dir_all(&point).expect("a mount point in the temporary directory");
        let at = point.to_str().expect("UTF-8 path");
        if self == Fs::Tmpfs {
            process::tool(
                "mount",
                &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs", at],
            );
            return mount;
        }
        let image = base(&format!("{}-image", self.name()));
        let file = fs::File::create(&image).expect("an image in the temporary directory");
        mount.image = Some(image.clone());
        match LIKE_DISKS.load(Ordering::Relaxed) {
            true => fill(&file, bytes),
            false => file.set_len(bytes).expect("a sparse image"),
        }
        drop(file);
        let image = image.to_str().expect("UTF-8 path");
        // Of an image, discarding would make it sparse again.
        match self {
            Fs::Xfs => process::tool("mkfs.xfs", &["-q", "-f", "-K", "-m", "reflink=1", image]),
            Fs::Btrfs => process::tool("mkfs.btrfs", &["-q", "-f", "-K", image]),
            _ => process::tool("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", image]),
        };
        mount.attach();
        mount
    }
}

/// A small file system; see [`Fs::mount_small`].
#[derive(Debug)]
pub struct Small(Mount);

impl Small {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0.point
    }

    /// Unmounts it, and mounts it again.
    #[track_caller]
    pub fn mount_again(&self) {
        let at = self.path().to_str().expect("UTF-8 path");
        process::tool("umount", &[at]);
        self.0.attach();
    }

    /// The same, and what is in memory only is lost, as if the power had been. XFS.
    #[track_caller]
    pub fn crash(&self) {
        let at = self.path().to_str().expect("UTF-8 path");
        process::tool("xfs_io", &["-x", "-c", "shutdown", at]);
        self.mount_again();
    }
}

impl Mount {
    /// Mounts its image.
    #[track_caller]
    fn attach(&self) {
        let image = self.image.as_deref().expect("an image");
        let mut command = Command::new("mount");
        // btrfs discards by itself: that would make an image sparse again.
        let like_disks = LIKE_DISKS.load(Ordering::Relaxed);
        let is_btrfs = self.point.extension().is_some_and(|kind| kind == "btrfs");
        let options = match like_disks && is_btrfs {
            true => "loop,noatime,nodiscard",
            false => "loop,noatime",
        };
        command.args(["-o", options]).args([image, &self.point]);
        let ended = process::run(command, Duration::from_secs(60));
        assert!(
            ended.code() == 0,
            "cannot mount {} from a loop device: {}\
             set SNAPSHIM_TEST_NO_MOUNTS=1 to leave out what needs one",
            image.display(),
            ended.err()
        );
        if like_disks {
            for device in loop_devices(image) {
                let mut command = Command::new("losetup");
                command.args(["--direct-io=on", &device]);
                let ended = process::run(command, Duration::from_secs(60));
                assert!(
                    ended.code() == 0,
                    "{device} cannot pass requests on to {}: {}\
                     `bench peers --buffered-loops` does without",
                    image.display(),
                    ended.err()
                );
            }
        }
    }
}

/// Writes zeros, once it is sure that there is room for them.
fn fill(mut file: &fs::File, bytes: u64) {
    let length = i64::try_from(bytes).expect("a size");
    fallocate(file, FallocateFlags::empty(), 0, length)
        .expect("room for an image in the temporary directory");
    let zeros = vec![0; 4 << 20];
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(zeros.len() as u64);
        file.write_all(&zeros[..piece as usize])
            .expect("room for an image in the temporary directory");
        left -= piece;
    }
    file.sync_all().expect("an image on disk");
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

impl Drop for Mount {
    fn drop(&mut self) {
        discard(&self.point, self.image.as_deref());
    }
}

/// This process's part of the names.
fn tag() -> String {
    let pid = std::process::id();
    let start = process::start_time(pid as i32).unwrap_or(0);
    format!("{PREFIX}{pid}-{start}")
}

/// A fresh directory on tmpfs with this process's tag.
pub fn shm_dir(name: &str) -> PathBuf {
    prepare();
    let path = Path::new("/dev/shm").join(format!("{}.{name}", tag()));
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(&path)
        .expect("a directory in /dev/shm");
    path
}

/// Undoes a mount, whatever state it is in. The loop device goes with it: it
/// was set up by `mount` and detaches itself.
fn discard(point: &Path, image: Option<&Path>) {
    let is_mounted = fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .any(|line| line.split(' ').nth(1) == point.to_str());
    if is_mounted {
        let unmount = |options: &[&str]| {
            let mut command = Command::new("umount");
            command.args(options).arg(point);
            process::run(command, Duration::from_secs(60)).code() == 0
        };
        if !unmount(&[]) && !unmount(&["--lazy"]) {
            eprintln!("cannot unmount {}", point.display());
            return;
        }
        let _ = fs::remove_dir(point);
    } else {
        let _ = fs::remove_dir_all(point);
    }
    if let Some(image) = image {
        for device in loop_devices(image) {
            let mut command = Command::new("losetup");
            command.args(["-d", &device]);
            process::run(command, Duration::from_secs(60));
        }
        let _ = fs::remove_file(image);
    }
}

/// Loop devices still attached to an image.
fn loop_devices(image: &Path) -> Vec<String> {
    let mut command = Command::new("losetup");
    command.args(["-n", "-O", "NAME", "-j"]).arg(image);
    let ended = process::run(command, Duration::from_secs(60));
    ended.out().lines().map(|l| l.trim().to_owned()).collect()
}

/// Once per process: cleans up after killed runs, and after this one at its end.
fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        extern "C" fn at_exit() {
            mounts().clear();
            sweep(Path::new("/dev/shm"), |name| name.starts_with(&tag()));
        }
        // SAFETY: the handler is a plain function; it runs when `main` is done.
        unsafe { libc::atexit(at_exit) };
        // Orphans of a test come to us, so that ids are not reused under it.
        // SAFETY: sets an attribute of this process.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1 as libc::c_ulong) };
        sweep_leftovers();
    });
}

/// Whether `name` belongs to a test process that is gone.
fn is_leftover(name: &str) -> bool {
    let owner = || {
        let rest = name.strip_prefix(PREFIX)?;
        let (pid, start) = rest.split('.').next()?.split_once('-')?;
        Some((pid.parse::<i32>().ok()?, start.parse::<u64>().ok()?))
    };
    owner().is_some_and(|(pid, start)| process::start_time(pid) != Some(start))
}

/// Removes what `which` names in `dir`: mount points first, then images.
fn sweep(dir: &Path, which: impl Fn(&str) -> bool) {
    let mut names: Vec<String> = fs::read_dir(dir)
        .map(|d| {
            d.flatten()
                .filter_map(|e| e.file_name().into_string().ok())
                .filter(|name| which(name))
                .collect()
        })
        .unwrap_or_default();
    names.sort_by_key(|name| name.ends_with("-image"));
    for name in names {
        let path = dir.join(&name);
        if name.ends_with("-image") {
            discard(Path::new("/nonexistent"), Some(&path));
        } else {
            discard(&path, None);
        }
    }
}
