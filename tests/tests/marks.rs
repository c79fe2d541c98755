//! Snapshots built on the one before, by what calls have marked since (`--mark-blocks`): they are
//! as exact as others, they capture little where little was changed, and marks that are missing do
//! not go unnoticed.
//!
//! `SNAPSHIM_TEST_FULL=1` takes 1,000 snapshots.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use snapshim_gate::marks::{MAX_BLOCKS, Marks};
use snapshim_tests::process::Proc;
use snapshim_tests::scribble::{LOAD, Load, faults, number, replays};
use snapshim_tests::stats::distribution;
use snapshim_tests::{Certificate, Fs, Lab, Outcome, Random, lab, process, product, rounds};

const HOW: [&str; 2] = ["--capture", "copy-before-write"];
const MIB: f64 = (1u64 << 20) as f64;

fn marked(certificate: &Certificate, field: &str) -> u64 {
    certificate.0["marked"][field].as_u64().unwrap_or(0)
}

/// The sums over several snapshots.
#[derive(Debug, Default)]
struct Sums {
    published: usize,
    verified: usize,
    inconsistent: usize,
    captured: u64,
    shared: u64,
    built: usize,
    compared: usize,
    others: BTreeMap<String, u32>,
    guards: Vec<f64>,
}

impl Sums {
    fn add(&mut self, outcome: &Outcome) -> Option<Certificate> {
        let Some(certificate) = &outcome.certificate else {
            let error = outcome.stderr.lines().next().unwrap_or_default();
            let error = format!("exit {}: {error}", outcome.code);
            *self.others.entry(error).or_default() += 1;
            assert_eq!(outcome.code, 4, "{}", outcome.stderr);
            return None;
        };
        for (code, text) in certificate.reasons() {
            *self.others.entry(format!("{code}: {text}")).or_default() += 1;
        }
        assert!(!outcome.stderr.contains("mark"), "{}", outcome.stderr);
        self.published += 1;
        self.verified += usize::from(certificate.is_verified());
        self.captured += marked(certificate, "bytes_captured");
        self.shared += marked(certificate, "bytes_shared");
        self.built += usize::from(marked(certificate, "bytes_shared") > 0);
        self.compared += usize::from(marked(certificate, "bytes_compared") > 0);
        self.guards.push(number(certificate, "guard_us") as f64);
        Some(certificate.clone())
    }
}

/// Kills a checkpoint at any moment of it: what it has announced, taken or published, and not yet
/// concluded, must not count for the next.
#[test]
fn after_a_coordinator_that_was_killed() {
    let mut random = Random(9);
    // How long one takes, µs, learnt on the way: every other is killed about when it publishes.
    let mut took = 400_000;
    let mut is_late = false;
    let (mut published, mut killed) = (0, 0);
    let has_run = consistent_with(Fs::Xfs, rounds(150, 15), &mut |lab| {
        let last = |lab: &Lab| fs::read_link(lab.store().join(lab.set()).join("latest")).ok();
        let before = last(lab);
        let args = ["checkpoint", lab.set(), "--json"];
        is_late = !is_late;
        let moment = match is_late {
            true => took * 4 / 5 + random.below(took * 2 / 5),
            false => random.below(took),
        };
        let mut coordinator = Proc::piped(lab.snapshim(&[&args[..], &HOW].concat()));
        std::thread::sleep(Duration::from_micros(moment));
        if coordinator.is_running() {
            coordinator.signal(Signal::SIGKILL);
            coordinator.wait(Duration::from_secs(10));
            killed += 1;
            published += usize::from(last(lab) != before);
            took = took.max(moment * 11 / 10);
        } else {
            took = took.min(moment.max(10_000));
        }
    });
    println!("{killed} were killed, {published} of them had published");
    assert!(!has_run || killed > 0);
    assert!(!has_run || !snapshim_tests::full() || published > 0);
}

/// Everything that `scribble` can do, few times a second: all of it in whole is marked by some.
fn consistent(fs: Fs, count: usize) {
    consistent_with(fs, count, &mut |_| {});
}

