//! Nobody hangs: whatever happens to the coordinator or a writer, no call waits
//! longer than the hold bound, the next checkpoint works, and nothing is called
//! verified that is not.
//!
//! Each program measures its own longest call. `SNAPSHIM_TEST_FULL=1` takes more
//! checkpoints of each of the difficult programs.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshim_tests::process::{self, Proc};
use snapshim_tests::records::{self, Shape};
use snapshim_tests::stats::Stalls;
use snapshim_tests::{Fs, Lab, Outcome, Random, lab, product, rounds};

/// The hold bound of these tests.
const BOUND: Duration = Duration::from_millis(300);
/// As an option.
const MAX_HOLD: [&str; 2] = ["--max-hold", "300ms"];
/// What a call may take beyond the bound.
const MARGIN: Duration = Duration::from_millis(100);
/// Holds that are as long as the capture: random moments fall into them. (What becomes of a guard is in
/// `guarded.rs`.)
const LONG: [&str; 3] = ["--full", "--capture", "copy"];
/// The records `stubborn` writes.
const SHAPE: Shape = Shape {
    files: 2,
    lanes: 1,
    record: 4096,
};

/// The data, the store and the program of one test.
struct Scene {
    lab: Lab,
    writer: Proc,
    stalls: Stalls,
}

impl Scene {
    /// Runs `stubborn MODE` under the shim.
    fn new(mode: &str, fs: Fs) -> Option<Scene> {
        Scene::of(&format!("stuck-{mode}"), mode, fs)
    }

    fn of(name: &str, mode: &str, fs: Fs) -> Option<Scene> {
        let lab = Lab::new(name, fs, Duration::from_secs(400))?;
        let data = lab.data();
        let args = [mode, data.to_str().unwrap(), "600"];
        let mut options = vec!["--keep-last", "30"];
        options.extend(MAX_HOLD);
        let mut writer = lab.run(&options, &product::program("stubborn"), &args);
        lab.wait_for_beats(&mut writer, 3);
        let stalls = Stalls::watch();
        Some(Scene {
            lab,
            writer,
            stalls,
        })
    }

    /// Makes holds long, so that random moments fall into them: 400 more files to
    /// copy, or as many as this machine copies in a third of the bound.
    fn add_ballast(&self) {
        let path = |index| self.lab.data().join(format!("ballast-{index}"));
        let mut count = 400;
        for index in 0..count {
            std::fs::write(path(index), [7; 32768]).unwrap();
        }
        let is_too_much = || {
            let outcome = self.lab.checkpoint(&LONG);
            outcome.code == 4 || outcome.certificate().hold_us() > BOUND.as_micros() as f64 / 3.0
        };
        while count > 10 && is_too_much() {
            for index in count / 2..count {
                std::fs::remove_file(path(index)).unwrap();
            }
            count /= 2;
        }
    }

    /// Every snapshot in the store that is listed as verified is consistent;
    /// returns how many there are and how many are verified.
    fn check_stored(&self) -> (usize, usize) {
        let stored = self.lab.stored();
        let mut verified = 0;
        for (dir, certificate) in &stored {
            let data = self.lab.data();
            let copy = dir.join("tree").join(data.strip_prefix("/").unwrap());
            let verdict = records::check(&copy, SHAPE);
            if certificate.is_verified() {
                verified += 1;
                assert!(
                    verdict.is_consistent(),
                    "{} is listed as verified: {verdict:?}",
                    dir.display()
                );
            }
        }
        (stored.len(), verified)
    }

    /// The process that runs the main loop.
    fn program(&self) -> i32 {
        let pids = self.lab.processes_named("stubborn");
        *pids.iter().min().expect("the program runs")
    }

    /// Every snapshot in the store that is listed as verified is consistent, and
    /// none waited for longer than allowed. Ends the program.
    fn conclude(mut self, what: &str) {
        self.conclude_without_end(what);
        self.writer.signal(Signal::SIGTERM);
        self.writer.wait(Duration::from_secs(20)).ok("the program");
    }

    fn conclude_without_end(&self, what: &str) {
        let (stored, verified) = self.check_stored();
        let stats = self.lab.stats();
        println!(
            "{what}: the last {stored} snapshots: {verified} verified; longest call {:.1} ms \
             of {} allowed; {} records, {} turns",
            stats.longest().as_secs_f64() * 1e3,
            (BOUND + MARGIN + self.stalls.longest()).as_millis(),
            stats.beats(),
            stats.turns(),
        );
        assert!(
            stats.longest() <= BOUND + MARGIN + self.stalls.longest(),
            "a call took {:?}",
            stats.longest()
        );
    }

