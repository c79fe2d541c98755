//! Capturing after the cut into a store that has no room for it: nothing is published and nothing is left,
//! the program goes on, and what was wrong is told. `guarded.rs` has the rest.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use snapshim_tests::fs::Small;
use snapshim_tests::process::{Proc, wait_until};
use snapshim_tests::{Fs, Lab, lab};

const MIB: u64 = 1 << 20;
/// The file, and where it has been written to. A sweep has 64 MiB in memory at most that are not written.
const SIZE: u64 = 160 * MIB;
const WRITTEN: u64 = 150 * MIB;
const GUARD: [&str; 2] = ["--capture", "copy-before-write"];

/// Overwrites blocks of what has been written.
const OVERWRITE: &str = "import os,random,sys,time
f = os.open(sys.argv[1], os.O_RDWR); n = int(sys.argv[2]) // 4096; b = os.urandom(4096)
while True: os.pwrite(f, b, random.randrange(n) * 4096); time.sleep(0.0005)";

/// A program that overwrites one file, and a store beside it, on a file system of their own.
struct Scene {
    writer: Proc,
    file: PathBuf,
    lab: Lab,
    small: Small,
}

impl Scene {
    fn new(name: &str, fs: Fs, has_hole: bool) -> Option<Scene> {
        let small = fs.mount_small(name, 600 * MIB)?;
        let lab = Lab::on_small(&small, name, Duration::from_secs(240));
        let path = lab.data().join("file");
        let file = fs::File::create(&path).unwrap();
        // Before there is anything in it: nothing is allocated ahead within the size.
        file.set_len(SIZE).unwrap();
        let written = if has_hole { WRITTEN } else { SIZE };
        for at in (0..written).step_by(MIB as usize) {
            file.write_all_at(&[1; MIB as usize], at).unwrap();
        }
        file.sync_all().unwrap();
        let blocks = file.metadata().unwrap().blocks();
        assert_eq!(blocks * 512 < SIZE, has_hole, "{blocks} blocks");
        let args = [
            "-c",
            OVERWRITE,
            path.to_str().unwrap(),
            &WRITTEN.to_string(),
        ];
        let writer = lab.run(&[], Path::new("/usr/bin/python3"), &args);
        let mut scene = Scene {
            writer,
            file: path,
            lab,
            small,
        };
        scene.goes_on();
        Some(scene)
    }

    #[track_caller]
    fn goes_on(&mut self) {
        let written = || {
            let stat = fs::metadata(&self.file).unwrap();
            (stat.mtime(), stat.mtime_nsec())
        };
        let before = written();
        let goes_on = wait_until(Duration::from_secs(20), || written() != before);
        assert!(goes_on && self.writer.is_running(), "the program stands");
    }

    /// Takes all room but so many bytes.
    fn fill(&self, leave: u64) -> PathBuf {
        let path = self.lab.beside("filler");
        let filler = fs::File::create(&path).unwrap();
        // What is kept for root is ours.
        let room = || {
            let stat = statvfs(self.small.path()).unwrap();
            stat.blocks_free() * stat.fragment_size()
        };
        // What a file system needs for itself differs.
        for _ in 0..10 {
            let more = room().saturating_sub(leave);
            if more < MIB {
                break;
            }
            let at = filler.metadata().unwrap().len();
            let flags = FallocateFlags::empty();
            fallocate(&filler, flags, at as i64, more as i64).unwrap();
        }
        path
    }

    /// What is in the store, whatever it is, but for names of the store's own.
    fn left(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.lab.store().join(self.lab.set())) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut left: Vec<String> = names.filter(|name| name != ".lock").collect();
        left.sort();
        left
    }
}

fn without_room(fs: Fs, has_hole: bool) {
    let _alone = lab::serial();
    let name = format!("room-{}-{has_hole}", fs.name());
    let Some(mut scene) = Scene::new(&name, fs, has_hole) else {
        return;
    };
    let filler = scene.fill(SIZE / 2);
    for round in 0..3 {
        let outcome = scene.lab.checkpoint(&GUARD);
        let error = &outcome.stderr;
        assert_eq!(outcome.code, 1, "{error}");
        assert!(outcome.certificate.is_none());
        let (failed, when) = match has_hole {
            true => ("cannot write to", "in the sweep"),
            false => ("cannot reserve room for", "before the hold"),
        };
        assert!(error.contains(failed), "not {when}: {error}");
        assert!(error.contains("the store's file system is full"), "{error}");
        assert!(error.contains("free space there"), "{error}");
        assert_eq!(scene.left(), [""; 0], "round {round}");
        scene.goes_on();
    }
    fs::remove_file(filler).unwrap();
    let outcome = scene.lab.checkpoint(&GUARD);
    assert_eq!(outcome.verified().capture(), "copy-before-write");
    scene.goes_on();
}

/// Room is reserved before the hold, if the file has no holes.
#[test]
fn there_is_no_room_before_the_cut() {
    for fs in [Fs::Xfs, Fs::Ext4, Fs::Tmpfs] {
        without_room(fs, false);
    }
}

/// Of a file that has some, it is not known how much it will be.
#[test]
fn room_ends_in_the_sweep() {
    for fs in [Fs::Xfs, Fs::Ext4, Fs::Tmpfs] {
        without_room(fs, true);
    }
}
