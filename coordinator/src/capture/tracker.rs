//! What changes below the roots between the walk before the hold and the cut.
//!
//! Looking at every file again takes some 2 µs each, under the hold. So directories are watched
//! instead (inotify(7)) from before they are listed, and at the cut only that is looked at which
//! the kernel has reported. An event is queued before the call returns that made the
//! change, so at the cut, with every call drained, none is missing.
//!
//! inotify tells nothing of stores into mappings, and reports what is written by the name that was
//! opened, which may not be the file's name any more, or be elsewhere. So: if anybody has mapped
//! anything since the first look, everything is looked at, as without reports; so it is if a name is
//! reported that has gone; files with several names, those that somebody has open, and those that have come
//! since are always looked at; and when the capture is over, everything is looked at once
//! more, with nobody waiting: a change from before the cut that was not reported is evidence
//! against it.
//!
//! For the program a watch costs some 0.2 µs for each call that changes something there.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use crate::interrupt;
use crate::tree::dirs::Node;
use crate::urgency::{self, Urgency};

/// What is read at once, bytes: some 500 events.
const BUFFER: usize = 16 << 10;

/// Watches directories until it is dropped.
#[derive(Debug)]
pub(super) struct Tracker {
    /// Until it is dropped.
    watched: Option<Arc<Watched>>,
    /// Raised to end the thread.
    end: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What has been reported.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Names at which something has changed, or which came or went.
    pub(super) names: HashMap<Name, Reported>,
    /// Directories that have changed themselves, by what is in them or their metadata.
    pub(super) dirs: HashSet<Node>,
    /// A directory was removed, or is not watched any more.
    pub(super) is_dir_gone: bool,
    /// Reports were lost, or are about something that cannot be found by them: anything may have
    /// changed.
    pub(super) is_lost: bool,
}

/// An entry by its directory and name.
pub(super) type Name = (Node, Box<CStr>);

/// What was reported of a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reported {
    /// Something was made or put there.
    pub(super) has_come: bool,
    /// A file that was opened by this name was changed.
    pub(super) has_changed: bool,
}

#[derive(Debug)]
struct Watched {
    inotify: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    nodes: HashMap<i32, Node>,
    changes: Changes,
    /// Names that have gone since they were watched. Whoever has such a file open is reported by
    /// it still, whatever name the file has now.
    gone: HashSet<Name>,
}

/// Most names in [`State::gone`].
const MOST_GONE: usize = 100_000;

impl Tracker {
    /// Begins, with nothing to watch; `None` if the system has no more of these.
    pub(super) fn new() -> Option<Tracker> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?;
        let end = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).ok()?);
        let watched = Arc::new(Watched {
            inotify,
            state: Mutex::default(),
        });
        let (theirs, their_end) = (Arc::clone(&watched), Arc::clone(&end));
        // A commit point may take its time.
        let thread = std::thread::Builder::new()
            .name("tracker".into())
            .spawn(move || collect(&theirs, &their_end))
            .ok()?;
        Some(Tracker {
            watched: Some(watched),
            end,
            thread: Some(thread),
        })
    }

    /// Watches a directory. To be called before it is listed, and before it is looked at.
    pub(super) fn watch(&self, node: Node, dir: &OwnedFd) {
        let what = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        // The only way by descriptor.
        let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
        let Some(watched) = &self.watched else { return };
        let mut state = watched.lock();
        match inotify::add_watch(&watched.inotify, path, what) {
            // The same directory once more, below a bind mount: which is meant cannot be told.
            Ok(watch) if state.nodes.insert(watch, node).is_none() => {}
            // No more of them (fs.inotify.max_user_watches), no /proc.
            Ok(_) | Err(_) => state.changes.is_lost = true,
        }
    }

    /// What was reported since it was asked last. Whatever call has returned by now is in it.
    pub(super) fn take(&self) -> Changes {
        let Some(watched) = &self.watched else {
            return Changes::default();
        };
        let mut state = watched.lock();
        while watched.read(&mut state) {}
        let is_lost = state.changes.is_lost;
        let changes = std::mem::take(&mut state.changes);
        // For good.
        state.changes.is_lost = is_lost;
        changes
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.end, &1u64.to_ne_bytes());
        let (thread, watched) = (self.thread.take(), self.watched.take());
        let end = move || {
            interrupt::leave_to_others();
            if let Some(thread) = thread {
                let _ = thread.join();
            }
            drop(watched);
        };
        // The kernel takes some 16 ms to forget what it watched (it waits for everybody who may look
        // at it, fsnotify_destroy_group): nobody else has to. Without a thread, we do.
        let _ = std::thread::Builder::new().spawn(end);
    }
}

