//! Programs in containers: pid, mount, IPC and user namespaces of their own, other paths
//! than the host's, the directory of gates as a shared volume. Made with bubblewrap.
//!
//! Where the coordinator stands decides what it can prove: on the host all of it; in
//! the pid namespace of the program what is in there; in a container beside it, that
//! somebody uses the gate whom it cannot look at.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use snapshim_gate::abi::HEADER_SIZE;
use snapshim_tests::lab::{Outcome, outcome};
use snapshim_tests::records::{self, Shape};
use snapshim_tests::{Certificate, Fs, Lab, Proc, Random, lab, process, product, rounds, tree};

const LIMIT: Duration = Duration::from_secs(200);
const SOON: Duration = Duration::from_secs(20);
const SHAPE: Shape = Shape {
    files: 2,
    lanes: 1,
    record: 1 << 19,
};

/// What the directory of gates is called in a container.
const GATES: &str = "/run/snapshim";
/// What the directory of site tables is called there.
const SITES: &str = "/run/sites";
/// What the data is called there.
const DATA: &str = "/srv/data";

/// How a container is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// By root, with a pid namespace; the program is root in it.
    Root,
    /// The same, but the program becomes nobody before it begins.
    OtherUser,
    /// By nobody, with a user namespace in which it is root.
    Rootless,
}

/// Who the user of [`Kind::OtherUser`] and [`Kind::Rootless`] is.
const USER: &str = "nobody";
const AS_USER: [&str; 4] = [
    "setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
];

/// Containers of one test.
struct Host {
    lab: Lab,
    app: PathBuf,
    /// What brings a program into the set, with the names that things have in a container.
    environment: Vec<(String, String)>,
    sites: String,
}

impl Host {
    /// `None` if the file system is left out on request.
    #[track_caller]
    fn new(name: &str, fs: Fs, options: &[&str]) -> Option<Host> {
        assert!(
            process::installed("bwrap"),
            "this test needs bwrap: apt-get install bubblewrap"
        );
        let lab = Lab::new(name, fs, LIMIT)?;
        // Copied to where every user can get at it.
        let app = lab.beside("ordered");
        fs::copy(product::program("ordered"), &app).unwrap();
        fs::set_permissions(&app, fs::Permissions::from_mode(0o755)).unwrap();
        // By a shell, as `Lab::env` has it, would leave the slot of a process of the host.
        let mut command = lab.snapshim(&["env", "--json", "--name", lab.set()]);
        command.arg("--watch").arg(lab.data());
        command.arg("--store").arg(lab.store()).args(options);
        let report = process::run(command, SOON).ok("snapshim env").stdout;
        let report: Value = serde_json::from_slice(&report).unwrap();
        let variables = report["environment"].as_object().unwrap();
        let gates = lab.gates().display().to_string();
        let mut sites = String::new();
        let mut environment = Vec::new();
        for (name, value) in variables {
            let value = value.as_str().unwrap();
            environment.push(match name.as_str() {
                "SNAPSHIM_SITES" => {
                    sites = value.to_owned();
                    (name.clone(), SITES.to_owned())
                }
                _ => (name.clone(), value.replacen(&gates, GATES, 1)),
            });
        }
        Some(Host {
            lab,
            app,
            environment,
            sites,
        })
    }

    /// A directory of data of its own for a container.
    fn data(&self, name: &str) -> PathBuf {
        let data = self.lab.data().join(name);
        fs::create_dir_all(&data).unwrap();
        data
    }

