//! Held from outside: programs the shim is not in are stopped for the capture, and
//! whatever happens meanwhile, none of them stays stopped.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshim_tests::lab::{Outcome, outcome};
use snapshim_tests::process::{self, Proc};
use snapshim_tests::{Certificate, Fs, Lab, Random, lab, product, rounds};

const LIMIT: Duration = Duration::from_secs(400);

/// The longest hold in tests that leave a hold to end by itself.
const BOUND: Duration = Duration::from_millis(400);

/// `snapshim snap` of the test's data.
fn snap_command(lab: &Lab, options: &[&str]) -> Command {
    let mut command = lab.snapshim(&["snap", "--name", lab.set(), "--json"]);
    command.arg("--store").arg(lab.store()).args(options);
    command.arg(lab.data());
    command
}

#[track_caller]
fn snap(lab: &Lab, options: &[&str]) -> Outcome {
    outcome(process::run(
        snap_command(lab, options),
        Duration::from_secs(30),
    ))
}

/// Starts `relay MODE`.
fn relay(lab: &Lab, mode: &str) -> Proc {
    let mut command = lab.command(product::program("relay"));
    command.arg(mode).arg(lab.data());
    let mut proc = Proc::piped(command);
    lab.wait_for_beats(&mut proc, 3);
    proc
}

fn words(path: &Path) -> Vec<u64> {
    let bytes = fs::read(path).unwrap_or_default();
    bytes
        .chunks(4096)
        .map(|page| {
            page.get(..8)
                .map_or(0, |w| u64::from_le_bytes(w.try_into().unwrap()))
        })
        .collect()
}

/// Whether a copy of the files of `relay` could be of one instant.
fn is_consistent(dir: &Path) -> bool {
    let mut all = words(&dir.join("a"));
    all.extend(words(&dir.join("b")));
    all.len() >= 2 && all.is_sorted_by(|x, y| x >= y) && all[0] <= all[all.len() - 1] + 1
}

fn layers(certificate: &Certificate) -> Vec<(u64, String)> {
    let writers = certificate.0["writers"].as_array().unwrap();
    let entry = |w: &serde_json::Value| {
        (
            w["pid"].as_u64().unwrap(),
            w["layer"].as_str().unwrap().to_owned(),
        )
    };
    writers.iter().map(entry).collect()
}

#[track_caller]
fn assert_layer(certificate: &Certificate, pid: i32, layer: &str) {
    let layers = layers(certificate);
    assert!(
        layers.contains(&(pid as u64, layer.to_owned())),
        "{pid} is not held by {layer}: {layers:?}"
    );
}

/// Takes snapshots with and without the hold from outside.
fn consistent(lab: &Lab, what: &str, mut writer: Proc, options: &[&str]) {
    let count = rounds(300, 40);
    let (mut longest, mut sum, mut wrong) = (0, 0, 0);
    for _ in 0..count {
        let mut given = vec!["--keep-last", "2"];
        given.extend(options);
        let outcome = snap(lab, &given);
        let certificate = outcome.verified();
        let stop = certificate.0["stop_us"].as_u64().expect("a stop");
        longest = longest.max(stop);
        sum += stop;
        wrong += usize::from(!is_consistent(&certificate.copy_of(&lab.data())));
    }
    assert_eq!(wrong, 0, "{what}: inconsistent of {count}");
    // The control: the same without the hold.
    let (mut off, mut tried) = (0, 0);
    while tried < 400 && (off == 0 || tried < 20) {
        let mut given = vec!["--full", "--keep-last", "2", "--outside", "none"];
        given.extend(["--capture", "copy"]);
        given.extend(options.iter().filter(|o| !o.contains("outside")));
        let outcome = snap(lab, &given);
        off += usize::from(!is_consistent(&outcome.unverified().copy_of(&lab.data())));
        tried += 1;
    }
    println!(
        "{what}: 0 of {count} inconsistent, stopped {} µs on average, {longest} µs at most; \
         {off} of {tried} without the hold",
        sum / count as u64
    );
    assert!(off > 0, "{what}: the control shows nothing");
    assert!(writer.is_running());
    writer.end();
}

#[test]
fn a_static_go_program() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-go", Fs::Xfs, LIMIT) else {
        return;
    };
    let mut command = lab.command(product::go_program("relay"));
    command.arg(lab.data());
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    assert_layer(snap(&lab, &[]).verified(), writer.pid(), "ptrace");
    consistent(&lab, "static Go program", writer, &[]);
}