/// The same, with `before` before each snapshot; whether there was a file system for it.
fn consistent_with(fs: Fs, count: usize, before: &mut dyn FnMut(&Lab)) -> bool {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("marks", fs, Duration::from_secs(3000)) else {
        return false;
    };
    let load = Load {
        pace_us: 60_000,
        ..LOAD
    };
    let args = load.args(&lab.data());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let options = ["--mark-blocks", "--keep-last", "2", "--max-hold", "5s"];
    let mut writer = lab.run(&options, &product::program("scribble"), &args);
    lab.wait_for_beats(&mut writer, 50);
    let mut replays = replays(&lab, "replay", load);
    let mut sums = Sums::default();
    for _ in 0..count {
        before(&lab);
        let Some(certificate) = sums.add(&lab.checkpoint(&HOW)) else {
            continue;
        };
        assert!(certificate.0["guard_us"].is_u64(), "not guarded");
        let faults = faults(&certificate.copy_of(&lab.data()), &mut replays);
        for fault in &faults {
            eprintln!("{} ({}): {fault}", certificate.id(), fs.name());
        }
        sums.inconsistent += usize::from(!faults.is_empty());
    }
    lab.check_digests();
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(30)).ok("the writer");
    println!(
        "{}: {count} snapshots: {} published, {} verified, {} inconsistent; {} built on the one before, {} compared; \
         {:.1} MiB captured, {:.1} MiB shared; guard {}; else {:?}",
        fs.name(),
        sums.published,
        sums.verified,
        sums.inconsistent,
        sums.built,
        sums.compared,
        sums.captured as f64 / MIB,
        sums.shared as f64 / MIB,
        distribution(&sums.guards),
        sums.others
    );
    assert_eq!(sums.inconsistent, 0);
    assert!(sums.built * 3 >= count, "{} were built", sums.built);
    assert!(sums.compared > 0 || count <= 30, "none was compared");
    assert!(sums.verified * 10 >= count * 9, "{:?}", sums.others);
    true
}

#[test]
fn on_tmpfs() {
    consistent(Fs::Tmpfs, rounds(250, 24));
}

#[test]
fn on_ext4() {
    consistent(Fs::Ext4, rounds(250, 24));
}

#[test]
fn on_xfs() {
    consistent(Fs::Xfs, rounds(250, 24));
}

#[test]
fn on_btrfs() {
    consistent(Fs::Btrfs, rounds(250, 20));
}

const BLOCK: usize = 4096;

/// `blocks` under the gate.
struct Blocks {
    lab: Lab,
    writer: Proc,
    blocks: usize,
    /// What is in each block after `made` writes.
    now: Vec<u64>,
    made: u64,
}

impl Blocks {
    fn new(name: &str, fs: Fs, blocks: usize, pace_us: u32) -> Option<Blocks> {
        let lab = Lab::new(name, fs, Duration::from_secs(900))?;
        let file = lab.data().join("file").display().to_string();
        let args = [&file, &blocks.to_string(), &pace_us.to_string()];
        let options = ["--mark-blocks", "--max-hold", "5s", "--keep-last", "40"];
        let mut writer = lab.run(
            &options,
            &product::program("blocks"),
            &args.map(String::as_str),
        );
        lab.wait_for_beats(&mut writer, 50);
        Some(Blocks {
            lab,
            writer,
            blocks,
            now: vec![0; blocks],
            made: 0,
        })
    }

    fn write(&mut self) {
        self.made += 1;
        let n = self.made;
        let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let place = 1 + (n ^ (n >> 31)) % (self.blocks as u64 - 1);
        self.now[place as usize] = self.made;
    }

    /// What is wrong with the copy in a snapshot.
    fn fault(&mut self, certificate: &Certificate) -> Option<String> {
        let bytes = fs::read(certificate.copy_of(&self.lab.data().join("file"))).unwrap();
        if bytes.len() != self.blocks * BLOCK {
            return Some(format!("{} bytes", bytes.len()));
        }
        let made = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        if made < self.made.saturating_sub(1) {
            return Some(format!("it went back to {made}"));
        }
        while self.made < made {
            self.write();
        }
        if self.made == made && self.difference(&bytes).is_some() {
            // The next one was made, and not yet counted.
            self.write();
        }
        self.difference(&bytes)
    }