    /// `bwrap` with `data` in it, up to the program.
    fn container(&self, kind: Kind, data: &Path) -> Command {
        let mut command = match kind {
            Kind::Rootless => {
                let mut command = self.lab.command(AS_USER[0]);
                command
                    .args(&AS_USER[1..])
                    .args(["bwrap", "--unshare-user"]);
                command.args(["--uid", "0", "--gid", "0"]);
                command
            }
            _ => self.lab.command("bwrap"),
        };
        command.args([
            "--die-with-parent",
            "--unshare-pid",
            "--unshare-ipc",
            "--clearenv",
        ]);
        command.args([
            "--ro-bind",
            "/usr",
            "/usr",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
        ]);
        for dir in ["bin", "sbin", "lib", "lib64"] {
            command.args(["--symlink", &format!("usr/{dir}"), &format!("/{dir}")]);
        }
        command.args(["--ro-bind", "/etc/passwd", "/etc/passwd"]);
        command.args(["--ro-bind", "/etc/group", "/etc/group"]);
        // Else it would make them for nobody but its user.
        for dir in ["/run", "/srv", "/app"] {
            command.args(["--perms", "0755", "--dir", dir]);
        }
        command.arg("--bind").arg(data).arg(DATA);
        command.arg("--bind").arg(self.lab.gates()).arg(GATES);
        command.args(["--ro-bind", &self.sites, SITES]);
        command.arg("--ro-bind").arg(&self.app).arg("/app/ordered");
        // So that the test finds what it has to end.
        command
            .arg("--setenv")
            .arg("SNAPSHIM_DIR")
            .arg(self.lab.gates());
        command
    }

    /// Starts the program in a container, in the set if it is `gated`.
    #[track_caller]
    fn start(&self, kind: Kind, data: &Path, gated: bool) -> Writer {
        let before = self.lab.processes_named("ordered");
        let mut command = self.container(kind, data);
        for (name, value) in self.environment.iter().filter(|_| gated) {
            command.args(["--setenv", name, value]);
        }
        if kind == Kind::OtherUser {
            command.args(AS_USER);
        }
        command.args(["/app/ordered", DATA, "2", "1", "1"]);
        command.args([&SHAPE.record.to_string(), "50", "600"]);
        let mut container = Proc::piped(command);
        let mut pid = None;
        let is_writing = || records::check(data, SHAPE).progress > 2;
        let came = process::wait_until(SOON, || {
            let new = self.lab.processes_named("ordered");
            pid = new.into_iter().find(|pid| !before.contains(pid));
            !container.is_running() || pid.is_some() && is_writing()
        });
        if !came || pid.is_none() {
            let ended = container.wait(Duration::ZERO);
            panic!("{kind:?}: the container does not write: {}", ended.err());
        }
        Writer {
            container,
            pid: pid.unwrap(),
        }
    }

    /// `status --json`.
    fn status(&self) -> Value {
        let command = self.lab.snapshim(&["status", self.lab.set(), "--json"]);
        serde_json::from_slice(&process::run(command, SOON).ok("status").stdout).unwrap()
    }

    /// The processes that own slots, as the host sees them.
    fn owners(&self) -> Vec<i32> {
        let status = self.status();
        let writers = status["writers"].as_array().unwrap();
        assert_eq!(status["slots_used"], writers.len(), "{status}");
        let mut pids: Vec<i32> = writers
            .iter()
            .map(|w| w["pid_here"].as_i64().unwrap_or(-1) as i32)
            .collect();
        pids.sort_unstable();
        pids
    }
}

/// A program that writes in a container.
struct Writer {
    container: Proc,
    /// Its id on the host.
    pid: i32,
}

impl Writer {
    /// Kills the program, and waits until its container is gone.
    #[track_caller]
    fn kill(mut self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap();
        let gone = process::wait_until(SOON, || !self.container.is_running());
        assert!(gone, "the container outlives its program");
    }
}

/// The writers of a certificate: id and layer.
fn writers(certificate: &Certificate) -> Vec<(i32, String)> {
    let writers = certificate.0["writers"].as_array().unwrap();
    let entry = |w: &Value| {
        let layer = w["layer"].as_str().unwrap().to_owned();
        (w["pid"].as_i64().unwrap() as i32, layer)
    };
    let mut found: Vec<(i32, String)> = writers.iter().map(entry).collect();
    found.sort();
    found
}

fn pids(certificate: &Certificate) -> Vec<i32> {
    writers(certificate)
        .into_iter()
        .map(|(pid, _)| pid)
        .collect()
}

