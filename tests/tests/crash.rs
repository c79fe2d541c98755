//! `run --restore-on-crash --restart`: a program that damages its files when it is killed in
//! the middle of an update always comes back in the state of a finished one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshim_tests::process::{self, Proc};
use snapshim_tests::{Fs, Lab, Random, lab, product, rounds};

const LIMIT: Duration = Duration::from_secs(1800);
const PATIENCE: Duration = Duration::from_secs(30);

struct Log(PathBuf);

impl Log {
    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn count(&self, what: &str) -> usize {
        self.lines().iter().filter(|l| l.starts_with(what)).count()
    }
}

/// The program below `snapshim run`, if there is one now.
fn child(of: &Proc, program: &Path) -> Option<Pid> {
    let pid = of.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    let is_it =
        |pid: &&str| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
    let pid = children.split_whitespace().find(is_it)?.parse().ok()?;
    Some(Pid::from_raw(pid))
}

fn started(log: &Log, times: usize) -> bool {
    process::wait_until(PATIENCE, || {
        log.count("start") + log.count("corrupt") >= times
    })
}

#[test]
fn it_comes_back_in_the_state_of_a_finished_update() {
    let _serial = lab::serial();
    let lab = Lab::new("crash", Fs::Xfs, LIMIT).unwrap();
    let program = product::program("fragile").canonicalize().unwrap();
    let log = Log(lab.data().parent().unwrap().join("log"));
    let check = format!("{} check \"$SNAPSHIM_ROOT\"", program.display());
    let options = [
        "--every",
        "60ms",
        "--at",
        "lock",
        "--keep-last",
        "3",
        "--verify",
        &check,
        "--restore-on-crash",
        "--restart",
    ];
    let data = lab.data();
    let args = ["run", data.to_str().unwrap(), log.0.to_str().unwrap()];
    let mut run = lab.run(&options, &program, &args);
    let rounds = rounds(100, 15);
    let mut random = Random(7);
    let mut damaged = 0;
    for round in 1..=rounds {
        assert!(
            started(&log, round),
            "start {round} never came: {:?}",
            log.lines()
        );
        assert_eq!(log.count("corrupt"), 0, "it came back damaged");
        // Long enough for a snapshot, so that the starts are not in a row.
        std::thread::sleep(Duration::from_millis(250 + random.below(80)));
        let pid = child(&run, &program).expect("the program");
        kill(pid, Signal::SIGKILL).unwrap();
    }
    assert!(started(&log, rounds + 1));
    assert_eq!(log.count("corrupt"), 0);
    // What each crash left is a snapshot that says so.
    for (manifest, certificate) in lab.stored() {
        let codes: Vec<String> = certificate.reasons().into_iter().map(|r| r.0).collect();
        // Taken as the program died: that is said, whatever else is.
        if codes.iter().any(|code| code == "program-ended") {
            continue;
        }
        for code in codes {
            assert_eq!(code, "crashed", "{}", manifest.display());
            let left = manifest.join("tree").join(data.strip_prefix("/").unwrap());
            let args = ["check", left.to_str().unwrap()];
            let command = lab.command_with(program.to_str().unwrap(), &args);
            let status = process::run(command, PATIENCE);
            damaged += usize::from(status.code() != 0);
        }
    }
    let starts = log.count("start");
    println!(
        "killed {rounds} times, {starts} starts, none of them damaged; of what the last crashes left, {damaged} was"
    );
    // Told to end, it ends.
    run.signal(Signal::SIGTERM);
    let ended = process::wait_until(PATIENCE, || !run.is_running());
    assert!(ended, "told to end, it was started again");
    assert_eq!(log.count("start"), starts);
}

/// The control: the same program, killed and started again with what it left.
#[test]
fn without_it_the_files_are_damaged() {
    let lab = Lab::new("crash-control", Fs::Xfs, LIMIT).unwrap();
    let program = product::program("fragile");
    let log = Log(lab.data().parent().unwrap().join("log"));
    let data = lab.data();
    for round in 1..=20 {
        let mut command = lab.command(&program);
        command.args(["run", data.to_str().unwrap(), log.0.to_str().unwrap()]);
        let mut proc = Proc::start(command);
        assert!(started(&log, round));
        if log.count("corrupt") > 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
        proc.end();
    }
    panic!("twenty kills damaged nothing: the test of restoring proves nothing");
}

