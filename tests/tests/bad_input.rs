//! Whatever is wrong: a message that names the cause and the next step, the exit
//! code that belongs to it, and nothing lost.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::process::{self, Ended, Proc, run, tool};
use snapshim_tests::records::{self, Shape};
use snapshim_tests::{Fs, Lab, Random, lab, product};

const LIMIT: Duration = Duration::from_secs(60);

/// A lab with a member and one snapshot of it.
fn with_snapshot(name: &str, fs_kind: Fs) -> Option<Lab> {
    let lab = Lab::new(name, fs_kind, Duration::from_secs(240))?;
    fs::write(lab.data().join("member"), "precious\n").unwrap();
    lab.env(&[]);
    lab.checkpoint(&[]).verified();
    Some(lab)
}

/// The data and the first snapshot are as they were, and nothing half done is
/// in the store.
#[track_caller]
fn nothing_lost(lab: &Lab) {
    let member = lab.data().join("member");
    assert_eq!(fs::read_to_string(&member).unwrap(), "precious\n");
    let stored = lab.stored();
    let (first, certificate) = stored.first().expect("the first snapshot is still there");
    assert!(certificate.is_verified());
    let copy = first.join("tree").join(member.strip_prefix("/").unwrap());
    assert_eq!(fs::read_to_string(copy).unwrap(), "precious\n");
}

/// The message has the words of the cause, and a next step on a second line.
#[track_caller]
fn explains(ended: &Ended, code: i32, words: &[&str]) {
    let message = ended.err();
    assert_eq!(ended.code(), code, "{message}");
    for word in words {
        assert!(
            message.contains(word),
            "the message does not say {word:?}: {message}"
        );
    }
    assert!(message.starts_with("snapshim: "), "{message}");
    assert!(
        message.trim_end().lines().count() >= 2,
        "no next step: {message}"
    );
    assert!(!message.contains("panicked"), "{message}");
}

fn checkpoint(lab: &Lab, options: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["checkpoint", lab.set(), "--json"]);
    command.args(options);
    run(command, LIMIT)
}

#[test]
fn names_and_options() {
    let Some(lab) = with_snapshot("bad-names", Fs::Tmpfs) else {
        return;
    };
    let snapshim = |args: &[&str]| run(lab.snapshim(args), LIMIT);
    explains(
        &snapshim(&["checkpoint", "nosuch"]),
        2,
        &["nosuch", lab.set()],
    );
    explains(&snapshim(&["status", "nosuch"]), 2, &["nosuch"]);
    explains(&snapshim(&["checkpoint", "../up"]), 2, &["../up"]);
    for args in [
        &["checkpoint", "--nonsense"][..],
        &["nonsense"],
        &[],
        &["run"],
        &["run", "--every", "soon", "--", "true"],
        &["run", "--max-hold", "11s", "--", "true"],
        &["run", "--max-hold", "0", "--", "true"],
        &["run", "--keep-last", "0", "--", "true"],
        &["checkpoint", lab.set(), "--capture", "magic"],
        &["checkpoint", lab.set(), "--at", "midnight"],
        &["env"],
    ] {
        let ended = snapshim(args);
        assert_eq!(ended.code(), 2, "{args:?}: {}", ended.err());
        assert!(
            !ended.err().is_empty() && ended.out().is_empty(),
            "{args:?}"
        );
    }
    let missing = snapshim(&["show", lab.set(), "19700101T000000Z"]);
    explains(&missing, 1, &["19700101T000000Z"]);
    // A second set: the name can no longer be left out.
    let other = lab.beside("other");
    fs::create_dir_all(&other).unwrap();
    let other = other.to_str().unwrap();
    snapshim(&["env", "--name", "second", "--watch", other]).ok("a second set");
    explains(&snapshim(&["checkpoint"]), 2, &["second", lab.set()]);
    nothing_lost(&lab);
}

#[test]
fn a_set_in_use_with_other_settings() {
    let Some(lab) = with_snapshot("bad-in-use", Fs::Tmpfs) else {
        return;
    };
    let mut first = lab.run(&[], Path::new("/bin/sleep"), &["600"]);
    process::wait_until(LIMIT, || !lab.processes_named("sleep").is_empty());
    let other = lab.beside("other");
    fs::create_dir_all(&other).unwrap();
    let mut command = lab.snapshim(&["run", "--name", lab.set(), "--watch"]);
    command
        .arg(&other)
        .args(["--", "touch"])
        .arg(other.join("ran"));
    let ended = run(command, LIMIT);
    explains(&ended, 2, &[lab.set(), "in use", "--name"]);
    assert!(!other.join("ran").exists(), "the program ran all the same");
    // With the same settings it joins.
    let mut command = lab.run_command(&[]);
    command.arg("true");
    run(command, LIMIT).ok("joining");
    assert!(first.is_running());
    first.end();
    nothing_lost(&lab);
}

