//! Stopping with the freezer of cgroup v2.
//!
//! A cgroup is frozen as a whole, so every process in it must be one that is to be
//! held. Nobody is told, and a debugger does not mind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::guardian::{Watch, say};
use super::protocol::{self, Answer};
use super::sigstop::{Schedules, schedules};
use super::{Held, Method, Target};
use crate::hold::process::{self, Pid};

const PAUSE: Duration = Duration::from_micros(50);

#[derive(Debug)]
struct Frozen {
    dir: PathBuf,
    was_frozen: bool,
    processes: Vec<(Target, Schedules)>,
}

/// The cgroups that were frozen.
#[derive(Debug, Default)]
pub(super) struct Freezer {
    frozen: Vec<Frozen>,
}

impl Freezer {
    /// Freezes the cgroups of the targets, where only targets are in them.
    pub(super) fn stop(&mut self, targets: &[Target], watch: &Watch) -> Vec<(Target, Answer)> {
        let mut answers = Vec::new();
        let mut groups: BTreeMap<PathBuf, Vec<Target>> = BTreeMap::new();
        for target in targets {
            match cgroup(target.pid) {
                _ if !target.is_there() => answers.push((*target, Answer::Gone)),
                Some(dir) => groups.entry(dir).or_default().push(*target),
                None => answers.push((*target, Answer::Not(NO_GROUP.into()))),
            }
        }
        for (dir, members) in groups {
            let frozen = self.freeze(&dir, &members, watch);
            answers.extend(members.into_iter().map(|target| {
                let answer = match &frozen {
                    Ok(()) => Answer::Held(Held {
                        method: Method::Freezer,
                        threads: schedules(target.pid).len() as u32,
                    }),
                    Err(cause) => Answer::Not(cause.clone()),
                };
                (target, answer)
            }));
        }
        answers
    }

    /// Freezes one.
    fn freeze(&mut self, dir: &Path, members: &[Target], watch: &Watch) -> Result<(), String> {
        let known: Vec<Pid> = self
            .frozen
            .iter()
            .flat_map(|f| f.processes.iter().map(|(t, _)| t.pid))
            .chain(members.iter().map(|t| t.pid))
            .collect();
        if let Some(other) = processes(dir).into_iter().find(|pid| !known.contains(pid)) {
            return Err(format!(
                "its cgroup {} also holds {} ({other}); give it a cgroup of its own, or allow --outside ptrace",
                dir.display(),
                process::name(other)
            ));
        }
        let was_frozen = is_frozen(dir);
        if !was_frozen {
            for target in members {
                say(&protocol::undo(*target, Method::Freezer)).ok_or("nobody waits for it")?;
            }
            fs::write(dir.join(FREEZE), "1").map_err(|cause| {
                format!(
                    "cannot freeze {}: {cause}; run this as root, or allow --outside ptrace",
                    dir.display()
                )
            })?;
        }
        while !is_frozen(dir) {
            if !watch.goes_on() {
                let _ = fs::write(dir.join(FREEZE), "0");
                return Err(format!(
                    "{} did not freeze in time; try again with a longer --max-hold",
                    dir.display()
                ));
            }
            std::thread::sleep(PAUSE);
        }
        self.frozen.push(Frozen {
            dir: dir.to_owned(),
            was_frozen,
            processes: members.iter().map(|t| (*t, schedules(t.pid))).collect(),
        });
        Ok(())
    }

    /// Whether one of them has run since, and which.
    pub(super) fn fell(&self) -> Option<String> {
        let ran = |(target, before): &&(Target, Schedules)| {
            target.is_there() && schedules(target.pid) != *before
        };
        let all = || self.frozen.iter().flat_map(|f| &f.processes);
        all().find(ran).map(|(target, _)| {
            let pid = target.pid;
            format!("somebody thawed {} ({pid})", process::name(pid))
        })
    }

    /// Thaws those that ran before.
    pub(super) fn release(&mut self) {
        for frozen in std::mem::take(&mut self.frozen) {
            if !frozen.was_frozen {
                let _ = fs::write(frozen.dir.join(FREEZE), "0");
            }
        }
    }
}

const FREEZE: &str = "cgroup.freeze";
const NO_GROUP: &str =
    "it is in no cgroup (v2) that can be frozen; give it one of its own, or allow --outside ptrace";

/// Thaws the cgroup of a process that a guardian left frozen.
pub(super) fn thaw(target: Target) {
    if let Some(dir) = cgroup(target.pid).filter(|_| target.is_there()) {
        let _ = fs::write(dir.join(FREEZE), "0");
    }
}

/// Whether all in it have stopped.
fn is_frozen(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.events"))
        .is_ok_and(|text| text.lines().any(|line| line == "frozen 1"))
}

/// The processes in a cgroup and those below it.
fn processes(dir: &Path) -> Vec<Pid> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<Pid> = text.lines().filter_map(|l| l.parse().ok()).collect();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(processes(&entry.path()));
        }
    }
    found
}

/// The directory of a process's cgroup, if it can be frozen: the root cannot.
pub(in crate::hold) fn cgroup(pid: Pid) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (root, point) = mounts.lines().find_map(mount_point)?;
    let inside = Path::new(path).strip_prefix(root).ok()?;
    let dir = Path::new(point).join(inside);
    dir.join(FREEZE).exists().then_some(dir)
}

/// Whether cgroup v2 is mounted, wherever.
pub(in crate::hold) fn is_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| mount_point(line).is_some())
}

/// Root and mount point, if the line of mountinfo is of cgroup v2.
fn mount_point(line: &str) -> Option<(&str, &str)> {
    let (left, right) = line.split_once(" - ")?;
    let mut fields = left.split(' ').skip(3);
    let found = (fields.next()?, fields.next()?);
    right.starts_with("cgroup2 ").then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts() {
        let line = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(mount_point(line), Some(("/", "/sys/fs/cgroup")));
        let line = "31 23 0:26 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(mount_point(line), Some(("/", "/sys/fs/cgroup/unified")));
        let line = "30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        assert_eq!(mount_point(line), None);
    }
}
