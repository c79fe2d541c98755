//! A checkpoint from end to end: prepare, shut, drain, capture, open, publish.

use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use snapshim_gate::abi::MAX_HOLD_BOUND_MS;
use snapshim_gate::table::FileId;

use crate::capture::{self, Captured, Method, Moved, Scope};
use crate::commit::CommitPoint;
use crate::hold::cut::{self, Hold, Shut};
use crate::hold::evidence::{self, Members, Scan, reason};
use crate::hold::set::Set;
use crate::store::manifest::{FileRecord, Manifest, PathName, Reason, VERSION};
use crate::store::{Draft, Store};
use crate::{Error, Exit, Result};

/// How often a checkpoint is tried again when it was aborted by chance: a thread
/// woke up in the wrong moment.
const TRIES: u32 = 5;

/// What a checkpoint is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The point to cut at.
    pub at: CommitPoint,
    /// How long to try for it, and for the set if another coordinator has it.
    pub wait: Duration,
    /// Longest time a call of the program may be made to wait.
    pub max_hold: Duration,
    /// How to capture.
    pub capture: Method,
    /// Delete all but the newest so many snapshots afterwards.
    pub keep_last: Option<usize>,
    /// Only this file.
    pub only: Option<PathBuf>,
}

/// A snapshot that was published.
#[derive(Debug)]
pub struct Outcome {
    /// Its certificate.
    pub manifest: Manifest,
    /// Its tree.
    pub path: PathBuf,
    /// Snapshots deleted under `keep_last`.
    pub pruned: Vec<String>,
}

/// What one hold brought.
struct Cut {
    captured: Captured,
    time: jiff::Timestamp,
    hold: Duration,
    drain: Duration,
    reasons: Vec<Reason>,
    scan: Scan,
    moved: Vec<Moved>,
}

/// Makes a snapshot of the set.
pub fn checkpoint(set: &Set, options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let _lock = set.lock(options.wait)?;
    if cut::recover(&set.gate) {
        progress("the gate was left shut by a coordinator that died; opened it");
    }
    let store = Store::open_or_create(&set.config.store, &set.name)?;
    let store_lock = store.lock(options.wait)?;
    for left in store.sweep(&store_lock)? {
        progress(&format!("removed {left}, left half done"));
    }
    let scope = scope(set, options);
    let mut tries = 1;
    let (draft, cut) = loop {
        let draft = store.begin(&store_lock)?;
        match take(set, options, &scope, &draft) {
            Ok(cut) => break (draft, cut),
            // The hold limit itself is a matter for the user, not for another try.
            Err(e) if e.exit == Exit::Aborted && e.is_chance && tries < TRIES => {
                progress(&format!("{}; trying again", e.message));
                tries += 1;
            }
            Err(e) => return Err(e),
        }
    };
    let (manifest, captured) = certify(set, options, draft.id(), cut);
    let files = captured.finish()?;
    let manifest = with_files(manifest, files);
    let path = draft.publish(&manifest)?;
    let pruned = match options.keep_last {
        Some(keep) => store.keep_last(&store_lock, keep)?,
        None => Vec::new(),
    };
    Ok(Outcome {
        manifest,
        path,
        pruned,
    })
}

/// What to capture: the whole set, or one file of it.
fn scope(set: &Set, options: &Options) -> Scope {
    Scope {
        roots: match &options.only {
            Some(path) => vec![path.clone()],
            None => set.config.roots.clone(),
        },
        excludes: set.config.excludes.clone(),
    }
}

/// One hold: everything in here until [`Hold::open`] makes programs wait.
fn take(set: &Set, options: &Options, scope: &Scope, draft: &Draft) -> Result<Cut> {
    let bound_ms = options
        .max_hold
        .as_millis()
        .clamp(1, u128::from(MAX_HOLD_BOUND_MS)) as u32;
    set.gate.header().hold_bound_ms.store(bound_ms, Relaxed);
    // A waiter's clock starts after ours: give up before it has to.
    let limit = Duration::from_millis(u64::from(bound_ms)) * 9 / 10;

    let prepared = capture::prepare(scope, &draft.tree(), options.capture)?;
    let overflow = evidence::overflow(&set.gate);
    let members = Members::new(prepared.members());
    let before = evidence::scan(&set.gate, set.gate_id, &members);
    let held = before.held();
    let shut = match &options.only {
        None => Shut::Devices(prepared.devices()),
        Some(path) => Shut::Only(identity(path)?),
    };

    let mut hold = Hold::close(&set.gate, set.gate_id, shut, limit)?;
    let drain = hold.drain()?;
    let time = jiff::Timestamp::now();
    let mut reasons = evidence::hidden_calls(&hold, &held);
    reasons.extend(evidence::mapped_since(
        &before,
        &set.gate,
        set.gate_id,
        &members,
    ));
    let captured = prepared.capture(&mut || hold.goes_on())?;
    let moved = captured.moved();
    let held_for = hold.open()?;

    // Whoever came since the first look, and files that did.
    let after = evidence::scan(&set.gate, set.gate_id, &Members::new(captured.members()));
    reasons.extend(evidence::overflow_reasons(&set.gate, overflow));
    Ok(Cut {
        captured,
        time,
        hold: held_for,
        drain,
        reasons,
        scan: before.and(after),
        moved,
    })
}

/// The identity of the one file to capture.
fn identity(path: &std::path::Path) -> Result<FileId> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::symlink_metadata(path)
        .map_err(|e| Error::usage(format!("cannot capture only {}: {e}", path.display())))?;
    if !meta.is_file() {
        return Err(
            Error::usage(format!("{} is not a regular file", path.display()))
                .next("--only takes one file; leave it out to capture the whole set"),
        );
    }
    Ok(FileId {
        dev: meta.dev(),
        ino: meta.ino(),
    })
}

/// The certificate with its list of files, and what these speak against.
fn with_files(mut manifest: Manifest, files: Vec<FileRecord>) -> Manifest {
    manifest.reasons.extend(evidence::ctime_reasons(&files));
    manifest.verified = manifest.reasons.is_empty();
    manifest.files = files;
    manifest
}

/// The verdict, without the list of files.
fn certify(set: &Set, options: &Options, id: &str, cut: Cut) -> (Manifest, Captured) {
    let Cut {
        captured,
        time,
        hold,
        drain,
        mut reasons,
        scan,
        moved,
    } = cut;
    reasons.extend(scan.reasons());
    // One entry for each file would bury the cause.
    if let Some(first) = moved.first() {
        reasons.push(reason(
            "changed-during-hold",
            format!(
                "{} {} during the hold{}: somebody changed it by a way that the shim does not see",
                first.path.display(),
                first.what,
                if moved.len() > 1 {
                    format!(" (and {} more)", moved.len() - 1)
                } else {
                    String::new()
                }
            ),
            None,
        ));
    }
    let manifest = Manifest {
        version: VERSION,
        id: id.to_owned(),
        set: set.name.clone(),
        time: time.to_string(),
        commit_point: CommitPoint::Write.to_string(),
        commit_point_asked: options.at.to_string(),
        verified: reasons.is_empty(),
        reasons,
        assumptions: scan.assumptions(),
        hold_us: hold.as_micros() as u64,
        drain_us: drain.as_micros() as u64,
        capture: captured.method(),
        roots: set.config.roots.iter().cloned().map(PathName).collect(),
        files: Vec::new(),
        writers: scan.writers(),
        foreign: scan.foreign(),
        unknown: serde_json::Map::new(),
    };
    (manifest, captured)
}