#[test]
fn stores_that_cannot_be_used() {
    let Some(lab) = with_snapshot("bad-store", Fs::Xfs) else {
        return;
    };
    let data = lab.data();
    let with_store = |store: &Path| {
        let mut command = lab.snapshim(&["env", "--name", "other", "--watch"]);
        command.arg(&data).arg("--store").arg(store);
        let ended = run(command, LIMIT);
        if ended.code() != 0 {
            return ended;
        }
        run(lab.snapshim(&["checkpoint", "other", "--json"]), LIMIT)
    };
    // Inside the data.
    let inside = data.join("snapshots");
    explains(
        &with_store(&inside),
        2,
        &[inside.to_str().unwrap(), "--exclude"],
    );
    assert!(!inside.exists());
    // On another file system, where nothing can be cloned.
    let elsewhere = Fs::Tmpfs.mount().unwrap().join("bad-store-elsewhere");
    let mut command = lab.snapshim(&["env", "--name", "other", "--watch"]);
    command.arg(&data).arg("--store").arg(&elsewhere);
    run(command, LIMIT).ok("a store elsewhere");
    let ended = run(
        lab.snapshim(&["checkpoint", "other", "--capture", "reflink"]),
        LIMIT,
    );
    explains(&ended, 1, &["store", "--store"]);
    // Behind a file, and in a directory that does not exist.
    explains(
        &with_store(&data.join("member/store")),
        2,
        &["member/store"],
    );
    let nowhere = lab.beside("no/such/store");
    explains(&with_store(&nowhere), 1, &[nowhere.to_str().unwrap()]);
    // One that others can change.
    let open = lab.beside("open-store");
    fs::create_dir_all(open.join("other")).unwrap();
    fs::set_permissions(open.join("other"), fs::Permissions::from_mode(0o777)).unwrap();
    explains(&with_store(&open), 1, &[open.to_str().unwrap(), "chmod"]);
    nothing_lost(&lab);
}

/// A small tmpfs, unmounted when dropped.
struct Small(std::path::PathBuf);

impl Small {
    fn new(lab: &Lab, options: &str) -> Small {
        let point = lab.gates().parent().unwrap().join("small");
        fs::create_dir_all(&point).unwrap();
        tool(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                options,
                "tmpfs",
                point.to_str().unwrap(),
            ],
        );
        Small(point)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        command.arg("--lazy").arg(&self.0);
        run(command, LIMIT);
    }
}

#[test]
fn a_full_store_and_one_that_is_read_only() {
    if Fs::Xfs.mount().is_none() {
        return;
    }
    let Some(lab) = Lab::new("bad-full", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let small = Small::new(&lab, "size=4m");
    let (data, store) = (small.0.join("data"), small.0.join("store"));
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("member"), vec![b'm'; 1_500_000]).unwrap();
    let mut command = lab.snapshim(&["env", "--name", "small", "--watch"]);
    command.arg(&data).arg("--store").arg(&store);
    run(command, LIMIT).ok("env");
    let take = || run(lab.snapshim(&["checkpoint", "small", "--json"]), LIMIT);
    take().ok("the first");
    let listing = || {
        let mut names: Vec<String> = fs::read_dir(store.join("small"))
            .unwrap()
            .flatten()
            .map(|e| e.file_name().into_string().unwrap())
            .filter(|n| !n.starts_with('.') && n != "latest")
            .collect();
        names.sort();
        names
    };
    let before = listing();
    let full = take();
    explains(&full, 1, &["space", "store"]);
    assert_eq!(listing(), before, "something half done is left");
    // The room of the failed attempt is free again.
    fs::write(data.join("another"), vec![b'a'; 700_000]).unwrap();
    fs::remove_file(data.join("another")).unwrap();

    let point = small.0.to_str().unwrap();
    tool("mount", &["-o", "remount,ro", point]);
    let read_only = take();
    explains(&read_only, 1, &["read-only", "store"]);
    tool("mount", &["-o", "remount,rw", point]);
    fs::write(data.join("member"), "small now").unwrap();
    take().ok("with room again");
    assert_eq!(listing().len(), before.len() + 1);
}

