//! Who can change the members, and what proves that nobody did.
//!
//! `verified` needs positive evidence for every process that holds a member open
//! for writing: it has the gate mapped (so its hooks look at the gate), no thread
//! of it was seen in a call that no slot counts, and no member moved between the
//! cut and the reopening. What the evidence cannot reach is a [`Reason`].
//!
//! Why a call that the hooks did not see and that was *in flight* at the cut does
//! no harm: every call that begins after the cut moves a ctime after it was read
//! (multigrain timestamps: a ctime that was read is never used again), and a
//! single call on a regular file is atomic against the capture, for both hold the
//! inode's lock (FICLONE takes it; for a copy, lseek(SEEK_DATA) does, on ext4 and
//! tmpfs). So such a call lands wholly before or wholly after, with nothing that
//! follows it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::time::Duration;

use snapshim_gate::abi::Gate;
use snapshim_gate::reap::Claimed;
use snapshim_gate::slot::{Owner, Seen, Slot};
use snapshim_gate::table::FileId;

use super::calls::{Changes, changes};
use super::cut::Hold;
use super::locate::Locator;
use super::outside::{Outside, Report, Target};
use super::process::{self, Doing, Mapping, Mappings, OpenFiles, Pid, Polling, Unreadable, Wanted};
use super::rebuilt;
use super::sight;
use super::sites::layer::{Layer, Looker};
use crate::Result;
use crate::capture::Member;
use crate::error::Context;
use crate::store::manifest::{FileRecord, Foreign, PathName, Reason, Writer};

/// The members, to be found by identity.
#[derive(Debug, Default)]
pub struct Members {
    by_id: HashMap<FileId, PathBuf>,
    /// Of those that matter when they are mapped.
    inodes: HashSet<u64>,
}

impl Wanted for Members {
    fn has(&self, id: FileId) -> bool {
        self.by_id.contains_key(&id)
    }

    fn has_device(&self, dev: u64) -> bool {
        self.by_id.keys().any(|id| id.dev == dev)
    }
}

impl Members {
    /// The members as a walk found them.
    pub fn new(members: Vec<Member>) -> Members {
        let matters = |m: &&Member| !rebuilt::is_rebuilt(&m.path);
        let inodes = members.iter().filter(matters).map(|m| m.id.ino).collect();
        Members {
            by_id: members.into_iter().map(|m| (m.id, m.path)).collect(),
            inodes,
        }
    }

    fn path(&self, id: FileId) -> Option<&Path> {
        self.by_id.get(&id).map(PathBuf::as_path)
    }

    /// The member behind a mapping of a process. The device number in /proc/PID/maps
    /// differs from stat's on btrfs, so it is the inode number first, then the path, then
    /// the identity of the file itself.
    fn mapped(&self, pid: Pid, mapping: &Mapping) -> Option<&Path> {
        if !self.inodes.contains(&mapping.ino) {
            return None;
        }
        let mut same = self.by_id.iter().filter(|(id, _)| id.ino == mapping.ino);
        let of_path = same.clone().find(|(_, path)| **path == mapping.path);
        match (of_path, mapping.identity(pid)) {
            (Some((_, path)), _) => Some(path),
            (None, Some(id)) => self.path(id),
            // Unmapped meanwhile, or not ours to look at. Inode numbers are small, and other file
            // systems have the same ones: the path tells, if it leads to that inode.
            (None, None) => match named(pid, mapping) {
                Some(id) => self.path(id),
                // The same file under another name, or seen from another mount
                // namespace: rather one warning too many.
                None => same.next().map(|(_, path)| path.as_path()),
            },
        }
    }
}

/// The file that the path of a mapping leads to, if it has the mapping's inode number and the
/// process sees the same mounts as we do.
fn named(pid: Pid, mapping: &Mapping) -> Option<FileId> {
    let mounts = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let ours = mounts("self")?;
    let meta = std::fs::symlink_metadata(&mapping.path).ok()?;
    let is_it =
        meta.is_file() && meta.ino() == mapping.ino && mounts(&pid.to_string()) == Some(ours);
    is_it.then(|| FileId {
        dev: meta.dev(),
        ino: meta.ino(),
    })
}

/// A process that matters to the certificate.
#[derive(Debug, Default)]
struct Found {
    name: String,
    /// When it started.
    start: u64,
    /// Its hooks look at the gate.
    is_held: bool,
    /// Members it had open for writing while its hooks looked at the gate.
    open: BTreeSet<PathBuf>,
    /// Members it had open for writing while they did not.
    open_unheld: BTreeSet<PathBuf>,
    /// Members it had mapped, and could or might come to store into.
    mapped: BTreeSet<PathBuf>,
    ring: Option<Polling>,
    aio: bool,
    /// Threads that own a slot.
    threads: u32,
    /// What held it, as far as it was looked at.
    layer: Option<Layer>,
}

