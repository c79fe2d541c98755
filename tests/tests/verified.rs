//! Verified means verified: whatever the gate cannot hold is found and named,
//! and a snapshot that could be wrong is never called right.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::lab::Outcome;
use snapshim_tests::process::{self, Proc};
use snapshim_tests::records::{self, Shape, Verdict};
use snapshim_tests::{Certificate, Fs, Lab, lab, product, rounds};

const LIMIT: Duration = Duration::from_secs(180);

/// Nobody is stopped from outside: these tests are about what the gate holds, and
/// what is said of the rest. tests/outside.rs is about stopping it.
const GATE_ONLY: &[&str] = &["--outside", "none"];

/// The records `suspect` writes.
const SHAPE: Shape = Shape {
    files: 2,
    lanes: 1,
    record: 16384,
};

/// `suspect` with everything this machine has.
fn suspect() -> PathBuf {
    for header in ["liburing.h", "libaio.h"] {
        assert!(
            Path::new("/usr/include").join(header).exists(),
            "this test needs {header}: apt-get install liburing-dev libaio-dev"
        );
    }
    let flags = ["-pthread", "-DWITH_URING", "-DWITH_AIO", "-luring", "-laio"];
    product::compiled("cc", "suspect", "suspect", &flags)
}

fn verdict(lab: &Lab, certificate: &Certificate) -> Verdict {
    records::check(&certificate.copy_of(&lab.data()), SHAPE)
}

/// A published checkpoint; if it is verified, it is consistent.
#[track_caller]
fn honest(lab: &Lab, what: &str) -> Outcome {
    honest_by(lab, what, GATE_ONLY)
}

/// The same, with options.
#[track_caller]
fn honest_by(lab: &Lab, what: &str, options: &[&str]) -> Outcome {
    let outcome = lab.checkpoint(options);
    assert!(
        matches!(outcome.code, 0 | 5),
        "{what}: exit {}: {}",
        outcome.code,
        outcome.stderr
    );
    let certificate = outcome.certificate();
    assert_eq!(
        outcome.code == 0,
        certificate.is_verified() && certificate.reasons().is_empty(),
        "{what}: exit {} with {:?}",
        outcome.code,
        certificate.0
    );
    if outcome.code == 0 {
        let verdict = verdict(lab, certificate);
        assert!(
            verdict.is_consistent(),
            "{what}: verified, and yet {verdict:?}"
        );
    }
    outcome
}

/// A helper that says "ready", outside the set.
fn outsider(lab: &Lab, mode: &str, path: &Path) -> Proc {
    let mut command = lab.command(product::program("hold"));
    command.arg(mode).arg(path);
    ready(command)
}

/// Starts `command` and waits for its first line.
fn ready(mut command: Command) -> Proc {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    command.stdin(Stdio::null()).stdout(writer);
    let proc = Proc::start(command);
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).expect("a line");
    assert_eq!(line, "ready\n");
    proc
}

#[test]
fn a_foreign_writer_is_named_and_a_reader_is_not() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("verified-foreign", Fs::Xfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    let args = ["plain", data.to_str().unwrap(), "600"];
    let mut writer = lab.run(&[], &suspect(), &args);
    lab.wait_for_beats(&mut writer, 3);
    honest(&lab, "alone").verified();
    let member = records::file(&data, 0);

    for (mode, harmless) in [
        ("writes", false),
        ("mapped", false),
        ("reads", true),
        ("mapped-read", true),
    ] {
        let mut other = outsider(&lab, mode, &member);
        let outcome = honest(&lab, mode);
        if harmless {
            outcome.verified();
        } else {
            let certificate = outcome.unverified();
            assert!(
                certificate.blames(other.pid()),
                "{mode}: {:?}",
                certificate.0
            );
            let (code, text) = &certificate.reasons()[0];
            println!("{mode}: {code}: {text}");
            assert!(
                text.contains("hold") || text.contains(&other.pid().to_string()),
                "{text}"
            );
            assert!(
                lab.checkpoint(&["--full", "--capture", "copy", "--outside", "none"])
                    .code
                    == 5
            );
        }
        other.end();
        honest(&lab, "afterwards").verified();
    }

    // A foreign writer of another file beside the data does no harm.
    let aside = lab.beside("not-watched");
    fs::write(&aside, "x").unwrap();
    let mut other = outsider(&lab, "writes", &aside);
    honest(&lab, "a stranger elsewhere").verified();
    other.end();
}

