//! Putting staged things into place and taking them out again, one rename at a time.
//!
//! Works from the journal alone, so that another run can go on where one ended. Which
//! operations are done is seen by looking.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, RenameFlags};
use rustix::io::Errno;

use super::journal::{DirForm, Journal, OpForm, State, TraitsForm};
use super::look::{look, look_at, names_in, open_dir};
use super::make::{is_root, not_set, set_exactly};
use super::place::{Place, full};
use crate::progress::Progress;
use crate::store::manifest::Kind;
use crate::tree::dirs::Dirs;
use crate::{Error, Result};

/// Up to this many directories, each is synced by itself; see `capture::finish`.
pub(super) const FEW: usize = 64;

/// A restore with its journal and its staging directories, all locked.
#[derive(Debug)]
pub(super) struct Swap {
    pub(super) journal: Journal,
    pub(super) places: Vec<Place>,
}

/// Which of the two is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// What was there before, be it nothing.
    Old,
    /// What comes, be it nothing.
    New,
    /// Something else: somebody changed it since.
    Changed,
}

/// What came of undoing.
#[derive(Debug, Default)]
pub(super) struct Undone {
    /// Entries put back.
    pub(super) count: usize,
    /// Operations that were not undone: something else is there now.
    pub(super) changed: Vec<usize>,
}

fn staged(op: usize) -> CString {
    CString::new(op.to_string()).unwrap_or_default()
}

/// Where the old one is, on file systems that cannot exchange.
fn aside(op: usize) -> CString {
    CString::new(format!("{op}.old")).unwrap_or_default()
}