impl Found {
    fn target(&self, pid: Pid) -> Target {
        Target {
            pid,
            start: self.start,
        }
    }

    /// Whether it was seen with nothing to write to or by: it ended while it was looked at.
    fn is_nobody(&self) -> bool {
        let has_files = !(self.open.is_empty() && self.open_unheld.is_empty());
        !self.is_held && !has_files && self.mapped.is_empty() && self.ring.is_none() && !self.aio
    }

    /// Whether every call that submits is one that the gate holds.
    fn submits_at_gate(&self) -> bool {
        self.is_held && self.layer.as_ref().is_some_and(|l| l.not_sites.is_none())
    }

    /// Whether it has calls that the gate, though it looks at it, does not hold.
    fn escapes(&self) -> bool {
        self.is_held && self.layer.as_ref().is_some_and(|l| l.escapes)
    }

    fn merge(&mut self, later: Found) {
        self.name = later.name;
        self.start = later.start;
        self.is_held |= later.is_held;
        self.open.extend(later.open);
        self.open_unheld.extend(later.open_unheld);
        self.mapped.extend(later.mapped);
        self.ring = self.ring.max(later.ring);
        self.aio |= later.aio;
        self.threads = self.threads.max(later.threads);
        self.layer = match (self.layer.take(), later.layer) {
            (Some(before), Some(after)) => Some(before.and(after)),
            (one, other) => one.or(other),
        };
    }
}

/// Everybody who can change a member, at one moment.
#[derive(Debug, Default)]
pub struct Scan {
    found: BTreeMap<Pid, Found>,
    /// Processes that cannot be looked at, though this command should be able to, and why.
    unreadable: BTreeMap<Pid, String>,
    /// Why other processes may not be looked at: they belong to another user, or
    /// are more privileged than we are.
    out_of_sight: BTreeSet<String>,
    /// Processes of the set in pid namespaces that we cannot see into.
    out_of_reach: BTreeSet<Neighbour>,
    maps: MapCounts,
    /// The members that anybody had open for writing.
    open: HashSet<FileId>,
}

/// How many shared writable mappings of files the owner of each slot has made.
type MapCounts = Vec<(u64, u32)>;

fn map_counts(gate: &Gate) -> MapCounts {
    let count = |slot: &Slot| slot.seen[Seen::MapShared as usize].load(Relaxed);
    gate.used_slots()
        .iter()
        .map(|slot| (slot.owner.load(Acquire), count(slot)))
        .collect()
}

/// What a look at all processes is for.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The gate and the identity of its file; `None` if there is no set.
    pub gate: Option<(&'a Gate, FileId)>,
    /// How often a process is looked at that may be in the middle of its end or of an exec.
    pub tries: u32,
}

/// Time between these looks.
const PAUSE: Duration = Duration::from_millis(5);

impl View<'_> {
    /// For looks at a time at which nobody is held.
    pub const PATIENT: u32 = 20;
    /// The same, if whoever is in the middle of something can be held from outside.
    pub const BRIEF: u32 = 2;
    /// For looks under a hold.
    pub const ONCE: u32 = 1;

    /// The same view, with so many tries.
    #[must_use]
    pub fn tries(self, tries: u32) -> Self {
        View { tries, ..self }
    }

    /// The gate's identity; one that no file has, if there is no gate.
    fn gate_id(&self) -> FileId {
        self.gate.map_or(FileId { dev: 0, ino: 0 }, |(_, id)| id)
    }
}