    fn difference(&self, bytes: &[u8]) -> Option<String> {
        let wrong = bytes
            .chunks_exact(BLOCK)
            .zip(&self.now)
            .skip(1)
            .position(|(block, number)| {
                block
                    .chunks_exact(8)
                    .any(|word| word != number.to_le_bytes())
            });
        wrong.map(|block| format!("block {} is not that of write {}", block + 1, self.made))
    }

    /// Stops the writer, for long enough to be left alone.
    fn rest(&self) {
        self.signal(Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(200));
    }

    /// To the writer, and not to `snapshim run`.
    fn signal(&self, signal: Signal) {
        for pid in process::descendants(self.writer.pid()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }

    fn end(mut self) {
        self.signal(Signal::SIGCONT);
        self.writer.signal(Signal::SIGTERM);
        self.writer.wait(Duration::from_secs(30)).ok("the writer");
    }
}

/// Few blocks of a large file change.
fn captures_little(fs: Fs) {
    let _alone = lab::serial();
    let Some(mut scene) = Blocks::new("marks-little", fs, 32 << 10, 1_000) else {
        return;
    };
    let mut sums = Sums::default();
    let first = sums.add(&scene.lab.checkpoint(&HOW)).expect("a snapshot");
    assert_eq!(marked(&first, "bytes_shared"), 0);
    assert_eq!(scene.fault(&first), None);
    sums = Sums::default();
    let count = 12;
    for _ in 0..count {
        let certificate = sums.add(&scene.lab.checkpoint(&HOW)).expect("a snapshot");
        assert_eq!(scene.fault(&certificate), None, "{}", certificate.id());
    }
    let (captured, size) = (sums.captured as f64 / f64::from(count) / MIB, 128.0);
    println!(
        "{}: of a file of {size} MiB, {captured:.2} MiB captured for a snapshot; guard {}",
        fs.name(),
        distribution(&sums.guards)
    );
    assert_eq!(sums.built, count as usize);
    assert!(captured < size / 8.0, "{captured} MiB");
    scene.end();
}

#[test]
fn little_is_captured_on_tmpfs() {
    captures_little(Fs::Tmpfs);
}

#[test]
fn little_is_captured_on_ext4() {
    captures_little(Fs::Ext4);
}

#[test]
fn little_is_captured_on_xfs() {
    captures_little(Fs::Xfs);
}

#[test]
fn little_is_captured_on_btrfs() {
    captures_little(Fs::Btrfs);
}

/// A file that was left alone for a snapshot, which so shares the copy of the one before, is built on
/// again when it changes.
#[test]
fn what_was_left_alone_is_built_on_again() {
    let _alone = lab::serial();
    let Some(mut scene) = Blocks::new("marks-idle", Fs::Ext4, 8 << 10, 1_000) else {
        return;
    };
    let mut sums = Sums::default();
    let mut take = |scene: &mut Blocks| {
        let certificate = sums.add(&scene.lab.checkpoint(&HOW)).expect("a snapshot");
        assert_eq!(scene.fault(&certificate), None, "{}", certificate.id());
        certificate
    };
    scene.rest();
    take(&mut scene);
    let shared = take(&mut scene);
    assert_eq!(shared.0["totals"]["shared_files"], 1, "it is left alone");
    scene.signal(Signal::SIGCONT);
    scene.lab.wait_for_beats(&mut scene.writer, 50);
    let built = take(&mut scene);
    assert!(marked(&built, "bytes_shared") > 16 << 20, "{built:?}");
    assert!(marked(&built, "bytes_captured") < 16 << 20);
    scene.end();
}

/// Each write is the first call of its process, and by name: it marks what it changes, and no more.
#[test]
fn the_first_call_of_a_process_marks_like_others() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("marks-first", Fs::Tmpfs, Duration::from_secs(120)) else {
        return;
    };
    let script = "head -c 8M /dev/zero > file; n=0; echo ready; while read -r line; do n=$((n + 1)); \
                  printf %04096d $n | dd of=file bs=4096 seek=$n conv=notrunc status=none iflag=fullblock; \
                  echo $n; done";
    let mut command = lab.run_command(&["--mark-blocks"]);
    command.args(["sh", "-c", script]).current_dir(lab.data());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("a shell");
    let mut to = child.stdin.take().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "ready");
    // Who was just made is not built on.
    std::thread::sleep(Duration::from_millis(300));
    let mut shared = 0;
    for number in 1..=5 {
        writeln!(to, "next").unwrap();
        assert_eq!(said.next().unwrap().unwrap(), number.to_string());
        let outcome = lab.checkpoint(&HOW);
        let certificate = outcome.verified();
        let copy = fs::read(certificate.copy_of(&lab.data().join("file"))).unwrap();
        let block = &copy[number * BLOCK..(number + 1) * BLOCK];
        assert_eq!(block, format!("{number:04096}").as_bytes());
        shared += usize::from(marked(certificate, "bytes_shared") > 4 << 20);
    }
    assert_eq!(shared, 4, "all but the first are built on the one before");
    drop(to);
    child.wait().unwrap();
}