    /// The program goes on writing.
    #[track_caller]
    fn makes_progress(&self) {
        let before = self.lab.stats().beats();
        assert!(
            process::wait_until(Duration::from_secs(5), || self.lab.stats().beats()
                > before + 2),
            "the program does not go on\n{}",
            process::describe(self.program())
        );
    }

    /// Some call had to help itself: the moments did fall into holds.
    fn was_left_waiting(&self) {
        let longest = self.lab.stats().longest();
        assert!(
            longest >= BOUND * 8 / 10,
            "no moment fell into a hold: {longest:?}"
        );
    }

    /// A checkpoint; another one if the machine itself stood still for so much of
    /// the bound that this one could not be made.
    #[track_caller]
    fn checkpoint(&self) -> Outcome {
        loop {
            let stalled = self.stalls.total();
            let outcome = self.lab.checkpoint(&[]);
            let stalled = self.stalls.total() - stalled;
            if outcome.code != 4 || stalled < BOUND / 3 {
                return outcome;
            }
            eprintln!("the machine stalled for {stalled:?}: {}", outcome.stderr);
        }
    }

    /// A checkpoint that works, within a few attempts if the machine is busy.
    #[track_caller]
    fn next_checkpoint_works(&self) {
        for attempt in 1.. {
            let outcome = self.lab.checkpoint(&[]);
            match outcome.code {
                0 | 5 => return,
                4 if attempt < 3 => eprintln!("aborted: {}", outcome.stderr),
                code => panic!("exit {code}: {}", outcome.stderr),
            }
        }
    }
}