/// Looks at all processes.
///
/// # Errors
///
/// They cannot be listed.
pub fn scan(view: View<'_>, members: &Members) -> Result<Scan> {
    let maps = view.gate.map(|(gate, _)| map_counts(gate));
    let attached = view
        .gate
        .map(|(gate, _)| attached(gate))
        .unwrap_or_default();
    let mut scan = Scan {
        maps: maps.unwrap_or_default(),
        out_of_reach: attached.out_of_reach,
        ..Scan::default()
    };
    let looker = Looker::default();
    let me = std::process::id();
    let my_user = nix::unistd::geteuid().as_raw();
    let my_capabilities = process::capabilities(me).unwrap_or(0);
    for pid in process::all().context(|| "list the processes in /proc".into())? {
        if pid == me {
            continue;
        }
        let threads = attached.threads.get(&pid).copied().unwrap_or_default();
        let (files, maps) = match settled(pid, view, members) {
            Ok(found) => found,
            Err(why) => {
                let is_foreign = why.is_forbidden() && threads == 0;
                match (process::owner(pid), process::capabilities(pid)) {
                    _ if !process::is_alive(pid) => {}
                    (Some(user), _) if is_foreign && user != my_user => {
                        scan.out_of_sight
                            .insert(format!("processes of user {user}"));
                    }
                    (_, Some(theirs)) if is_foreign && theirs & !my_capabilities != 0 => {
                        let name = process::name(pid);
                        scan.out_of_sight.insert(format!(
                            "{name} ({pid}), more privileged than this command,"
                        ));
                    }
                    _ => {
                        scan.unreadable.insert(pid, why.to_string());
                    }
                }
                continue;
            }
        };
        let is_member = |id: &FileId| members.path(*id).is_some();
        scan.open
            .extend(files.writable.iter().copied().filter(is_member));
        let open: BTreeSet<PathBuf> = files
            .writable
            .iter()
            .filter_map(|id| members.path(*id).map(Path::to_owned))
            .collect();
        let mapped = may_store(pid, &maps, members);
        if open.is_empty() && mapped.is_empty() && threads == 0 {
            continue;
        }
        let (open, open_unheld) = if maps.gate {
            (open, BTreeSet::new())
        } else {
            (BTreeSet::new(), open)
        };
        let found = Found {
            name: process::name(pid),
            start: process::start_time(pid).unwrap_or(0),
            is_held: maps.gate,
            open,
            open_unheld,
            mapped,
            ring: files.ring,
            aio: maps.aio,
            threads,
            // A look at the code takes too long while programs are held.
            layer: (maps.gate && view.tries > View::ONCE).then(|| looker.look(pid)),
        };
        scan.found.insert(pid, found);
    }
    Ok(scan)
}

/// The members a process can store into by way of a mapping, now or after a call
/// of mprotect.
fn may_store(pid: Pid, maps: &Mappings, members: &Members) -> BTreeSet<PathBuf> {
    let shared: Vec<&Mapping> = maps
        .shared
        .iter()
        .filter(|m| members.mapped(pid, m).is_some())
        .collect();
    if shared.is_empty() || !process::may_write(pid, &shared) {
        return BTreeSet::new();
    }
    shared
        .iter()
        .filter_map(|m| members.mapped(pid, m).map(Path::to_owned))
        .collect()
}

/// The processes that have made a shared writable mapping since a look.
fn mappers_since(before: &Scan, gate: &Gate) -> BTreeSet<Pid> {
    let locator = Locator::default();
    let is_new = |(i, now): &(usize, (u64, u32))| now.1 > 0 && before.maps.get(*i) != Some(now);
    map_counts(gate)
        .into_iter()
        .enumerate()
        .filter(is_new)
        .filter_map(|(_, (owner, _))| locator.process(Owner::unpack(owner)?))
        .collect()
}

/// Looks, at the cut, at the mappings of processes that have made a shared writable
/// one since `before`: what was mapped and stored into then, and is unmapped before
/// the next look, would leave no other trace. New ones wait at the gate. Whoever cannot be
/// looked at now is added to `before` as such.
///
/// Of processes that had a member mapped in `before`, and whose every mapping waits at the gate, what they
/// have mapped now takes the place of it: what they have unmapped they cannot store into.
pub fn mapped_since(before: &mut Scan, view: View<'_>, members: &Members) -> Vec<Mapped> {
    let Some((gate, gate_id)) = view.gate else {
        return Vec::new();
    };
    for (pid, found) in &mut before.found {
        if found.mapped.is_empty() || !found.submits_at_gate() {
            continue;
        }
        // What cannot be read stays as it was.
        if let Ok(maps) = process::mappings(*pid, gate_id)
            && process::start_time(*pid) == Some(found.start)
        {
            found.mapped = may_store(*pid, &maps, members);
        }
    }
    let pids = mappers_since(before, gate);
    let mut found = Vec::new();
    for pid in pids {
        let mapped = match process::mappings(pid, gate_id) {
            Ok(maps) => may_store(pid, &maps, members),
            Err(why) => {
                before.unreadable.insert(pid, why.to_string());
                continue;
            }
        };
        if let Some(path) = mapped.first() {
            found.push(Mapped {
                target: Target {
                    pid,
                    start: process::start_time(pid).unwrap_or(0),
                },
                name: process::name(pid),
                path: path.clone(),
            });
        }
    }
    found
}

/// Whether anybody has made a shared writable mapping since a look, be it that it is gone again.
pub fn has_mapped_since(before: &Scan, gate: &Gate) -> bool {
    let count =
        |(owner, count): &(u64, u32)| *count > 0 && !before.maps.contains(&(*owner, *count));
    map_counts(gate).iter().any(count)
}