#[track_caller]
fn assert_consistent(certificate: &Certificate, data: &Path) {
    let verdict = records::check(&certificate.copy_of(data), SHAPE);
    assert!(
        verdict.is_consistent() && verdict.progress > 0,
        "{}: {verdict:?}",
        data.display()
    );
}

/// Copies of the files of a container that is in no set: how many of how many are not of
/// one instant.
fn control(host: &Host) -> (usize, usize) {
    let data = host.data("control");
    let writer = host.start(Kind::Root, &data, false);
    let copy = host.lab.beside("control-copy");
    fs::create_dir_all(&copy).unwrap();
    let (mut bad, mut copies) = (0, 0);
    while copies < 20 || (bad == 0 && copies < 1000) {
        for index in 0..SHAPE.files {
            tree::copy_plainly(&records::file(&data, index), &records::file(&copy, index)).unwrap();
        }
        copies += 1;
        bad += usize::from(!records::check(&copy, SHAPE).is_consistent());
    }
    writer.kill();
    fs::remove_dir_all(&data).unwrap();
    (bad, copies)
}

/// Two containers in one set, in which the programs have the same ids and the same paths.
#[test]
fn from_the_host_all_is_proved() {
    let Some(host) = Host::new("containers-host", Fs::Xfs, &["--max-hold", "10s"]) else {
        return;
    };
    let (bad, copies) = control(&host);
    let (one, two) = (host.data("one"), host.data("two"));
    let (a, b) = (
        host.start(Kind::Root, &one, true),
        host.start(Kind::Root, &two, true),
    );
    let mut both = [a.pid, b.pid];
    both.sort_unstable();
    assert_eq!(host.owners(), both);
    let count = rounds(300, 40);
    let mut layers = Vec::new();
    for _ in 0..count {
        let outcome = host.lab.checkpoint(&["--keep-last", "2"]);
        let certificate = outcome.verified();
        assert_consistent(certificate, &one);
        assert_consistent(certificate, &two);
        assert_eq!(pids(certificate), both);
        layers = writers(certificate);
    }
    println!(
        "two containers: {count} snapshots, all verified and consistent, writers {layers:?}; \
         without the gate {bad} of {copies} copies inconsistent"
    );
    assert!(bad > 0, "the control shows nothing");
    drop((a, b));
}

/// A program killed in the middle of a call leaves its slot counted; its namespace, and
/// with it the meaning of the ids in the slot, is gone as well.
#[test]
fn a_dead_container_is_reaped() {
    let Some(host) = Host::new("containers-dead", Fs::Tmpfs, &["--max-hold", "10s"]) else {
        return;
    };
    let (one, two) = (host.data("one"), host.data("two"));
    let lives = host.start(Kind::Root, &two, true);
    let count = rounds(60, 12);
    let (mut random, mut killed, mut in_call) = (Random(7), 0, 0);
    while killed < count || (in_call == 0 && killed < 200) {
        let dies = host.start(Kind::Root, &one, true);
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        dies.kill();
        killed += 1;
        in_call += stuck_counts(&host);
        let outcome = host.lab.checkpoint(&["--keep-last", "2"]);
        let certificate = outcome.verified();
        assert_consistent(certificate, &two);
        assert_eq!(pids(certificate), [lives.pid]);
        assert_eq!(host.owners(), [lives.pid], "the slot was not freed");
    }
    // With the last one the set is no longer in use, and can be given other settings.
    lives.kill();
    assert_eq!(host.status()["in_use"], false);
    let mut command = host.lab.run_command(&["--max-hold", "2s"]);
    command.arg("/bin/true");
    process::run(command, SOON).ok("other settings");
    println!("{killed} containers killed, {in_call} of them seen in the middle of a call");
    assert!(in_call > 0, "none was killed in the middle of a call");
}