/// Checkpoints a program that does something difficult. All must be published;
/// `min_verified` percent must be verified.
fn difficult(mode: &str, fs: Fs, min_verified: usize) {
    let _alone = lab::serial();
    let Some(scene) = Scene::new(mode, fs) else {
        return;
    };
    if mode != "plain" {
        let busy = process::wait_until(Duration::from_secs(10), || scene.lab.stats().turns() > 0);
        assert!(busy, "{mode} never got going");
    }
    let count = rounds(100, 25);
    let (mut verified, mut reasons) = (0, std::collections::BTreeMap::new());
    for _ in 0..count {
        let outcome = scene.checkpoint();
        assert!(
            matches!(outcome.code, 0 | 5),
            "{mode}: exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        verified += usize::from(outcome.code == 0);
        for (code, text) in outcome.certificate().reasons() {
            reasons.entry(code).or_insert((0, text)).0 += 1;
        }
        scene.makes_progress();
    }
    if !reasons.is_empty() {
        println!("{mode}: not verified, how often and why: {reasons:?}");
    }
    scene.conclude(mode);
    assert!(
        verified * 100 >= count * min_verified,
        "{mode}: only {verified} of {count} verified"
    );
}

#[test]
fn a_plain_writer() {
    difficult("plain", Fs::Xfs, 100);
}

#[test]
fn a_thread_blocked_on_a_pipe_for_ever() {
    difficult("pipe", Fs::Xfs, 100);
}

#[test]
fn a_thread_opening_a_fifo_for_ever() {
    difficult("fifo", Fs::Xfs, 100);
}

#[test]
fn waiters_for_a_lock_whose_holder_writes() {
    difficult("setlkw", Fs::Xfs, 100);
}

#[test]
fn siglongjmp_out_of_a_write() {
    difficult("longjmp", Fs::Tmpfs, 0);
}

#[test]
fn pthread_cancel_in_a_write() {
    difficult("cancel", Fs::Tmpfs, 0);
}

#[test]
fn execve_from_a_second_thread() {
    difficult("exec", Fs::Tmpfs, 0);
}

#[test]
fn fork_in_a_signal_handler() {
    difficult("fork-in-handler", Fs::Tmpfs, 0);
}

#[test]
fn vfork_and_exec() {
    difficult("vfork", Fs::Xfs, 0);
}

#[test]
fn posix_spawn_of_shells_that_write() {
    difficult("spawn", Fs::Xfs, 0);
}

#[test]
fn raw_clone_threads_with_their_creators_thread_pointer() {
    difficult("clone", Fs::Tmpfs, 0);
}

#[test]
fn more_short_lived_threads_than_there_are_slots() {
    let _alone = lab::serial();
    let Some(scene) = Scene::new("churn", Fs::Tmpfs) else {
        return;
    };
    let mut codes = Vec::new();
    while scene.lab.stats().turns() < 6000 || codes.len() < 20 {
        let outcome = scene.checkpoint();
        assert!(
            matches!(outcome.code, 0 | 5),
            "exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        codes.push(outcome.code);
    }
    println!("churn: exit codes {codes:?}");
    assert!(codes.contains(&0), "no checkpoint was verified");
    scene.conclude("churn");
}

/// How long a checkpoint of this scene takes: the range for random moments.
fn usual_wall(scene: &Scene) -> Duration {
    let mut walls: Vec<Duration> = (0..5).map(|_| scene.lab.checkpoint(&LONG).wall).collect();
    walls.sort();
    walls[walls.len() / 2]
}

/// A random moment within a checkpoint that usually takes `wall`.
fn moment(random: &mut Random, wall: Duration) -> Duration {
    Duration::from_nanos(random.below(wall.as_nanos() as u64 * 11 / 10 + 1))
}

fn sleep_until(start: Instant, moment: Duration) {
    std::thread::sleep(moment.saturating_sub(start.elapsed()));
}

fn start_checkpoint(lab: &Lab) -> Proc {
    let args = [&["checkpoint", lab.set(), "--json"], &LONG[..]].concat();
    Proc::piped(lab.snapshim(&args))
}

#[test]
fn the_coordinator_is_killed_at_200_random_moments() {
    let _alone = lab::serial();
    let Some(scene) = Scene::of("stuck-coordinator-killed", "plain", Fs::Tmpfs) else {
        return;
    };
    scene.add_ballast();
    let wall = usual_wall(&scene);
    let mut random = Random(1);
    let mut killed = 0;
    for round in 0..200 {
        let mut coordinator = start_checkpoint(&scene.lab);
        sleep_until(Instant::now(), moment(&mut random, wall));
        killed += usize::from(coordinator.is_running());
        coordinator.signal(Signal::SIGKILL);
        drop(coordinator);
        if round % 10 == 9 {
            scene.makes_progress();
            scene.next_checkpoint_works();
            scene.check_stored();
        }
    }
    println!("kill -9 of the coordinator: {killed} of 200 hit it alive");
    scene.next_checkpoint_works();
    scene.was_left_waiting();
    scene.conclude("coordinator killed");
}

#[test]
fn the_coordinator_is_stopped_at_200_random_moments() {
    let _alone = lab::serial();
    let Some(scene) = Scene::of("stuck-coordinator-stopped", "plain", Fs::Tmpfs) else {
        return;
    };
    scene.add_ballast();
    let wall = usual_wall(&scene);
    let mut random = Random(2);
    let mut codes = std::collections::BTreeMap::new();
    for round in 0..200 {
        let mut coordinator = start_checkpoint(&scene.lab);
        sleep_until(Instant::now(), moment(&mut random, wall));
        coordinator.signal(Signal::SIGSTOP);
        // Long enough for a waiter to lose patience in every second round.
        let pause = if round % 2 == 0 {
            BOUND + Duration::from_millis(50)
        } else {
            BOUND / 6
        };
        std::thread::sleep(pause);
        coordinator.signal(Signal::SIGCONT);
        let outcome = lab::outcome(coordinator.wait(Duration::from_secs(20)));
        *codes.entry(outcome.code).or_insert(0) += 1;
        assert!(
            matches!(outcome.code, 0 | 4 | 5),
            "exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        if round % 10 == 9 {
            scene.check_stored();
        }
        if outcome.code == 4 {
            assert!(!outcome.stderr.trim().is_empty(), "aborted without a word");
        }
    }
    println!("SIGSTOP of the coordinator: exit codes {codes:?}");
    scene.makes_progress();
    scene.next_checkpoint_works();
    scene.was_left_waiting();
    scene.conclude("coordinator stopped");
}

#[test]
fn writers_are_killed_at_200_random_moments() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("stuck-writers-killed", Fs::Tmpfs, Duration::from_secs(400)) else {
        return;
    };
    // The set outlives its programs: each is started by plain LD_PRELOAD.
    let env = lab.env(&MAX_HOLD);
    let data = lab.data();
    let start = |name: &str| {
        let dir = data.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let mut command = lab.command(product::program("stubborn"));
        command
            .arg("sibling")
            .arg(&dir)
            .arg("600")
            .envs(env.clone());
        Proc::piped(command)
    };
    let stalls = Stalls::watch();
    let mut steady = start("steady");
    lab.wait_for_beats(&mut steady, 3);
    let mut random = Random(3);
    let mut reasons = std::collections::BTreeMap::new();
    let mut codes = std::collections::BTreeMap::new();
    for round in 0..200 {
        let mut victim = start("victim");
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        if round % 4 == 0 {
            // Killed inside a hold, as often as not.
            let coordinator = start_checkpoint(&lab);
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
            victim.end();
            let outcome = lab::outcome(coordinator.wait(Duration::from_secs(20)));
            *codes.entry(outcome.code).or_insert(0) += 1;
            reasons.extend(outcome.certificate().reasons());
            assert!(
                matches!(outcome.code, 0 | 5),
                "exit {}: {}",
                outcome.code,
                outcome.stderr
            );
        }
        victim.end();
    }
    let outcome = lab.checkpoint(&[]);
    println!(
        "kill -9 of writers: exit codes {codes:?} {reasons:?}, then {}",
        outcome.code
    );
    outcome.verified();
    let longest = lab.stats().longest();
    println!("longest call {:.1} ms", longest.as_secs_f64() * 1e3);
    assert!(longest <= BOUND + MARGIN + stalls.longest());
    for (dir, certificate) in lab.stored() {
        let live = data.join("steady");
        let copy = dir.join("tree").join(live.strip_prefix("/").unwrap());
        let verdict = records::check(&copy, SHAPE);
        assert!(
            !certificate.is_verified() || verdict.is_consistent(),
            "{verdict:?}"
        );
    }
}

#[test]
fn a_stopped_writer_blocks_no_checkpoint() {
    let _alone = lab::serial();
    let Some(scene) = Scene::of("stuck-writer-stopped", "sibling", Fs::Xfs) else {
        return;
    };
    let main = scene.program();
    let children = process::descendants(main);
    let sibling = Pid::from_raw(*children.first().expect("the sibling runs"));
    let mut random = Random(4);
    let mut codes = std::collections::BTreeMap::new();
    for _ in 0..rounds(200, 60) {
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        kill(sibling, Signal::SIGSTOP).unwrap();
        process::wait_until(Duration::from_secs(1), || {
            process::state(sibling.as_raw()) == Some('T')
        });
        let outcome = scene.checkpoint();
        kill(sibling, Signal::SIGCONT).unwrap();
        *codes.entry(outcome.code).or_insert(0) += 1;
        assert!(
            matches!(outcome.code, 0 | 5),
            "exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        let turns = scene.lab.stats().turns();
        assert!(
            process::wait_until(Duration::from_secs(5), || scene.lab.stats().turns() > turns),
            "the writer does not go on\n{}",
            process::describe(sibling.as_raw())
        );
    }
    println!("a stopped writer: exit codes {codes:?}");
    assert!(codes.get(&0).is_some_and(|n| *n > 0));
    scene.makes_progress();
    // Its own calls may well be longer now: it was stopped by us.
    scene.lab.processes();
}

#[test]
fn checkpoints_at_once_are_serialised() {
    let _alone = lab::serial();
    let Some(scene) = Scene::of("stuck-two-coordinators", "plain", Fs::Xfs) else {
        return;
    };
    let mut ids = std::collections::BTreeSet::new();
    for _ in 0..10 {
        let all: Vec<Proc> = (0..4).map(|_| start_checkpoint(&scene.lab)).collect();
        for coordinator in all {
            let outcome = lab::outcome(coordinator.wait(Duration::from_secs(30)));
            assert!(
                ids.insert(outcome.verified().id().to_owned()),
                "two snapshots have one id"
            );
        }
    }
    scene.conclude("four coordinators at once");
}

#[test]
fn a_killed_run_leaves_the_program_and_the_set_in_order() {
    let _alone = lab::serial();
    let name = "stuck-run-killed";
    let Some(lab) = Lab::new(name, Fs::Xfs, Duration::from_secs(100)) else {
        return;
    };
    // `stubborn` ends with its parent, so it gets one that does not.
    let mut command = lab.run_command(&MAX_HOLD);
    command.args(["sh", "-c", "\"$@\"; exit", "sh"]);
    command
        .arg(product::program("stubborn"))
        .arg("plain")
        .arg(lab.data())
        .arg("100");
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    let stalls = Stalls::watch();
    let mut scene = Scene {
        lab,
        writer,
        stalls,
    };
    kill(Pid::from_raw(scene.writer.pid()), Signal::SIGKILL).unwrap();
    assert!(process::wait_until(Duration::from_secs(5), || {
        !scene.writer.is_running()
    }));
    scene.makes_progress();
    scene.next_checkpoint_works();
    scene.lab.checkpoint(&[]).verified();
    scene.conclude_without_end("run killed");
}