/// The processes that had a member mapped in a look, or may have had one since: their
/// stores are changes that nobody has counted.
pub fn mappers(before: &Scan, gate: &Gate) -> BTreeSet<Pid> {
    let mapped = before.found.iter().filter(|(_, f)| !f.mapped.is_empty());
    let mut pids = mappers_since(before, gate);
    pids.extend(mapped.map(|(pid, _)| *pid));
    pids
}

/// A process that has mapped a member since the first look.
#[derive(Debug)]
pub struct Mapped {
    /// The process.
    pub target: Target,
    name: String,
    path: PathBuf,
}

impl Mapped {
    /// What this speaks against, unless the process was held.
    pub fn reason(&self, report: &Report) -> Option<Reason> {
        let held = report.is_settled(self.target);
        (!held).then(|| mapped_reason(self.target, &self.name, &self.path, report))
    }
}

fn mapped_reason(target: Target, name: &str, path: &Path, report: &Report) -> Reason {
    let pid = target.pid;
    reason(
        "mapped-writable",
        format!(
            "{name} ({pid}) has {} mapped shared and can write to it{}: stores into a mapping cannot be held by the gate",
            path.display(),
            report.cause(target)
        ),
        Some(pid),
    )
}

/// The descriptors and mappings of a process, as of a moment at which it is not in
/// the middle of its end or of an exec: then it has files open, but its memory,
/// and with it the gate, is gone, or not there yet.
fn settled(
    pid: Pid,
    view: View<'_>,
    members: &Members,
) -> std::result::Result<(OpenFiles, Mappings), Unreadable> {
    let mut tries = 1;
    loop {
        let files = process::open_files(pid, members)?;
        let maps = process::mappings(pid, view.gate_id())?;
        let is_suspect = !maps.gate && !files.writable.is_empty();
        if !is_suspect || tries >= view.tries || view.gate.is_none() {
            return Ok((files, maps));
        }
        tries += 1;
        std::thread::sleep(PAUSE);
    }
}

/// Who owns the slots of a gate.
#[derive(Debug, Default)]
struct Attached {
    /// Processes, and how many slots each has.
    threads: BTreeMap<Pid, u32>,
    /// Processes that may well be there, but not where we can see them.
    out_of_reach: BTreeSet<Neighbour>,
}

/// A process of another pid namespace: the namespace (see [`Owner`]), and its id in there.
type Neighbour = (u32, Pid);

fn attached(gate: &Gate) -> Attached {
    let claimed: Vec<Claimed> = gate.used_slots().iter().filter_map(Claimed::read).collect();
    let locator = Locator::default();
    let mut attached = Attached::default();
    for claimed in claimed {
        let Some(owner) = Owner::unpack(claimed.owner) else {
            continue;
        };
        match locator.process(owner) {
            Some(pid) if locator.is_another(pid, claimed.start_time) => {}
            Some(pid) => *attached.threads.entry(pid).or_insert(0) += 1,
            None if locator.is_gone(owner, claimed.start_time) => {}
            None => _ = attached.out_of_reach.insert((owner.pidns, owner.pid)),
        }
    }
    attached
}

/// The processes that have a gate in use, as far as they can be seen from here.
pub fn attached_here(gate: &Gate) -> Vec<Pid> {
    attached(gate).threads.into_keys().collect()
}

impl Scan {
    /// The processes to look into at the cut.
    pub fn held(&self) -> Vec<Pid> {
        let held = |(pid, found): (&Pid, &Found)| {
            (found.is_held && !(found.open.is_empty() && found.mapped.is_empty())).then_some(*pid)
        };
        self.found.iter().filter_map(held).collect()
    }

    /// Of those, the ones with executable memory that is of no file: calls made from there are
    /// held by nothing.
    pub fn held_in_part(&self) -> Vec<Pid> {
        let made_code = |pid: &Pid| {
            let layer = self.found.get(pid).and_then(|found| found.layer.as_ref());
            layer.is_none_or(|layer| !layer.notes.is_empty())
        };
        self.held().into_iter().filter(made_code).collect()
    }

    /// Why a cut cannot be guarded: everybody has to be held by his system call sites, for
    /// what else there is changes bytes without asking.
    pub fn not_to_be_guarded(&self) -> Option<String> {
        self.found.iter().find_map(|(pid, found)| {
            let why = if found.is_nobody() {
                return None;
            } else if !found.is_held {
                "is not under the shim".to_owned()
            } else if !found.mapped.is_empty() {
                "has a member mapped".to_owned()
            } else if found.ring.is_some() || found.aio {
                "writes by io_uring or AIO".to_owned()
            } else {
                match &found.layer {
                    Some(Layer {
                        not_sites: Some(why),
                        ..
                    }) => format!("is held by symbols only ({why})"),
                    // Calls made from there ask for nothing.
                    Some(layer) if !layer.notes.is_empty() => {
                        format!("has code that was made at run time ({})", layer.notes[0])
                    }
                    Some(_) => return None,
                    None => "was not looked into".to_owned(),
                }
            };
            Some(format!("{} ({pid}) {why}", found.name))
        })
    }

