//! What the processes of the set have open under the watched paths, whether it was there
//! when the checkpoint began or not.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use snapshim_gate::abi::Gate;
use snapshim_gate::calls;
use snapshim_gate::reap::Claimed;
use snapshim_gate::slot::{Owner, Seen, Slot};
use snapshim_gate::table::FileId;

use super::locks;
use crate::capture::Member;
use crate::hold::locate::Locator;
use crate::hold::process::{self, Doing, Pid};

/// A process that owns slots, and what it did.
#[derive(Clone, Debug, Default)]
pub struct Worker {
    /// As this process sees it; `None` if it has ended.
    pub pid: Option<Pid>,
    /// Changes of members while the gate was armed: of each slot, which moves if it is
    /// given to somebody else.
    pub changes: Changes,
    /// Whether some of these were made since the same thread last gave up a lock.
    pub is_unsettled: bool,
    /// Whether it ever asked for a lock.
    pub locks: bool,
    /// Its threads that did.
    pub lockers: Vec<Owner>,
    /// See [`Slot::image`].
    pub image: u64,
}

/// By slot: its generation, and what was counted.
pub type Changes = Vec<(usize, u32, u32)>;

/// Tells a process from another that got its id: owner, and start time.
pub type Key = (u32, u32, u64);

/// The processes that own slots, dead ones that have not been reaped included. `None`: there
/// are some that cannot be seen from here.
pub fn workers(gate: &Gate) -> Option<BTreeMap<Key, Worker>> {
    let slots = gate.used_slots().iter();
    let claimed = |slot: &'static Slot| Some((Claimed::read(slot)?, slot));
    let claimed: Vec<(Claimed, &Slot)> = slots.filter_map(claimed).collect();
    let locator = Locator::default();
    let mut workers = BTreeMap::new();
    for (claimed, slot) in claimed {
        let Some(owner) = Owner::unpack(claimed.owner) else {
            continue;
        };
        let pid = match locator.process(owner) {
            Some(pid) if !locator.is_another(pid, claimed.start_time) => Some(pid),
            _ if locator.is_gone(owner, claimed.start_time) => None,
            _ => return None,
        };
        let key = (owner.pid, owner.pidns, claimed.start_time);
        let worker: &mut Worker = workers.entry(key).or_default();
        worker.pid = pid;
        let changed = slot.changed.load(Acquire);
        if changed != 0 {
            let generation = slot.generation.load(Acquire);
            let at = std::ptr::from_ref(slot) as usize;
            worker.changes.push((at, generation, changed));
        }
        worker.image = slot.image.load(Relaxed);
        if slot.seen[Seen::Lock as usize].load(Relaxed) > 0 {
            worker.locks = true;
            worker.lockers.push(owner);
        }
        worker.is_unsettled |= changed != slot.settled.load(Acquire);
    }
    Some(workers)
}

/// Whether one of these threads of a process waits for a lock now, or may, for all that can be seen.
pub fn waits_for_lock(pid: Pid, lockers: &[Owner]) -> bool {
    let locator = Locator::default();
    lockers.iter().any(|owner| {
        let tid = match locator.thread(*owner, pid) {
            Ok(Some(tid)) => tid,
            Ok(None) => return false,
            Err(_) => return true,
        };
        match process::doing(pid, tid) {
            Doing::Call { number, args } => {
                let number = usize::try_from(number);
                number.is_ok_and(|number| calls::waits_for_lock(number, args[1] as usize))
            }
            Doing::Hidden => true,
            Doing::Running | Doing::Elsewhere | Doing::Gone => false,
        }
    })
}

/// A process in the form of [`snapshim_gate::watch::Watch::holders`].
pub fn packed(pid: Pid) -> Option<u64> {
    let inner = process::inner_id(pid, pid)?;
    let owner = Owner {
        pid: inner,
        tid: inner,
        pidns: process::pid_namespace(pid)?,
    };
    Some(owner.pack())
}

/// How many calls of a kind the processes of the set have made so far.
pub fn seen(gate: &Gate, what: Seen) -> u64 {
    let count = |slot: &Slot| slot.seen[what as usize].load(Relaxed);
    gate.used_slots()
        .iter()
        .map(|slot| u64::from(count(slot)))
        .sum()
}

/// An open file.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    /// Whether it is open for writing.
    pub is_writer: bool,
    /// Whether the process holds a lock on it.
    pub is_locked: bool,
    /// Whether one of those is a write lock.
    pub is_write_locked: bool,
    /// Whether one of these is inherited by forked children.
    pub is_shared_lock: bool,
}

/// What counts as below the watched paths.
#[derive(Debug)]
pub struct Below<'a> {
    roots: &'a [PathBuf],
    /// That these are on.
    devices: HashSet<u64>,
    members: HashSet<FileId>,
}

impl<'a> Below<'a> {
    /// By path, or as one of `members`.
    pub fn new(roots: &'a [PathBuf], members: &[Member]) -> Below<'a> {
        let meta = roots.iter().filter_map(|root| root.metadata().ok());
        Below {
            roots,
            devices: meta.map(|meta| meta.dev()).collect(),
            members: members.iter().map(|member| member.id).collect(),
        }
    }

    fn has(&self, target: &Path, id: FileId) -> bool {
        self.members.contains(&id)
            || self.roots.iter().any(|root| target.starts_with(root))
            // In another mount namespace the path may be any: the device decides.
            || self.devices.contains(&id.dev) && !target.exists()
    }
}

/// The regular files that a process has open there. What cannot be looked at is an error:
/// nothing is claimed of it.
pub fn open_below(pid: Pid, below: &Below<'_>) -> std::io::Result<Vec<Open>> {
    let mut found = Vec::new();
    let Some(tid) = process::live_thread(pid) else {
        return Ok(found);
    };
    for entry in std::fs::read_dir(format!("/proc/{tid}/fd"))? {
        let path = entry?.path();
        let Ok(target) = std::fs::read_link(&path) else {
            continue; // closed meanwhile
        };
        if !target.is_absolute() {
            continue;
        }
        let Ok(meta) = std::fs::metadata(&path) else {
            continue;
        };
        let id = FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        };
        if !meta.is_file() || meta.nlink() == 0 || !below.has(&target, id) {
            continue;
        }
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let info = match std::fs::read_to_string(format!("/proc/{tid}/fdinfo/{name}")) {
            Ok(info) => info,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => continue,
            Err(cause) => return Err(cause),
        };
        found.push(Open {
            is_writer: process::is_writable(&info),
            is_locked: locks::parse(&info).next().is_some(),
            is_write_locked: locks::parse(&info).any(|lock| lock.is_write),
            is_shared_lock: locks::parse(&info).any(|lock| lock.is_write && lock.is_shared),
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    #[test]
    fn who_waits_for_a_lock_is_seen() {
        let dir = crate::store::scratch::Scratch::new();
        let path = dir.join("file");
        std::fs::write(&path, "").unwrap();
        let open = || std::fs::File::open(&path).unwrap();
        let held = Flock::lock(open(), FlockArg::LockExclusive).unwrap();
        let other = open();
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            sender.send(nix::unistd::gettid().as_raw() as u32).unwrap();
            drop(Flock::lock(other, FlockArg::LockExclusive).unwrap());
        });
        let pid = std::process::id();
        let owner = Owner {
            pid,
            tid: receiver.recv().unwrap(),
            pidns: process::pid_namespace(pid).unwrap(),
        };
        let begun = Instant::now();
        while !waits_for_lock(pid, &[owner]) {
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
        drop(held);
        thread.join().unwrap();
        assert!(!waits_for_lock(pid, &[owner]));
    }
}