/// Checkpoints `suspect MODE` under `run`; returns how many were verified.
fn checkpoints_of(mode: &str, program: &Path, fs_kind: Fs, count: usize) -> Option<usize> {
    checkpoints_by(mode, program, fs_kind, count, GATE_ONLY)
}

/// The same, with options.
fn checkpoints_by(
    mode: &str,
    program: &Path,
    fs_kind: Fs,
    count: usize,
    options: &[&str],
) -> Option<usize> {
    let _alone = lab::serial();
    let lab = Lab::new(&format!("verified-{mode}"), fs_kind, LIMIT)?;
    let mut command = lab.run_command(&["--keep-last", "2"]);
    // `run` itself refuses a static program; behind a shell it cannot know.
    command.args(["sh", "-c", "exec \"$@\"", "sh"]);
    let plain_mode = match mode.strip_prefix("symbols-") {
        Some(rest) => {
            // Without tables of system call sites.
            command.args(["env", "SNAPSHIM_SITES=/nonexistent"]);
            rest
        }
        None => mode.trim_start_matches("static-"),
    };
    command
        .arg(program)
        .arg(plain_mode)
        .arg(lab.data())
        .arg("600");
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    let (mut verified, mut inconsistent) = (0, 0);
    let mut reasons = std::collections::BTreeMap::new();
    for _ in 0..count {
        let outcome = honest_by(&lab, mode, options);
        verified += usize::from(outcome.code == 0);
        let certificate = outcome.certificate();
        inconsistent += usize::from(!verdict(&lab, certificate).is_consistent());
        for (code, text) in certificate.reasons() {
            reasons.entry(code).or_insert((0, text)).0 += 1;
        }
    }
    writer.signal(Signal::SIGTERM);
    let ended = writer.wait(Duration::from_secs(20)).ok(mode);
    println!(
        "{mode} on {} {options:?}: {verified} of {count} verified, {inconsistent} inconsistent and not called \
         verified; {reasons:?}; {}",
        fs_kind.name(),
        ended.out().trim()
    );
    Some(verified)
}

/// A way of writing that can never be verified.
fn never_verified(mode: &str, program: &Path) {
    for fs_kind in [Fs::Xfs, Fs::Tmpfs] {
        let verified = checkpoints_of(mode, program, fs_kind, rounds(100, 20));
        assert_eq!(verified.unwrap_or(0), 0, "{mode} on {}", fs_kind.name());
    }
}

/// A way of writing that is verified only when it did not matter.
fn honestly_verified(mode: &str, program: &Path) {
    for fs_kind in [Fs::Xfs, Fs::Tmpfs] {
        checkpoints_of(mode, program, fs_kind, rounds(300, 40));
    }
}

/// A way of writing that the gate holds.
fn always_verified(mode: &str, program: &Path) {
    for fs_kind in [Fs::Xfs, Fs::Tmpfs] {
        let count = rounds(100, 20);
        let verified = checkpoints_of(mode, program, fs_kind, count);
        assert_eq!(
            verified.unwrap_or(count),
            count,
            "{mode} on {}",
            fs_kind.name()
        );
    }
}

#[test]
fn plain_writes() {
    always_verified("plain", &suspect());
}

#[test]
fn writes_through_syscall() {
    always_verified("syscall", &suspect());
}

#[test]
fn a_program_that_gives_up_root() {
    always_verified("setuid", &suspect());
}

#[test]
fn a_sandboxed_program_lives_and_is_held() {
    honestly_verified("sandbox", &suspect());
}

#[test]
fn stores_into_a_mapping() {
    never_verified("mapped", &suspect());
}

/// Submissions wait at the gate, and what a ring has in flight can be seen.
#[test]
fn io_uring() {
    always_verified("uring", &suspect());
}

/// Submissions wait at the gate; a reflink waits for what is in flight, a copy does not.
#[test]
fn kernel_aio() {
    let count = rounds(100, 20);
    for (fs_kind, expected) in [(Fs::Xfs, count), (Fs::Tmpfs, 0)] {
        let verified = checkpoints_of("aio", &suspect(), fs_kind, count);
        assert_eq!(verified.unwrap_or(expected), expected, "{}", fs_kind.name());
    }
}