    /// The members that anybody had open for writing.
    pub fn open(&self) -> &HashSet<FileId> {
        &self.open
    }

    /// Whether anybody may change a member otherwise than by calls that begin and end within this
    /// look and the cut: through a mapping, or by handing it to the kernel; or is not held.
    pub fn may_change_unseen(&self) -> bool {
        self.found
            .values()
            .any(|f| !f.open_unheld.is_empty() || !f.mapped.is_empty() || f.ring.is_some() || f.aio)
    }

    /// The processes that no gate can hold, or not wholly, and that stopping does hold: those
    /// without it, those that map a member, and those with code whose calls pass it by.
    pub fn outside(&self) -> BTreeSet<Target> {
        let needs = |(pid, f): (&Pid, &Found)| {
            let is_out = !f.open_unheld.is_empty() || !f.mapped.is_empty();
            // Stopping a program does not stop a kernel thread that submits for it.
            let submits = f.ring == Some(Polling::No) || f.aio;
            let escapes = f.escapes() && !f.open.is_empty();
            (is_out || escapes || submits && !f.submits_at_gate()).then(|| f.target(*pid))
        };
        self.found.iter().filter_map(needs).collect()
    }

    /// Whether some of [`Scan::outside`] stay so: others only have a member mapped, by calls that all
    /// wait at the gate, and may have unmapped it when it is shut.
    pub fn is_outside_for_good(&self) -> bool {
        let is_passing = |target: &Target| {
            let found = self.found.get(&target.pid);
            found.is_some_and(|f| {
                f.open_unheld.is_empty() && f.submits_at_gate() && f.ring.is_none() && !f.aio
            })
        };
        !self.outside().iter().all(is_passing)
    }

    /// Leaves out what was mapped by the time of this look, after the gate was opened, but not when it
    /// was shut, as `at_cut` has it: of processes whose every mapping waits at the gate.
    pub fn forget_later_mappings(&mut self, at_cut: &Scan, mapped: &[Mapped]) {
        for (pid, found) in &mut self.found {
            let Some(then) = at_cut.found.get(pid) else {
                continue;
            };
            let is_known = then.start == found.start
                && then.submits_at_gate()
                && found.submits_at_gate()
                && !mapped.iter().any(|m| m.target.pid == *pid);
            if is_known {
                found.mapped.retain(|path| then.mapped.contains(path));
            }
        }
    }

    /// The names of [`Scan::outside`], with their ids.
    pub fn outside_names(&self) -> Vec<String> {
        let name = |target: Target| {
            let name = self.found.get(&target.pid).map_or("?", |found| &found.name);
            format!("{name}, {}", target.pid)
        };
        self.outside().into_iter().map(name).collect()
    }

    /// A process with calls that may be in flight at the cut although nothing holds them up: they
    /// are made inside libc, by code that no table knows, or by the kernel. Not those that are
    /// `stopped`, unless the kernel works for them.
    pub fn may_hide(&self, stopped: impl Fn(Target) -> bool) -> Option<(Pid, &str)> {
        let hides = |(pid, f): &(&Pid, &Found)| {
            let sites = |l: &Layer| l.not_sites.is_none() && l.notes.is_empty();
            let is_whole = f.layer.as_ref().is_some_and(sites) || stopped(f.target(**pid));
            f.is_held && !is_whole || f.ring.is_some() || f.aio
        };
        let (pid, found) = self.found.iter().find(hides)?;
        Some((*pid, &found.name))
    }

    /// Processes of the set that may change files by calls that are only noticed, not noted.
    fn partly_seen(&self) -> impl Iterator<Item = (&Pid, &Found)> {
        let is_partly = |(_, f): &(&Pid, &Found)| {
            let by_symbols = f.layer.as_ref().is_some_and(|l| l.not_sites.is_some());
            f.is_held && by_symbols && (f.threads > 0 || !f.open.is_empty())
        };
        self.found.iter().filter(is_partly)
    }

    /// Whether there are any: what libc writes inside itself is not noted.
    pub fn is_partly_seen(&self) -> bool {
        self.partly_seen().next().is_some()
    }

    /// Their names, with their ids.
    pub fn partly_seen_names(&self) -> Vec<String> {
        let name = |(pid, found): (&Pid, &Found)| format!("{}, {pid}", found.name);
        self.partly_seen().map(name).collect()
    }

