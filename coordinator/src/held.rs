//! A command of the user's that is run while programs are held: it takes the snapshot by
//! means that we do not know (LVM, ZFS, a cloud's disks).

use std::collections::{BTreeMap, HashSet};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use snapshim_gate::abi::Gate;
use snapshim_gate::guard;
use snapshim_gate::table::FileId;

use crate::capture::{self, Member, Moved, Scope};
use crate::checkpoint::{AfterCut, Done, Work};
use crate::child;
use crate::error::Context;
use crate::store::manifest::{FileRecord, Kind};
use crate::{Error, Result};

/// How long is waited for what SIGKILL does not end at once.
const LAST: Duration = Duration::from_secs(2);
/// Between looks whether it has ended.
const TICK: Duration = Duration::from_micros(200);

/// A command, ready to be run.
pub(crate) struct Held {
    scope: Scope,
    files: Vec<FileRecord>,
    command: Command,
}

/// What came of it.
pub(crate) struct Ran {
    /// The files when it began.
    files: Vec<FileRecord>,
    after: Vec<FileRecord>,
    status: ExitStatus,
}

impl Held {
    /// Looks at the files it is about.
    pub(crate) fn prepare(scope: Scope, mut command: Command) -> Result<Held> {
        let files = capture::look(&scope)?.records().to_vec();
        child::set_apart(&mut command);
        Ok(Held {
            scope,
            files,
            command,
        })
    }
}

fn members(files: &[FileRecord]) -> Vec<Member> {
    let files = files.iter().filter(|file| file.kind == Kind::File);
    let member = |file: &FileRecord| Member {
        path: file.path.0.clone(),
        id: FileId {
            dev: file.dev,
            ino: file.ino,
        },
    };
    files.map(member).collect()
}

/// Ends a command and what it started, when the hold is over before it is.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // Not reaped yet, so its id is its own.
            let _ = killpg(Pid::from_raw(self.0.id() as i32), Signal::SIGKILL);
            // Asleep in the kernel, where no signal reaches it, it ends when it wakes up.
            let sent = std::time::Instant::now();
            while sent.elapsed() < LAST && matches!(self.0.try_wait(), Ok(None)) {
                std::thread::sleep(TICK);
            }
        }
    }
}

/// A command is never run after the cut.
pub(crate) enum Never {}

impl AfterCut for Never {
    type Done = Ran;

    fn cut(&mut self, _: bool, _: &mut dyn FnMut() -> bool) -> Result<()> {
        match *self {}
    }

    fn does_not_fit(&self) -> Option<&'static str> {
        match *self {}
    }

    fn trust_nothing(&mut self) -> Result<()> {
        match *self {}
    }

    fn guarded(&self) -> (u32, Vec<guard::Member>) {
        match *self {}
    }

    fn sweep(
        self,
        _: &Gate,
        _: Vec<u32>,
        _: &mut dyn FnMut() -> bool,
        _: impl FnOnce() -> Result<()>,
    ) -> Result<Ran> {
        match self {}
    }
}

impl Work for Held {
    type Done = Ran;
    type Rehearsed = Never;

    fn is_to_be_guarded(&self) -> bool {
        false
    }

    fn lacks_room(&self, _: bool) -> Option<String> {
        None
    }

    fn rehearse(self, _: bool, _: HashSet<FileId>) -> Result<Never> {
        Err(Error::new("a command is run under the hold"))
    }

    fn devices(&self) -> Vec<u64> {
        let mut devices: Vec<u64> = self.files.iter().map(|file| file.dev).collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    fn members(&self) -> Vec<Member> {
        members(&self.files)
    }

    fn run(mut self, goes_on: &mut dyn FnMut() -> bool) -> Result<Ran> {
        // Its own look: the first was before the hold.
        let files = capture::look(&self.scope)?.records().to_vec();
        let program = self.command.get_program().to_string_lossy().into_owned();
        let child = self
            .command
            .spawn()
            .context(|| format!("start {program}"))?;
        let mut group = Group(child);
        let status = loop {
            if let Some(status) = group
                .0
                .try_wait()
                .context(|| format!("wait for {program}"))?
            {
                break status;
            }
            if !goes_on() {
                return Err(Error::aborted(format!(
                    "the command {program} did not end within the hold bound, and was ended"
                ))
                .next("the program goes on; allow more time with --max-hold"));
            }
            std::thread::sleep(TICK);
        };
        let after = capture::look(&self.scope)?.records().to_vec();
        Ok(Ran {
            files,
            after,
            status,
        })
    }
}

impl Ran {
    /// The files as they were, and how the command ended.
    pub(crate) fn into_parts(self) -> (Vec<FileRecord>, ExitStatus) {
        (self.files, self.status)
    }
}

impl Done for Ran {
    fn moved_unasked(&self) -> Vec<Moved> {
        Vec::new()
    }

    fn asked(&self) -> Option<u64> {
        None
    }

    fn members(&self) -> Vec<Member> {
        members(&self.after)
    }

    fn moved(&self) -> Vec<Moved> {
        let moved = |file: &FileRecord, what: &str| Moved {
            path: file.path.0.clone(),
            what: what.to_owned(),
        };
        let before: BTreeMap<_, _> = self.files.iter().map(|f| (&f.path, f)).collect();
        let after: BTreeMap<_, _> = self.after.iter().map(|f| (&f.path, f)).collect();
        let changed = before.iter().filter_map(|(path, file)| {
            let what = match after.get(path) {
                None => "was removed or renamed",
                Some(now) if (now.dev, now.ino) != (file.dev, file.ino) => {
                    "was replaced by another"
                }
                Some(now) if now.ctime_ns != file.ctime_ns => "changed (ctime moved)",
                Some(_) => return None,
            };
            Some(moved(file, what))
        });
        let new = after.iter().filter(|(path, _)| !before.contains_key(*path));
        changed
            .chain(new.map(|(_, file)| moved(file, "appeared")))
            .collect()
    }
}