#[test]
fn gate_directories_that_cannot_be_used() {
    let Some(lab) = with_snapshot("bad-gate-dir", Fs::Ext4) else {
        return;
    };
    let with_dir = |dir: &str| {
        let mut command = lab.run_command(&[]);
        command
            .env("SNAPSHIM_DIR", dir)
            .args(["touch", "/nonexistent/ran"]);
        run(command, LIMIT)
    };
    let on_disk = lab.beside("gates");
    fs::create_dir_all(&on_disk).unwrap();
    explains(
        &with_dir(on_disk.to_str().unwrap()),
        2,
        &["tmpfs", on_disk.to_str().unwrap()],
    );
    explains(&with_dir("relative/dir"), 2, &["relative/dir"]);
    explains(&with_dir("/proc/nothing"), 2, &["/proc"]);
    nothing_lost(&lab);
}

/// A program under the shim, by the environment as it is, runs to its end.
#[track_caller]
fn program_runs(lab: &Lab, env: &[(String, String)], what: &str) {
    let file = lab.beside("written");
    let mut command = lab.command(product::program("writes"));
    command.arg("100").arg(&file).envs(env.iter().cloned());
    let ended = run(command, Duration::from_secs(30));
    assert_eq!(
        ended.code(),
        0,
        "{what}: the program fails: {}",
        ended.err()
    );
    assert_eq!(fs::read(&file).unwrap(), vec![b'x'; 100], "{what}");
    assert_eq!(ended.err(), "", "{what}: the shim talks");
}

