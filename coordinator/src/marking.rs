//! Snapshots built on the one before, by what calls have marked since (`run --mark-blocks`).
//!
//! What is known of the snapshot to build on is in the set's directory (`marks.json`), beside the
//! gate with the marks: one is of no use without the other. It is replaced when the next snapshot
//! is published, and a mark is never taken back ([`snapshim_gate::marks`]); so a checkpoint
//! that comes to nothing changes nothing.
//!
//! Each [`COMPARED`]th snapshot is captured in whole, and what was not marked is compared with the
//! one before. If that differs, marks are not used any more, and the snapshots that were built on
//! them since the last comparison are no longer verified.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{AtFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};
use snapshim_gate::abi::Gate;
use snapshim_gate::table::FileId;

use crate::Result;
use crate::capture::delta::{BaseFile, Bases, Earlier, Outcome, identity_of};
use crate::error::Context;
use crate::hold::evidence::reason;
use crate::hold::set::Set;
use crate::store::manifest::{Check, FileRecord, Kind, Manifest, Marked, PathName};
use crate::store::policy::Class;
use crate::store::{Store, StoreLock};
use crate::verify::mark;

/// Name of what is known, in the set's directory.
const NAME: &str = "marks.json";
const VERSION: u32 = 1;
/// The code of the reason that a snapshot was built on marks of which some were missing.
const CODE: &str = "unmarked-change";
/// At most so many snapshots are built one on the other before one is compared.
const COMPARED: usize = 16;
/// What is larger is not read.
const MAX: u64 = 64 << 20;

/// What is known of the snapshot to build on.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    /// The gate with the marks.
    gate_id: u64,
    /// The snapshot.
    snapshot: String,
    /// The number of its cut.
    number: u32,
    /// Snapshots that were built on marks since the last comparison.
    since: Vec<String>,
    files: Vec<FileForm>,
}

/// The form of [`BaseFile`].
#[derive(Clone, Debug, Serialize, Deserialize)]
struct FileForm {
    dev: u64,
    ino: u64,
    born_ns: i64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    #[serde(flatten)]
    path: PathName,
    copy: (u64, i64, u64),
}

/// Notes, if calls mark what they change, that somebody may have changed something without.
pub(crate) fn note(gate: Option<&Gate>, is_doubtful: bool) {
    if let Some(gate) = gate.filter(|gate| is_doubtful && gate.wants_marks()) {
        gate.marks().set_blind();
    }
}

/// The marks of a set, for one checkpoint.
#[derive(Debug)]
pub(crate) struct Marking<'a> {
    /// If it has any.
    set: Option<&'a Set>,
    record: Option<Record>,
}