/// Takes marks away as fast as they are set.
fn forget(gate: &Path, over: &AtomicBool) {
    let file = fs::OpenOptions::new().write(true).open(gate).unwrap();
    let size = file.metadata().unwrap().len() as usize;
    let blocks = size - MAX_BLOCKS as usize * 4;
    assert!(blocks > size - size_of::<Marks>());
    let zeros = vec![0; 4 * 16_384];
    while !over.load(Relaxed) {
        file.write_all_at(&zeros, blocks as u64).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The control: without marks, snapshots are wrong. That is found out, said of them, and no
/// further one is.
#[test]
fn marks_that_are_missing_are_missed() {
    missing(Fs::Tmpfs, None);
}

/// The same where files that are left alone are shared: a wrong copy is not passed on unseen.
#[test]
fn marks_that_are_missing_are_missed_when_the_writer_rests() {
    missing(Fs::Ext4, Some(6));
}

/// `rests`: the snapshot before which the writer stops.
fn missing(fs: Fs, rests: Option<u32>) {
    let _alone = lab::serial();
    let Some(mut scene) = Blocks::new("marks-missing", fs, 4 << 10, 500) else {
        return;
    };
    let over = AtomicBool::new(false);
    let (mut wrong, mut after) = (Vec::new(), 0);
    let mut found_out = None;
    std::thread::scope(|scope| {
        let gate = scene.lab.gate();
        let over = &over;
        scope.spawn(move || forget(&gate, over));
        for round in 0..30 {
            if rests == Some(round) {
                scene.rest();
            }
            let outcome = scene.lab.checkpoint(&HOW);
            let certificate = outcome.certificate().clone();
            let fault = scene.fault(&certificate);
            match found_out {
                None if outcome.stderr.contains("not marked") => {
                    println!("found out by snapshot {round}: {}", outcome.stderr.trim());
                    assert_eq!(fault, None, "what is compared is captured in whole");
                    found_out = Some(round);
                }
                None => wrong.extend(fault.map(|_| certificate.id().to_owned())),
                Some(_) => {
                    assert_eq!(fault, None);
                    assert_eq!(certificate.0["marked"], Value::Null);
                    after += 1;
                }
            }
        }
        over.store(true, Relaxed);
    });
    println!("{} snapshots were wrong", wrong.len());
    assert!(!wrong.is_empty(), "the control shows nothing");
    assert!(found_out.is_some() && after > 0);
    let stored = scene.lab.stored();
    for id in &wrong {
        let (_, manifest) = stored
            .iter()
            .find(|(_, manifest)| manifest.id() == id)
            .expect("it stays");
        assert!(!manifest.is_verified(), "{id} is verified");
        assert!(
            manifest
                .reasons()
                .iter()
                .any(|(code, _)| code == "unmarked-change")
        );
        assert_eq!(manifest.0["checks"][0]["kind"], "marks");
    }
    scene.end();
}

/// Somebody whom the gate does not see changes what is not marked: all is captured then, and it
/// is found out.
#[test]
fn who_marks_nothing_is_found_out() {
    let _alone = lab::serial();
    let Some(mut scene) = Blocks::new("marks-foreign", Fs::Ext4, 1 << 10, 20_000) else {
        return;
    };
    // Else what nobody has changed is shared, whatever is marked.
    let full = [&HOW[..], &["--full"]].concat();
    let quiet = scene.lab.data().join("quiet");
    fs::write(&quiet, vec![1; 1 << 20]).unwrap();
    // On what was just made nothing is built.
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..3 {
        let outcome = scene.lab.checkpoint(&full);
        assert_eq!(scene.fault(outcome.verified()), None);
    }
    // Nothing but a ctime: compared, and found to be as it was.
    fs::set_permissions(&quiet, fs::Permissions::from_mode(0o600)).unwrap();
    let outcome = scene.lab.checkpoint(&full);
    let certificate = outcome.verified();
    assert!(
        outcome.stderr.contains("marks nothing"),
        "{}",
        outcome.stderr
    );
    assert!(marked(certificate, "bytes_compared") >= 1 << 20);
    assert_eq!(marked(certificate, "bytes_shared"), 0);
    let outcome = scene.lab.checkpoint(&full);
    assert!(marked(outcome.verified(), "bytes_shared") >= 1 << 20);
    let file = fs::OpenOptions::new().write(true).open(&quiet).unwrap();
    file.write_all_at(b"unseen", 700_000).unwrap();
    drop(file);
    let outcome = scene.lab.checkpoint(&full);
    let certificate = outcome.verified();
    assert!(outcome.stderr.contains("not marked"), "{}", outcome.stderr);
    let copy = fs::read(certificate.copy_of(&quiet)).unwrap();
    assert!(copy == fs::read(&quiet).unwrap());
    assert_eq!(scene.fault(certificate), None);
    scene.end();
}

/// What becomes of large files by other programs, one at a time: cut down, replaced, made anew.
fn each_way(fs: Fs) {
    const COMMANDS: [&str; 14] = [
        "head -c 1000000 /dev/urandom > a",
        "head -c 2000000 /dev/urandom > b",
        "cp a b",
        "truncate -s 600000 b; truncate -s 1500000 b",
        "fallocate -p -o 300000 -l 200000 a",
        "dd if=/dev/urandom of=a bs=4096 count=3 seek=100 conv=notrunc",
        "head -c 300000 /dev/urandom >> a",
        "mv a c; cp b a",
        "mv -f c a",
        "rm b; head -c 900000 /dev/urandom > b",
        ": > a; truncate -s 1200000 a",
        "ln a d; dd if=/dev/urandom of=d bs=1 count=5 seek=777777 conv=notrunc",
        "chmod 600 b; touch a",
        "truncate -s 100 a; truncate -s 1200000 a; rm d",
    ];
    let _alone = lab::serial();
    let Some(lab) = Lab::new("marks-ways", fs, Duration::from_secs(600)) else {
        return;
    };
    let script = "cd $0; while read -r line; do eval \"$line\" 2>&- ; echo done; done";
    let mut command = lab.run_command(&["--mark-blocks", "--keep-last", "2"]);
    command.args(["sh", "-c", script]).arg(lab.data());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    process::dies_with_us(&mut command);
    let mut child = command.spawn().expect("a shell");
    let mut to = child.stdin.take().expect("its input");
    let mut from = BufReader::new(child.stdout.take().expect("its output"));
    let (mut shared, mut line) = (0, String::new());
    for round in 0..3 * COMMANDS.len() {
        let what = COMMANDS[round % COMMANDS.len()];
        writeln!(to, "{what}").expect("the shell");
        from.read_line(&mut line).expect("the shell");
        let outcome = lab.checkpoint(&HOW);
        let certificate = outcome.verified();
        shared += u64::from(marked(certificate, "bytes_shared") > 0);
        for entry in fs::read_dir(lab.data()).unwrap() {
            let live = entry.unwrap().path();
            let same = fs::read(certificate.copy_of(&live)).unwrap() == fs::read(&live).unwrap();
            assert!(same, "{}: {} after {what}", fs.name(), live.display());
        }
        let note = outcome.stderr.lines().find(|line| line.contains("mark"));
        assert_eq!(note, None, "after {what}");
    }
    drop(to);
    assert!(child.wait().expect("the shell").success());
    println!(
        "{}: {shared} of {} were built on the one before",
        fs.name(),
        3 * COMMANDS.len()
    );
    assert!(shared > 10, "{shared}");
}

#[test]
fn each_way_on_xfs() {
    each_way(Fs::Xfs);
}

#[test]
fn each_way_on_tmpfs() {
    each_way(Fs::Tmpfs);
}