/// How many slots are counted by a call that goes nowhere.
fn stuck_counts(host: &Host) -> usize {
    // gate/src/abi.rs and slot.rs: the slots, of 128 bytes, come after the head; first the
    // count, then the generation and the sequence number.
    let slots = host.status()["slots"].as_u64().unwrap() as usize;
    let word = |slot: &[u8], at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().unwrap());
    let counted = || -> Vec<(usize, u32)> {
        let gate = fs::read(host.lab.gate()).unwrap();
        let slots = gate[HEADER_SIZE..][..slots * 128].chunks_exact(128);
        let counted = slots.enumerate().filter(|(_, slot)| word(slot, 0) != 0);
        counted
            .map(|(index, slot)| (index, word(slot, 8)))
            .collect()
    };
    let before = counted();
    std::thread::sleep(Duration::from_millis(30));
    let after = counted();
    before.iter().filter(|slot| after.contains(slot)).count()
}

#[test]
fn other_users_and_user_namespaces() {
    let owner = ["--gate-owner", USER];
    let its_group = lab::group_of(USER);
    let group = ["--gate-group", &its_group];
    for (kind, shared, name) in [
        (Kind::OtherUser, owner, "containers-user"),
        (Kind::Rootless, owner, "containers-rootless"),
        (Kind::Rootless, group, "containers-group"),
    ] {
        let options = ["--max-hold", "10s", shared[0], shared[1]];
        let Some(host) = Host::new(name, Fs::Ext4, &options) else {
            return;
        };
        host.lab.give_to(USER);
        let data = host.data("one");
        lab::give(&data, USER);
        let writer = host.start(kind, &data, true);
        let mut held = Vec::new();
        for _ in 0..rounds(50, 8) {
            let outcome = host
                .lab
                .checkpoint(&["--outside", "none", "--keep-last", "2"]);
            let certificate = outcome.verified();
            assert_consistent(certificate, &data);
            assert_eq!(pids(certificate), [writer.pid], "{kind:?}");
            held = writers(certificate);
        }
        writer.kill();
        host.lab.checkpoint(&[]).verified();
        assert!(host.owners().is_empty());
        println!("{kind:?}, {}: held by {held:?}", shared[0]);
    }
}

/// A gate that the program may not open holds nobody, and nobody claims it does.
#[test]
fn a_gate_that_was_not_shared_is_not_taken_for_one() {
    let Some(host) = Host::new("containers-unshared", Fs::Xfs, &["--max-hold", "10s"]) else {
        return;
    };
    host.lab.give_to(USER);
    let data = host.data("one");
    lab::give(&data, USER);
    let writer = host.start(Kind::Rootless, &data, true);
    let outcome = host.lab.checkpoint(&["--outside", "none"]);
    let reasons = outcome.unverified().reasons();
    assert!(
        reasons.iter().any(|(code, _)| code == "foreign-writer"),
        "{reasons:?}"
    );
    assert!(outcome.unverified().blames(writer.pid));
    // On the host it can be stopped, whatever namespaces it is in.
    let outcome = host.lab.checkpoint(&[]);
    assert_eq!(
        writers(outcome.verified()),
        [(writer.pid, "ptrace".to_owned())]
    );
    assert_consistent(outcome.verified(), &data);
    drop(writer);
}

/// `checkpoint` in a container of its own, that has the host's paths but its own ids.
fn from_beside(host: &Host) -> Outcome {
    let mut command = host.lab.command("bwrap");
    command.args(["--die-with-parent", "--unshare-pid", "--unshare-ipc"]);
    command.args(["--dev-bind", "/", "/", "--proc", "/proc"]);
    command.arg(product::snapshim());
    command.args(["checkpoint", host.lab.set(), "--json", "--max-hold", "2s"]);
    outcome(process::run(command, Duration::from_secs(30)))
}

/// Who has the `/proc` of another pid namespace would take one process for another.
#[test]
fn a_proc_of_others_is_refused() {
    let Some(host) = Host::new("containers-proc", Fs::Tmpfs, &[]) else {
        return;
    };
    let mut command = host.lab.command("bwrap");
    command.args(["--die-with-parent", "--unshare-pid", "--dev-bind", "/", "/"]);
    command.arg(product::snapshim());
    command.args(["checkpoint", host.lab.set(), "--json"]);
    let outcome = outcome(process::run(command, SOON));
    assert_eq!(outcome.code, 1, "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("another pid namespace"),
        "{}",
        outcome.stderr
    );
    assert!(host.lab.stored().is_empty());
}

