//! Capturing after the cut (`--capture copy-before-write`): what programs change while the
//! snapshot is still being read must not be in it.
//!
//! `scribble` changes files in every way there is; what its operations do follows from their
//! number. So a snapshot can be compared, byte by byte, with the state after exactly as many
//! operations as it says were made, which another `scribble` has made again elsewhere.
//!
//! `SNAPSHIM_TEST_FULL=1` takes 2,000 snapshots, and kills the coordinator 200 times.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use snapshim_tests::process::Proc;
use snapshim_tests::scribble::{LOAD, Load, Replay, faults, number, replays};
use snapshim_tests::stats::{Stalls, distribution};
use snapshim_tests::{Fs, Lab, Outcome, Random, lab, process, product, rounds};

const GUARD: [&str; 2] = ["--capture", "copy-before-write"];
/// Copies without a gate, of which at least one must show something that never was; how many
/// of how many.
fn control(lab: &Lab) -> (usize, usize) {
    let load = Load {
        big_kib: 8 << 10,
        ..LOAD
    };
    let (live, copy) = (lab.beside("control"), lab.beside("control-copy"));
    fs::create_dir_all(&live).unwrap();
    let mut command = lab.command(product::program("scribble"));
    command.args(load.args(&live));
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 50);
    let mut replays = replays(lab, "control-replay", load);
    let (mut bad, mut copies) = (0, 0);
    while copies < 3 || (bad == 0 && copies < 50) {
        let _ = fs::remove_dir_all(&copy);
        let mut command = Command::new("cp");
        // What vanishes meanwhile is a failure of cp, too.
        command.arg("-a").arg(&live).arg(&copy);
        process::run(command, Duration::from_secs(60));
        copies += 1;
        bad += usize::from(!faults(&copy, &mut replays).is_empty());
    }
    writer.end();
    drop(replays);
    for dir in [live, copy, lab.beside("control-replay")] {
        fs::remove_dir_all(dir).unwrap();
    }
    fs::remove_file(lab.stats().path()).unwrap();
    (bad, copies)
}

/// `count` snapshots of everything `scribble` can do.
fn consistent(fs: Fs, count: usize) {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("guarded", fs, Duration::from_secs(3000)) else {
        return;
    };
    let (bad, controls) = control(&lab);
    let args = LOAD.args(&lab.data());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let options = ["--keep-last", "2", "--max-hold", "5s"];
    let mut writer = lab.run(&options, &product::program("scribble"), &args);
    lab.wait_for_beats(&mut writer, 50);
    let mut replays = replays(&lab, "replay", LOAD);
    let (mut published, mut verified, mut asked, mut inconsistent) = (0, 0, 0, 0);
    let (mut holds, mut guards) = (Vec::new(), Vec::new());
    let mut others = BTreeMap::new();
    for round in 0..count {
        let outcome = lab.checkpoint(&GUARD);
        let Some(certificate) = &outcome.certificate else {
            let error = outcome.stderr.lines().next().unwrap_or_default();
            *others
                .entry(format!("exit {}: {error}", outcome.code))
                .or_insert(0) += 1;
            assert_eq!(outcome.code, 4, "{}", outcome.stderr);
            continue;
        };
        published += 1;
        // What was hashed while it was captured is what was written.
        if round % 5 == 4 {
            lab.check_digests();
        }
        assert_eq!(certificate.capture(), "copy-before-write");
        assert!(
            certificate.0["guard_us"].is_u64(),
            "captured under the hold: {}",
            outcome.stderr
        );
        asked += number(certificate, "guard_asked");
        holds.push(certificate.hold_us());
        guards.push(number(certificate, "guard_us") as f64);
        for (code, text) in certificate.reasons() {
            *others.entry(format!("{code}: {text}")).or_insert(0) += 1;
        }
        let faults = faults(&certificate.copy_of(&lab.data()), &mut replays);
        for fault in &faults {
            eprintln!("{} ({}): {fault}", certificate.id(), fs.name());
        }
        if certificate.is_verified() {
            verified += 1;
            inconsistent += usize::from(!faults.is_empty());
        }
    }
    let longest = lab.stats().longest();
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(30)).ok("the writer");
    println!(
        "{}: {count} snapshots: {published} published, {verified} verified, {inconsistent} of them \
         inconsistent; {asked} chunks asked for; hold {}; guard {}; longest operation {:.1} ms; without \
         the gate {bad} of {controls} copies inconsistent; else {others:?}",
        fs.name(),
        distribution(&holds),
        distribution(&guards),
        longest.as_secs_f64() * 1e3,
    );
    assert_eq!(inconsistent, 0);
    assert!(bad > 0, "the control shows nothing");
    assert!(
        verified * 10 >= count * 9,
        "{verified} of {count}: {others:?}"
    );
    assert!(asked >= 10 * count as u64, "asked for {asked} chunks only");
}

