//! A checkpoint from end to end: prepare, shut, drain, capture, open, publish.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use snapshim_gate::abi::{Gate, MAX_HOLD_BOUND_MS};
use snapshim_gate::guard;
use snapshim_gate::slot::{FREE, Seen, Slot};
use snapshim_gate::table::FileId;

use crate::capture::delta::AtCut;
use crate::capture::{self, Member, Method, Moved, Prepared, Rehearsed, Scope, Taken};
use crate::commit::judge::Ground;
use crate::commit::reach::{self, Asked};
use crate::commit::{CommitPoint, Otherwise};
use crate::digest;
use crate::held::Held;
use crate::hold::clock::Clock;
use crate::hold::cut::{self, Hold, Shut};
use crate::hold::evidence::{self, Members, Scan, View, reason};
use crate::hold::outside::{Methods, Outside, Report};
use crate::hold::process::{self, Pid};
use crate::hold::rebuilt;
use crate::hold::set::{Config, Set, SetLock};
use crate::hold::witness;
use crate::hooks::{self, Hooks};
use crate::interrupt;
use crate::marking::{self, Marking};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::store::manifest::{FileRecord, Kind, Manifest, PathName, Pin, Reason, Totals, VERSION};
use crate::store::pace::Pace;
use crate::store::policy::{Policy, Room};
use crate::store::{Draft, Snapshot, Store, StoreLock};
use crate::tally::Tally;
use crate::urgency::{self, Turns, Urgency};
use crate::verify::command::{self, Verify};
use crate::{Error, Exit, Result};

/// How often a checkpoint is tried again when it was aborted by chance: a thread
/// woke up in the wrong moment.
const TRIES: u32 = 5;
/// How often those that came meanwhile are stopped as well; one more that comes after
/// that is a reason.
const ROUNDS: u32 = 6;

/// What a checkpoint is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The point to cut at.
    pub at: CommitPoint,
    /// What else, if it is not reached.
    pub otherwise: Otherwise,
    /// How long to try for it, and for the set if another coordinator has it.
    pub wait: Duration,
    /// Longest time a call of the program may be made to wait.
    pub max_hold: Duration,
    /// How to capture.
    pub capture: Method,
    /// How processes that the gate cannot hold are held.
    pub outside: Methods,
    /// Which snapshots stay.
    pub policy: Policy,
    /// Pin the snapshot, with this note.
    pub pin: Option<String>,
    /// Only this file.
    pub only: Option<PathBuf>,
    /// Whether files that have not changed are shared with the previous snapshot; see
    /// [`Options::shares`].
    pub share: bool,
    /// Whether the files' digests go into the manifest.
    pub digest: bool,
    /// The command that the snapshot has to pass.
    pub verify: Option<Verify>,
    /// What is run before and after the hold.
    pub hooks: Hooks,
    /// Why the snapshot is not to be verified, whatever is found.
    pub doubt: Option<Reason>,
    /// How far the capture is, for whoever looks.
    pub tally: Tally,
    /// Whether to come to an end: what the snapshot need not have is left out then.
    pub stop: Stop,
}

impl Options {
    /// Whether files that have not changed are shared with the previous snapshot. Not if a command is to
    /// work in the new one's own files: what it wrote would be written to the previous one, too.
    pub fn shares(&self) -> bool {
        self.share && self.verify.as_ref().is_none_or(|verify| verify.writable)
    }
}

/// A snapshot that was published.
#[derive(Debug)]
pub struct Outcome {
    /// Its certificate.
    pub manifest: Manifest,
    /// Its tree.
    pub path: PathBuf,
    /// Snapshots taken out of the store under the policy.
    pub pruned: Vec<String>,
    /// What else there is to say, a line each.
    pub notes: Vec<String>,
    store: Store,
}

impl Outcome {
    /// Removes the files of what was taken out of the store, at a pace; to be called after
    /// the snapshot was reported, for it may take long. What is left is for the next time.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub fn clear(&self, pace: &mut Pace<'_>) -> Result<()> {
        urgency::give_way();
        self.store.clear(pace).map(|_| ())
    }
}

/// What is done while programs are held.
pub(crate) trait Work: Sized {
    /// What that brings.
    type Done: Done;
    /// Ready for being done after the cut, with the gate guarded.
    type Rehearsed: AfterCut<Done = Self::Done>;
    /// `st_dev` of everything it is about.
    fn devices(&self) -> Vec<u64>;
    /// The files it is about.
    fn members(&self) -> Vec<Member>;
    /// Does it. `goes_on` says whether it may go on.
    ///
    /// # Errors
    ///
    /// [`Exit::Aborted`] if it may not.
    fn run(self, goes_on: &mut dyn FnMut() -> bool) -> Result<Self::Done>;
    /// Is told that calls may be in flight at the cut which nothing holds up.
    ///
    /// # Errors
    ///
    /// It cannot get ready for that.
    fn needs_locks(self) -> Result<Self> {
        Ok(self)
    }
    /// Is told that files may be changed in ways that leave no trace.
    ///
    /// # Errors
    ///
    /// It cannot get ready for that.
    fn share_nothing(&mut self) -> Result<()> {
        Ok(())
    }
    /// Is told so under the hold.
    fn share_nothing_now(&mut self) {}
    /// Is told, before the hold, that it is done under it, although it is to be guarded.
    ///
    /// # Errors
    ///
    /// It cannot get ready for that.
    fn stay_under_hold(&mut self) -> Result<()> {
        Ok(())
    }
    /// Whether it is to be done after the cut, if that is possible.
    fn is_to_be_guarded(&self) -> bool;
    /// Why there is no room for that. `settled`: as for [`Work::rehearse`].
    fn lacks_room(&self, settled: bool) -> Option<String>;
    /// Gets ready for that. `settled`: every call that was in flight when it was made has ended;
    /// `open`: members that somebody has open for writing.
    ///
    /// # Errors
    ///
    /// As [`Work::run`].
    fn rehearse(self, settled: bool, open: HashSet<FileId>) -> Result<Self::Rehearsed>;
}