impl<'a> Marking<'a> {
    /// What is known of them.
    pub(crate) fn load(set: Option<&'a Set>) -> Marking<'a> {
        let has_marks = |set: &&Set| set.gate.wants_marks() && !set.gate.marks().is_refuted();
        let set = set.filter(has_marks);
        let is_its = |record: &Record, set: &Set| {
            record.version == VERSION && record.gate_id == set.gate.header().gate_id.load(Relaxed)
        };
        // One that is missing, damaged or of another gate: there is nothing to build on.
        let record = set.and_then(|set| read(set).filter(|record| is_its(record, set)));
        Marking { set, record }
    }

    /// What a snapshot can be built on.
    pub(crate) fn bases(&self, store: &Store, lock: &StoreLock) -> Option<Bases> {
        let set = self.set?;
        let earlier = self.record.as_ref().and_then(|record| {
            // One that was found to be bad since is nothing to build on.
            let manifest = store.find(&record.snapshot).ok()?.manifest.ok()?;
            if !manifest.verified || manifest.class() != Class::Good {
                return None;
            }
            Some(Earlier {
                tree: store.open_tree(lock, &record.snapshot)?,
                number: record.number,
                files: record.files.iter().map(FileForm::base).collect(),
            })
        });
        Some(Bases {
            marks: set.gate.marks(),
            earlier,
            compare: self.is_comparison_due(),
        })
    }

    fn is_comparison_due(&self) -> bool {
        let since = self.record.as_ref().map_or(0, |record| record.since.len());
        since + 1 >= COMPARED
    }

    /// The snapshot that was built on.
    fn base(&self, outcome: &Outcome) -> Option<&str> {
        let record = self.record.as_ref()?;
        (outcome.shared > 0 || outcome.compared.is_some_and(|bytes| bytes > 0))
            .then_some(record.snapshot.as_str())
    }

    /// What the manifest says of it.
    pub(crate) fn describe(&self, outcome: &Outcome, manifest: &mut Manifest) {
        let base = self.base(outcome);
        manifest.marked = Some(Marked {
            bytes_captured: outcome.captured,
            bytes_shared: outcome.shared,
            base: base.map(str::to_owned),
            bytes_compared: outcome.compared,
        });
        if let Some(base) = base.filter(|_| outcome.shared > 0) {
            manifest.assumptions.push(format!(
                "no program but those held by their system call sites opened a member, changed it and closed it \
                 again since the snapshot {base}, from which unmarked blocks were taken"
            ));
        }
    }

    /// Writes down that the snapshot `id`, which is about to be published, is built on marks: whatever
    /// becomes of this process then, it will be withdrawn with the others if marks are missing.
    ///
    /// # Errors
    ///
    /// It cannot be written: then the snapshot must not be published.
    pub(crate) fn announce(&self, outcome: &Outcome, id: &str) -> Result<()> {
        let (Some(set), Some(record)) = (self.set, &self.record) else {
            return Ok(());
        };
        if outcome.shared == 0 {
            return Ok(());
        }
        let mut record = record.clone();
        record.since.push(id.to_owned());
        write(set, &record)
    }

    /// Writes down what can be built on next, now that the snapshot is published; what there is to
    /// say about it.
    pub(crate) fn conclude(
        &self,
        outcome: &Outcome,
        manifest: &Manifest,
        tree: &OwnedFd,
        store: &Store,
        lock: &StoreLock,
    ) -> Vec<String> {
        let Some(set) = self.set else {
            return Vec::new();
        };
        let mut notes = Vec::new();
        if let Some(what) = &outcome.refuted {
            set.gate.marks().refute(true);
            let _ = rustix::fs::unlinkat(set.dir_fd(), NAME, AtFlags::empty());
            notes.push(format!(
                "{what}: from now on everything is captured, until the set is started again"
            ));
            notes.extend(self.withdraw(what, store, lock));
            return notes;
        }
        if let Some(path) = &outcome.unexplained {
            notes.push(format!(
                "{} was changed by somebody who marks nothing; so everything was captured, and compared: no \
                 bytes differ that were not marked",
                path.display()
            ));
        }
        let has_compared = outcome.compared.is_some_and(|bytes| bytes > 0);
        let mut since = match &self.record {
            Some(record) if !has_compared => record.since.clone(),
            _ => Vec::new(),
        };
        if outcome.shared > 0 {
            since.push(manifest.id.clone());
        }
        let next = match (&self.record, manifest.verified) {
            (_, true) => Record {
                version: VERSION,
                gate_id: set.gate.header().gate_id.load(Relaxed),
                snapshot: manifest.id.clone(),
                number: outcome.number,
                since,
                files: self.files(outcome, manifest, tree),
            },
            (Some(record), false) => Record {
                since,
                ..record.clone()
            },
            (None, false) => return notes,
        };
        if let Err(error) = write(set, &next) {
            notes.push(error.message);
        }
        notes
    }

    /// What can be built on of a snapshot with this `tree`: what was captured after its cut, and what
    /// has not changed since the one before.
    fn files(&self, outcome: &Outcome, manifest: &Manifest, tree: &OwnedFd) -> Vec<FileForm> {
        let mut born: HashMap<FileId, i64> = outcome.files.iter().copied().collect();
        let earlier = self.record.iter().flat_map(|record| &record.files);
        let earlier: HashMap<FileId, &FileForm> =
            earlier.map(|form| (form.base().0, form)).collect();
        let id_of = |file: &FileRecord| FileId {
            dev: file.dev,
            ino: file.ino,
        };
        for file in &manifest.files {
            let is_same = |form: &&&FileForm| {
                (form.size, form.mtime_ns, form.ctime_ns)
                    == (file.size, file.mtime_ns, file.ctime_ns)
            };
            let shared = file.capture.as_deref() == Some("shared");
            if let Some(form) = earlier.get(&id_of(file)).filter(|_| shared).filter(is_same) {
                born.entry(id_of(file)).or_insert(form.born_ns);
            }
        }
        // Of several names any will do.
        let form = |file: &FileRecord| {
            Some(FileForm {
                dev: file.dev,
                ino: file.ino,
                born_ns: *born.get(&id_of(file)).filter(|_| file.kind == Kind::File)?,
                size: file.size,
                mtime_ns: file.mtime_ns,
                ctime_ns: file.ctime_ns,
                path: file.path.clone(),
                copy: identity_of(tree.as_fd(), file.path.as_ref())?,
            })
        };
        manifest.files.iter().filter_map(form).collect()
    }

    /// Says of the snapshots that were built on marks since the last comparison that they are not
    /// verified; what cannot be said.
    fn withdraw(&self, what: &str, store: &Store, lock: &StoreLock) -> Vec<String> {
        let since = self.record.iter().flat_map(|record| &record.since);
        let failed = since.filter_map(|id| {
            let check = Check {
                kind: "marks".to_owned(),
                passed: false,
                time: jiff::Timestamp::now().to_string(),
                output: Some(what.to_owned()),
                ..Check::default()
            };
            let text = format!(
                "blocks of it were taken from the snapshot before because they were not marked, and a later \
                 comparison has shown that marks are missing ({what})"
            );
            let why = reason(CODE, text, None);
            match store.has(id) {
                true => mark::mark(store, lock, id, &check, CODE, Some(&why)).err(),
                false => None,
            }
        });
        failed.map(|error| error.message).collect()
    }
}

impl FileForm {
    fn base(&self) -> (FileId, BaseFile) {
        let id = FileId {
            dev: self.dev,
            ino: self.ino,
        };
        let base = BaseFile {
            born_ns: self.born_ns,
            size: self.size,
            mtime_ns: self.mtime_ns,
            ctime_ns: self.ctime_ns,
            path: self.path.0.clone(),
            copy: self.copy,
        };
        (id, base)
    }
}

fn read(set: &Set) -> Option<Record> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(set.dir_fd(), NAME, flags, Mode::empty()).ok()?;
    let mut text = Vec::new();
    let mut file = std::fs::File::from(file).take(MAX);
    file.read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Whole or not at all.
fn write(set: &Set, record: &Record) -> Result<()> {
    let what = || "write down what the next snapshot can be built on".to_owned();
    let text = serde_json::to_vec(record).context(what)?;
    let temporary = format!(".{NAME}.tmp");
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    // The holder of the set's lock is alone here.
    let file = rustix::fs::openat(set.dir_fd(), &temporary, flags, mode).context(what)?;
    std::fs::File::from(file)
        .write_all_at(&text, 0)
        .context(what)?;
    rustix::fs::renameat(set.dir_fd(), &temporary, set.dir_fd(), NAME).context(what)
}