    /// The processes that have an io_uring, and whether what they submit waits at the gate.
    pub fn rings(&self) -> BTreeMap<Target, bool> {
        let has =
            |(pid, f): (&Pid, &Found)| Some((f.ring.map(|_| f.target(*pid))?, f.submits_at_gate()));
        self.found.iter().filter_map(has).collect()
    }

    /// The same look, with the layers that an earlier one found.
    #[must_use]
    pub fn with_layers_of(mut self, earlier: &Scan) -> Scan {
        for (pid, found) in &mut self.found {
            let known = earlier.found.get(pid).filter(|e| e.start == found.start);
            found.layer = found.layer.take().or(known.and_then(|e| e.layer.clone()));
        }
        self
    }

    /// Looks once more, and patiently, at those that seemed to be without the gate: they
    /// may have been in the middle of an exec. For after the hold.
    pub fn settle(&mut self, view: View<'_>, members: &Members, report: &Report) {
        let looker = Looker::default();
        self.found.retain(|pid, found| {
            let is_open = !found.open_unheld.is_empty() && found.mapped.is_empty();
            if !is_open || report.is_settled(found.target(*pid)) {
                return true;
            }
            match settled(*pid, view, members) {
                Ok((files, _)) if files.writable.is_empty() && !process::is_alive(*pid) => false,
                Ok((_, maps)) if maps.gate => {
                    found.is_held = true;
                    found.open.append(&mut found.open_unheld);
                    true
                }
                _ => true,
            }
        });
        for (pid, found) in self.found.iter_mut().filter(|(_, f)| f.is_held) {
            found.layer = Some(looker.look(*pid));
        }
    }

    /// Adds what another look, at another time, found.
    #[must_use]
    pub fn and(mut self, later: Scan) -> Scan {
        for (pid, theirs) in later.found {
            self.found.entry(pid).or_default().merge(theirs);
        }
        self.unreadable.extend(later.unreadable);
        self.out_of_sight.extend(later.out_of_sight);
        self.out_of_reach.extend(later.out_of_reach);
        self
    }

    /// The processes of the set, and those held from outside.
    pub fn writers(&self, report: &Report) -> Vec<Writer> {
        let writer = |(pid, f): (&Pid, &Found)| {
            let outside = report.held(f.target(*pid));
            let (threads, layer) = match outside {
                Some(held) => (held.threads, held.method.name()),
                None if f.is_held => (f.threads, f.layer.as_ref().map_or("symbols", Layer::name)),
                None => return None,
            };
            Some(Writer {
                pid: *pid,
                name: f.name.clone(),
                threads,
                layer: layer.into(),
                notes: f.layer.as_ref().map(Layer::all_notes).unwrap_or_default(),
            })
        };
        self.found.iter().filter_map(writer).collect()
    }

    /// The processes that are not of the set, one entry for each member they can change.
    ///
    /// At least one file of each process, and of more only so many that the manifest can be read.
    pub fn foreign(&self, report: &Report) -> Vec<Foreign> {
        /// Bytes in the manifest; a reader takes some times as many.
        const MOST: usize = 1 << 20;
        let mut foreign = Vec::new();
        let mut bytes = 0;
        for (pid, found) in &self.found {
            let mapped = if found.is_held {
                None
            } else {
                Some((&found.mapped, "mapped"))
            };
            let each = [Some((&found.open_unheld, "open")), mapped];
            for (paths, how) in each.into_iter().flatten() {
                for (nth, path) in paths.iter().enumerate() {
                    if nth > 0 && bytes > MOST {
                        break;
                    }
                    let one = Foreign {
                        pid: *pid,
                        name: found.name.clone(),
                        path: PathName(path.clone()),
                        how: how.into(),
                        held_by: report
                            .held(found.target(*pid))
                            .map(|held| held.method.name().into()),
                    };
                    bytes += serde_json::to_vec_pretty(&one).map_or(0, |text| text.len());
                    foreign.push(one);
                }
            }
        }
        foreign
    }