/// What is done after the cut, while programs go on.
pub(crate) trait AfterCut {
    /// What that brings.
    type Done: Done;
    /// Just before the hold: what has changed so far.
    ///
    /// # Errors
    ///
    /// As [`Work::run`].
    fn catch_up(&mut self) -> Result<()> {
        Ok(())
    }
    /// Under the hold: what has changed since it was rehearsed. `is_told`: nobody may have changed
    /// anything without a report.
    ///
    /// # Errors
    ///
    /// As [`Work::run`].
    fn cut(&mut self, is_told: bool, goes_on: &mut dyn FnMut() -> bool) -> Result<()>;
    /// Under the hold: it will be captured under it after all.
    fn stays_under_hold(&mut self) {}
    /// Why there is no place in the gate for what is to be guarded.
    fn does_not_fit(&self) -> Option<&'static str>;
    /// Under the hold: what was done ahead does not count.
    ///
    /// # Errors
    ///
    /// As [`Work::run`].
    fn trust_nothing(&mut self) -> Result<()>;
    /// Under the hold, when it is sure that the cut is guarded: whether calls mark what they change
    /// from now on.
    fn mark(&mut self, at: AtCut) -> bool {
        let _ = at;
        false
    }
    /// Chunks are 2 to the power of this, bytes; what is to be guarded.
    fn guarded(&self) -> (u32, Vec<guard::Member>);
    /// Captures; `end` is called when programs need ask no more.
    ///
    /// # Errors
    ///
    /// As [`Work::run`]; those of `end`.
    fn sweep(
        self,
        gate: &Gate,
        firsts: Vec<u32>,
        goes_on: &mut dyn FnMut() -> bool,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<Self::Done>;
}

/// What was done while programs were held.
pub(crate) trait Done {
    /// The files that it was about, in the end.
    fn members(&self) -> Vec<Member>;
    /// What changed meanwhile.
    fn moved(&self) -> Vec<Moved>;
    /// What changed while programs went on, and had not been asked for.
    fn moved_unasked(&self) -> Vec<Moved>;
    /// Chunks that were asked for, if it was done after the cut.
    fn asked(&self) -> Option<u64>;
    /// It was not done after the cut, although it might have been.
    #[must_use]
    fn under_hold(self) -> Self
    where
        Self: Sized,
    {
        self
    }
    /// Whether there is nothing that can wait: see [`Done::settle`].
    fn is_settled(&self) -> bool {
        true
    }
    /// Does what can wait until nobody is held; what that shows to have changed meanwhile.
    ///
    /// # Errors
    ///
    /// That fails.
    fn settle(self, goes_on: &mut dyn FnMut() -> bool) -> Result<(Self, Vec<Moved>)>
    where
        Self: Sized,
    {
        let _ = goes_on;
        Ok((self, Vec::new()))
    }
}

impl AfterCut for Rehearsed {
    type Done = Taken;

    fn catch_up(&mut self) -> Result<()> {
        self.catch_up()
    }

    fn cut(&mut self, is_told: bool, goes_on: &mut dyn FnMut() -> bool) -> Result<()> {
        self.cut(is_told, goes_on)
    }

    fn stays_under_hold(&mut self) {
        self.stay_under_hold();
    }

    fn does_not_fit(&self) -> Option<&'static str> {
        self.does_not_fit()
    }

    fn trust_nothing(&mut self) -> Result<()> {
        self.trust_nothing()
    }

    fn mark(&mut self, at: AtCut) -> bool {
        self.mark(at)
    }

    fn guarded(&self) -> (u32, Vec<guard::Member>) {
        (self.shift(), self.guarded().collect())
    }

    fn sweep(
        self,
        gate: &Gate,
        firsts: Vec<u32>,
        goes_on: &mut dyn FnMut() -> bool,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<Taken> {
        let captured = self.sweep(gate, firsts, goes_on, end)?;
        Ok(Taken::Captured(Box::new(captured)))
    }
}

impl Work for Prepared {
    type Done = Taken;
    type Rehearsed = Rehearsed;

    fn is_to_be_guarded(&self) -> bool {
        self.is_to_be_guarded()
    }

    fn lacks_room(&self, settled: bool) -> Option<String> {
        self.lacks_room(settled)
    }

    fn rehearse(self, settled: bool, open: HashSet<FileId>) -> Result<Rehearsed> {
        self.rehearse(settled, open)
    }

    fn devices(&self) -> Vec<u64> {
        self.devices()
    }

    fn members(&self) -> Vec<Member> {
        self.members()
    }

    fn run(self, goes_on: &mut dyn FnMut() -> bool) -> Result<Taken> {
        self.take(goes_on)
    }

    fn needs_locks(self) -> Result<Prepared> {
        self.needs_locks()
    }

    fn share_nothing(&mut self) -> Result<()> {
        self.share_nothing()
    }

    fn share_nothing_now(&mut self) {
        self.share_nothing_now();
    }

    fn stay_under_hold(&mut self) -> Result<()> {
        self.stay_under_hold()
    }
}

impl Done for Taken {
    fn members(&self) -> Vec<Member> {
        self.members()
    }

    fn moved(&self) -> Vec<Moved> {
        self.moved()
    }

    fn moved_unasked(&self) -> Vec<Moved> {
        match self {
            Taken::Captured(captured) => captured.moved_unasked().to_vec(),
            Taken::Frozen(_) => Vec::new(),
        }
    }

    fn asked(&self) -> Option<u64> {
        match self {
            Taken::Captured(captured) => captured.swept().map(|swept| u64::from(swept.asked)),
            Taken::Frozen(_) => None,
        }
    }