#[test]
fn on_tmpfs() {
    consistent(Fs::Tmpfs, rounds(600, 15));
}

#[test]
fn on_ext4() {
    consistent(Fs::Ext4, rounds(500, 10));
}

#[test]
fn on_xfs() {
    consistent(Fs::Xfs, rounds(600, 15));
}

#[test]
fn on_btrfs() {
    consistent(Fs::Btrfs, rounds(300, 6));
}

/// The hold bound of what follows.
const BOUND: Duration = Duration::from_millis(400);
const MAX_HOLD: [&str; 2] = ["--max-hold", "400ms"];
/// What an operation may take beyond it: it is two calls and some work.
const MARGIN: Duration = Duration::from_millis(250);

/// The state of the gate: 0 open, 2 guarded.
fn state(lab: &Lab) -> u32 {
    let mut word = [0; 4];
    let gate = fs::File::open(lab.gate()).expect("the gate");
    gate.read_exact_at(&mut word, 64).expect("its word");
    u32::from_le_bytes(word) & 0xf
}

/// `scribble` under the gate.
struct Scene {
    lab: Lab,
    writer: Proc,
    replays: Vec<Replay>,
    stalls: Stalls,
}

impl Scene {
    fn new(name: &str, trouble: &[&str]) -> Option<Scene> {
        let load = Load {
            threads: 2,
            processes: 1,
            ..LOAD
        };
        let lab = Lab::new(name, Fs::Tmpfs, Duration::from_secs(900))?;
        let args = load.args(&lab.data());
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.extend(trouble);
        let options = [&["--keep-last", "2"], &MAX_HOLD[..]].concat();
        let mut writer = lab.run(&options, &product::program("scribble"), &args);
        lab.wait_for_beats(&mut writer, 20);
        let replays = replays(&lab, "replay", load);
        Some(Scene {
            lab,
            writer,
            replays,
            stalls: Stalls::watch(),
        })
    }

    fn start(&self) -> Proc {
        let args = ["checkpoint", self.lab.set(), "--json", "--no-digest"];
        Proc::piped(self.lab.snapshim(&[&args[..], &GUARD].concat()))
    }

    fn state(&self) -> u32 {
        state(&self.lab)
    }

    /// Starts a checkpoint, and waits until its sweep has begun; `None` if that was missed.
    fn sweeping(&self) -> Option<Proc> {
        let mut coordinator = self.start();
        let begun = Instant::now();
        while self.state() != 2 {
            if !coordinator.is_running() || begun.elapsed() > Duration::from_secs(20) {
                return None;
            }
        }
        Some(coordinator)
    }

    #[track_caller]
    fn makes_progress(&self) {
        let before = self.lab.stats().beats();
        assert!(
            process::wait_until(Duration::from_secs(10), || {
                self.lab.stats().beats() > before + 2
            }),
            "the program does not go on: {}",
            process::describe(self.writer.pid())
        );
    }