/// `checkpoint` in the pid namespace of a process, with a `/proc` of that.
fn from_within(host: &Host, pid: i32) -> Outcome {
    let mut command = host.lab.command("nsenter");
    command.args(["--target", &pid.to_string(), "--pid", "unshare", "--mount"]);
    command.args(["sh", "-c", "mount -t proc proc /proc && exec \"$@\"", "sh"]);
    command.arg(product::snapshim());
    command.args(["checkpoint", host.lab.set(), "--json"]);
    outcome(process::run(command, Duration::from_secs(30)))
}

fn assumes_own_namespace(certificate: &Certificate) -> bool {
    let assumptions = certificate.0["assumptions"].as_array().unwrap();
    assumptions
        .iter()
        .any(|a| a.as_str().unwrap().contains("pid namespace of its own"))
}

#[test]
fn from_beside_nothing_is_proved_of_the_program() {
    let Some(host) = Host::new("containers-beside", Fs::Xfs, &["--max-hold", "10s"]) else {
        return;
    };
    let data = host.data("one");
    let writer = host.start(Kind::Root, &data, true);
    for _ in 0..rounds(30, 5) {
        let outcome = from_beside(&host);
        let certificate = outcome.unverified();
        let [(code, text)] = &certificate.reasons()[..] else {
            panic!("{:?}", certificate.reasons());
        };
        assert_eq!(code, "unreadable-process");
        assert!(text.contains("of another pid namespace"), "{text}");
        assert!(assumes_own_namespace(certificate));
        // It was held all the same.
        assert_consistent(certificate, &data);
        assert_eq!(pids(certificate), [0; 0]);
    }
    // From the host the same is proved.
    let outcome = host.lab.checkpoint(&[]);
    assert_eq!(pids(outcome.verified()), [writer.pid]);
    // Its end cannot be proved from beside either, but from the host.
    writer.kill();
    let outcome = from_beside(&host);
    match outcome.code {
        // It died in a call.
        4 => assert!(
            outcome
                .stderr
                .contains("of another pid namespace was still in a call"),
            "{}",
            outcome.stderr
        ),
        _ => assert_eq!(outcome.unverified().reasons().len(), 1),
    }
    host.lab.checkpoint(&[]).verified();
    let outcome = from_beside(&host);
    assert!(assumes_own_namespace(outcome.verified()));
}

#[test]
fn from_within_what_is_in_there_is_proved() {
    let Some(host) = Host::new("containers-within", Fs::Xfs, &["--max-hold", "10s"]) else {
        return;
    };
    let (one, two) = (host.data("one"), host.data("two"));
    let writer = host.start(Kind::Root, &one, true);
    let inner = inner_id(writer.pid);
    assert_ne!(inner, writer.pid);
    for _ in 0..rounds(30, 5) {
        let outcome = from_within(&host, writer.pid);
        let certificate = outcome.verified();
        // Processes outside are not seen: it says so.
        assert!(assumes_own_namespace(certificate));
        assert_eq!(pids(certificate), [inner]);
        assert_consistent(certificate, &one);
    }
    // One more container in the set, which cannot be looked at from the first.
    let other = host.start(Kind::Root, &two, true);
    let reasons = from_within(&host, writer.pid).unverified().reasons();
    assert!(
        reasons.iter().all(|(code, _)| code == "unreadable-process"),
        "{reasons:?}"
    );
    other.kill();
    host.lab.checkpoint(&[]).verified();
    from_within(&host, writer.pid).verified();
}

/// The id of a process in its own pid namespace.
fn inner_id(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
    let last = line.and_then(|l| l.split_ascii_whitespace().last());
    last.and_then(|id| id.parse().ok()).expect("NSpid")
}
