//! What a script leaves and says with the shim, compared with what it leaves and
//! says without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::{Ended, run};
use crate::{Fs, Lab, lab, tree};

/// A bash script to compare.
#[derive(Clone, Copy, Debug)]
pub struct Script<'a> {
    /// Unique among the tests.
    pub name: &'a str,
    /// Run in the directory of data. `$PROGRAMS` is the directory of the compiled
    /// test programs, `$HOME` one outside the data.
    pub script: &'a str,
    /// Ends of the paths of files whose bytes hold times or ids.
    pub except: &'a [&'a str],
    /// `$PROGRAMS`.
    pub programs: &'a Path,
    /// What it says on standard output, among other things: that it does its work
    /// without the shim is not to be taken for granted.
    pub expect: &'a str,
    /// For everything.
    pub limit: Duration,
    /// A user to run it as, who is given the gate; `snapshim run` stays root.
    pub user: Option<&'a str>,
}

/// What one run of a script left and said.
#[derive(PartialEq, Eq)]
struct Effect {
    code: i32,
    stdout: String,
    stderr: String,
    files: Vec<String>,
}

/// How often the script is run with the shim, at most, until a snapshot was made.
const ATTEMPTS: usize = 5;

/// Runs the script in a fresh directory, without the shim and with it, and compares
/// everything. The shimmed run is repeated, and compared each time, until a snapshot
/// was made meanwhile: how many fall into one run depends on the speed of the
/// machine. After the first attempt the holds may last longer and come sooner.
#[track_caller]
pub fn same(script: &Script) {
    let Some(lab) = Lab::new(script.name, Fs::Xfs, script.limit) else {
        return;
    };
    if let Some(user) = script.user {
        lab.give_to(user);
    }
    let (without, _) = effect(&lab, lab.command("env"), script);
    assert!(
        without.stdout.contains(script.expect),
        "{}: it fails without the shim: exit {}, {}\n{}",
        script.name,
        without.code,
        without.stdout,
        without.stderr
    );
    let mut said = String::new();
    for attempt in 0..ATTEMPTS {
        let options = match attempt {
            0 => ["--every", "100ms", "--max-hold", "1s"],
            _ => ["--every", "20ms", "--max-hold", "10s"],
        };
        let mut options = options.to_vec();
        if let Some(user) = script.user {
            options.extend(["--gate-owner", user]);
        }
        let (with, ended) = effect(&lab, lab.run_command(&options), script);
        let name = script.name;
        let why = || format!("{name}, attempt {attempt}; run says: {}", ended.err());
        assert_eq!(without.code, with.code, "exit status; {}", why());
        assert_eq!(without.stdout, with.stdout, "stdout; {}", why());
        assert_eq!(without.stderr, with.stderr, "stderr; {}", why());
        assert_eq!(without.files, with.files, "files; {}", why());
        assert_eq!(ended.out(), "", "run printed something");
        said = ended.err();
        let snapshots = lab.stored();
        let verified = snapshots.iter().filter(|(_, c)| c.is_verified()).count();
        println!(
            "{name}: {} checkpoints meanwhile, {verified} verified",
            snapshots.len()
        );
        if let Some((_, last)) = snapshots.iter().rfind(|(_, c)| !c.is_verified()) {
            println!("{name}: not verified: {:?}", last.reasons());
        }
        if !snapshots.is_empty() {
            return;
        }
    }
    panic!("no snapshot in {ATTEMPTS} runs; the last says: {said}");
}

/// Runs the script behind `command`, and empties the directory of data.
fn effect(lab: &Lab, mut command: Command, script: &Script) -> (Effect, Ended) {
    // Both runs see the same paths.
    let (data, aside) = (lab.data(), lab.beside("aside"));
    fs::create_dir_all(&aside).expect("a directory beside the data");
    if let Some(user) = script.user {
        lab::give(&aside, user);
        // Not runuser: it changes the environment.
        command.args(["setpriv", "--init-groups", "--reuid", user]);
        command.args(["--regid", &lab::group_of(user), "--"]);
    }
    let out = aside.join("stdout");
    let err = aside.join("stderr");
    command
        .args(["bash", "-c"])
        .arg("cd \"$1\" && exec >\"$2\" 2>\"$3\" && eval \"$4\"")
        .args([
            "bash".as_ref(),
            data.as_os_str(),
            out.as_os_str(),
            err.as_os_str(),
        ])
        .arg(script.script)
        .env("HOME", &aside)
        .env("PROGRAMS", script.programs);
    let ended = run(command, script.limit);
    let text =
        |path: &PathBuf| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let effect = Effect {
        code: ended.code(),
        stdout: text(&out),
        stderr: text(&err),
        files: tree::listing(&data, script.except),
    };
    fs::remove_dir_all(&aside).expect("the directory beside the data");
    for entry in fs::read_dir(&data).expect("the data").flatten() {
        let path = entry.path();
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
    }
    (effect, ended)
}