/// The file system cannot do this kind of rename.
fn is_unsupported(cause: Errno) -> bool {
    matches!(cause, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
}

impl Swap {
    fn home(&self) -> &Place {
        // There is at least one: a journal without is refused.
        &self.places[0]
    }

    /// Writes the journal with this state.
    pub(super) fn note(&mut self, state: State) -> Result<()> {
        self.journal.state = state;
        let home = &self.places[0];
        self.journal.write(&home.fd, &home.path)
    }

    /// Remembers in the journal when a restore that kept what it replaced was complete.
    pub(super) fn settle(&mut self) -> Result<()> {
        if self.journal.state == State::Kept {
            let home = self.home();
            let written = Journal::written_ns(&home.fd)
                .map_err(|cause| full("look at the journal in", &home.path, cause))?;
            self.journal.settled_ns = Some(written);
        }
        Ok(())
    }

    fn dir(&self, op: &OpForm) -> Result<OwnedFd> {
        let dir = &self.journal.dirs[op.dir];
        open_same(dir).map_err(|cause| full("open", &dir.path.0, cause))
    }

    /// How one operation stands. Of a directory that is gone, everything has changed.
    pub(super) fn standing(&self, op: &OpForm) -> Standing {
        let Ok(dir) = open_same(&self.journal.dirs[op.dir]) else {
            return Standing::Changed;
        };
        standing_in(&dir, op)
    }

    /// Does what is not done yet. `go_on` is asked before each.
    ///
    /// # Errors
    ///
    /// Somebody changed an entry; the file system refuses; interrupted. Each entry
    /// is the old or the new one then.
    pub(super) fn forward(
        &mut self,
        progress: &mut dyn Progress,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        progress.begin("putting into place", 0);
        self.unlock();
        for (number, op) in self.journal.ops.iter().enumerate() {
            let path = || self.journal.path(op);
            if !go_on() {
                return Err(self.interrupted(number));
            }
            let dir = self.dir(op).map_err(|error| self.stuck(error))?;
            match standing_in(&dir, op) {
                Standing::New => {}
                Standing::Old => self
                    .put(number, op, &dir)
                    .map_err(|cause| self.stuck(full("replace", &path(), cause)))?,
                Standing::Changed if self.is_away(number, op, &dir) => {
                    let place = &self.places[op.place].fd;
                    rename_new(place, &staged(number), &dir, &op.c_name())
                        .map_err(|cause| self.stuck(full("replace", &path(), cause)))?;
                }
                Standing::Changed => {
                    let message = format!("{} was changed by somebody else", path().display());
                    return Err(self.stuck(Error::new(message)));
                }
            }
        }
        let new = |dir: &DirForm| dir.new.clone();
        self.sync()
            .and_then(|()| self.set_dirs(new, |_| true))
            .and_then(|()| self.lock_again())
            .map_err(|error| self.stuck(error))?;
        progress.end();
        Ok(())
    }

    /// Takes back what is done. With `force`, also where something else is there now.
    ///
    /// # Errors
    ///
    /// The file system refuses; interrupted.
    pub(super) fn backward(
        &mut self,
        force: bool,
        progress: &mut dyn Progress,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Undone> {
        progress.begin("putting back", 0);
        let mut undone = Undone::default();
        // All of them first: what is put back changes other names of the same file.
        let written: Vec<bool> = match (self.journal.settled_ns, force) {
            (Some(settled), false) => {
                let each = self.journal.ops.iter();
                each.map(|op| self.is_written(op, settled)).collect()
            }
            _ => Vec::new(),
        };
        self.unlock();
        for (number, op) in self.journal.ops.iter().enumerate().rev() {
            if !go_on() {
                return Err(Error::new(format!(
                    "interrupted: {} entries were put back",
                    undone.count
                ))
                .next("run `snapshim restore --undo` again to put back the rest"));
            }
            let Ok(dir) = open_same(&self.journal.dirs[op.dir]) else {
                undone.changed.push(number);
                continue;
            };
            let path = self.journal.path(op);
            match standing_in(&dir, op) {
                Standing::Old => continue,
                Standing::New if written.get(number) == Some(&true) => {
                    undone.changed.push(number);
                    continue;
                }
                Standing::Changed if self.is_away(number, op, &dir) => {}
                // Somebody changed it before it was its turn: nothing of ours is there.
                Standing::Changed if self.is_still_staged(number, op) => continue,
                Standing::Changed if !force => {
                    undone.changed.push(number);
                    continue;
                }
                Standing::New | Standing::Changed => {}
            }
            self.take_back(number, op, &dir)
                .map_err(|cause| full("put back", &path, cause))?;
            undone.count += 1;
        }
        let old = |dir: &DirForm| (!dir.is_base).then(|| dir.old.clone());
        self.sync()?;
        self.set_dirs(old, |_| true)?;
        self.lock_again()?;
        progress.end();
        Ok(undone)
    }

    /// Whether what came was written to since, or has something in it that was. What is only
    /// gone again is not looked for.
    fn is_written(&self, op: &OpForm, settled: i64) -> bool {
        let Ok(dir) = open_same(&self.journal.dirs[op.dir]) else {
            return false;
        };
        let mut dirs = Dirs::new().without_atime();
        let top = dirs.add_top(Path::new(""), dir);
        let mut pending = vec![(top, op.c_name())];
        while let Some((parent, name)) = pending.pop() {
            let Ok(fd) = dirs.open(parent) else { continue };
            let Ok(Some(look)) = look(&fd, &name) else {
                continue;
            };
            let seen = look.seen;
            if seen.kind() != Kind::Dir {
                // Putting back another name of it has moved its ctime.
                let last = if seen.nlink > 1 {
                    seen.mtime_ns
                } else {
                    seen.ctime_ns
                };
                if last > settled {
                    return true;
                }
                continue;
            }
            let Ok(opened) = dirs.open_dir_at(&fd, &name).map(Arc::new) else {
                continue;
            };
            let node = dirs.add(parent, &name, Some(seen.id), &opened);
            let names = names_in(&opened).unwrap_or_default();
            pending.extend(names.into_iter().map(|name| (node, name)));
        }
        false
    }

    /// Whether neither is there: the old one was put aside, and a run was killed before the
    /// new one, or the old one again, got its name. Only where nothing can be exchanged.
    fn is_away(&self, number: usize, op: &OpForm, dir: &OwnedFd) -> bool {
        let place = &self.places[op.place].fd;
        op.old.is_some()
            && ino(dir, &op.c_name()) == Ok(None)
            && ino(place, &aside(number)) == Ok(op.old)
    }

    /// Whether what comes is in the staging directory still, or what goes is not there yet.
    fn is_still_staged(&self, number: usize, op: &OpForm) -> bool {
        let there = ino(&self.places[op.place].fd, &staged(number));
        there.is_ok_and(|there| there == op.new)
    }

    /// Gives the owner all rights on the directories something is renamed in, or that are
    /// renamed: without them, only root could.
    fn unlock(&self) {
        if is_root() {
            return;
        }
        for dir in &self.journal.dirs {
            let mode = Mode::from_raw_mode(dir.old.mode & 0o7777 | 0o700);
            if mode.as_raw_mode() != dir.old.mode & 0o7777
                && let Ok(fd) = open_same(dir)
            {
                // Where it is not ours to change, the rename says so.
                let _ = rustix::fs::fchmod(fd, mode);
            }
        }
    }

    /// Gives those whose metadata is not part of the restore their modes again.
    fn lock_again(&self) -> Result<()> {
        for dir in self.journal.dirs.iter().filter(|dir| dir.new.is_none()) {
            let mode = dir.old.mode & 0o7777;
            if is_root() || mode & 0o700 == 0o700 {
                continue;
            }
            if let Ok(fd) = open_same(dir) {
                let path = &dir.path.0;
                rustix::fs::fchmod(fd, Mode::from_raw_mode(mode))
                    .map_err(|cause| full("set the mode of", path, cause))?;
            }
        }
        Ok(())
    }

    /// Puts the new one into place; the old one is staged then.
    fn put(&self, number: usize, op: &OpForm, dir: &OwnedFd) -> rustix::io::Result<()> {
        let place = &self.places[op.place].fd;
        let (name, staged) = (&op.c_name(), &staged(number));
        match (op.old, op.new) {
            (Some(old), Some(_)) => {
                let exchange = |from: &OwnedFd, a: &CStr, to: &OwnedFd, b: &CStr| {
                    rustix::fs::renameat_with(from, a, to, b, RenameFlags::EXCHANGE)
                };
                match exchange(place, staged, dir, name) {
                    Ok(()) if ino(place, staged)? == Some(old) => Ok(()),
                    Ok(()) => {
                        // Another one came under that name since we looked: back.
                        exchange(place, staged, dir, name)?;
                        Err(Errno::STALE)
                    }
                    Err(cause) if is_unsupported(cause) => self.put_aside(number, op, dir),
                    Err(cause) => Err(cause),
                }
            }
            (None, _) => rename_new(place, staged, dir, name),
            (Some(old), None) => {
                if ino(place, staged)? == Some(old) {
                    // A second name it was given where nothing else was possible.
                    return rustix::fs::unlinkat(dir, name, AtFlags::empty());
                }
                rename_new(dir, name, place, staged)?;
                if ino(place, staged)? == Some(old) {
                    return Ok(());
                }
                rename_new(place, staged, dir, name)?;
                Err(Errno::STALE)
            }
        }
    }

    /// Without exchange: the old one gets a second name in the staging directory, then the
    /// new one is renamed over the first. A directory has no second name, and
    /// is away for a moment.
    fn put_aside(&self, number: usize, op: &OpForm, dir: &OwnedFd) -> rustix::io::Result<()> {
        let place = &self.places[op.place].fd;
        let (name, staged, aside) = (&op.c_name(), &staged(number), &aside(number));
        match rustix::fs::linkat(dir, name, place, aside, AtFlags::empty()) {
            Ok(()) | Err(Errno::EXIST) => {
                if ino(place, aside)? != op.old {
                    return Err(Errno::STALE);
                }
                rustix::fs::fsync(place)?;
                match rustix::fs::renameat(place, staged, dir, name) {
                    Err(Errno::ISDIR | Errno::NOTDIR) => {}
                    other => return other,
                }
                rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
            }
            Err(Errno::PERM | Errno::ISDIR | Errno::MLINK) => {
                rename_new(dir, name, place, aside)?;
                rustix::fs::fsync(place)?;
            }
            Err(cause) => return Err(cause),
        }
        rename_new(place, staged, dir, name)
    }

    /// Puts the old one back; the new one, or what is there, is staged then.
    fn take_back(&self, number: usize, op: &OpForm, dir: &OwnedFd) -> rustix::io::Result<()> {
        let place = &self.places[op.place].fd;
        let (name, staged, aside) = (&op.c_name(), &staged(number), &aside(number));
        let there = ino(dir, name)?;
        if op.old.is_none() {
            // Nothing was there: whatever is there now goes.
            return match there {
                Some(_) => rename_new(dir, name, place, staged),
                None => Ok(()),
            };
        }
        let kept = match (ino(place, staged)?, ino(place, aside)?) {
            (Some(found), _) if Some(found) == op.old => staged,
            (_, Some(found)) if Some(found) == op.old => aside,
            _ => return Err(Errno::NOENT),
        };
        if there.is_none() {
            return rename_new(place, kept, dir, name);
        }
        match rustix::fs::renameat_with(place, kept, dir, name, RenameFlags::EXCHANGE) {
            Err(cause) if is_unsupported(cause) => {
                match rustix::fs::renameat(place, kept, dir, name) {
                    Err(Errno::ISDIR | Errno::NOTDIR | Errno::NOTEMPTY | Errno::EXIST) => {
                        rename_new(dir, name, place, staged)?;
                        rename_new(place, kept, dir, name)
                    }
                    other => other,
                }
            }
            other => other,
        }
    }

    /// Makes the renames durable.
    fn sync(&self) -> Result<()> {
        if self.journal.dirs.len() <= FEW {
            for dir in &self.journal.dirs {
                // One that was moved away by an operation has nothing of ours in it.
                if let Ok(fd) = open_same(dir) {
                    let path = &dir.path.0;
                    rustix::fs::fsync(fd).map_err(|cause| full("write", path, cause))?;
                }
            }
        }
        for place in &self.places {
            let done = match self.journal.dirs.len() <= FEW {
                true => rustix::fs::fsync(&place.fd),
                false => rustix::fs::syncfs(&place.fd),
            };
            done.map_err(|cause| full("write", &place.path, cause))?;
        }
        Ok(())
    }

    /// Gives directories metadata, those deepest in the tree first, and makes it durable.
    fn set_dirs(
        &self,
        traits: impl Fn(&DirForm) -> Option<TraitsForm>,
        which: impl Fn(&DirForm) -> bool,
    ) -> Result<()> {
        for dir in self.journal.dirs.iter().rev().filter(|dir| which(dir)) {
            let Some(traits) = traits(dir).and_then(|form| form.traits()) else {
                continue;
            };
            let path = &dir.path.0;
            let fd = match open_same(dir) {
                Ok(fd) => fd,
                // It went, or came back, with an operation of its own.
                Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR) => continue,
                Err(cause) => return Err(full("open", path, cause)),
            };
            set_exactly(&fd, &traits).map_err(|failed| not_set(path, failed))?;
            rustix::fs::fsync(&fd).map_err(|cause| full("write", path, cause))?;
        }
        Ok(())
    }

    /// The end: all is in its place. Removes what is staged, and the staging directories;
    /// or keeps what was replaced.
    ///
    /// # Errors
    ///
    /// Something cannot be removed; the next restore goes on with it.
    pub(super) fn finish(mut self, keep: bool) -> Result<()> {
        if keep {
            return self.note(State::Kept);
        }
        let was = self.journal.state;
        if self.note(State::Done).is_err() {
            // The file system may be full, and of what is staged nothing is needed any more.
            self.clear()?;
            self.note(State::Done)?;
        }
        self.discard()?;
        // The staging directory that was in a directory has moved its times.
        let is_parent =
            |dir: &DirForm| self.journal.places.iter().any(|p| p.parent.0 == dir.path.0);
        match was {
            State::Undoing => {
                self.set_dirs(|dir| (!dir.is_base).then(|| dir.old.clone()), is_parent)
            }
            State::Swapping => self.set_dirs(|dir| dir.new.clone(), is_parent),
            // Another run came as far as this: which way, it does not say.
            State::Staging | State::Done | State::Kept => Ok(()),
        }
    }

    /// Removes all that is staged, the journal, and the staging directories, the first one last.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub(super) fn discard(&self) -> Result<()> {
        self.clear()?;
        for place in self.places.iter().rev() {
            Journal::remove(&place.fd).map_err(|cause| full("clear", &place.path, cause))?;
            place.remove()?;
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        self.places.iter().rev().try_for_each(Place::clear)
    }

    /// How many entries are new, old, and changed since.
    pub(super) fn count(&self) -> (usize, usize, usize) {
        let mut counts = (0, 0, 0);
        for op in &self.journal.ops {
            match self.standing(op) {
                Standing::New => counts.0 += 1,
                Standing::Old => counts.1 += 1,
                Standing::Changed => counts.2 += 1,
            }
        }
        counts
    }

    fn interrupted(&self, done: usize) -> Error {
        let all = self.journal.ops.len();
        self.stuck(Error::new(format!(
            "interrupted: {done} of {all} entries are new, the others are still the old ones"
        )))
    }

    fn stuck(&self, error: Error) -> Error {
        let place = self.home().path.display();
        let cause = error
            .next
            .as_deref()
            .map_or(String::new(), |n| format!("{n}; "));
        let next = format!(
            "{cause}run the same restore again to complete it, or put back what was replaced with `snapshim restore --undo --path {}`; until then that is in {place}",
            self.journal
                .dirs
                .first()
                .map_or(Path::new("/"), |dir| &dir.path.0)
                .display()
        );
        error.next(next)
    }
}

fn standing_in(dir: &OwnedFd, op: &OpForm) -> Standing {
    match ino(dir, &op.c_name()) {
        Ok(there) if there == op.new => Standing::New,
        Ok(there) if there == op.old => Standing::Old,
        _ => Standing::Changed,
    }
}

/// The inode under a name; `None` if there is nothing.
fn ino(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<Option<u64>> {
    Ok(look(dir, name)?.map(|look| look.seen.id.ino))
}

/// Opens a live directory, if it is still the same.
fn open_same(dir: &DirForm) -> rustix::io::Result<OwnedFd> {
    let fd = open_dir(&dir.path.0)?;
    match look_at(&fd)?.seen.id.ino == dir.ino {
        true => Ok(fd),
        false => Err(Errno::STALE),
    }
}

/// Renames, never over something.
fn rename_new(
    from: &OwnedFd,
    name: &CStr,
    to: &OwnedFd,
    new_name: &CStr,
) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(from, name, to, new_name, RenameFlags::NOREPLACE) {
        Err(cause) if is_unsupported(cause) => link_and_unlink(from, name, to, new_name),
        other => other,
    }
}

fn link_and_unlink(
    from: &OwnedFd,
    name: &CStr,
    to: &OwnedFd,
    new_name: &CStr,
) -> rustix::io::Result<()> {
    match rustix::fs::linkat(from, name, to, new_name, AtFlags::empty()) {
        Ok(()) => rustix::fs::unlinkat(from, name, AtFlags::empty()),
        // A run was killed between the two: it has both names.
        Err(Errno::EXIST)
            if ino(from, name)?.is_some() && ino(from, name)? == ino(to, new_name)? =>
        {
            rustix::fs::unlinkat(from, name, AtFlags::empty())
        }
        // A directory. The plain form replaces nothing but an empty one.
        Err(Errno::PERM | Errno::ISDIR | Errno::MLINK) => {
            rustix::fs::renameat(from, name, to, new_name)
        }
        Err(cause) => Err(cause),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::progress::Silent;
    use crate::restore::journal::{PlaceForm, form_of};
    use crate::restore::source::Traits;
    use crate::store::manifest::{PathName, VERSION};
    use crate::store::scratch::Scratch;
    use crate::tree::seen::Seen;

    /// `live/name` is the old one, the new one is staged.
    struct Bench {
        scratch: Scratch,
        swap: Swap,
    }

    fn ino_of(path: &Path) -> u64 {
        fs::symlink_metadata(path).unwrap().ino()
    }

    impl Bench {
        fn new(make_old: impl Fn(&Path), make_new: impl Fn(&Path)) -> Bench {
            let scratch = Scratch::new();
            let live = scratch.join("live");
            fs::create_dir(&live).unwrap();
            make_old(&live.join("name"));
            let place = Place::make(scratch.path()).unwrap();
            make_new(&place.path.join("0"));
            let stat = rustix::fs::stat(&live).unwrap();
            let traits = Traits {
                attributes: (&Seen::of(&stat)).into(),
                xattrs: Vec::new(),
            };
            let journal = Journal {
                version: VERSION,
                state: State::Swapping,
                id: String::new(),
                time: String::new(),
                to: None,
                keep: false,
                settled_ns: None,
                places: vec![PlaceForm {
                    parent: PathName(scratch.path().to_owned()),
                }],
                dirs: vec![DirForm {
                    path: PathName(live.clone()),
                    ino: ino_of(&live),
                    is_base: false,
                    old: TraitsForm::from(&traits),
                    new: None,
                }],
                ops: vec![OpForm {
                    dir: 0,
                    name: form_of(c"name"),
                    place: 0,
                    old: Some(ino_of(&live.join("name"))),
                    new: Some(ino_of(&place.path.join("0"))),
                }],
            };
            let places = vec![place];
            Bench {
                swap: Swap { journal, places },
                scratch,
            }
        }

        fn standing(&self) -> Standing {
            self.swap.standing(&self.swap.journal.ops[0])
        }

        fn put_aside(&self) -> rustix::io::Result<()> {
            let op = &self.swap.journal.ops[0];
            self.swap.put_aside(0, op, &self.swap.dir(op).unwrap())
        }
    }

    fn file(content: &'static str) -> impl Fn(&Path) {
        move |path| fs::write(path, content).unwrap()
    }

    fn dir(path: &Path) {
        fs::create_dir(path).unwrap();
        fs::write(path.join("inside"), "inside").unwrap();
    }

    #[test]
    fn without_exchange_there_is_a_way() {
        for (make_old, make_new) in [
            (
                &file("old") as &dyn Fn(&Path),
                &file("new") as &dyn Fn(&Path),
            ),
            (&dir, &file("new")),
            (&file("old"), &dir),
            (&dir, &dir),
        ] {
            let mut bench = Bench::new(make_old, make_new);
            assert_eq!(bench.standing(), Standing::Old);
            bench.put_aside().unwrap();
            assert_eq!(bench.standing(), Standing::New);
            // Taken back from where that put it, by whatever the file system can.
            let mut go_on = || true;
            let undone = bench.swap.backward(false, &mut Silent, &mut go_on).unwrap();
            assert_eq!((undone.count, undone.changed.len()), (1, 0));
            assert_eq!(bench.standing(), Standing::Old);
            bench.swap.discard().unwrap();
            assert!(!bench.scratch.join(".snapshim-restore").exists());
        }
    }

    #[test]
    fn without_exchange_the_old_one_has_its_name_until_the_new_one_has() {
        let bench = Bench::new(file("old"), file("new"));
        let (live, place) = (bench.scratch.join("live/name"), &bench.swap.places[0].path);
        // Killed after the first half.
        fs::hard_link(&live, place.join("0.old")).unwrap();
        assert_eq!(bench.standing(), Standing::Old);
        bench.put_aside().unwrap();
        assert_eq!(fs::read_to_string(&live).unwrap(), "new");
        assert_eq!(fs::read_to_string(place.join("0.old")).unwrap(), "old");
    }

    #[test]
    fn without_exchange_what_is_away_comes_back() {
        for is_undone in [true, false] {
            let mut bench = Bench::new(dir, file("new"));
            let (live, place) = (bench.scratch.join("live/name"), &bench.swap.places[0].path);
            // Killed when the old one was put aside.
            fs::rename(&live, place.join("0.old")).unwrap();
            let mut go_on = || true;
            if is_undone {
                let undone = bench.swap.backward(false, &mut Silent, &mut go_on).unwrap();
                assert_eq!((undone.count, undone.changed.len()), (1, 0));
                assert_eq!(bench.standing(), Standing::Old);
                assert!(live.join("inside").exists());
            } else {
                bench.swap.forward(&mut Silent, &mut go_on).unwrap();
                assert_eq!(bench.standing(), Standing::New);
                assert_eq!(fs::read_to_string(&live).unwrap(), "new");
            }
        }
    }

    #[test]
    fn without_exchange_a_name_too_many_is_no_obstacle() {
        let scratch = Scratch::new();
        let (a, b) = (scratch.join("a"), scratch.join("b"));
        fs::write(&a, "it").unwrap();
        fs::hard_link(&a, &b).unwrap();
        let top = open_dir(scratch.path()).unwrap();
        link_and_unlink(&top, c"a", &top, c"b").unwrap();
        assert_eq!((a.exists(), b.exists()), (false, true));
        // Another file is.
        fs::write(&a, "other").unwrap();
        assert_eq!(link_and_unlink(&top, c"a", &top, c"b"), Err(Errno::EXIST));
    }

    #[test]
    fn what_somebody_changed_is_not_touched() {
        let mut bench = Bench::new(file("old"), file("new"));
        let live = bench.scratch.join("live/name");
        fs::write(bench.scratch.join("live/other"), "other").unwrap();
        fs::rename(bench.scratch.join("live/other"), &live).unwrap();
        assert_eq!(bench.standing(), Standing::Changed);
        let mut go_on = || true;
        assert!(bench.swap.forward(&mut Silent, &mut go_on).is_err());
        // It came between the look and the rename: exchanged back.
        let op = &bench.swap.journal.ops[0];
        let put = bench.swap.put(0, op, &bench.swap.dir(op).unwrap());
        assert_eq!(put, Err(Errno::STALE));
        assert_eq!(fs::read_to_string(&live).unwrap(), "other");
        let undone = bench.swap.backward(false, &mut Silent, &mut go_on).unwrap();
        assert_eq!((undone.count, undone.changed.len()), (0, 0));
        assert_eq!(fs::read_to_string(&live).unwrap(), "other");
    }

    #[test]
    fn what_was_changed_after_it_came_is_put_back_only_by_force() {
        let mut bench = Bench::new(file("old"), file("new"));
        let live = bench.scratch.join("live/name");
        let mut go_on = || true;
        bench.swap.forward(&mut Silent, &mut go_on).unwrap();
        fs::write(bench.scratch.join("live/other"), "other").unwrap();
        fs::rename(bench.scratch.join("live/other"), &live).unwrap();
        let undone = bench.swap.backward(false, &mut Silent, &mut go_on).unwrap();
        assert_eq!((undone.count, undone.changed), (0, vec![0]));
        assert_eq!(fs::read_to_string(&live).unwrap(), "other");
        let undone = bench.swap.backward(true, &mut Silent, &mut go_on).unwrap();
        assert_eq!((undone.count, undone.changed.len()), (1, 0));
        assert_eq!(fs::read_to_string(&live).unwrap(), "old");
    }
}
