//! `snapshim verify`: whether snapshots are still what they were.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use crate::progress::Progress;
use crate::stop::Stop;
use crate::store::manifest::{Check, PathName, Reason, VERSION};
use crate::store::pace::Pace;
use crate::store::{Entry, Snapshot};
use crate::verify::command::{self, Verify};
use crate::verify::content::{self, Damage, Findings};
use crate::verify::{COMMAND, CONTENT, mark};
use crate::{Error, Exit, Result};

use super::args::VerifyArgs;
use super::progress::Meter;
use super::snapshots::{self, Snapshots};
use super::table::{Cell, Table};
use super::{output, style, usage};

/// How long a command that works on the store is waited for before what was found is
/// written down.
const WAIT: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Report {
    version: u32,
    set: String,
    #[serde(serialize_with = "output::plain")]
    store: PathName,
    /// Whether nothing was compared byte by byte.
    quick: bool,
    good: bool,
    snapshots: Vec<Line>,
}

/// What was found of one snapshot.
#[derive(Serialize)]
struct Line {
    id: String,
    #[serde(flatten)]
    path: PathName,
    good: bool,
    /// Why it cannot be used at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    entries: u64,
    bytes: u64,
    unchecked: u64,
    damaged: u64,
    #[serde(serialize_with = "as_found")]
    damage: Vec<Damage>,
    /// What a command said.
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Check>,
    /// Whether this is written in its manifest.
    marked: bool,
}

#[derive(Serialize)]
struct Found<'a> {
    #[serde(flatten)]
    path: &'a PathName,
    what: &'a str,
    expected: &'a str,
    found: &'a str,
}

fn as_found<S: Serializer>(
    damage: &[Damage],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(damage.iter().map(|damage| Found {
        path: &damage.path,
        what: damage.what,
        expected: &damage.expected,
        found: &damage.found,
    }))
}

/// Runs the command.
pub fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let (name, id) = args.set_and_id();
    if args.all && id.is_some() {
        return Err(usage(
            "--all is for every snapshot, and one is named",
            "leave out one of them",
        ));
    }
    let found = snapshots::find(name, args.store.as_deref())?;
    let ids = match args.all {
        true => found.store.ids()?,
        false => vec![found.store.find(id.unwrap_or("latest"))?.id],
    };
    let pace = Pace::gentle(&|_| false);
    let _idle = args.all.then(|| pace.idle());
    let verify = args.command.wanted();
    let mut progress = Meter::new(args.output.json);
    let mut lines = Vec::new();
    for id in ids {
        let entry = match found.store.find(&id) {
            Ok(entry) => entry,
            // Removed since it was listed.
            Err(_) if args.all => continue,
            Err(error) => return Err(error),
        };
        let line = look(&found, entry, args.quick, verify.as_ref(), &mut progress)?;
        lines.push(line);
    }
    let good = lines.iter().all(|line| line.good);
    if args.output.json {
        output::json(&Report {
            version: VERSION,
            set: found.set,
            store: PathName(found.place),
            quick: args.quick,
            good,
            snapshots: lines,
        })?;
    } else if lines.is_empty() {
        output::note(&format!(
            "snapshim: the set {} has no snapshots yet",
            found.set
        ));
    } else {
        let mut table = Table::new(&["ID", "STATE", "ENTRIES", "READ", ""]);
        lines.iter().for_each(|line| line.rows(&mut table));
        table.print()?;
    }
    Ok(ExitCode::from(match good {
        true => Exit::Verified as u8,
        false => Exit::Failure as u8,
    }))
}

