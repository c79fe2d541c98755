//! `--verify CMD`: a command of the user's that says whether a snapshot is good.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::COMMAND;
use super::scratch::Scratch;
use super::unchanged::{self, Names};
use crate::Result;
use crate::child::{self, End};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::store::Store;
use crate::store::manifest::{Check, Reason};

/// How long a command may take unless told otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// A command, and how it is run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// One word that names an executable file, or a line for the shell.
    pub command: String,
    /// How long it may take, ms.
    pub timeout_ms: u64,
    /// Whether it works on a copy that it may write to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writable: bool,
}

/// The snapshot that is checked.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Its id.
    pub id: &'a str,
    /// The set it is of.
    pub set: &'a str,
    /// The directory with its files.
    pub tree: &'a Path,
    /// Whether it is published: then other snapshots may share its files.
    pub is_published: bool,
    /// The first path watched, in the live tree.
    pub root: Option<&'a Path>,
    /// The store it is in.
    pub store: &'a Store,
}

/// What came of a command.
#[derive(Debug)]
pub struct Verdict {
    /// For the manifest.
    pub check: Check,
    /// What speaks against the snapshot.
    pub reason: Option<Reason>,
}

/// Runs the command on a snapshot. What it prints goes to `progress`, line by line.
///
/// Whatever goes wrong is a verdict, too: a snapshot that could not be checked did not pass.
pub fn check(
    verify: &Verify,
    subject: &Subject<'_>,
    stop: &Stop,
    progress: &mut dyn Progress,
) -> Verdict {
    let time = jiff::Timestamp::now().to_string();
    let begun = Instant::now();
    progress.begin("waiting for the command of --verify", 0);
    let mut writable = verify.writable;
    let found = match writable {
        true => on_a_copy(verify, subject, stop, progress),
        false => in_place(verify, subject, stop, progress, &mut writable),
    };
    let found = found.unwrap_or_else(|error| Found {
        against: Some(format!("could not be run: {}", error.message)),
        end: None,
        output: String::new(),
    });
    progress.end();
    let passed = found.against.is_none();
    let reason = found.against.map(|what| Reason {
        code: COMMAND.to_owned(),
        text: format!("the command '{}' {what}", short(&verify.command)),
        pid: None,
    });
    let (mut status, mut signal) = (None, None);
    match &found.end {
        Some(End::Status(code)) => status = Some(*code),
        Some(End::Signal(number)) => signal = Some(*number),
        _ => {}
    }
    let check = Check {
        kind: "command".to_owned(),
        command: Some(verify.command.clone()),
        writable: Some(writable),
        passed,
        status,
        signal,
        timed_out: found.end == Some(End::TimedOut),
        ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        time,
        output: (!passed && !found.output.is_empty()).then_some(found.output),
        damaged: None,
    };
    Verdict { check, reason }
}

/// How a command ended, and what speaks against the snapshot.
struct Found {
    against: Option<String>,
    end: Option<End>,
    output: String,
}

fn on_a_copy(
    verify: &Verify,
    subject: &Subject<'_>,
    stop: &Stop,
    progress: &mut dyn Progress,
) -> Result<Found> {
    let scratch = Scratch::of(subject.tree, subject.id, subject.store, stop)?;
    let found = run(verify, subject, scratch.tree(), stop, progress);
    // That it cannot be removed says nothing of the snapshot; the next sweep tries again.
    if let Err(error) = scratch.remove() {
        progress.note(&error.line());
    }
    found
}

/// Not in place if files are shared, for what the command might write would be written to other snapshots:
/// `on_copy` says so.
fn in_place(
    verify: &Verify,
    subject: &Subject<'_>,
    stop: &Stop,
    progress: &mut dyn Progress,
    on_copy: &mut bool,
) -> Result<Found> {
    let before = unchanged::look(subject.tree)?;
    if let Some(path) = unchanged::shared(&before) {
        progress.note(&format!(
            "{} shares files with other snapshots ({} is the first): the command works on a copy, as \
             with --writable",
            subject.id,
            super::live(path).display()
        ));
        *on_copy = true;
        drop(before);
        return on_a_copy(verify, subject, stop, progress);
    }
    let mut found = run(verify, subject, subject.tree, stop, progress)?;
    let after = unchanged::look(subject.tree)?;
    let names = match subject.is_published {
        true => Names::Shared,
        false => Names::Own,
    };
    if let Some(path) = unchanged::difference(&before, &after, names) {
        found.against = Some(format!(
            "changed {} in the snapshot: add --writable, which gives it a copy of its own",
            super::live(&path).display()
        ));
    }
    Ok(found)
}

fn run(
    verify: &Verify,
    subject: &Subject<'_>,
    tree: &Path,
    stop: &Stop,
    progress: &mut dyn Progress,
) -> Result<Found> {
    let mut command = child::command(&verify.command, tree);
    let root = subject.root.map_or(tree.to_owned(), |root| {
        tree.join(root.strip_prefix("/").unwrap_or(root))
    });
    command
        .env("SNAPSHIM_PATH", tree)
        .env("SNAPSHIM_ROOT", root)
        .env("SNAPSHIM_ID", subject.id)
        .env("SNAPSHIM_SET", subject.set);
    let timeout = Duration::from_millis(verify.timeout_ms);
    let mut say = |line: &str| progress.note(&format!("verify: {line}"));
    let is_asked = || stop.is_asked();
    let ended = child::run(command, timeout, child::Patience::of(&is_asked), &mut say)?;
    let last = ended.output.lines().rev().find(|l| !l.trim().is_empty());
    let last = last.map_or(String::new(), |line| format!(": {}", short(line.trim())));
    let against = match &ended.end {
        End::Status(0) => None,
        End::Status(code) => Some(format!("ended with status {code}{last}")),
        End::Signal(number) => Some(format!("was ended by signal {number}{last}")),
        End::TimedOut => Some(format!(
            "did not end within {}: --verify-timeout gives it more time",
            in_words(timeout)
        )),
        End::Stopped => Some("was ended before it was done, because the program ended".to_owned()),
    };
    Ok(Found {
        against,
        end: Some(ended.end),
        output: ended.output,
    })
}

fn in_words(time: Duration) -> String {
    match time.as_millis() {
        ms if ms % 1000 != 0 => format!("{ms} ms"),
        ms => format!("{} s", ms / 1000),
    }
}

/// The beginning of a text, for a message.
fn short(text: &str) -> String {
    /// Characters.
    const MOST: usize = 160;
    let mut short: String = text.chars().take(MOST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// A command as a set keeps it: a path that leads to its program from everywhere.
pub fn absolute(command: &str) -> String {
    let is_relative = !command.contains(char::is_whitespace)
        && command.contains('/')
        && child::is_executable(Path::new(command));
    let path = is_relative
        .then(|| std::path::absolute(command).ok())
        .flatten();
    match path.map(PathBuf::into_os_string).map(|p| p.into_string()) {
        Some(Ok(path)) => path,
        _ => command.to_owned(),
    }
}