    fn under_hold(self) -> Taken {
        match self {
            Taken::Captured(captured) => Taken::Captured(Box::new(captured.copied_under_hold())),
            frozen => frozen,
        }
    }

    fn is_settled(&self) -> bool {
        matches!(self, Taken::Captured(_))
    }

    fn settle(self, goes_on: &mut dyn FnMut() -> bool) -> Result<(Taken, Vec<Moved>)> {
        let (captured, moved) = self.read(goes_on)?;
        Ok((Taken::Captured(Box::new(captured)), moved))
    }
}

/// What one hold brought.
struct Cut<D> {
    captured: D,
    time: jiff::Timestamp,
    point: CommitPoint,
    hold: Duration,
    drain: Duration,
    reasons: Vec<Reason>,
    scan: Scan,
    report: Report,
    moved: Vec<Moved>,
    /// What it took to capture, under the hold or after it.
    capture: Duration,
    /// How long the cut was guarded, if it was.
    guard: Option<Duration>,
    /// Why the cut was not guarded, though it was to be.
    instead: Option<String>,
    notes: Vec<String>,
}

/// What a snapshot is made of.
#[derive(Clone, Copy)]
struct Subject<'a> {
    name: &'a str,
    config: &'a Config,
    /// The set with the gate of its programs; `None` if there is none.
    set: Option<&'a Set>,
}

impl<'a> Subject<'a> {
    /// How processes are looked at.
    fn view(&self) -> View<'a> {
        View {
            gate: self.set.map(|set| (&set.gate, set.gate_id)),
            tries: View::PATIENT,
        }
    }
}

/// Takes the set's lock, and opens a gate that a dead coordinator left shut.
fn take_set<'a>(
    set: &'a Set,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<(Subject<'a>, SetLock)> {
    let lock = set.lock(options.wait)?;
    if cut::recover(&set.gate) {
        progress.note("the gate was left shut by a coordinator that died; opened it");
    }
    let subject = Subject {
        name: &set.name,
        config: &set.config,
        set: Some(set),
    };
    Ok((subject, lock))
}

/// Makes a snapshot of the set.
pub fn checkpoint(set: &Set, options: &Options, progress: &mut dyn Progress) -> Result<Outcome> {
    let (subject, _lock) = take_set(set, options, progress)?;
    snapshot(subject, options, progress)
}

/// Runs a command while the programs of the set are held. The certificate, without an id, and
/// the command's exit status.
///
/// # Errors
///
/// As [`checkpoint`]; the command cannot be started, or did not end within the hold bound.
pub fn hold(
    set: &Set,
    options: &Options,
    command: std::process::Command,
    progress: &mut dyn Progress,
) -> Result<(Manifest, std::process::ExitStatus)> {
    let (subject, _lock) = take_set(set, options, progress)?;
    let held = Held::prepare(scope(subject, options), command)?;
    let (hooks, stop) = (&options.hooks, &options.stop);
    let turns = Turns::begin();
    let cut = hooks::around(hooks, subject.name, stop, progress, || {
        take(subject, options, held, &turns)
    })?;
    let (manifest, ran) = certify(subject, options, "", cut, "command");
    let (files, status) = ran.into_parts();
    Ok((with_files(manifest, files), status))
}