/// By symbols alone it is not known that every submission waits.
#[test]
fn io_uring_and_aio_held_by_symbols() {
    never_verified("symbols-uring", &suspect());
    never_verified("symbols-aio", &suspect());
}

/// What a ring or context has in flight is known once its process is stopped; what AIO
/// has in flight is waited for by a reflink only.
#[test]
fn io_uring_and_aio_of_a_stopped_program() {
    let count = rounds(100, 15);
    for (mode, fs_kind, expected) in [
        ("uring", Fs::Xfs, count),
        ("uring", Fs::Tmpfs, count),
        ("aio", Fs::Xfs, count),
        ("aio", Fs::Btrfs, count),
        ("aio", Fs::Tmpfs, 0),
    ] {
        let verified = checkpoints_by(mode, &suspect(), fs_kind, count, &["--outside", "ptrace"]);
        assert_eq!(
            verified.unwrap_or(expected),
            expected,
            "{mode} on {}",
            fs_kind.name()
        );
    }
}

#[test]
fn a_static_program() {
    let flags = ["-pthread", "-static"];
    let program = product::compiled("cc", "suspect", "suspect-static", &flags);
    never_verified("static-plain", &program);
}

#[test]
fn stdio_that_flushes_from_within_libc() {
    always_verified("stdio", &suspect());
}

#[test]
fn system_calls_of_the_programs_own() {
    always_verified("asm", &suspect());
}

#[test]
fn a_child_without_the_shim() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("verified-scrubbed", Fs::Xfs, LIMIT) else {
        return;
    };
    let member = lab.data().join("member");
    fs::write(&member, "x").unwrap();
    let mut command = lab.run_command(&[]);
    command.args(["env", "-i"]);
    command.arg(format!("SNAPSHIM_DIR={}", lab.gates().display()));
    command
        .arg(product::program("hold"))
        .arg("writes")
        .arg(&member);
    let _proc = ready(command);
    let outcome = lab.checkpoint(GATE_ONLY);
    let certificate = outcome.unverified();
    let child = lab.processes_named("hold")[0];
    assert!(certificate.blames(child), "{:?}", certificate.0);
}

#[test]
fn a_program_that_started_before_any_gate_existed() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("verified-early", Fs::Xfs, LIMIT) else {
        return;
    };
    // The environment, without the gate it names.
    let mut env = lab.env(&[]);
    fs::remove_dir_all(lab.gates().join(lab.set())).unwrap();
    for (name, value) in &mut env {
        if name == "SNAPSHIM_GATE" {
            // Pinned to no particular file.
            *value = lab.gate().display().to_string();
        }
    }
    env.retain(|(name, _)| name == "SNAPSHIM_GATE" || name == "LD_PRELOAD");
    let data = lab.data();
    let mut command = lab.command(suspect());
    command
        .args(["plain", data.to_str().unwrap(), "600"])
        .envs(env);
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 100);
    let refused = lab.checkpoint(&[]);
    assert_eq!(refused.code, 2, "no set yet: {}", refused.stderr);
    // Now the set comes up; the program finds its gate by itself.
    lab.env(&[]);
    let attached = process::wait_until(Duration::from_secs(20), || honest(&lab, "early").code == 0);
    assert!(
        attached,
        "never verified: {:?}",
        lab.checkpoint(&[]).certificate().reasons()
    );
    for _ in 0..rounds(50, 10) {
        honest(&lab, "attached").verified();
    }
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(20)).ok("the program");
}

#[test]
fn plain_preload_without_run() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("verified-preload", Fs::Btrfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    let mut command = lab.command(suspect());
    command
        .args(["plain", data.to_str().unwrap(), "600"])
        .envs(lab.env(&[]));
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    for _ in 0..rounds(50, 10) {
        let outcome = honest(&lab, "preload");
        let certificate = outcome.verified();
        let writers = certificate.0["writers"].as_array().unwrap();
        assert!(
            writers
                .iter()
                .any(|w| w["pid"] == writer.pid() && w["layer"] == "sites"),
            "{writers:?}"
        );
    }
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(20)).ok("the program");
    // The set outlives its program.
    honest(&lab, "afterwards").verified();
}
