//! Which process is behind the owner of a slot, who names itself as it sees itself.

use std::cell::OnceCell;
use std::collections::{BTreeSet, HashMap};

use snapshim_gate::slot::Owner;

use super::process::{self, Pid, Unreadable};
use super::sight;

/// Finds the processes behind owners.
///
/// Good for one look around, made *after* the owners have been read: processes of other
/// pid namespaces are listed once, and whoever claims a slot after that is not in the list.
#[derive(Debug, Default)]
pub struct Locator {
    own_namespace: OnceCell<Option<u32>>,
    elsewhere: OnceCell<Elsewhere>,
}

/// The processes in other pid namespaces than ours (containers).
#[derive(Debug, Default)]
struct Elsewhere {
    /// By namespace and by the id they have in it.
    known: HashMap<(u32, Pid), Pid>,
    /// Ids, in their own namespaces, of those whose namespace we may not ask for.
    unknown: BTreeSet<Pid>,
    /// Whether no process was out of sight.
    is_complete: bool,
}

impl Elsewhere {
    fn list() -> Elsewhere {
        let Ok(all) = process::all() else {
            return Elsewhere::default();
        };
        let mut found = Elsewhere {
            is_complete: sight::blind_spots().is_empty(),
            ..Elsewhere::default()
        };
        for pid in all {
            let Some(inner) = process::id_elsewhere(pid) else {
                continue;
            };
            match process::pid_namespace(pid) {
                Some(namespace) => _ = found.known.insert((namespace, inner), pid),
                None => _ = found.unknown.insert(inner),
            }
        }
        found
    }
}

impl Locator {
    /// Whether an owner is in our pid namespace.
    pub fn is_own_namespace(&self, owner: Owner) -> bool {
        let own = self
            .own_namespace
            .get_or_init(|| process::pid_namespace(std::process::id()));
        *own == Some(owner.pidns)
    }

    fn elsewhere(&self) -> &Elsewhere {
        self.elsewhere.get_or_init(Elsewhere::list)
    }

    /// The process behind an owner, as this process sees it. Looks into other pid
    /// namespaces through NSpid; `None` if it is gone or out of sight.
    pub fn process(&self, owner: Owner) -> Option<Pid> {
        let found = match self.is_own_namespace(owner) {
            true => Some(owner.pid),
            false => self.find(owner),
        };
        found.filter(|pid| process::is_alive(*pid))
    }

    /// The process of another pid namespace behind an owner, dead or alive.
    fn find(&self, owner: Owner) -> Option<Pid> {
        let known = &self.elsewhere().known;
        known.get(&(owner.pidns, owner.pid)).copied()
    }

    /// The thread behind an owner, in process `pid` as this process sees it; `None` if it
    /// is gone.
    ///
    /// # Errors
    ///
    /// The threads of `pid` cannot be looked at.
    pub fn thread(&self, owner: Owner, pid: Pid) -> Result<Option<Pid>, Unreadable> {
        let inner = |tid| process::inner_id(pid, tid) == Some(owner.tid);
        match self.is_own_namespace(owner) {
            true => process::has_thread(pid, owner.tid).map(|has| has.then_some(owner.tid)),
            false => process::find_thread(pid, inner),
        }
    }

    /// Whether the process is known to have ended. Out of sight is not gone; nor is
    /// a process whose start time cannot be compared.
    ///
    /// From the initial pid namespace every other one can be seen into, so whoever is not
    /// found there is gone. From any other it may be a neighbour's, or the one around ours.
    pub fn is_gone(&self, owner: Owner, start_time: u64) -> bool {
        match self.process(owner) {
            Some(pid) => self.is_another(pid, start_time),
            None if self.is_own_namespace(owner) || self.find(owner).is_some() => true,
            None => {
                let elsewhere = self.elsewhere();
                elsewhere.is_complete && !elsewhere.unknown.contains(&owner.pid)
            }
        }
    }

    /// Whether `pid` is not the process that claimed a slot at its `start_time`.
    pub fn is_another(&self, pid: Pid, start_time: u64) -> bool {
        start_time != 0
            && process::start_time(pid).is_some_and(|start| start != start_time)
            && !process::is_in_other_time(pid)
    }
}