/// A program that dies at once is not started for ever; one whose status is no crash, not at all.
#[test]
fn crash_loops_are_bounded() {
    let lab = Lab::new("crash-loop", Fs::Tmpfs, LIMIT).unwrap();
    let log = lab.data().parent().unwrap().join("log");
    let run = |options: &[&str], script: &str| {
        let _ = fs::remove_file(&log);
        let mut command = lab.run_command(options);
        command.args([
            "sh",
            "-c",
            &format!("echo x >> {}; {script}", log.display()),
        ]);
        let ended = process::run(command, Duration::from_secs(60));
        let starts = fs::read_to_string(&log).unwrap().lines().count();
        (ended, starts)
    };
    let (ended, starts) = run(&["--restore-on-crash", "--restart=3"], "kill -9 $$");
    assert_eq!(starts, 4, "{}", ended.err());
    assert!(ended.err().contains("not started again"), "{}", ended.err());
    let (ended, starts) = run(&["--restart=3"], "exit 7");
    assert_eq!((ended.code(), starts), (7, 1));
    let (ended, starts) = run(&["--restart=1", "--crash-status", "7"], "exit 7");
    assert_eq!((ended.code(), starts), (7, 2), "{}", ended.err());
}

/// Somebody else takes snapshots all the time, also between a crash and what is done about it: what
/// the crash left looks like anything else to him, and is never what is put back.
#[test]
fn snapshots_that_others_make_of_what_a_crash_left() {
    let _serial = lab::serial();
    let lab = Lab::new("crash-others", Fs::Tmpfs, LIMIT).unwrap();
    let program = product::program("fragile").canonicalize().unwrap();
    let log = Log(lab.data().parent().unwrap().join("log"));
    let data = lab.data();
    let options = ["--restore-on-crash", "--restart=1000"];
    let args = ["run", data.to_str().unwrap(), log.0.to_str().unwrap()];
    let mut run = lab.run(&options, &program, &args);
    let rounds = rounds(100, 10);
    let mut random = Random(11);
    let (mut damaged, mut said) = (0, 0);
    for round in 1..=rounds {
        assert!(started(&log, round), "start {round} never came");
        assert_eq!(log.count("corrupt"), 0, "it came back damaged");
        std::thread::sleep(Duration::from_millis(30 + random.below(30)));
        // One to go back to; the other has the set before the crash, and cuts after it.
        let at_lock = ["--at", "lock", "--wait", "5s"];
        lab.checkpoint(&at_lock).verified();
        let mut other = lab.snapshim(&["checkpoint", lab.set(), "--json", "--before-cut"]);
        other.arg("sleep 0.15").args(at_lock);
        let other = Proc::piped(other);
        std::thread::sleep(Duration::from_millis(60 + random.below(20)));
        kill(child(&run, &program).expect("the program"), Signal::SIGKILL).unwrap();
        let outcome = lab::outcome(other.wait(PATIENCE));
        if let Some(certificate) = &outcome.certificate {
            assert!(!certificate.is_verified(), "of what a crash left");
            let codes: Vec<String> = certificate.reasons().into_iter().map(|r| r.0).collect();
            assert!(codes.contains(&"program-ended".into()), "{codes:?}");
            said += 1;
            let left = certificate.copy_of(&data);
            let args = ["check", left.to_str().unwrap()];
            let command = lab.command_with(program.to_str().unwrap(), &args);
            damaged += usize::from(process::run(command, PATIENCE).code() != 0);
        }
    }
    assert!(started(&log, rounds + 1));
    assert_eq!(log.count("corrupt"), 0);
    println!(
        "killed {rounds} times under a snapshot of somebody else's: {said} of these say so, {damaged} \
         of them damaged, none was put back"
    );
    assert!(damaged > 0, "nothing could have gone wrong");
    run.signal(Signal::SIGTERM);
    assert!(process::wait_until(PATIENCE, || !run.is_running()));
    // Nobody puts anything back any more: what there is now is as good as anything.
    lab.checkpoint(&[]).verified();
}