/// Checks one snapshot and writes down what was found.
fn look(
    found: &Snapshots,
    entry: Entry,
    quick: bool,
    verify: Option<&Verify>,
    progress: &mut dyn Progress,
) -> Result<Line> {
    let mut line = Line {
        id: entry.id.clone(),
        path: PathName(entry.tree()),
        good: false,
        error: None,
        entries: 0,
        bytes: 0,
        unchecked: 0,
        damaged: 0,
        damage: Vec::new(),
        check: None,
        marked: false,
    };
    if let Err(cause) = &entry.manifest {
        line.error = Some(cause.clone());
        return Ok(line);
    }
    let snapshot = match found.store.open_snapshot(entry) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            line.error = Some(error.message);
            return Ok(line);
        }
    };
    let time = jiff::Timestamp::now().to_string();
    let begun = Instant::now();
    let findings = content::compare(&snapshot, quick, progress)?;
    let check = Check {
        kind: "content".to_owned(),
        passed: findings.damaged == 0,
        ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        time,
        damaged: (findings.damaged > 0).then_some(findings.damaged),
        ..Check::default()
    };
    let reason = reason(&findings);
    // That a quick look finds nothing does not take back what a thorough one has found.
    let is_thorough = !quick && findings.unchecked == 0;
    let mut marks = Vec::new();
    if reason.is_some() || is_thorough {
        marks.push((check, CONTENT, reason));
    }
    let verdict = verify.map(|verify| {
        let subject = command::Subject {
            id: &snapshot.id,
            set: &found.set,
            tree: &snapshot.tree(),
            is_published: true,
            root: snapshot.manifest.roots.first().map(AsRef::as_ref),
            store: &found.store,
        };
        command::check(verify, &subject, &Stop::default(), progress)
    });
    line.good = findings.damaged == 0;
    line.entries = findings.entries;
    line.bytes = findings.bytes;
    line.unchecked = findings.unchecked;
    line.damaged = findings.damaged;
    line.damage = findings.damage;
    if let Some(verdict) = verdict {
        line.good &= verdict.check.passed;
        if let Some(reason) = &verdict.reason {
            progress.note(&format!("{}: {}", line.id, reason.text));
        }
        line.check = Some(verdict.check.clone());
        marks.push((verdict.check, COMMAND, verdict.reason));
    }
    match write_down(found, &snapshot, &marks) {
        Ok(marked) => line.marked = marked,
        Err(error) if line.good => progress.note(&format!("{}: {}", line.id, error.message)),
        Err(error) => output::error(&format!(
            "snapshim: {} is damaged, but that could not be written into its manifest: {}",
            line.id,
            output::name(&error.message)
        )),
    }
    Ok(line)
}

/// Writes what was found into the manifest; whether that was to be done.
fn write_down(
    found: &Snapshots,
    snapshot: &Snapshot,
    marks: &[(Check, &str, Option<Reason>)],
) -> Result<bool> {
    // What is good and was so is not worth waiting for the store.
    let was_bad = |kind: &str| {
        let checks = &snapshot.manifest.checks;
        checks.iter().any(|check| check.kind == kind)
    };
    let is_news = |(check, _, reason): &&(Check, &str, Option<Reason>)| {
        reason.is_some() || check.kind == "command" || was_bad(&check.kind)
    };
    let marks: Vec<_> = marks.iter().filter(is_news).collect();
    if marks.is_empty() {
        return Ok(false);
    }
    if !snapshot.is_own {
        return Err(
            Error::new("the store belongs to another user").next("run as the owner of the store")
        );
    }
    let lock = found.store.lock(WAIT)?;
    for (check, code, reason) in marks {
        mark::mark(
            &found.store,
            &lock,
            &snapshot.id,
            check,
            code,
            reason.as_ref(),
        )?;
    }
    Ok(true)
}

/// What speaks against a snapshot of which this was found.
fn reason(findings: &Findings) -> Option<Reason> {
    let first = findings.damage.first()?;
    let more = match findings.damaged {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    };
    Some(Reason {
        code: CONTENT.to_owned(),
        text: format!("it is not what it was: {}{more}", first.line()),
        pid: None,
    })
}

impl Line {
    /// One row, or one for each thing that is wrong.
    fn rows(&self, table: &mut Table) {
        let (state, style) = match self.good {
            true => ("good", style::GOOD),
            false => ("damaged", style::BAD),
        };
        let mut row = |note: &str| {
            table.row([
                Cell::new(self.id.clone()).styled(style::NAME),
                Cell::new(state).styled(style),
                Cell::count(self.entries),
                Cell::size(self.bytes),
                Cell::name(note),
            ]);
        };
        let mut notes: Vec<String> = self.error.iter().cloned().collect();
        notes.extend(self.damage.iter().map(Damage::line));
        let left = self.damaged - self.damage.len() as u64;
        if left > 0 {
            notes.push(format!("and {left} more"));
        }
        if self.unchecked > 0 {
            notes.push(format!(
                "the content of {} files was not checked",
                self.unchecked
            ));
        }
        match &self.check {
            Some(check) if check.passed => notes.push("passed the command".to_owned()),
            Some(_) => notes.push("failed the command".to_owned()),
            None => {}
        }
        if notes.is_empty() {
            row("");
        }
        notes.iter().for_each(|note| row(note));
    }
}