    /// What this look speaks against. `aio_is_done`: every file was captured in a way that
    /// waits for direct I/O in flight.
    pub fn reasons(&self, report: &Report, aio_is_done: bool) -> Vec<Reason> {
        let mut reasons = Vec::new();
        for (pid, found) in &self.found {
            let who = format!("{} ({pid})", found.name);
            let target = found.target(*pid);
            let settled = report.is_settled(target);
            let cause = report.cause(target);
            let mut add = |code: &str, text: String| reasons.push(reason(code, text, Some(*pid)));
            if let Some(path) = found.open_unheld.first().filter(|_| !settled) {
                add(
                    "foreign-writer",
                    format!(
                        "{who} has {} open for writing and is not under the shim{cause}: start it with `snapshim run`, or end it before a checkpoint",
                        path.display()
                    ),
                );
            }
            // What the kernel reads into a mapping moves no ctime, so nothing is waived.
            let mapped = found.mapped.first().filter(|_| !report.is_gone(target));
            let ring = match (report.ring(target), mapped) {
                (Some(why), _) => Some(why),
                (None, Some(path)) => Some(format!(
                    "what it reads into its mapping of {} may still be on its way",
                    path.display()
                )),
                (None, None) => None,
            };
            if let Some(why) = ring.filter(|_| found.ring.is_some()) {
                add("io-uring", format!("{who} has an io_uring{cause}: {why}"));
            }
            let is_waived = (settled || found.submits_at_gate()) && aio_is_done && mapped.is_none();
            if found.aio && !is_waived {
                add(
                    "aio",
                    format!(
                        "{who} has a kernel AIO context{cause}: writes it submitted may still be on their way"
                    ),
                );
            }
        }
        let mapped = self.found.iter().filter_map(|(pid, f)| {
            let target = f.target(*pid);
            let path = f.mapped.first().filter(|_| !report.is_settled(target))?;
            Some(mapped_reason(target, &f.name, path, report))
        });
        reasons.extend(mapped);
        for (pid, why) in &self.unreadable {
            reasons.push(reason(
                "unreadable-process",
                format!("{} ({pid}) cannot be looked at ({why}): run the coordinator as root, or make the process dumpable", process::name(*pid)),
                Some(*pid),
            ));
        }
        reasons.extend(self.out_of_reach.iter().map(|(_, id)| {
            reason(
                "unreadable-process",
                format!("process {id} of another pid namespace (a container) uses the gate, and cannot be looked at from here: run the coordinator as root on the host, or in the pid namespace of the program"),
                None,
            )
        }));
        reasons
    }

    /// What speaks against a capture that went on while programs ran.
    pub fn guard_reason(&self) -> Option<Reason> {
        let why = self.not_to_be_guarded()?;
        Some(reason(
            "not-guarded",
            format!(
                "{why}: what it changed while files were captured was not seen to be asked for"
            ),
            None,
        ))
    }

    /// What was taken for granted.
    pub fn assumptions(&self) -> Vec<String> {
        let mut assumptions = sight::blind_spots();
        let unseen = |who: &String| {
            format!(
                "{who} cannot be looked at: what their calls change during the hold is seen, what they have open or mapped is not"
            )
        };
        assumptions.extend(self.out_of_sight.iter().map(unseen));
        assumptions
    }
}

/// Makes a reason.
pub fn reason(code: &str, text: String, pid: Option<Pid>) -> Reason {
    Reason {
        code: code.into(),
        text,
        pid,
    }
}

/// Looks, at the cut, for threads of held processes inside a call on a member
/// that no slot counts. A thread on a CPU cannot be looked at; see the module's
/// documentation for why a call it may be in does no harm.
pub fn hidden_calls(hold: &Hold<'_>, held: &[Pid], outside: &Outside) -> Vec<Reason> {
    let parked = hold.parked();
    let mut reasons = Vec::new();
    // Whoever was stopped from outside is in no call.
    for pid in held.iter().filter(|pid| !outside.holds(**pid)) {
        let threads = match process::threads(*pid) {
            Ok(threads) => threads,
            Err(why) => {
                let name = process::name(*pid);
                let text = format!(
                    "the threads of {name} ({pid}) could not be looked at at the cut: {why}"
                );
                reasons.push(reason("hidden-call", text, Some(*pid)));
                continue;
            }
        };
        for tid in threads {
            if parked.contains(&(*pid, tid)) {
                continue;
            }
            let what = match process::doing(*pid, tid) {
                Doing::Call { number, args } => match changes(number) {
                    Some(Changes::File(arg)) => {
                        match process::file_behind(*pid, tid, i64::from(args[arg] as i32)) {
                            Some((id, mode)) if hold.is_member(id, mode) => {
                                Some("changing a member")
                            }
                            _ => None,
                        }
                    }
                    // In the open or the rename itself it is on its way in; a
                    // thread that sleeps there for long is waiting, not changing.
                    Some(Changes::Name) => Some("changing a name"),
                    Some(Changes::Open | Changes::Submitted) | None => None,
                },
                Doing::Hidden => Some("not to be looked at"),
                Doing::Running | Doing::Elsewhere | Doing::Gone => None,
            };
            if let Some(what) = what {
                reasons.push(reason(
                    "hidden-call",
                    format!(
                        "thread {tid} of {} ({pid}) was {what} at the cut, in a call that the shim did not see",
                        process::name(*pid)
                    ),
                    Some(*pid),
                ));
            }
        }
    }
    reasons
}