    /// Looks at a published snapshot; whether it is verified.
    #[track_caller]
    fn check(&mut self, outcome: &Outcome) -> bool {
        assert!(
            matches!(outcome.code, 0 | 4 | 5),
            "exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        let Some(certificate) = &outcome.certificate else {
            return false;
        };
        let copy = certificate.copy_of(&self.lab.data());
        let mut faults = faults(&copy, &mut self.replays);
        faults.extend(torn_block(&copy.join("trouble")));
        assert!(
            !certificate.is_verified() || faults.is_empty(),
            "{faults:?}"
        );
        certificate.is_verified()
    }

    /// A checkpoint that is verified, if not at once.
    #[track_caller]
    fn next_checkpoint_works(&mut self) {
        let mut errors = Vec::new();
        for _ in 0..5 {
            let outcome = lab::outcome(self.start().wait(Duration::from_secs(60)));
            if self.check(&outcome) {
                return;
            }
            errors.push(outcome.stderr);
        }
        panic!("no checkpoint is verified: {errors:?}");
    }

    /// Ends the program, and says how long it waited at most.
    fn conclude(mut self, what: &str) {
        self.makes_progress();
        let longest = self.lab.stats().longest();
        let allowed = BOUND + MARGIN + self.stalls.longest();
        println!("{what}; longest operation {longest:?} of {allowed:?} allowed");
        assert!(longest <= allowed);
        self.writer.signal(Signal::SIGTERM);
        self.writer.wait(Duration::from_secs(30)).ok("the writer");
    }
}

/// A block of a file that is not all of one number.
fn torn_block(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let torn = bytes
        .chunks(4096)
        .position(|block| block.chunks(8).any(|word| word != &block[..8]));
    torn.map(|index| format!("block {index} of {} is torn", path.display()))
}

#[test]
fn the_coordinator_is_killed_while_it_sweeps() {
    let _alone = lab::serial();
    let Some(mut scene) = Scene::new("guarded-killed", &[]) else {
        return;
    };
    let mut random = Random(4);
    let (mut killed, mut hit, count) = (0, 0, rounds(200, 15));
    // How long a sweep takes depends on the machine: sooner, if this one was over.
    let mut within = 60_000;
    while hit < count {
        killed += 1;
        assert!(killed <= count * 5, "{hit} of {killed} hit the sweep");
        let Some(mut coordinator) = scene.sweeping() else {
            continue;
        };
        std::thread::sleep(Duration::from_micros(random.below(within)));
        match scene.state() {
            2 => hit += 1,
            _ => within = (within * 3 / 4).max(1_000),
        }
        coordinator.signal(Signal::SIGKILL);
        drop(coordinator);
        if killed % 10 == 0 || hit == count {
            scene.makes_progress();
            scene.next_checkpoint_works();
            for (dir, _) in scene.lab.stored() {
                let name = dir.file_name().unwrap_or_default().to_owned();
                assert!(!name.as_bytes().starts_with(b".tmp"), "{name:?} is left");
            }
        }
    }
    scene.conclude(&format!(
        "killed {killed} times, {hit} of them in the sweep"
    ));
}