/// Makes a snapshot of files that no set is about: whoever writes to them is held from
/// outside.
pub fn snap(
    name: &str,
    config: &Config,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Outcome> {
    let subject = Subject {
        name,
        config,
        set: None,
    };
    snapshot(subject, options, progress)
}

fn snapshot(
    subject: Subject<'_>,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Outcome> {
    // All of it is, but for the hold.
    let turns = Turns::begin();
    turns.take(Urgency::Yielding);
    let store = Store::open_or_create(&subject.config.store, subject.name)?;
    let store_lock = store.lock(options.wait)?;
    for line in store.sweep(&store_lock)?.lines() {
        progress.note(&line);
    }
    if store.is_nearly_full()? {
        // What cannot be removed is told of at the end, and no reason to make no snapshot.
        let _ = store.clear(&mut Pace::brisk());
    }
    let room = make_room(&store, &store_lock, &options.policy)?;
    let made = make(subject, options, &store, &store_lock, &turns, progress);
    let (manifest, path) = made.map_err(|error| {
        let message = [&[error.message], &room[..]].concat().join("; ");
        Error { message, ..error }
    })?;
    let old = retain(&store, &store_lock, &options.policy);
    Ok(Outcome {
        manifest,
        path,
        pruned: old.removed,
        notes: [room, old.notes].concat(),
        store,
    })
}

/// Makes and publishes a snapshot; its certificate, and the path of its tree.
fn make(
    subject: Subject<'_>,
    options: &Options,
    store: &Store,
    store_lock: &StoreLock,
    turns: &Turns,
    progress: &mut dyn Progress,
) -> Result<(Manifest, PathBuf)> {
    let scope = scope(subject, options);
    let is_compared = options.shares() || options.digest;
    let read = || is_compared.then(|| store.newest().map(Arc::new)).flatten();
    // A certificate of many files takes a while to read: meanwhile the live files are looked at.
    let previous = OnceLock::new();
    let mut base = || match options.shares() {
        true => previous
            .get_or_init(read)
            .clone()
            .and_then(capture::Base::of),
        false => None,
    };
    let marking = Marking::load(subject.set);
    let mut tries = 1;
    let mut attempt = || loop {
        turns.take(Urgency::Yielding);
        let draft = store.begin(store_lock)?;
        let begun = Instant::now();
        let (capture, tally) = (options.capture, &options.tally);
        let prepared = capture::prepare_after(&scope, &draft.tree(), capture, &mut base, tally)?;
        let prepared = prepared
            .with_bases(marking.bases(store, store_lock))
            .with_digests(options.digest);
        let prepare = begun.elapsed();
        let prediction = prepared.prediction().clone();
        let mounted = prepared.mounted().cloned();
        let (hooks, stop) = (&options.hooks, &options.stop);
        let taken = hooks::around(hooks, subject.name, stop, progress, || {
            take(subject, options, prepared, turns)
        });
        turns.take(Urgency::Yielding);
        match taken {
            Ok(cut) => break Ok((draft, prepare, prediction, mounted, cut)),
            // The hold limit itself is a matter for the user, not for another try.
            Err(e) if e.exit == Exit::Aborted && e.is_chance && tries < TRIES => {
                progress.note(&format!("{}; trying again", e.message));
                tries += 1;
            }
            Err(e) => break Err(e),
        }
    };
    let attempted = std::thread::scope(|threads| {
        // Without a thread, when it is asked for.
        let _ = std::thread::Builder::new().spawn_scoped(threads, || {
            interrupt::leave_to_others();
            urgency::of_this_thread(Urgency::Yielding);
            previous.get_or_init(read);
        });
        attempt()
    });
    let (draft, prepare, prediction, mounted, mut cut) = attempted?;
    let previous = previous.get_or_init(read).clone();
    // Told after the hold: whoever reads it may be held himself.
    progress.detail(&format!("got ready in {prepare:.1?}"));
    progress.detail(&format!("chose {}", prediction.in_words()));
    progress.detail(&format!(
        "held {:.1?}: drained after {:.1?}, captured in {:.1?}",
        cut.hold, cut.drain, cut.capture
    ));
    if let Some(guard) = cut.guard {
        progress.detail(&format!(
            "captured within {guard:.1?} after that, while programs went on; they asked for {} chunks",
            cut.captured.asked().unwrap_or(0)
        ));
    }
    for line in &cut.notes {
        progress.note(line);
    }
    let capture = cut.captured.method();
    let (wall, instead) = (cut.capture, cut.instead.take());
    let (manifest, mut captured) = certify(subject, options, draft.id(), cut, &capture);
    let in_memory = captured.take_digests();
    let delta = captured.delta().cloned();
    let begun = Instant::now();
    let files = captured.finish()?;
    progress.detail(&format!(
        "made the files durable in {:.1?}",
        begun.elapsed()
    ));
    let wall = wall.saturating_add(begun.elapsed());
    let mut manifest = with_files(manifest, files);
    if let Some(delta) = &delta {
        marking.describe(delta, &mut manifest);
    }
    let prediction = prediction.with_outcome(&manifest, &draft.tree(), wall, instead);
    progress.detail(&prediction.outcome_in_words());
    manifest.prediction = Some(prediction);
    manifest.mounted = mounted;
    if options.digest {
        let previous = previous.as_deref();
        add_digests(
            &mut manifest,
            &draft,
            previous,
            &in_memory,
            options,
            progress,
        )?;
    }
    if let Some(verify) = &options.verify {
        check_draft(&mut manifest, verify, &draft, store, options, progress);
    }
    let tree = draft.tree_fd()?;
    let begun = Instant::now();
    if let Some(delta) = &delta {
        marking.announce(delta, draft.id())?;
    }
    let path = draft.publish(&manifest)?;
    progress.detail(&format!(
        "published {} in {:.1?}",
        manifest.id,
        begun.elapsed()
    ));
    let own = std::process::id();
    if let Some(kib) = process::status_number(own, own, "VmHWM:") {
        progress.detail(&format!(
            "used {} MiB of memory at most",
            kib.div_ceil(1024)
        ));
    }
    if let Some(delta) = &delta {
        for line in marking.conclude(delta, &manifest, &tree, store, store_lock) {
            progress.note(&line);
        }
    }
    Ok((manifest, path))
}

/// Makes room before a capture, while the store has less than it shall; says what was removed.
///
/// # Errors
///
/// There cannot be room enough.
fn make_room(store: &Store, lock: &StoreLock, policy: &Policy) -> Result<Vec<String>> {
    let Some(room) = policy.min_free else {
        return Ok(Vec::new());
    };
    let (removed, space) = store.make_room(lock, room, policy)?;
    if !space.is_short() {
        return Ok(removed_for_room(&removed, room));
    }
    Err(store.no_room(room, space, &removed))
}

fn removed_for_room(removed: &[String], room: Room) -> Vec<String> {
    let line = |id| format!("removed the snapshot {id} to make room (--min-free {room})");
    removed.iter().map(line).collect()
}

/// What became of the old snapshots.
#[derive(Default)]
struct Old {
    removed: Vec<String>,
    notes: Vec<String>,
}

/// Takes out what the policy does not keep, now that the new snapshot is there. That exists
/// whatever comes of this: so there are no errors, only notes.
fn retain(store: &Store, lock: &StoreLock, policy: &Policy) -> Old {
    let mut old = Old::default();
    if policy.has_rules() {
        match store.apply(lock, policy) {
            Ok(retired) => {
                let busy = |id| format!("left the snapshot {id}, which somebody reads");
                old.notes.extend(retired.busy.iter().map(busy));
                old.removed = retired.ids;
            }
            Err(error) => old
                .notes
                .push(format!("old snapshots stay: {}", error.message)),
        }
    }
    if let Some(room) = policy.min_free {
        match store.make_room(lock, room, policy) {
            Ok((removed, space)) => {
                old.notes.extend(removed_for_room(&removed, room));
                old.removed.extend(removed);
                if space.is_short() {
                    old.notes.push(format!(
                        "{} bytes are free on the store's file system, less than --min-free {room}, and no further snapshot may be removed",
                        space.free
                    ));
                }
            }
            Err(error) => old
                .notes
                .push(format!("no room was made: {}", error.message)),
        }
    }
    old
}

/// The digests of the files, before anybody but us has touched the draft.
fn add_digests(
    manifest: &mut Manifest,
    draft: &Draft,
    previous: Option<&Snapshot>,
    in_memory: &digest::InMemory,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<()> {
    let files = &mut manifest.files;
    let digested = digest::digest(files, draft, previous, in_memory, &options.stop, progress)?;
    if let Some(first) = digested.missing.first() {
        progress.note(&format!(
            "{} of the files have no digest: {} is the first",
            digested.missing.len(),
            first.display()
        ));
    }
    manifest.hashed_bytes = Some(digested.hashed_bytes);
    Ok(())
}

/// What a command says of the draft. If it fails, the snapshot is published all the
/// same: whoever wants to know why will look at it.
fn check_draft(
    manifest: &mut Manifest,
    verify: &Verify,
    draft: &Draft,
    store: &Store,
    options: &Options,
    progress: &mut dyn Progress,
) {
    let subject = command::Subject {
        id: draft.id(),
        set: &manifest.set,
        tree: &draft.tree(),
        is_published: false,
        root: manifest.roots.first().map(AsRef::as_ref),
        store,
    };
    let verdict = command::check(verify, &subject, &options.stop, progress);
    manifest.reasons.extend(verdict.reason);
    manifest.verified = manifest.reasons.is_empty();
    manifest.checks.push(verdict.check);
}

/// What to capture: everything, or one file of it.
fn scope(subject: Subject<'_>, options: &Options) -> Scope {
    Scope {
        roots: match &options.only {
            Some(path) => vec![path.clone()],
            None => subject.config.roots.clone(),
        },
        excludes: subject.config.excludes.clone(),
    }
}

/// The same options for all of the set's files: points are the program's, not a file's.
fn whole(options: &Options) -> Options {
    Options {
        only: None,
        ..options.clone()
    }
}

/// What bounds a hold, with a gate and without.
enum Bound<'a> {
    Gate(Hold<'a>),
    Clock(Clock),
}

impl Bound<'_> {
    fn drain(&mut self) -> Result<Duration> {
        match self {
            Bound::Gate(hold) => hold.drain(),
            Bound::Clock(clock) => Ok(clock.elapsed()),
        }
    }

    fn goes_on(&self) -> bool {
        match self {
            Bound::Gate(hold) => hold.goes_on(),
            Bound::Clock(clock) => !clock.left().is_zero(),
        }
    }

    fn left(&self) -> Duration {
        match self {
            Bound::Gate(hold) => hold.left(),
            Bound::Clock(clock) => clock.left(),
        }
    }

    fn hidden_calls(&self, held: &[Pid], outside: &Outside) -> Vec<Reason> {
        match self {
            Bound::Gate(hold) => evidence::hidden_calls(hold, held, outside),
            Bound::Clock(_) => Vec::new(),
        }
    }

    /// Ends the hold; how long it was.
    ///
    /// The gate opens first, and then those held from outside are let go. A call that the
    /// drain ignored because its thread sleeps is only known to have slept on while
    /// that thread is still stopped; and whoever waits at the gate finds it open
    /// when he goes on.
    fn end(self, outside: &mut Outside) -> Result<Duration> {
        match self {
            Bound::Gate(hold) => {
                let held = hold.open()?;
                outside.release()?;
                Ok(held)
            }
            Bound::Clock(clock) => {
                outside.release()?;
                Ok(clock.elapsed())
            }
        }
    }
}

/// One hold: everything in here until [`Bound::end`] makes programs wait.
fn take<W: Work>(
    subject: Subject<'_>,
    options: &Options,
    mut prepared: W,
    turns: &Turns,
) -> Result<Cut<W::Done>> {
    let bound_ms = options
        .max_hold
        .as_millis()
        .clamp(1, u128::from(MAX_HOLD_BOUND_MS)) as u32;
    let gate = subject.set.map(|set| &set.gate);
    if let Some(gate) = gate {
        gate.header().hold_bound_ms.store(bound_ms, Relaxed);
    }
    // A waiter's clock starts after ours: give up before it has to.
    let limit = Duration::from_millis(u64::from(bound_ms)) * 9 / 10;

    // A program whose files are put back when it dies has to live when the hold ends: what it
    // did when it died may be half done. What is known to be that is not looked at in this way.
    let witness = match subject.set.filter(|_| options.doubt.is_none()) {
        Some(set) => witness::find(set),
        None => witness::Found::Nobody,
    };
    let overflow = gate.map(evidence::overflow);
    let listed = prepared.members();
    let members = Members::new(listed.clone());
    let mut outside = Outside::new(&options.outside);
    let view = subject.view();
    let patience = match outside.is_enabled() {
        true => View::BRIEF,
        false => View::PATIENT,
    };
    let mut seen = evidence::scan(view.tries(patience), &members)?;
    marking::note(gate, seen.not_to_be_guarded().is_some());
    let held = seen.held();
    let mut targets = seen.outside();
    if seen.may_hide(|target| targets.contains(&target)).is_some() {
        prepared = prepared.needs_locks()?;
    }
    if seen.may_change_unseen() {
        prepared.share_nothing()?;
    }
    if outside.is_enabled() && !targets.is_empty() {
        // A guardian is as prompt as we are when it is started.
        turns.take(Urgency::Usual);
        // What it cannot do, it will say when it is asked to stop somebody.
        let _ = outside.prepare();
    }
    turns.take(Urgency::Yielding);
    let shut = match &options.only {
        None => Shut::Devices(prepared.devices()),
        // A save that replaces the file makes another of it.
        Some(path) if options.at != CommitPoint::Write => Shut::Devices(vec![identity(path)?.dev]),
        Some(path) => Shut::Only(identity(path)?),
    };

    let mut notes = Vec::new();
    let mut instead = None;
    let mut work = match prepared.is_to_be_guarded() {
        false => Stage::Under(prepared),
        true => {
            let why = not_to_be_guarded(options, gate, &seen);
            let settled = why.is_none() && gate.is_some_and(cut::settled);
            match (gate, why.or_else(|| prepared.lacks_room(settled))) {
                (Some(gate), None) => {
                    gate.guard().clear();
                    Stage::After(prepared.rehearse(settled, seen.open().clone())?)
                }
                (gate, why) => {
                    let why = why.filter(|_| gate.is_some());
                    let why = why.unwrap_or_else(|| "there is no gate".into());
                    if options.capture == Method::CopyBeforeWrite {
                        notes.push(format!("captured under the hold, and not after it: {why}"));
                    }
                    instead = Some(why);
                    prepared.stay_under_hold()?;
                    Stage::Under(prepared)
                }
            }
        }
    };

    let mut seal = None;
    let is_partly_seen = seen.is_partly_seen();
    let scope = scope(subject, &whole(options));
    let (mut hold, mut drain, mut point) = match subject.set {
        Some(set) => {
            let ground = Ground {
                gate: &set.gate,
                roots: &subject.config.roots,
                members: &listed,
                scope: &scope,
                seen: &seen,
            };
            let asked = asked(options, limit, &seen)?;
            get_prompt(turns);
            if let Stage::After(rehearsed) = &mut work {
                rehearsed.catch_up()?;
            }
            let reached = reach::reach(&ground, set.gate_id, shut, asked)?;
            seal = reached.seal;
            (Bound::Gate(reached.hold), reached.drain, reached.point)
        }
        None => {
            get_prompt(turns);
            let clock = Bound::Clock(Clock::start(limit));
            (clock, Duration::ZERO, CommitPoint::Write)
        }
    };
    let mapped = evidence::mapped_since(&mut seen, view, &members);
    targets = seen.outside();
    targets.extend(mapped.iter().map(|m| m.target));
    for _ in 0..ROUNDS {
        if !outside.stop(&targets, hold.left()) {
            break;
        }
        // Whoever came since, a child of one that is stopped now, say.
        let now = evidence::scan(view.tries(View::ONCE), &members)?.with_layers_of(&seen);
        targets = now.outside();
        seen = seen.and(now);
    }
    if outside.is_used() {
        // A thread that was ignored because it slept does so elsewhere now.
        let settled = hold.drain()?;
        if subject.set.is_none() {
            drain = settled;
        }
    }
    outside.drain_rings(&seen.rings(), hold.left() / 4);
    let time = jiff::Timestamp::now();
    let is_guardable =
        !outside.is_used() && mapped.is_empty() && seen.rings().is_empty() && seal.is_none();
    marking::note(gate, !is_guardable && seal.is_none());
    let hidden = match &work {
        Stage::After(_) if is_guardable => seen.held_in_part(),
        _ => held.clone(),
    };
    let mut reasons = hold.hidden_calls(&hidden, &outside);
    let mut is_guarded = is_guardable;
    let is_after = matches!(work, Stage::After(_));
    let mut not_guarded = (!is_guardable).then_some("somebody may change files without asking");
    if let Stage::After(rehearsed) = &mut work {
        let has_mapped = |gate| evidence::has_mapped_since(&seen, gate);
        let is_told = is_guardable && !gate.is_some_and(has_mapped);
        rehearsed.cut(is_told, &mut || hold.goes_on() && outside.stands())?;
        if let Some(why) = rehearsed.does_not_fit() {
            if is_guarded {
                reasons = hold.hidden_calls(&held, &outside);
            }
            is_guarded = false;
            not_guarded = Some(why);
        }
        if !is_guardable {
            rehearsed.trust_nothing()?;
        }
        if !is_guarded {
            rehearsed.stays_under_hold();
        }
    }
    let look = |tries, members: &Members| evidence::scan(view.tries(tries), members);
    let begun = Instant::now();
    let mut is_sealed = true;
    // Children of those that were stopped, made the moment they go on, are no evidence
    // against the hold: so the look at them comes before its end, and all it is about has to be
    // known by then. Otherwise both can wait.
    let mut early = None;
    let (mut captured, capture, mut moved, held_for, guarded) = match (work, hold, gate) {
        (Stage::After(rehearsed), Bound::Gate(hold), Some(gate)) if is_guarded => {
            let is_doubtful = overflow.is_some_and(|before| evidence::overflow(gate) != before);
            let (captured, held_for) = guarded(rehearsed, hold, gate, is_doubtful, turns)?;
            let guarded = begun.elapsed().saturating_sub(held_for);
            let moved = captured.moved_unasked();
            (captured, guarded, moved, held_for, Some(guarded))
        }
        (work, hold, _) => {
            let mut goes_on = || hold.goes_on() && outside.stands();
            let captured = match work {
                Stage::Under(mut prepared) => {
                    if outside.is_used() || !mapped.is_empty() {
                        prepared.share_nothing_now();
                    }
                    prepared.run(&mut goes_on)
                }
                Stage::After(rehearsed) => under_hold(rehearsed, gate, &mut goes_on),
            };
            let mut captured = match captured {
                // Not the hold's bound: `release` knows what became of the guardian.
                Err(cause) if hold.goes_on() && !outside.stands() => {
                    outside.release()?;
                    return Err(cause);
                }
                captured => captured?,
            };
            let capture = begun.elapsed();
            let mut moved = captured.moved();
            is_sealed = seal.is_none_or(|seal| seal.stands());
            if outside.is_used() {
                let (settled, more) =
                    captured.settle(&mut || hold.goes_on() && outside.stands())?;
                captured = settled;
                moved.extend(more);
                let members = Members::new(captured.members());
                early = Some((look(View::ONCE, &members)?, members));
            }
            let held_for = hold.end(&mut outside)?;
            (captured, capture, moved, held_for, None)
        }
    };
    turns.take(Urgency::Yielding);
    if let Some(why) = not_guarded.filter(|_| is_after && guarded.is_none()) {
        instead = Some(why.to_owned());
        if options.capture == Method::CopyBeforeWrite {
            notes.push(format!("captured under the hold, and not after it: {why}"));
        }
    }

    let has_ended = match &witness {
        witness::Found::Nobody => false,
        witness::Found::Lives(process) => has_ended(process),
        witness::Found::Ended => true,
    };
    if has_ended {
        reasons.push(reason(
            "program-ended",
            "the program ended before the cut: what it was doing may be half done".into(),
            None,
        ));
    }
    // Whoever came since the first look, and files that did.
    let after = match early {
        Some((mut after, members)) => {
            after.settle(view, &members, outside.report());
            after
        }
        None => {
            let mut after = if captured.is_settled() {
                look(View::PATIENT, &Members::new(captured.members()))?
            } else {
                let known = captured.members();
                let after = look(View::PATIENT, &Members::new(known.clone()))?;
                let (settled, more) = captured.settle(&mut || true)?;
                captured = settled;
                moved.extend(more);
                // What is known only now was not looked for.
                match captured.members() {
                    all if all == known => after,
                    all => after.and(look(View::PATIENT, &Members::new(all))?),
                }
            };
            after.forget_later_mappings(&seen, &mapped);
            after
        }
    };
    moved.retain(|m| !rebuilt::is_rebuilt(&m.path));
    let report = outside.into_report();
    let scan = seen.and(after);
    marking::note(gate, scan.not_to_be_guarded().is_some());
    // What the gate does not see done cannot have reached a point of the program's.
    if !scan.outside().is_empty() && point != CommitPoint::Write {
        if options.otherwise != Otherwise::At(CommitPoint::Write) {
            return Err(cannot_be_told(point, &scan));
        }
        point = CommitPoint::Write;
    }
    // The same of what is not noted.
    let is_told = is_sealed && (is_partly_seen || !scan.is_partly_seen());
    if point.needs_notes() && !is_told {
        if options.otherwise != Otherwise::At(CommitPoint::Write) {
            return Err(is_partly_noted(point, &scan));
        }
        point = CommitPoint::Write;
    }
    reasons.extend(mapped.iter().filter_map(|m| m.reason(&report)));
    if let (Some(gate), Some(before)) = (gate, overflow) {
        reasons.extend(evidence::overflow_reasons(gate, before));
    }
    if guarded.is_some() {
        reasons.extend(scan.guard_reason());
    }
    Ok(Cut {
        guard: guarded,
        instead,
        notes,
        captured,
        time,
        point,
        hold: held_for,
        drain,
        reasons,
        scan,
        report,
        moved,
        capture,
    })
}

/// For a hold that is about to begin.
fn get_prompt(turns: &Turns) {
    turns.take(Urgency::Prompt);
    // The turn that was begun keeps its end, up to 100 ms away, until the thread has slept once
    // (sched_setattr(2) keeps deadlines, `PLACE_REL_DEADLINE`).
    std::thread::sleep(Duration::from_micros(10));
}

/// Work that is done under the hold, or after it.
enum Stage<W: Work> {
    Under(W),
    After(W::Rehearsed),
}

/// Why a cut cannot be guarded.
fn not_to_be_guarded(options: &Options, gate: Option<&Gate>, seen: &Scan) -> Option<String> {
    if options.only.is_some() {
        return Some("only one file is asked for".into());
    }
    // Who can ask for nothing waits for everything.
    let is_sandboxed = |slot: &Slot| {
        slot.owner.load(Acquire) != FREE && slot.seen[Seen::Sandbox as usize].load(Relaxed) > 0
    };
    if gate.is_some_and(|gate| gate.used_slots().iter().any(is_sandboxed)) {
        return Some("a program of the set has entered a sandbox".into());
    }
    seen.not_to_be_guarded()
}

/// Ends the hold with a guard, and captures while that stands; what was captured, and how long
/// the hold was. `is_doubtful`: see [`AtCut`].
fn guarded<R: AfterCut>(
    mut rehearsed: R,
    mut hold: Hold<'_>,
    gate: &Gate,
    is_doubtful: bool,
    turns: &Turns,
) -> Result<(R::Done, Duration)> {
    let (shift, members) = rehearsed.guarded();
    let has_marks = rehearsed.mark(hold.to_mark(is_doubtful));
    let (held_for, firsts) = hold.guard(shift, has_marks, members.into_iter())?;
    let stands = hold.watch();
    let mut is_prompt = true;
    let mut goes_on = || {
        // Asked for the first time when those who serve have begun.
        if std::mem::take(&mut is_prompt) {
            turns.take(Urgency::Yielding);
        }
        stands.stands() && !Clock::is_asked_to_end()
    };
    let captured = rehearsed.sweep(gate, firsts, &mut goes_on, || hold.unguard());
    match captured {
        Ok(captured) => Ok((captured, held_for)),
        // The sweep only knows that it does not go on; if a call has ended the guard, whether
        // it is worth another try depends on why.
        Err(cause) if cause.exit == Exit::Aborted => Err(cut::why_unguarded(gate).unwrap_or(cause)),
        Err(cause) => Err(cause),
    }
}

/// Captures what was rehearsed, but under the hold after all.
fn under_hold<R: AfterCut>(
    rehearsed: R,
    gate: Option<&Gate>,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<R::Done> {
    let gate = gate.ok_or_else(|| Error::new("there is no gate"))?;
    let (shift, members) = rehearsed.guarded();
    let mut next = 0;
    let firsts = members.iter().map(|member| {
        let first = next;
        next += guard::chunks_of(member.size, shift) as u32;
        first
    });
    let captured = rehearsed.sweep(gate, firsts.collect(), goes_on, || Ok(()));
    captured
        .map(Done::under_hold)
        .map_err(|cause| match cause.exit {
            Exit::Aborted => Error::aborted("the hold was over before all files were captured")
                .next("watch fewer or smaller files, or raise --max-hold"),
            _ => cause,
        })
}

/// Whether the process behind a pidfd has ended (pidfd_open(2): it is readable then).
fn has_ended(process: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// The error of a point that somebody the gate does not see may not have reached.
fn cannot_be_told(point: CommitPoint, scan: &Scan) -> Error {
    Error {
        exit: Exit::NotReached,
        ..Error::new(format!(
            "the commit point {point} cannot be told: a program writes to the files that the gate \
             does not see ({})",
            scan.outside_names().join(", ")
        ))
    }
    .next("say what else will do with --else write; `snapshim doctor PID` says why")
}

/// The same of somebody whose calls are noted only in part.
fn is_partly_noted(point: CommitPoint, scan: &Scan) -> Error {
    Error {
        exit: Exit::NotReached,
        ..Error::new(format!(
            "the commit point {point} cannot be told: what libc does inside itself is not noted in \
             programs that are held by symbols alone ({})",
            scan.partly_seen_names().join(", ")
        ))
    }
    .next("say what else will do with --else write; `snapshim doctor PID` says why it is so")
}

/// What is asked of the commit point, if there are these writers.
fn asked<'a>(options: &'a Options, limit: Duration, seen: &Scan) -> Result<Asked<'a>> {
    let mut at = options.at;
    // Whoever has a member mapped between two of its points has it no more when one is reached; at
    // the cut it is looked at again.
    let may_pass = at.may_have_been_mapped() && !seen.is_outside_for_good();
    if at != CommitPoint::Write && !seen.outside().is_empty() && !may_pass {
        match options.otherwise {
            Otherwise::At(CommitPoint::Write) => at = CommitPoint::Write,
            _ => return Err(cannot_be_told(at, seen)),
        }
    }
    // Nothing tells of a change that is not noted whether it came before.
    if matches!(at, CommitPoint::Sync | CommitPoint::Rename) && seen.is_partly_seen() {
        match options.otherwise {
            Otherwise::Fail => return Err(is_partly_noted(at, seen)),
            Otherwise::At(point) => at = point,
        }
    }
    Ok(Asked {
        at,
        otherwise: options.otherwise,
        wait: options.wait,
        limit,
        stop: &options.stop,
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
    let is_rebuilt = |f: &&FileRecord| f.kind == Kind::File && rebuilt::is_rebuilt(f.path.as_ref());
    manifest
        .assumptions
        .extend(files.iter().filter(is_rebuilt).map(|file| {
        format!(
            "{} is made anew by SQLite when the database is opened: its bytes are not vouched for",
            file.path.0.display()
        )
    }));
    manifest.reasons.extend(evidence::ctime_reasons(&files));
    manifest.verified = manifest.reasons.is_empty();
    manifest.totals = Some(Totals::of(&files));
    manifest.files = files;
    manifest
}

fn names(paths: &[PathBuf]) -> Vec<PathName> {
    paths.iter().cloned().map(PathName).collect()
}

/// The verdict, without the list of files.
///
/// `capture`: by what means.
fn certify<D: Done>(
    subject: Subject<'_>,
    options: &Options,
    id: &str,
    cut: Cut<D>,
    capture: &str,
) -> (Manifest, D) {
    let Cut {
        captured,
        time,
        point,
        hold,
        drain,
        mut reasons,
        scan,
        report,
        moved,
        guard,
        ..
    } = cut;
    reasons.extend(options.doubt.clone());
    // FICLONE waits for direct I/O in flight on its file.
    let aio_is_done = matches!(capture, "reflink" | "none");
    let assumptions = scan.assumptions();
    let assumptions = assumptions.into_iter().chain(guard.map(|guard| {
        format!(
            "no program but those held by their system call sites opened a member, changed it and closed it \
             again within the {} ms in which files were captured after the cut",
            guard.as_millis().max(1)
        )
    }));
    reasons.extend(scan.reasons(&report, aio_is_done));
    if capture == "subvolume"
        && let Some((pid, name)) = scan.may_hide(|target| report.held(target).is_some())
    {
        reasons.push(reason(
            "hidden-call",
            format!(
                "{name} ({pid}) may have been in the middle of a call that is not held, and \
                 a snapshot of a subvolume does not wait for it, as --capture reflink does"
            ),
            Some(pid),
        ));
    }
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
        set: subject.name.to_owned(),
        time: time.to_string(),
        commit_point: point.to_string(),
        claim: Some(point.claim().to_owned()),
        commit_point_asked: options.at.to_string(),
        verified: reasons.is_empty(),
        reasons,
        assumptions: assumptions.collect(),
        hold_us: hold.as_micros() as u64,
        drain_us: drain.as_micros() as u64,
        stop_us: report.longest.map(|d| d.as_micros() as u64),
        guard_us: guard.map(|d| d.as_micros() as u64),
        guard_asked: guard.and(captured.asked()),
        prediction: None,
        capture: capture.to_owned(),
        marked: None,
        hashed_bytes: None,
        checks: Vec::new(),
        roots: names(&subject.config.roots),
        excludes: Some(names(&subject.config.excludes)),
        mounted: None,
        only: options.only.clone().map(PathName),
        files: Vec::new(),
        writers: scan.writers(&report),
        foreign: scan.foreign(&report),
        totals: None,
        pin: options.pin.as_deref().map(Pin::now),
        unknown: serde_json::Map::new(),
    };
    (manifest, captured)
}