#[test]
fn stores_into_a_mapping() {
    let _alone = lab::serial();
    for fs_kind in [Fs::Xfs, Fs::Tmpfs] {
        let Some(lab) = Lab::new("outside-mapped", fs_kind, LIMIT) else {
            continue;
        };
        let writer = relay(&lab, "mapped");
        consistent(&lab, &format!("mapping on {}", fs_kind.name()), writer, &[]);
    }
}

#[test]
fn a_program_of_the_set_that_maps_a_member() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-mapped-set", Fs::Xfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    let args = ["mapped", data.to_str().unwrap()];
    let mut writer = lab.run(&[], &product::program("relay"), &args);
    lab.wait_for_beats(&mut writer, 3);
    let program = lab.processes_named("relay")[0];
    for _ in 0..rounds(100, 15) {
        let outcome = lab.checkpoint(&["--keep-last", "2"]);
        let certificate = outcome.verified();
        assert_layer(certificate, program, "ptrace");
        assert!(is_consistent(&certificate.copy_of(&data)));
    }
    let outcome = lab.checkpoint(&["--outside", "none"]);
    let reasons = outcome.unverified().reasons();
    assert!(
        reasons.iter().any(|(code, _)| code == "mapped-writable"),
        "{reasons:?}"
    );
    // And by `snap`, which knows of no gate.
    assert_layer(snap(&lab, &[]).verified(), program, "ptrace");
}

#[test]
fn threads_and_children_made_all_the_time() {
    let _alone = lab::serial();
    for mode in ["threads", "forks"] {
        let Some(lab) = Lab::new(&format!("outside-{mode}"), Fs::Xfs, LIMIT) else {
            return;
        };
        let mut writer = relay(&lab, mode);
        for _ in 0..rounds(300, 40) {
            let outcome = snap(&lab, &["--keep-last", "2"]);
            let certificate = outcome.verified();
            assert!(is_consistent(&certificate.copy_of(&lab.data())), "{mode}");
        }
        assert_runs(&lab, &mut writer, Duration::from_secs(1));
    }
}

/// The `/proc/PID` of a process whose first thread has ended shows neither descriptors
/// nor mappings.
#[test]
fn the_first_thread_has_ended() {
    let _alone = lab::serial();
    for mode in ["plain", "stdio", "mapped"] {
        let Some(lab) = Lab::new(&format!("outside-headless-{mode}"), Fs::Xfs, LIMIT) else {
            return;
        };
        let data = lab.data();
        let headless = format!("headless-{mode}");
        let mut writer = relay(&lab, &headless);
        let pid = writer.pid();
        assert!(process::wait_until(LIMIT, || process::state(pid) == Some('Z')));
        for method in ["ptrace", "sigstop"] {
            for _ in 0..rounds(50, 5) {
                let outcome = snap(&lab, &["--outside", method, "--keep-last", "2"]);
                let certificate = outcome.verified();
                assert_layer(certificate, pid, method);
                assert!(is_consistent(&certificate.copy_of(&data)), "{mode}");
            }
        }
        snap(&lab, &["--outside", "none"]).unverified();
        writer.end();
        let _ = fs::remove_file(lab.stats().path());

        let mut writer = lab.run(
            &[],
            &product::program("relay"),
            &[&headless, data.to_str().unwrap()],
        );
        lab.wait_for_beats(&mut writer, 3);
        let pid = lab.processes_named("relay")[0];
        assert!(process::wait_until(LIMIT, || process::state(pid) == Some('Z')));
        for _ in 0..rounds(100, 10) {
            let outcome = lab.checkpoint(&["--keep-last", "2"]);
            let certificate = outcome.verified();
            let layers = layers(certificate);
            assert!(
                layers.iter().any(|(of, _)| *of == pid as u64),
                "{mode}: {layers:?}"
            );
            assert!(is_consistent(&certificate.copy_of(&data)), "{mode}");
        }
        assert_layer(snap(&lab, &[]).verified(), pid, "ptrace");
        assert_runs(&lab, &mut writer, Duration::from_secs(1));
    }
}