impl Changes {
    /// What is said here as well as what was said before.
    pub(super) fn extend(&mut self, more: Changes) {
        self.names.extend(more.names);
        self.dirs.extend(more.dirs);
        self.is_dir_gone |= more.is_dir_gone;
        self.is_lost |= more.is_lost;
    }
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, State> {
        // What it guards is whole between any two of its steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads some of what there is; whether there may be more.
    fn read(&self, state: &mut State) -> bool {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        // At least one; the others of one read come without a further one.
        loop {
            match reader.next() {
                Ok(event) => state.note(event.wd(), event.events(), event.file_name()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) => {
                    state.changes.is_lost = true;
                    return false;
                }
            }
            if reader.is_buffer_empty() {
                return true;
            }
        }
    }
}

impl State {
    fn note(&mut self, watch: i32, what: ReadFlags, name: Option<&CStr>) {
        const COMES: ReadFlags = ReadFlags::CREATE.union(ReadFlags::MOVED_TO);
        const GOES: ReadFlags = ReadFlags::DELETE.union(ReadFlags::MOVED_FROM);
        let gone = ReadFlags::IGNORED | ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF;
        if what.intersects(ReadFlags::QUEUE_OVERFLOW | ReadFlags::UNMOUNT) {
            self.changes.is_lost = true;
            return;
        }
        // The next one may get the same inode number, and is not watched.
        self.changes.is_dir_gone |= what.intersects(gone);
        let Some(node) = self.nodes.get(&watch) else {
            return;
        };
        let (comes, goes) = (what.intersects(COMES), what.intersects(GOES));
        if comes || goes || name.is_none() {
            self.changes.dirs.insert(*node);
        }
        let Some(name) = name else { return };
        let key: Name = (*node, name.into());
        if comes {
            self.gone.remove(&key);
        } else if goes {
            if self.gone.len() >= MOST_GONE {
                self.changes.is_lost = true;
            } else {
                self.gone.insert(key.clone());
            }
        } else if self.gone.contains(&key) {
            self.changes.is_lost = true;
        }
        let reported = self.changes.names.entry(key).or_default();
        reported.has_come |= comes;
        reported.has_changed |= !comes && !goes;
    }
}

/// Reads what is reported, until `end` is raised. From time to time: to be woken by each report would
/// take turns with the program that makes them.
fn collect(watched: &Watched, end: &OwnedFd) {
    interrupt::leave_to_others();
    // Whoever asks under the hold waits for it.
    urgency::of_this_thread(Urgency::Awaited);
    // What was reported since the last time may be read under the hold. The kernel keeps 16,384 by
    // default; more would mean that everything is looked at.
    const PAUSE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 1_000_000,
    };
    loop {
        let mut fds = [PollFd::new(end, PollFlags::IN)];
        match poll(&mut fds, Some(&PAUSE)) {
            Ok(0) | Err(Errno::INTR) => {
                let mut state = watched.lock();
                while watched.read(&mut state) {}
            }
            Ok(_) => return,
            Err(_) => {
                watched.lock().changes.is_lost = true;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use super::*;
    use crate::store::scratch::Scratch;

    fn is_nothing(changes: &Changes) -> bool {
        changes.names.is_empty() && changes.dirs.is_empty() && !changes.is_lost
    }

    fn names(changes: &Changes) -> HashSet<Name> {
        changes.names.keys().cloned().collect()
    }

    #[test]
    fn what_is_written_by_a_name_that_has_gone_is_lost() {
        let scratch = Scratch::new();
        let dir = OwnedFd::from(File::open(scratch.path()).unwrap());
        let mut file = File::create(scratch.join("a")).unwrap();
        let tracker = Tracker::new().unwrap();
        tracker.watch(0, &dir);
        fs::hard_link(scratch.join("a"), scratch.join("b")).unwrap();
        fs::remove_file(scratch.join("a")).unwrap();
        let changes = tracker.take();
        assert!(changes.names[&(0, c"b".into())].has_come && !changes.is_lost);
        file.write_all(b"x").unwrap();
        assert!(tracker.take().is_lost);
    }

    #[test]
    fn a_directory_that_is_made_again_is_another() {
        let scratch = Scratch::new();
        let path = scratch.join("d");
        fs::create_dir(&path).unwrap();
        let dir = OwnedFd::from(File::open(&path).unwrap());
        let tracker = Tracker::new().unwrap();
        tracker.watch(0, &dir);
        drop(dir);
        fs::remove_dir(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(tracker.take().is_dir_gone);
    }

    #[test]
    fn what_changes_is_told() {
        let scratch = Scratch::new();
        let dir = OwnedFd::from(File::open(scratch.path()).unwrap());
        fs::write(scratch.join("old"), "1").unwrap();
        fs::write(scratch.join("same"), "1").unwrap();
        let tracker = Tracker::new().unwrap();
        tracker.watch(7, &dir);
        assert!(is_nothing(&tracker.take()));
        let name = |name: &CStr| (7, Box::from(name));

        let mut old = File::options()
            .append(true)
            .open(scratch.join("old"))
            .unwrap();
        for _ in 0..1000 {
            old.write_all(b"2").unwrap();
        }
        let changes = tracker.take();
        assert_eq!(names(&changes), HashSet::from([name(c"old")]));
        assert!(changes.dirs.is_empty() && !changes.is_lost);

        fs::write(scratch.join("new"), "").unwrap();
        fs::rename(scratch.join("new"), scratch.join("old")).unwrap();
        let changes = tracker.take();
        assert_eq!(names(&changes), HashSet::from([name(c"old"), name(c"new")]));
        assert_eq!(changes.dirs, HashSet::from([7]));
        assert!(is_nothing(&tracker.take()));

        // The same by another number: that cannot be told apart.
        tracker.watch(8, &dir);
        assert!(tracker.take().is_lost && tracker.take().is_lost);
    }

    #[test]
    fn more_than_the_kernel_keeps() {
        let scratch = Scratch::new();
        let dir = OwnedFd::from(File::open(scratch.path()).unwrap());
        let tracker = Tracker::new().unwrap();
        tracker.watch(0, &dir);
        let files = ["a", "b"].map(|name| File::create(scratch.join(name)).unwrap());
        let hold = tracker.watched.as_ref().unwrap().lock();
        // Two names in turn are not merged by the kernel; it keeps 16,384.
        for _ in 0..20_000 {
            for mut file in &files {
                file.write_all(b"x").unwrap();
            }
        }
        drop(hold);
        assert!(tracker.take().is_lost);
        // But no more than that are needed while they are read.
        let tracker = Tracker::new().unwrap();
        tracker.watch(0, &dir);
        for _ in 0..200 {
            for mut file in std::iter::repeat_n(&files, 100).flatten() {
                file.write_all(b"x").unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let changes = tracker.take();
        assert_eq!((changes.names.len(), changes.is_lost), (2, false));
    }
}