#[test]
fn the_coordinator_is_stopped_while_it_sweeps() {
    let _alone = lab::serial();
    let Some(mut scene) = Scene::new("guarded-stopped", &[]) else {
        return;
    };
    let mut codes = BTreeMap::new();
    for _ in 0..rounds(30, 4) {
        let Some(mut coordinator) = scene.sweeping() else {
            continue;
        };
        coordinator.signal(Signal::SIGSTOP);
        let was_guarded = scene.state() == 2;
        let opened = process::wait_until(BOUND + MARGIN + Duration::from_secs(2), || {
            scene.state() != 2
        });
        assert!(opened, "the gate stays guarded");
        coordinator.signal(Signal::SIGCONT);
        let outcome = lab::outcome(coordinator.wait(Duration::from_secs(60)));
        assert!(
            !was_guarded || outcome.code == 4 && outcome.certificate.is_none(),
            "exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        *codes.entry(outcome.code).or_insert(0) += 1;
    }
    assert!(codes.contains_key(&4), "{codes:?}");
    scene.next_checkpoint_works();
    scene.conclude(&format!("stopped in the sweep, exit codes {codes:?}"));
}

#[test]
fn an_interrupt_ends_the_sweep_at_once() {
    let _alone = lab::serial();
    let Some(mut scene) = Scene::new("guarded-interrupted", &[]) else {
        return;
    };
    let (mut hit, mut longest) = (0, Duration::ZERO);
    for _ in 0..rounds(30, 4) {
        let Some(mut coordinator) = scene.sweeping() else {
            continue;
        };
        let is_hit = scene.state() == 2;
        coordinator.signal(Signal::SIGINT);
        let begun = Instant::now();
        let ended = coordinator.wait(Duration::from_secs(30));
        if is_hit && ended.code() != 0 {
            hit += 1;
            longest = longest.max(begun.elapsed());
        }
        assert_eq!(scene.state(), 0, "the gate is open");
    }
    assert!(hit > 0);
    let allowed = Duration::from_millis(500) + scene.stalls.longest();
    assert!(longest <= allowed, "{longest:?} of {allowed:?}");
    scene.next_checkpoint_works();
    scene.conclude(&format!("interrupted {hit} times, ended after {longest:?}"));
}

/// Overwrites blocks of a file, and appends to another how long each call took, ns.
const TIMED: &str = "import os,random,struct,sys,time
f = os.open(sys.argv[1], os.O_RDWR); n = os.fstat(f).st_size // 4096; b = os.urandom(4096)
out = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while True:
    at = random.randrange(n) * 4096; begun = time.monotonic_ns(); os.pwrite(f, b, at)
    os.write(out, struct.pack('Q', time.monotonic_ns() - begun)); time.sleep(0.0005)";

/// The thread that reads what calls ask for may not have a processor for long: the sweep does it then.
#[test]
fn the_service_stands_still() {
    const MIB: u64 = 1 << 20;
    let _alone = lab::serial();
    let Some(lab) = Lab::new("guarded-service", Fs::Xfs, Duration::from_secs(240)) else {
        return;
    };
    let (path, times) = (lab.data().join("file"), lab.shm().join("times"));
    let file = fs::File::create(&path).unwrap();
    for at in (0..512 * MIB).step_by(MIB as usize) {
        file.write_all_at(&[1; MIB as usize], at).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let args = ["-c", TIMED, path.to_str().unwrap(), times.to_str().unwrap()];
    let options = ["--keep-last", "1", "--max-hold", "800ms"];
    let mut writer = lab.run(&options, Path::new("/usr/bin/python3"), &args);
    let is_up = || fs::metadata(&times).is_ok_and(|stat| stat.len() > 800);
    assert!(process::wait_until(Duration::from_secs(20), is_up) && writer.is_running());
    let (mut parts, mut rounds) = (Vec::new(), 0);
    while parts.len() < 5 {
        rounds += 1;
        assert!(rounds <= 20, "{parts:?} only");
        let args = ["checkpoint", lab.set(), "--json"];
        let mut coordinator = Proc::piped(lab.snapshim(&[&args[..], &GUARD].concat()));
        let begun = Instant::now();
        let is_swept = || state(&lab) == 2;
        while !is_swept() && coordinator.is_running() && begun.elapsed() < Duration::from_secs(20) {
        }
        let stopped = Stopped::new(coordinator.pid(), "service").filter(|_| is_swept());
        fs::write(&times, "").unwrap();
        let begun = Instant::now();
        assert!(process::wait_until(Duration::from_secs(20), || !is_swept()));
        let guard = begun.elapsed();
        let took = fs::read(&times).unwrap();
        let was_stopped = stopped.is_some();
        drop(stopped);
        let outcome = lab::outcome(coordinator.wait(Duration::from_secs(60)));
        let is_midway = outcome.code == 4 && outcome.stderr.contains("waited as long as it may");
        if !was_stopped || is_midway || took.is_empty() {
            // Stopped too late, or in the midst of a chunk, which nobody else can have then.
            continue;
        }
        let certificate = outcome.verified();
        assert_eq!(certificate.capture(), "copy-before-write");
        assert!(number(certificate, "guard_asked") > 0);
        let took = took
            .chunks_exact(8)
            .map(|ns| u64::from_ne_bytes(ns.try_into().unwrap()));
        let longest = Duration::from_nanos(took.max().unwrap());
        println!("longest call {longest:?} of a guard of {guard:?}");
        parts.push(longest.as_secs_f64() / guard.as_secs_f64());
    }
    // Who is not helped waits for a good part of it, in one call or another.
    parts.sort_by(f64::total_cmp);
    assert!(parts[2] < 0.2, "{parts:?}");
}

/// A thread that stands still until this is dropped.
struct Stopped(Pid);

impl Stopped {
    /// `None` if it is gone.
    fn new(pid: i32, name: &str) -> Option<Stopped> {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let mut threads = threads.filter_map(|entry| Some(entry.ok()?.path()));
        let is_it = |at: &std::path::PathBuf| {
            fs::read_to_string(at.join("comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let at = threads.find(is_it)?;
        let id = at.file_name()?.to_str()?.parse().ok()?;
        let thread = Pid::from_raw(id);
        ptrace::seize(thread, ptrace::Options::empty()).ok()?;
        let stopped = Stopped(thread);
        ptrace::interrupt(thread).ok()?;
        let is_stopped = |status| matches!(status, WaitStatus::PtraceEvent(..));
        let status = waitpid(thread, Some(WaitPidFlag::__WALL)).ok()?;
        is_stopped(status).then_some(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if ptrace::detach(self.0, None).is_err() {
            // It has ended, and waits for us.
            let _ = waitpid(self.0, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        }
    }
}

/// Checkpoints beside something difficult.
fn difficult(trouble: &str) {
    let _alone = lab::serial();
    let Some(mut scene) = Scene::new(&format!("guarded-{trouble}"), &[trouble]) else {
        return;
    };
    let mut verified = 0;
    let mut others = BTreeMap::new();
    let count = rounds(40, 5);
    for _ in 0..count {
        let outcome = lab::outcome(scene.start().wait(Duration::from_secs(60)));
        verified += usize::from(scene.check(&outcome));
        match &outcome.certificate {
            None => *others.entry(outcome.stderr).or_insert(0) += 1,
            Some(certificate) => {
                for (code, text) in certificate.reasons() {
                    *others.entry(format!("{code}: {text}")).or_insert(0) += 1;
                }
            }
        }
        scene.makes_progress();
    }
    let is_busy = || trouble == "signal" || scene.lab.stats().turns() > 0;
    assert!(
        process::wait_until(Duration::from_secs(60), is_busy),
        "{trouble} never got going"
    );
    let turns = scene.lab.stats().turns();
    scene.conclude(&format!(
        "{trouble}: {verified} of {count} verified, {turns} turns; else {others:?}"
    ));
}

#[test]
fn a_handler_writes_while_its_thread_waits_for_a_chunk() {
    difficult("signal");
}

#[test]
fn children_of_fork_write() {
    difficult("fork");
}

#[test]
fn children_of_vfork_write_and_execute() {
    difficult("vfork");
}

#[test]
fn a_program_executes_another_and_goes_on_writing() {
    difficult("exec");
}

#[test]
fn threads_are_cancelled_while_they_write() {
    difficult("cancel");
}

#[test]
fn writes_are_left_by_a_jump() {
    difficult("longjmp");
}

#[test]
fn a_writer_in_a_sandbox() {
    difficult("sandbox");
}

#[test]
fn writers_are_killed_while_they_wait() {
    difficult("killed");
}