#[test]
fn what_the_coordinator_inherits_makes_nobody_a_writer() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-inherits", Fs::Xfs, LIMIT) else {
        return;
    };
    let writer = relay(&lab, "plain");
    let plain = snap_command(&lab, &[]);
    let mut command = lab.command("sh");
    command.args(["-c", "exec \"$@\" 3>>\"$MEMBER\"", "sh"]);
    command.env("MEMBER", lab.data().join("a"));
    command.arg(plain.get_program()).args(plain.get_args());
    let outcome = outcome(process::run(command, Duration::from_secs(30)));
    let layers = layers(outcome.verified());
    assert_eq!(layers, [(writer.pid() as u64, "ptrace".to_owned())]);
}

#[test]
fn by_sigstop_and_freezer() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-methods", Fs::Xfs, LIMIT) else {
        return;
    };
    let mut writer = relay(&lab, "plain");
    let pid = writer.pid();
    for _ in 0..rounds(50, 5) {
        let outcome = snap(&lab, &["--outside", "sigstop"]);
        assert_layer(outcome.verified(), pid, "sigstop");
        assert!(is_consistent(&outcome.certificate().copy_of(&lab.data())));
    }
    assert_runs(&lab, &mut writer, Duration::from_secs(1));
    // Without a cgroup of its own: the next method in the list, or the reason.
    let outcome = snap(&lab, &["--outside", "freezer"]);
    let (_, text) = &outcome.unverified().reasons()[0];
    assert!(text.contains("cgroup"), "{text}");
    assert_layer(
        snap(&lab, &["--outside", "freezer,ptrace"]).verified(),
        pid,
        "ptrace",
    );
    let Some(group) = Cgroup::new(lab.set()) else {
        eprintln!("SKIPPED: no cgroup v2 that can be written");
        return;
    };
    group.take(pid);
    for _ in 0..rounds(50, 5) {
        let outcome = snap(&lab, &["--outside", "freezer"]);
        assert_layer(outcome.verified(), pid, "freezer");
        assert!(is_consistent(&outcome.certificate().copy_of(&lab.data())));
    }
    assert_runs(&lab, &mut writer, Duration::from_secs(1));
    // With somebody else in it, it is not to be frozen.
    let other = Proc::start(lab.command_with("sleep", &["60"]));
    group.take(other.pid());
    let (_, text) = &snap(&lab, &["--outside", "freezer"]).unverified().reasons()[0];
    assert!(text.contains("sleep"), "{text}");
    drop((writer, other));
}

/// A cgroup, removed when dropped.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Cgroup> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let line = mounts
            .lines()
            .find(|l| l.split(' ').nth(2) == Some("cgroup2"))?;
        let dir = Path::new(line.split(' ').nth(1)?).join(format!("snapshim-test-{name}"));
        let _ = fs::create_dir(&dir);
        dir.join("cgroup.freeze").exists().then_some(Cgroup(dir))
    }

    fn take(&self, pid: i32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("a process in its cgroup");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        process::wait_until(Duration::from_secs(5), || fs::remove_dir(&self.0).is_ok());
    }
}

/// The state letters of all threads.
fn states(pid: i32) -> Vec<char> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|t| process::state(t.file_name().to_str()?.parse().ok()?))
        .collect()
}

fn is_stopped(pid: i32) -> bool {
    states(pid).iter().any(|s| matches!(s, 'T' | 't'))
}

fn tracer(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("TracerPid:"));
    line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
}

/// Asserts that the program runs within `limit`, is traced by nobody, and gets on.
#[track_caller]
fn assert_runs(lab: &Lab, writer: &mut Proc, limit: Duration) {
    let pid = writer.pid();
    let start = Instant::now();
    assert!(writer.is_running(), "the writer has ended");
    let runs = process::wait_until(limit, || !is_stopped(pid) && tracer(pid) == 0);
    assert!(
        runs,
        "stopped for {:?}: {}",
        start.elapsed(),
        process::describe(pid)
    );
    let beats = lab.stats().beats();
    let on = process::wait_until(Duration::from_secs(5), || lab.stats().beats() > beats);
    assert!(on, "no progress: {}", process::describe(pid));
    assert!(!is_stopped(pid) && tracer(pid) == 0, "stopped again");
}

/// The guardian of a running command.
fn guardian(of: i32) -> Option<i32> {
    let is_guardian = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|c| c.windows(17).any(|w| w == b"internal-guardian"))
    };
    process::descendants(of).into_iter().find(is_guardian)
}