#[test]
fn gates_that_cannot_be_used() {
    let Some(lab) = with_snapshot("bad-gates", Fs::Tmpfs) else {
        return;
    };
    let env = lab.env(&[]);
    let gate = lab.gate();
    let good = fs::read(&gate).unwrap();
    let path = gate.to_str().unwrap();
    let refused = |what: &str, words: &[&str]| {
        let ended = checkpoint(&lab, &[]);
        explains(&ended, 1, words);
        println!("{what}: {}", ended.err().trim());
        program_runs(&lab, &env, what);
    };
    let put = |bytes: &[u8]| {
        let file = OpenOptions::new().write(true).open(&gate).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(bytes, 0).unwrap();
    };
    put(&good[..100]);
    refused("truncated", &[path, "too short"]);
    put(&[]);
    refused("empty", &[path]);
    put(&vec![0xa5; good.len()]);
    refused("corrupted", &[path, "not a gate"]);
    let mut newer = good.clone();
    newer[8..12].copy_from_slice(&77u32.to_le_bytes());
    put(&newer);
    refused("another version", &[path, "77", "version"]);
    let mut absurd = good.clone();
    absurd[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    put(&absurd);
    refused("absurd counts", &[path]);
    put(&good);
    checkpoint(&lab, &[]).ok("as it was");

    chown(&gate, Some(1234), Some(1234)).unwrap();
    refused("foreign-owned", &[path, "1234"]);
    chown(&gate, Some(0), Some(0)).unwrap();
    fs::set_permissions(&gate, fs::Permissions::from_mode(0o666)).unwrap();
    refused("open to all", &[path]);
    fs::set_permissions(&gate, fs::Permissions::from_mode(0o600)).unwrap();

    let aside = gate.with_extension("aside");
    fs::rename(&gate, &aside).unwrap();
    std::os::unix::fs::symlink(&aside, &gate).unwrap();
    refused("a symbolic link", &[path]);
    fs::remove_file(&gate).unwrap();
    fs::create_dir(&gate).unwrap();
    refused("a directory", &[path]);
    fs::remove_dir(&gate).unwrap();
    fs::rename(&aside, &gate).unwrap();
    checkpoint(&lab, &[]).ok("as it was");
    nothing_lost(&lab);
}

#[test]
fn a_swapped_gate_is_never_verified() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("bad-swapped", Fs::Xfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    let args = ["2", "1", "1", "4096", "100", "600"];
    let all: Vec<&str> = [data.to_str().unwrap()].into_iter().chain(args).collect();
    let mut writer = lab.run(&[], &product::program("ordered"), &all);
    lab.wait_for_beats(&mut writer, 3);
    lab.checkpoint(&[]).verified();
    let copy = lab.gate().with_extension("copy");
    fs::copy(lab.gate(), &copy).unwrap();
    fs::rename(&copy, lab.gate()).unwrap();
    for _ in 0..5 {
        let outcome = lab.checkpoint(&["--outside", "none"]);
        assert!(
            matches!(outcome.code, 1 | 5),
            "exit {}: {}",
            outcome.code,
            outcome.stderr
        );
        if let Some(certificate) = &outcome.certificate {
            println!("swapped: {:?}", certificate.reasons());
        }
    }
    // Held by other means than the gate, it may be.
    let outcome = lab.checkpoint(&[]);
    let writers = &outcome.verified().0["writers"];
    assert_eq!(writers[0]["layer"], "ptrace", "{writers}");
    writer.signal(Signal::SIGTERM);
    writer.wait(LIMIT).ok("the program");
}

#[test]
fn members_that_cannot_be_read() {
    let Some(lab) = Lab::new("bad-unreadable", Fs::Tmpfs, LIMIT) else {
        return;
    };
    // As an ordinary user, who may not read what root made.
    let (data, user) = (lab.data(), 65534);
    let secret = data.join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let gates = lab.gates().with_extension("user");
    fs::create_dir_all(&gates).unwrap();
    fs::set_permissions(&gates, fs::Permissions::from_mode(0o700)).unwrap();
    chown(&gates, Some(user), Some(user)).unwrap();
    chown(lab.data().parent().unwrap(), Some(user), Some(user)).unwrap();
    for dir in gates.ancestors().skip(1).take(1) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let binary = lab.gates().with_extension("snapshim");
    fs::copy(product::snapshim(), &binary).unwrap();
    let as_user = |args: &[&str]| {
        let mut command = lab.command("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command
            .arg(&binary)
            .args(args)
            .env("SNAPSHIM_DIR", &gates)
            .env("HOME", &gates);
        run(command, LIMIT)
    };
    let (data, store) = (data.to_str().unwrap(), lab.store());
    let store = store.to_str().unwrap();
    as_user(&["env", "--name", "user", "--watch", data, "--store", store]).ok("env");
    let ended = as_user(&["checkpoint", "user", "--json"]);
    explains(&ended, 1, &[secret.to_str().unwrap(), "--exclude"]);
    let list = as_user(&["list", "user", "--json"]).ok("list");
    assert!(!list.out().contains("\"id\""), "{}", list.out());
}

#[test]
fn what_is_watched_may_appear_later() {
    let Some(lab) = Lab::new("bad-later", Fs::Xfs, LIMIT) else {
        return;
    };
    let later = lab.beside("later/dir");
    let mut command = lab.snapshim(&["env", "--name", "later", "--watch"]);
    command.arg(&later).arg("--store").arg(lab.store());
    run(command, LIMIT).ok("a path that does not exist yet");
    let ended = run(lab.snapshim(&["checkpoint", "later", "--json"]), LIMIT);
    let outcome = lab::outcome(ended);
    outcome.verified();
    fs::create_dir_all(&later).unwrap();
    fs::write(later.join("file"), "here now").unwrap();
    let outcome = lab::outcome(run(lab.snapshim(&["checkpoint", "later", "--json"]), LIMIT));
    let copy = outcome.verified().copy_of(&later);
    assert_eq!(fs::read_to_string(copy.join("file")).unwrap(), "here now");
}

#[test]
fn programs_the_shim_cannot_be_loaded_into() {
    let Some(lab) = Lab::new("bad-unloadable", Fs::Xfs, LIMIT) else {
        return;
    };
    let flags = ["-pthread", "-static"];
    let program = product::compiled("cc", "writes", "writes-static", &flags);
    let file = lab.data().join("file");
    let mut command = lab.run_command(&[]);
    command.arg(&program).arg("10").arg(&file);
    let ended = run(command, LIMIT);
    let message = ended.err();
    assert!(
        message.contains("writes-static") && message.contains("static"),
        "run does not say that the shim cannot be loaded, and why: {message:?}"
    );
    // Refused or run, but not halfway.
    match ended.code() {
        0 => assert_eq!(fs::read(&file).unwrap().len(), 10),
        code => assert!(
            matches!(code, 1 | 2 | 126) && !file.exists(),
            "exit {code}: {message}"
        ),
    }
}

/// Runs everything that reads a gate against the one that is there.
fn survives(lab: &Lab, env: &[(String, String)], what: &str) {
    program_runs(lab, env, what);
    for args in [
        &["status", lab.set(), "--json"][..],
        &["checkpoint", lab.set(), "--json"],
    ] {
        let ended = run(lab.snapshim(args), Duration::from_secs(30));
        assert!(
            (0..=5).contains(&ended.code()),
            "{what}: {args:?}: exit {}: {}",
            ended.code(),
            ended.err()
        );
        assert!(!ended.err().contains("panicked"), "{what}: {}", ended.err());
    }
}

#[test]
fn a_hostile_gate() {
    let _alone = lab::serial();
    let Some(lab) = with_snapshot("bad-hostile", Fs::Tmpfs) else {
        return;
    };
    let env = lab.env(&["--max-hold", "200ms", "--keep-last", "2"]);
    let good = fs::read(lab.gate()).unwrap();
    let file = OpenOptions::new().write(true).open(lab.gate()).unwrap();
    let mut random = Random(5);
    for at in (0..256).step_by(4) {
        for value in [0, 1, u32::MAX, random.number() as u32] {
            file.write_all_at(&value.to_le_bytes(), at).unwrap();
            survives(&lab, &env, &format!("{value:#x} at {at}"));
            file.write_all_at(&good, 0).unwrap();
        }
    }
    // Noise in the tables and the slots, under a head that makes sense.
    for round in 0..20 {
        let from = if round % 2 == 0 { 192 } else { 13696 };
        let until = [13696 + 128 * 64, good.len()][usize::from(round % 4 > 1)];
        let noise: Vec<u8> = (from..until).map(|_| random.number() as u8).collect();
        file.write_all_at(&noise, from as u64).unwrap();
        // The highest slot ever used: all.
        file.write_all_at(&4096u32.to_le_bytes(), 140).unwrap();
        survives(&lab, &env, &format!("noise {round}"));
        file.write_all_at(&good, 0).unwrap();
    }
    for round in 0..10 {
        let noise: Vec<u8> = good.iter().map(|_| random.number() as u8).collect();
        file.write_all_at(&noise, 0).unwrap();
        survives(&lab, &env, &format!("nothing but noise {round}"));
    }
    file.write_all_at(&good, 0).unwrap();
    checkpoint(&lab, &[]).ok("as it was");
}

#[test]
fn a_gate_that_is_scribbled_on_while_it_is_used() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("bad-scribbled", Fs::Tmpfs, Duration::from_secs(120)) else {
        return;
    };
    let data = lab.data();
    let args = ["4", "4", "1", "4096", "100", "600"];
    let all: Vec<&str> = [data.to_str().unwrap()].into_iter().chain(args).collect();
    let options = ["--max-hold", "100ms", "--keep-last", "2"];
    let mut writer = lab.run(&options, &product::program("ordered"), &all);
    lab.wait_for_beats(&mut writer, 3);
    let file = OpenOptions::new().write(true).open(lab.gate()).unwrap();
    let mut random = Random(6);
    let mut checkpoints: Vec<Proc> = Vec::new();
    for round in 0..3000 {
        // Anything but the identity and the hold bound: the gate word, counters,
        // tables, and the slots in use.
        let at = match random.below(4) {
            0 => 64,
            1 => 132 + random.below(60),
            2 => 192 + random.below(4608),
            _ => 13696 + random.below(128 * 8),
        } & !3;
        let value = [0, 1, u32::MAX, random.number() as u32][random.below(4) as usize];
        file.write_all_at(&value.to_le_bytes(), at).unwrap();
        if round % 100 == 0 {
            let mut command = lab.snapshim(&["checkpoint", lab.set(), "--json"]);
            command.args(["--wait", "1s"]);
            checkpoints.push(Proc::piped(command));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for proc in checkpoints {
        let ended = proc.wait(Duration::from_secs(60));
        assert!(
            (0..=5).contains(&ended.code()),
            "exit {}: {}",
            ended.code(),
            ended.err()
        );
    }
    // The program goes on, and ends well.
    file.write_all_at(&0u32.to_le_bytes(), 64).unwrap();
    let beats = lab.stats().beats();
    assert!(process::wait_until(Duration::from_secs(20), || lab
        .stats()
        .beats()
        > beats + 10));
    println!(
        "scribbled on: {beats} records, longest call {:.0} ms",
        lab.stats().longest().as_secs_f64() * 1e3
    );
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(30)).ok("the program");
    let shape = Shape {
        files: 4,
        lanes: 4,
        record: 4096,
    };
    let verdict = records::check(&data, shape);
    assert!(
        verdict.is_consistent(),
        "the program's own files: {verdict:?}"
    );
}