/// How many calls threads without a slot have made.
pub fn overflow(gate: &Gate) -> u32 {
    gate.header().overflow.load(SeqCst)
}

/// What speaks against a snapshot if threads without a slot made calls while it was
/// taken: `before` is [`overflow`] as it was when it began.
pub fn overflow_reasons(gate: &Gate, before: u32) -> Vec<Reason> {
    let calls = overflow(gate).wrapping_sub(before);
    if calls == 0 {
        return Vec::new();
    }
    vec![reason(
        "slots-exhausted",
        format!(
            "{calls} calls were made by threads that could get no slot of the gate ({} slots, or a sandbox entered before the first write): they wait, but cannot be waited for",
            gate.slots().len()
        ),
        None,
    )]
}

/// Whether a change made after a ctime was read always moves it, for all of `files`:
/// multigrain timestamps (Linux 6.13, Documentation/filesystems/multigrain-ts.rst), on
/// the file systems that have them, and made with inodes that have room for them.
pub fn ctime_reasons(files: &[FileRecord]) -> Vec<Reason> {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    if !has_multigrain(&release) {
        return vec![reason(
            "no-fine-ctime",
            format!(
                "Linux {release} does not move a file's ctime with every change (6.13 does), so a change by an unseen call cannot be ruled out"
            ),
            None,
        )];
    }
    let mut by_device: BTreeMap<u64, Vec<&FileRecord>> = BTreeMap::new();
    for file in files {
        by_device.entry(file.dev).or_default().push(file);
    }
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut reasons = Vec::new();
    for files in by_device.values() {
        let path = &files[0].path.0;
        let kind = filesystem(path, &mountinfo);
        let is_known = is_fine(kind.as_deref());
        // ext4 with 128-byte inodes keeps whole seconds.
        let has_fractions = files.iter().any(|f| f.ctime_ns % 1_000_000_000 != 0);
        if !is_known || !has_fractions {
            reasons.push(reason(
                "no-fine-ctime",
                format!(
                    "the file system of {} ({}{}) is not known to move a file's ctime with every change",
                    path.display(),
                    kind.as_deref().unwrap_or("unknown"),
                    if has_fractions { "" } else { ", without fractions of a second" }
                ),
                None,
            ));
        }
    }
    reasons
}

/// Whether a file system of this type is known to have multigrain timestamps.
pub fn is_fine(kind: Option<&str>) -> bool {
    matches!(kind, Some("xfs" | "btrfs" | "ext4" | "tmpfs"))
}

/// The name of the file system `path` is on, by the mount it is reached through:
/// drivers share magic numbers (ext2 and ext4), and btrfs gives stat device
/// numbers that no mount has.
pub fn filesystem(path: &Path, mountinfo: &str) -> Option<String> {
    sight::mount_of(path, mountinfo).map(|(kind, _)| kind)
}

/// Whether this release of Linux has multigrain timestamps.
pub fn has_multigrain(release: &str) -> bool {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || {
        parts
            .next()
            .and_then(|p| p.parse::<u32>().ok())
            .unwrap_or(0)
    };
    (number(), number()) >= (6, 13)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_to_be_stopped() {
        let path = || BTreeSet::from([PathBuf::from("/a")]);
        let found = |is_held, escapes, open| Found {
            is_held,
            open,
            layer: Some(Layer {
                escapes,
                ..Layer::default()
            }),
            ..Found::default()
        };
        let mut scan = Scan::default();
        scan.found.insert(1, found(true, false, path()));
        scan.found.insert(2, found(true, true, path()));
        scan.found.insert(3, found(true, true, BTreeSet::new()));
        scan.found.insert(4, found(false, true, path()));
        let out = |scan: &Scan| -> Vec<Pid> { scan.outside().iter().map(|t| t.pid).collect() };
        assert_eq!(out(&scan), [2]);
        // A look under the hold does not look at code, but knows what was seen before.
        let brief = Found {
            layer: None,
            ..found(true, false, path())
        };
        let mut later = Scan::default();
        later.found.insert(2, brief);
        assert!(out(&later).is_empty());
        assert_eq!(out(&later.with_layers_of(&scan)), [2]);
    }

    #[test]
    fn kernels() {
        assert!(has_multigrain("6.13.0-rc1"));
        assert!(has_multigrain("6.18.44-foo"));
        assert!(has_multigrain("7.0"));
        assert!(!has_multigrain("6.12.9"));
        assert!(!has_multigrain("5.10.0-21-amd64"));
        assert!(!has_multigrain("nonsense"));
    }
}
