//! Whatever ends a command that works on a store, SIGKILL at any moment or a file system that
//! is full: every snapshot that is listed passes `verify --all`, `latest` is one of the good
//! ones, and the next command that changes the store and completes leaves nothing of it.
//!
//! The checker has its control: it is shown each kind of damage and of left-over.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use snapshim_tests::process::{Ended, run, wait_until};
use snapshim_tests::{Fs, Lab, Proc, Random, full, product, rounds};

const SOON: Duration = Duration::from_secs(60);
const FILES: usize = 6;
const BYTES: usize = 128 << 10;

/// What is done to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Checkpoint,
    /// With a command that writes to its copy.
    Checked,
    /// That takes out old ones.
    Keeping,
    Prune,
    Delete,
    Pin,
    Unpin,
    Restore,
}

use Action::{Checked, Checkpoint, Delete, Keeping, Pin, Prune, Restore, Unpin};

const ALL: [Action; 8] = [
    Checkpoint, Checked, Keeping, Prune, Delete, Pin, Unpin, Restore,
];
/// Those that change the store, and are expected to clear away what is left there.
const CLEARING: [Action; 5] = [Checkpoint, Keeping, Prune, Delete, Pin];

/// A store under test, and a program that writes to what is watched.
struct Site<'a> {
    lab: &'a Lab,
    base: PathBuf,
    writer: Proc,
}