fn send(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// A test whose captures take some time, to have something to disturb.
fn slow_lab(name: &str) -> Option<Lab> {
    let lab = Lab::new(name, Fs::Tmpfs, LIMIT)?;
    fs::write(lab.data().join("bulk"), vec![7; 48 << 20]).unwrap();
    Some(lab)
}

/// Starts a snapshot and waits until the writer is stopped for it.
#[track_caller]
fn snap_in_progress(lab: &Lab, writer: &Proc, options: &[&str]) -> Proc {
    for _ in 0..20 {
        let mut command = snap_command(lab, options);
        command.args(["--full", "--capture", "copy", "--max-hold", "400ms"]);
        let mut proc = Proc::piped(command);
        let pid = writer.pid();
        while proc.is_running() {
            if is_stopped(pid) {
                return proc;
            }
            std::hint::spin_loop();
        }
    }
    panic!("the writer was never seen stopped");
}

#[test]
fn whoever_is_killed_nothing_stays_stopped() {
    let _alone = lab::serial();
    let Some(lab) = slow_lab("outside-kill") else {
        return;
    };
    let mut writer = relay(&lab, "plain");
    let pid = writer.pid();
    // The coordinator, at any moment.
    let mut random = Random(4711);
    let (count, mut hits, mut longest) = (rounds(200, 20), 0, Duration::ZERO);
    for _ in 0..count {
        let mut proc = Proc::piped(snap_command(&lab, &["--full", "--capture", "copy"]));
        std::thread::sleep(Duration::from_micros(random.below(90_000)));
        hits += usize::from(is_stopped(pid));
        proc.signal(Signal::SIGKILL);
        let killed = Instant::now();
        assert!(
            process::wait_until(Duration::from_secs(2), || !is_stopped(pid)),
            "{}",
            process::describe(pid)
        );
        longest = longest.max(killed.elapsed());
        assert_runs(&lab, &mut writer, Duration::from_secs(1));
        proc.end();
    }
    println!(
        "coordinator killed {count} times, {hits} with the writer stopped; it ran {longest:?} later at most"
    );

    // The coordinator, the guardian, and both, surely during the stop.
    for who in ["coordinator", "guardian", "both"] {
        for _ in 0..rounds(50, 5) {
            let mut proc = snap_in_progress(&lab, &writer, &[]);
            let guardian = guardian(proc.pid());
            if who != "coordinator"
                && let Some(guardian) = guardian
            {
                send(guardian, Signal::SIGKILL);
            }
            if who != "guardian" {
                proc.signal(Signal::SIGKILL);
            }
            assert_runs(&lab, &mut writer, Duration::from_millis(300));
            let outcome = proc.wait(Duration::from_secs(20));
            if who == "guardian" && guardian.is_some() {
                // Either it was done already, or it knows.
                assert!(
                    matches!(outcome.code(), 0 | 4 | 5),
                    "exit {}: {}",
                    outcome.code(),
                    outcome.err()
                );
                println!(
                    "guardian killed: exit {}: {}",
                    outcome.code(),
                    outcome.err().trim()
                );
                if outcome.code() == 0 {
                    let text = outcome.out();
                    let value = serde_json::from_str(&text).unwrap();
                    assert!(is_consistent(&Certificate(value).copy_of(&lab.data())));
                }
            }
        }
    }
}

#[test]
fn whoever_is_stopped_the_bound_holds() {
    let _alone = lab::serial();
    let Some(lab) = slow_lab("outside-bound") else {
        return;
    };
    let mut writer = relay(&lab, "plain");
    for (method, who) in [
        ("ptrace", "coordinator"),
        ("ptrace", "both"),
        ("sigstop", "coordinator"),
        ("sigstop", "guardian"),
    ] {
        for _ in 0..rounds(20, 2) {
            let mut proc = snap_in_progress(&lab, &writer, &["--outside", method]);
            let since = Instant::now();
            if who != "coordinator"
                && let Some(guardian) = guardian(proc.pid())
            {
                send(guardian, Signal::SIGSTOP);
            }
            if who != "guardian" {
                proc.signal(Signal::SIGSTOP);
            }
            assert_runs(&lab, &mut writer, BOUND + Duration::from_millis(450));
            println!(
                "{method}, {who} stopped: the writer ran after {:?}",
                since.elapsed()
            );
            proc.signal(Signal::SIGCONT);
            let ended = proc.wait(Duration::from_secs(20));
            assert!(
                matches!(ended.code(), 0 | 4 | 5),
                "{}: {}",
                ended.code(),
                ended.err()
            );
            assert_runs(&lab, &mut writer, Duration::from_secs(1));
        }
    }
}

#[test]
fn a_stopped_program_stays_stopped() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-stopped", Fs::Xfs, LIMIT) else {
        return;
    };
    let mut writer = relay(&lab, "plain");
    let pid = writer.pid();
    for method in ["ptrace", "sigstop"] {
        writer.signal(Signal::SIGSTOP);
        assert!(process::wait_until(LIMIT, || states(pid) == ['T']));
        for _ in 0..3 {
            assert_layer(snap(&lab, &["--outside", method]).verified(), pid, method);
            assert!(
                process::wait_until(Duration::from_secs(1), || states(pid) == ['T']),
                "{method}: {:?}",
                states(pid)
            );
            assert_eq!(tracer(pid), 0);
        }
        let beats = lab.stats().beats();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(lab.stats().beats(), beats, "{method}: it ran");
        writer.signal(Signal::SIGCONT);
        assert_runs(&lab, &mut writer, Duration::from_secs(1));
    }
}

