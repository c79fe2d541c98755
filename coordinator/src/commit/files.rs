//! What the processes of the set have open under the watched paths, whether it was there
//! when the checkpoint began or not.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use snapshim_gate::abi::Gate;
use snapshim_gate::reap::Claimed;
use snapshim_gate::slot::{Owner, Seen, Slot};

use super::locks;
use crate::hold::locate::Locator;
use crate::hold::process::{self, Pid};

/// The processes that own slots, and the changes of members each has made so far while
/// the gate was armed. `None`: there are some that cannot be seen from here.
pub fn changes(gate: &Gate) -> Option<BTreeMap<Pid, u64>> {
    let slots = gate.used_slots().iter();
    let claimed = |slot: &Slot| Some((Claimed::read(slot)?, slot.changed.load(Acquire)));
    let claimed: Vec<(Claimed, u32)> = slots.filter_map(claimed).collect();
    let locator = Locator::default();
    let mut changes = BTreeMap::new();
    for (claimed, changed) in claimed {
        let Some(owner) = Owner::unpack(claimed.owner) else {
            continue;
        };
        match locator.process(owner) {
            Some(pid) => *changes.entry(pid).or_insert(0) += u64::from(changed),
            None if locator.is_gone(owner, claimed.start_time) => {}
            None => return None,
        }
    }
    Some(changes)
}

/// Whether whoever claimed a slot may live.
pub fn is_owned(slot: &Slot) -> bool {
    Claimed::read(slot).is_some_and(|claimed| {
        Owner::unpack(claimed.owner)
            .is_some_and(|owner| !Locator::default().is_gone(owner, claimed.start_time))
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
}

/// Regular files below `roots` that a process has open. What cannot be looked at is
/// an error: nothing is claimed of it.
pub fn open_below(pid: Pid, roots: &[PathBuf]) -> std::io::Result<Vec<Open>> {
    let mut found = Vec::new();
    let Some(tid) = process::live_thread(pid) else {
        return Ok(found);
    };
    let devices: HashSet<u64> = roots
        .iter()
        .filter_map(|root| root.metadata().ok())
        .map(|meta| meta.dev())
        .collect();
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
        // In another mount namespace the path may be any: the device decides.
        let is_below = roots.iter().any(|root| target.starts_with(root))
            || devices.contains(&meta.dev()) && !Path::new(&target).exists();
        if !is_below || !meta.is_file() || meta.nlink() == 0 {
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
        });
    }
    Ok(found)
}