impl<'a> Site<'a> {
    #[track_caller]
    fn new(lab: &'a Lab, base: &Path) -> Site<'a> {
        let data = base.join("data");
        fs::create_dir_all(&data).unwrap();
        let mut command = lab.snapshim(&["run", "--name", lab.set(), "--watch"]);
        command.arg(&data).arg("--store").arg(base.join("store"));
        command.arg("--").arg(product::program("churn")).arg(&data);
        command.args([FILES.to_string(), BYTES.to_string()]);
        let mut site = Site {
            lab,
            base: base.to_owned(),
            writer: Proc::piped(command),
        };
        let last = data.join(format!("file-{}", FILES - 1));
        let began = wait_until(SOON, || last.exists() || !site.writer.is_running());
        assert!(began && last.exists(), "the writer does not write");
        site
    }

    /// The set's directory.
    fn dir(&self) -> PathBuf {
        self.base.join("store").join(self.lab.set())
    }

    /// Where `restore --to` puts things.
    fn to(&self) -> PathBuf {
        self.base.join("to")
    }

    fn over(&self, command: &str, args: &[&str]) -> Command {
        let mut line = self.lab.snapshim(&[command, self.lab.set()]);
        line.args(args);
        line
    }

    fn command(&self, action: Action) -> Command {
        const CHECK: &str = "test -s \"$SNAPSHIM_ROOT/file-0\" && echo more > \"$SNAPSHIM_ROOT/more\" && sleep 0.03";
        match action {
            Checkpoint => self.over("checkpoint", &["--json"]),
            Checked => self.over("checkpoint", &["--verify", CHECK, "--writable"]),
            Keeping => self.over("checkpoint", &["--keep-last", "3"]),
            Prune => self.over("prune", &["--keep-last", "3"]),
            Delete => self.over("delete", &["latest"]),
            Pin => self.over("pin", &["latest", "--note", "kept"]),
            Unpin => self.over("unpin", &["latest"]),
            Restore => {
                let mut command = self.over("restore", &["latest", "--to"]);
                command.arg(self.to());
                command
            }
        }
    }

    /// Makes what an action needs: some snapshots, the newest of them not pinned.
    #[track_caller]
    fn furnish(&self, action: Action) {
        while self.ids().len() < 5 {
            self.complete(Checkpoint);
        }
        if self.ids().len() > 10 {
            self.complete(Prune);
        }
        if action == Delete {
            self.complete(Unpin);
        }
    }

    /// Runs a command to its end.
    #[track_caller]
    fn complete(&self, action: Action) {
        if action == Delete {
            run(self.command(Unpin), SOON).ok("unpin");
        }
        run(self.command(action), SOON).ok(&format!("{action:?}"));
    }

    fn names(&self) -> Vec<String> {
        // Made by the first checkpoint.
        let names = fs::read_dir(self.dir()).into_iter().flatten();
        let mut names: Vec<String> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn ids(&self) -> Vec<String> {
        let mut names = self.names();
        names.retain(|name| name.starts_with(|first: char| first.is_ascii_digit()));
        names
    }

    /// The listed snapshots that their own manifests call good, by a reading of our own.
    fn good(&self) -> Vec<String> {
        let is_good = |id: &String| {
            let text = fs::read(self.dir().join(id).join("manifest.json")).unwrap_or_default();
            serde_json::from_slice::<Value>(&text).is_ok_and(|m| m["verified"] == true)
        };
        let mut ids = self.ids();
        ids.retain(is_good);
        ids
    }

    fn latest(&self) -> Option<String> {
        let link = fs::read_link(self.dir().join("latest")).ok()?;
        Some(link.to_string_lossy().into_owned())
    }

    fn verify(&self) -> Ended {
        run(self.over("verify", &["--all", "--json"]), SOON)
    }

    /// What is wrong with the store; must be nothing at any moment.
    fn faults(&self) -> Vec<String> {
        let ended = self.verify();
        let mut faults = Vec::new();
        let Ok(report) = serde_json::from_slice::<Value>(&ended.stdout) else {
            return vec![format!("verify: exit {}: {}", ended.code(), ended.err())];
        };
        let looked_at = report["snapshots"].as_array().cloned().unwrap_or_default();
        for one in looked_at.iter().filter(|one| one["good"] != true) {
            faults.push(format!("{}: {} {}", one["id"], one["error"], one["damage"]));
        }
        if (ended.code() == 0) != faults.is_empty() {
            faults.push(format!("verify: exit {}: {}", ended.code(), ended.err()));
        }
        let looked_at: Vec<&str> = looked_at.iter().filter_map(|o| o["id"].as_str()).collect();
        if looked_at != self.ids() {
            faults.push(format!("verified {looked_at:?} of {:?}", self.ids()));
        }
        let good = self.good();
        match self.latest() {
            Some(latest) if good.contains(&latest) => {}
            None if good.is_empty() => {}
            latest => faults.push(format!("latest is {latest:?}, good are {good:?}")),
        }
        faults
    }

    /// What must not be there after a command that completed.
    fn left_over(&self) -> Vec<String> {
        let mut left = Vec::new();
        for name in self.names() {
            let path = self.dir().join(&name);
            if self.ids().contains(&name) {
                for entry in fs::read_dir(&path).unwrap() {
                    let entry = entry.unwrap().file_name().into_string().unwrap();
                    if !["manifest.json", "digests", "tree"].contains(&entry.as_str()) {
                        left.push(format!("{name}/{entry}"));
                    }
                }
            } else if name != ".lock" && name != "latest" {
                left.push(name);
            }
        }
        let beside = fs::read_dir(&self.base).unwrap();
        let mut to_do: Vec<PathBuf> = beside.map(|e| e.unwrap().path()).collect();
        while let Some(path) = to_do.pop() {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with(".snapshim-restore") {
                left.push(path.display().to_string());
            } else if path.starts_with(self.to()) && path.is_dir() && !path.is_symlink() {
                to_do.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
        }
        if self.latest().as_ref() != self.good().last() {
            let (latest, good) = (self.latest(), self.good());
            left.push(format!("latest at {latest:?}, the newest good: {good:?}"));
        }
        left
    }

    /// After an action that did not come to its end: the store is whole, and the next
    /// command clears away the rest.
    #[track_caller]
    fn judge(&self, what: &str, was: Action, random: &mut Random, relieve: impl FnOnce()) {
        let faults = self.faults();
        assert!(faults.is_empty(), "{what}: {faults:#?}");
        let left = self.left_over();
        relieve();
        if was == Restore {
            // It may have come to its end, but for telling.
            let mut again = self.command(Restore);
            again.arg("--overwrite");
            run(again, SOON).ok("restore again");
        }
        let next = CLEARING[random.below(CLEARING.len() as u64) as usize];
        self.complete(next);
        let still = self.left_over();
        assert!(
            still.is_empty(),
            "{what}, then {next:?}: {still:#?} of {left:#?}"
        );
        let _ = fs::remove_dir_all(self.to());
    }
}

fn lab(name: &str, kind: Fs) -> Option<Lab> {
    Lab::new(
        name,
        kind,
        Duration::from_secs(if full() { 900 } else { 240 }),
    )
}

/// Kills every action at random moments of the time it takes.
fn killed(kind: Fs, count: usize) {
    let Some(lab) = lab("store-killed", kind) else {
        return;
    };
    let site = Site::new(&lab, &lab.beside("site"));
    let mut random = Random(4);
    let (mut hits, mut left, mut round) = (BTreeMap::<Action, usize>::new(), 0, 0);
    let mut takes = BTreeMap::new();
    while hits.values().sum::<usize>() < count {
        // The one that was hit least: some are over soon.
        let action = *ALL.iter().min_by_key(|a| hits.get(a)).unwrap();
        round += 1;
        assert!(round < count * 5, "commands are over too soon: {hits:?}");
        site.furnish(action);
        let whole = *takes.entry(action).or_insert_with(|| {
            let begun = Instant::now();
            run(site.command(action), SOON).ok("a command that is not killed");
            let took = begun.elapsed();
            let _ = fs::remove_dir_all(site.to());
            site.furnish(action);
            took
        });
        let mut proc = Proc::piped(site.command(action));
        let moment = Duration::from_micros(random.below(whole.as_micros() as u64));
        std::thread::sleep(moment);
        proc.signal(Signal::SIGKILL);
        let ended = proc.wait(SOON);
        if ended.code() != 128 + Signal::SIGKILL as i32 {
            assert_eq!(ended.code(), 0, "{action:?}: {}", ended.err());
        } else {
            *hits.entry(action).or_default() += 1;
        }
        left += usize::from(!site.left_over().is_empty());
        let what = format!("{action:?} killed after {moment:?} of {whole:?}");
        site.judge(&what, action, &mut random, || ());
    }
    println!(
        "{}: killed {count} commands ({hits:?}); {left} left something, all of it gone after the next",
        kind.name()
    );
    assert!(left > 0, "none was killed midway");
}

#[test]
fn killed_at_any_moment_on_xfs() {
    killed(Fs::Xfs, rounds(100, 16));
}

#[test]
fn killed_at_any_moment_on_ext4() {
    killed(Fs::Ext4, rounds(100, 16));
}

/// Every action on a file system with little or no room.
fn without_room(kind: Fs, size: u64, count: usize) {
    let Some(small) = kind.mount_small(&format!("crash-{}", kind.name()), size) else {
        return;
    };
    let Some(lab) = lab(&format!("store-no-room-{}", kind.name()), Fs::Tmpfs) else {
        return;
    };
    let site = Site::new(&lab, small.path());
    let mut random = Random(5);
    let (mut failed, mut round) = (0, 0);
    while failed < count {
        let action = ALL[round % ALL.len()];
        round += 1;
        assert!(
            round < count * 10,
            "only {failed} of {round} commands had no room"
        );
        site.furnish(action);
        let filler = small.path().join("filler");
        fill(&filler, random.below(2 * (FILES * BYTES) as u64));
        let ended = run(site.command(action), SOON);
        assert_ne!(ended.code(), -1, "{action:?} hangs");
        failed += usize::from(ended.code() != 0);
        let what = format!(
            "{action:?} without room ({}: {})",
            ended.code(),
            ended.err()
        );
        site.judge(&what, action, &mut random, || {
            fs::remove_file(&filler).unwrap();
            nix::unistd::sync();
        });
    }
    println!(
        "{}: {failed} of {round} commands failed for want of room; every snapshot stayed whole",
        kind.name()
    );
}

/// Takes all room of a file system but about `left` bytes.
fn fill(path: &Path, left: u64) {
    let file = fs::File::create(path).unwrap();
    let mut length = 0;
    for block in [1 << 20, 64 << 10, 4 << 10] {
        let bytes = vec![7; block];
        while let Ok(wrote @ 1..) = file.write_at(&bytes, length) {
            length += wrote as u64;
        }
    }
    let _ = file.sync_all();
    file.set_len(length.saturating_sub(left)).unwrap();
    let _ = file.sync_all();
}

#[test]
fn a_full_file_system_on_ext4() {
    without_room(Fs::Ext4, 48 << 20, rounds(25, 5));
}

#[test]
fn a_full_file_system_on_xfs() {
    without_room(Fs::Xfs, 320 << 20, rounds(25, 5));
}

/// The control: damage and left-overs of each kind are noticed.
#[test]
fn the_checker_notices() {
    let Some(lab) = lab("store-crash-control", Fs::Xfs) else {
        return;
    };
    let site = Site::new(&lab, &lab.beside("site"));
    for _ in 0..3 {
        site.complete(Checkpoint);
    }
    let clean = || {
        assert_eq!(site.faults(), [""; 0]);
        assert_eq!(site.left_over(), [""; 0]);
    };
    clean();
    let ids = site.ids();
    let (oldest, newest) = (site.dir().join(&ids[0]), site.dir().join(&ids[2]));
    let data = site.base.join("data");
    let file = oldest
        .join("tree")
        .join(data.strip_prefix("/").unwrap())
        .join("file-3");
    let manifest = oldest.join("manifest.json");
    let was = fs::read(&manifest).unwrap();
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    let noticed = |what: &str, which: &str| {
        let faults = site.faults();
        assert!(
            faults.iter().any(|f| f.contains(which)),
            "{what}: {faults:?}"
        );
    };

    // One byte, with the times put back.
    let byte = {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&file)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 70_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 70_000).unwrap();
        file.set_modified(time).unwrap();
        byte
    };
    noticed("a byte", &ids[0]);
    let put_back = fs::OpenOptions::new().write(true).open(&file).unwrap();
    put_back.write_all_at(&byte, 70_000).unwrap();
    put_back.set_modified(time).unwrap();
    fs::write(&manifest, &was).unwrap();
    clean();
    // A file that is not there, one too many, half a manifest and none.
    let aside = site.base.join("aside");
    fs::rename(&file, &aside).unwrap();
    noticed("a missing file", &ids[0]);
    fs::rename(&aside, &file).unwrap();
    fs::write(&manifest, &was[..was.len() / 2]).unwrap();
    noticed("half a manifest", &ids[0]);
    fs::remove_file(&manifest).unwrap();
    noticed("no manifest", &ids[0]);
    fs::write(&manifest, &was).unwrap();
    // The times of the directory the file was moved out of and into.
    let records: Value = serde_json::from_slice(&was).unwrap();
    let of_dir = |r: &&Value| r["path"] == data.to_str().unwrap();
    let record = records["files"]
        .as_array()
        .unwrap()
        .iter()
        .find(of_dir)
        .unwrap();
    let ns = record["mtime_ns"].as_u64().unwrap();
    let dir = fs::File::open(file.parent().unwrap()).unwrap();
    dir.set_modified(std::time::UNIX_EPOCH + Duration::from_nanos(ns))
        .unwrap();
    clean();

    // `latest` that leads nowhere, is not there, and names one that is not good.
    let latest = site.dir().join("latest");
    let point = |to: &str| {
        fs::remove_file(&latest).unwrap();
        symlink(to, &latest).unwrap();
    };
    point("20200101T000000.000000Z");
    noticed("a dangling latest", "latest is");
    point(&ids[1]);
    assert_eq!(site.faults(), [""; 0]);
    assert!(site.left_over()[0].contains("the newest good"));
    point(&ids[2]);
    let newest_was = fs::read(newest.join("manifest.json")).unwrap();
    let bad = String::from_utf8(newest_was.clone()).unwrap();
    let bad = bad.replacen("\"verified\": true", "\"verified\": false", 1);
    fs::write(newest.join("manifest.json"), bad).unwrap();
    noticed("a latest that is not good", "latest is");
    fs::write(newest.join("manifest.json"), newest_was).unwrap();
    fs::remove_file(&latest).unwrap();
    noticed("no latest", "latest is None");
    symlink(&ids[2], &latest).unwrap();
    clean();

    // Left-overs.
    let dir = site.dir();
    for path in [
        dir.join(format!(".tmp-{}", ids[0])),
        dir.join(format!(".del-{}", ids[0])),
        dir.join(format!(".tmp-verify-{}-1-0", ids[0])),
        dir.join(".tmp-latest"),
        dir.join(".tmp-manifest.json"),
        oldest.join("manifest.json.tmp"),
        site.base.join(".snapshim-restore"),
        site.to().join("srv/.snapshim-restore"),
    ] {
        fs::create_dir_all(&path).unwrap();
        let left = site.left_over();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            left.len() == 1 && left[0].contains(name),
            "{path:?}: {left:?}"
        );
        fs::remove_dir(&path).unwrap();
    }
    let _ = fs::remove_dir_all(site.to());
    clean();
}