#[test]
fn a_program_under_a_debugger_is_a_reason() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-strace", Fs::Xfs, LIMIT) else {
        return;
    };
    let mut writer = relay(&lab, "plain");
    let pid = writer.pid().to_string();
    let mut strace =
        Proc::start(lab.command_with("strace", &["-qq", "-o", "/dev/null", "-p", &pid]));
    assert!(process::wait_until(Duration::from_secs(10), || tracer(
        writer.pid()
    ) != 0));
    let outcome = snap(&lab, &[]);
    let reasons = outcome.unverified().reasons();
    let (code, text) = &reasons[0];
    assert!(
        code == "foreign-writer" && text.contains("strace"),
        "{reasons:?}"
    );
    println!("{text}");
    strace.signal(Signal::SIGINT);
    strace.wait(Duration::from_secs(10));
    snap(&lab, &[]).verified();
    assert_runs(&lab, &mut writer, Duration::from_secs(1));
}

#[test]
fn nobody_is_told_and_signals_arrive_once() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-signals", Fs::Xfs, LIMIT) else {
        return;
    };
    let parent = relay(&lab, "watched");
    let child = process::descendants(parent.pid())[0];
    let mut sent = 0;
    let signal = libc::SIGRTMIN();
    for round in 0..rounds(100, 20) {
        let mut proc = Proc::piped(snap_command(&lab, &["--keep-last", "2"]));
        let mut kills = 0;
        while proc.is_running() {
            // SAFETY: sends a signal.
            sent += u64::from(unsafe { libc::kill(child, signal) } == 0);
            if round % 4 == 3 && kills == 0 && is_stopped(child) {
                // What was about to be delivered is not lost with the tracer.
                if let Some(guardian) = guardian(proc.pid()) {
                    send(guardian, Signal::SIGKILL);
                    kills += 1;
                }
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let code = proc.wait(Duration::from_secs(1)).code();
        assert!(code == 0 || kills > 0, "exit {code}");
    }
    let all = process::wait_until(Duration::from_secs(5), || lab.stats().turns() >= sent);
    std::thread::sleep(Duration::from_millis(20));
    assert!(
        all && lab.stats().turns() == sent,
        "{} of {sent}",
        lab.stats().turns()
    );
    assert_eq!(
        lab.stats().longest(),
        Duration::ZERO,
        "the parent was told of stops"
    );
    println!("{sent} signals arrived once, the parent saw nothing");
}

#[test]
fn programs_the_shim_cannot_enter() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("outside-kinds", Fs::Xfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    let setuid = lab.beside("relay-setuid");
    fs::copy(product::program("relay"), &setuid).unwrap();
    fs::set_permissions(&setuid, fs::Permissions::from_mode(0o4755)).unwrap();
    let wide = product::program("relay");
    let narrow = product::compiled("cc", "relay", "relay-32", &["-m32", "-pthread", "-latomic"]);
    let set = format!("SNAPSHIM_DIR={}", lab.gates().display());
    let stats = format!("SNAPSHIM_TEST_STATS={}", lab.stats().path().display());
    let text = |p: &Path| p.to_str().unwrap().to_owned();
    let id = "65534";
    for (what, words) in [
        (
            "env -i",
            vec!["env".into(), "-i".into(), set, stats, text(&wide)],
        ),
        (
            "setuid",
            vec![
                "setpriv".into(),
                "--reuid".into(),
                id.into(),
                "--clear-groups".into(),
                text(&setuid),
            ],
        ),
        (
            "32-bit",
            vec![
                "sh".into(),
                "-c".into(),
                "exec \"$@\"".into(),
                "sh".into(),
                text(&narrow),
            ],
        ),
    ] {
        let _ = fs::remove_file(lab.stats().path());
        let mut command = lab.run_command(&[]);
        command.args(words).arg("plain").arg(&data);
        let mut writer = Proc::piped(command);
        lab.wait_for_beats(&mut writer, 3);
        for _ in 0..rounds(30, 5) {
            let outcome = lab.checkpoint(&["--keep-last", "2"]);
            let certificate = outcome.verified();
            assert!(
                layers(certificate).iter().any(|(_, l)| l == "ptrace"),
                "{what}: {:?}",
                certificate.0
            );
            assert!(is_consistent(&certificate.copy_of(&data)), "{what}");
        }
        let outcome = lab.checkpoint(&["--outside", "none"]);
        let reasons = outcome.unverified().reasons();
        assert!(
            reasons.iter().any(|(code, _)| code == "foreign-writer"),
            "{what}: {reasons:?}"
        );
        writer.end();
    }
}

/// Real stores that write through mappings: started under no shim, snapshotted, and
/// each copy opened and checked by the store's own code.
#[test]
fn real_mapped_stores() {
    let _alone = lab::serial();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let python = |mode: &str| {
        let script = sources.join("stores.py").to_str().unwrap().to_owned();
        vec!["/usr/bin/python3".to_owned(), script, mode.to_owned()]
    };
    let store = |mode: &str| {
        let flags = ["-pthread", "-llmdb", "-lkyotocabinet"];
        let program = product::compiled("cc", "stores", "stores", &flags);
        vec![program.to_str().unwrap().to_owned(), mode.to_owned()]
    };
    let java = sources.join("Mapped.java").to_str().unwrap().to_owned();
    let java = vec!["java".to_owned(), "-Xmx64m".to_owned(), java];
    let mut controls = 0;
    for (name, writer, checker) in [
        ("lmdb", store("lmdb"), store("check-lmdb")),
        ("kyoto", store("kyoto"), store("check-kyoto")),
        ("sqlite", python("sqlite"), python("check-sqlite")),
        ("mmap", python("mmap"), python("check-mmap")),
        ("rrd", python("rrd"), python("check-rrd")),
        ("java", java, python("check-mmap")),
    ] {
        let Some(lab) = Lab::new(&format!("outside-store-{name}"), Fs::Xfs, LIMIT) else {
            return;
        };
        let start = |words: &[String], dir: &Path| {
            let mut command = lab.command(&words[0]);
            command.args(&words[1..]).arg(dir);
            command
        };
        let mut proc = Proc::piped(start(&writer, &lab.data()));
        lab.wait_for_beats(&mut proc, 10);
        let is_whole = |certificate: &Certificate| {
            // A store may mend its files when it opens them: not those of the snapshot.
            let copy = lab.beside("opened");
            let _ = fs::remove_dir_all(&copy);
            let from = certificate.copy_of(&lab.data());
            process::tool(
                "cp",
                &["-a", from.to_str().unwrap(), copy.to_str().unwrap()],
            );
            let ended = process::run(start(&checker, &copy), Duration::from_secs(30));
            (ended.code() == 0, ended.err())
        };
        let count = rounds(100, 8);
        let mut longest = 0;
        for _ in 0..count {
            let outcome = snap(&lab, &["--keep-last", "2"]);
            let certificate = outcome.verified();
            longest = longest.max(certificate.0["stop_us"].as_u64().unwrap());
            let (whole, why) = is_whole(certificate);
            assert!(whole, "{name}: {why}");
        }
        let mut off = 0;
        for _ in 0..count {
            let outcome = snap(&lab, &["--keep-last", "2", "--outside", "none"]);
            off += usize::from(outcome.code != 0 && !is_whole(outcome.certificate()).0);
        }
        println!(
            "{name}: 0 of {count} inconsistent, stopped {longest} µs at most; {off} of {count} without the hold"
        );
        controls += off;
        proc.end();
    }
    assert!(controls > 0, "the controls show nothing");
}
