//! What is to be done: each entry of the snapshot compared with what is there now.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags};
use rustix::io::Errno;
use snapshim_gate::table::FileId;

use super::compare::{Comparer, Same};
use super::look::{Look, look, look_at, names_in, open_dir};
use super::source::{Source, Traits};
use super::wanted::{Parent, Role, Wanted};
use super::{Action, Entry, Excluded, Target};
use crate::capture::Member;
use crate::progress::Progress;
use crate::store::fault;
use crate::store::manifest::{FileRecord, Kind};
use crate::tree::STAGING;
use crate::tree::dirs::{Dirs, Node, as_path};
use crate::{Error, Result};

/// All that is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    /// The live directories.
    pub(super) live: Dirs,
    pub(super) ops: Vec<Op>,
    /// Live directories whose metadata is to be set, or is changed by an operation in them.
    pub(super) touched: BTreeMap<Node, Touched>,
    /// The directories staging directories are to be made in.
    pub(super) places: Vec<PathBuf>,
    /// One for each entry, for the report.
    pub(super) entries: Vec<Entry>,
    /// The regular files that are there now.
    pub(super) members: Vec<Member>,
    /// Records of the files to be made, each once, and their bytes.
    pub(super) files: Vec<usize>,
    pub(super) bytes: u64,
    /// What is worth saying.
    pub(super) notes: Vec<String>,
}

/// One swap: of a name in a live directory.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) dir: Node,
    pub(super) name: CString,
    /// What comes there; `None` if nothing.
    pub(super) item: Option<usize>,
    /// What is there; `None` if nothing.
    pub(super) old: Option<FileId>,
    /// Its metadata, if it is a directory.
    pub(super) old_dir: Option<Traits>,
    /// The staging directory, by number.
    pub(super) place: usize,
}

/// A live directory.
#[derive(Debug)]
pub(super) struct Touched {
    pub(super) id: FileId,
    pub(super) old: Traits,
    /// What it gets; `None`: its metadata is not part of this.
    pub(super) new: Option<Traits>,
    /// Whether it is only what the things restored are in.
    pub(super) is_base: bool,
    /// Whether its metadata is not what it is to be.
    pub(super) differs: bool,
    /// The staging directory for what is in it.
    pub(super) place: usize,
}

/// A live directory to go through.
struct Task {
    node: Node,
    /// Whose children are wanted in it; `None`: nothing is.
    of: Option<Parent>,
    look: Look,
    place: usize,
    /// What else is in it goes.
    exact: bool,
}

/// A live entry that is no directory, and its record.
struct Compared {
    item: usize,
    dir: Node,
    name: CString,
    look: Look,
    place: usize,
    same: Same,
}

/// What a plan is made from.
pub(super) struct Maker<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) wanted: &'a Wanted,
    pub(super) target: &'a Target,
    pub(super) excluded: &'a Excluded,
    /// Whether there may be something in the directory the files go to.
    pub(super) may_overwrite: bool,
    /// The directory of [`Target::To`] was made for this, or is empty.
    pub(super) is_fresh: bool,
    pub(super) progress: &'a mut dyn Progress,
    pub(super) go_on: &'a mut dyn FnMut() -> bool,
}

struct Making<'a, 'b> {
    from: &'b mut Maker<'a>,
    plan: Plan,
    comparer: Comparer,
    tasks: Vec<Task>,
    compared: Vec<Compared>,
    can_make_devices: bool,
}

impl Maker<'_> {
    /// Compares everything. Changes nothing.
    ///
    /// # Errors
    ///
    /// Something stands in the way; the snapshot is damaged or the live tree cannot be read.
    pub(super) fn make(&mut self) -> Result<Plan> {
        let can_make_devices = self.source.snapshot.is_own && rustix::process::geteuid().is_root();
        let mut making = Making {
            plan: Plan {
                live: Dirs::new().without_atime(),
                ops: Vec::new(),
                touched: BTreeMap::new(),
                places: Vec::new(),
                entries: Vec::new(),
                members: Vec::new(),
                files: Vec::new(),
                bytes: 0,
                notes: Vec::new(),
            },
            comparer: Comparer::new(),
            tasks: Vec::new(),
            compared: Vec::new(),
            can_make_devices,
            from: self,
        };
        making.from.progress.begin("comparing", 0);
        making.bases()?;
        while let Some(task) = making.tasks.pop() {
            making.directory(&task)?;
        }
        making.decide()?;
        making.from.progress.end();
        let mut plan = making.plan;
        for name in &self.wanted.further_names {
            plan.notes.push(format!(
                "{} is another name of a file that was asked for, and is restored with it",
                name.display()
            ));
        }
        plan.entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(plan)
    }
}

impl Making<'_, '_> {
    fn bases(&mut self) -> Result<()> {
        for (number, base) in self.from.wanted.bases.iter().enumerate() {
            let fd = open_dir(&base.path).map_err(|cause| not_opened(&base.path, cause))?;
            let look = look_at(&fd).map_err(|cause| unreadable(&base.path, cause))?;
            let node = self.plan.live.add_top(&base.path, fd);
            let fd = self.open(node)?;
            self.plan.places.push(base.path.clone());
            let place = self.plan.places.len() - 1;
            let record = base.record.filter(|_| self.from.is_fresh);
            let new = match record.and_then(|r| self.from.source.snapshot.manifest.files.get(r)) {
                Some(record) => Some(self.traits(record)?),
                None => None,
            };
            let old = self.traits_of(node, &fd, &look)?;
            let touched = Touched {
                id: look.seen.id,
                is_base: new.is_none(),
                differs: new.is_some(),
                place,
                old,
                new,
            };
            self.plan.touched.insert(node, touched);
            self.tasks.push(Task {
                node,
                of: Some(Parent::Base(number)),
                look,
                place,
                exact: false,
            });
        }
        Ok(())
    }

    fn open(&self, node: Node) -> Result<Arc<OwnedFd>> {
        let opened = self.plan.live.open(node);
        opened.map_err(|cause| unreadable(&self.plan.live.path(node), cause))
    }

    fn traits(&self, record: &FileRecord) -> Result<Traits> {
        let opened = self.from.source.open(record)?;
        self.from.source.traits(record, opened.as_ref())
    }

    fn traits_of(&mut self, node: Node, fd: &OwnedFd, look: &Look) -> Result<Traits> {
        let traits = self.comparer.traits_of(fd, &look.seen);
        traits.map_err(|cause| unreadable(&self.plan.live.path(node), cause))
    }

    fn directory(&mut self, task: &Task) -> Result<()> {
        if !(self.from.go_on)() {
            return Err(Error::new("interrupted; nothing was changed"));
        }
        let fd = self.open(task.node)?;
        let path = self.plan.live.path(task.node);
        let wanted = self.from.wanted;
        let children: &[usize] = match task.of {
            Some(Parent::Base(base)) => &wanted.bases[base].children,
            Some(Parent::Item(item)) => &wanted.items[item].children,
            None => &[],
        };
        for child in children {
            self.child(task, &fd, &path, *child)?;
        }
        if !task.exact {
            return Ok(());
        }
        let names: HashSet<&CStr> = children
            .iter()
            .map(|child| &*wanted.items[*child].name)
            .collect();
        let there = names_in(&fd).map_err(|cause| unreadable(&path, cause))?;
        for name in there.iter().filter(|name| !names.contains(name.as_c_str())) {
            self.extra(task, &fd, &path, name)?;
        }
        Ok(())
    }

    /// One name that is wanted.
    fn child(&mut self, task: &Task, fd: &OwnedFd, dir: &Path, item: usize) -> Result<()> {
        let wanted = &self.from.wanted.items[item];
        let (name, role) = (&wanted.name, wanted.role);
        let path = dir.join(as_path(name));
        if name.to_bytes() == STAGING || self.from.excluded.has(&path) {
            self.plan
                .notes
                .push(format!("{} is left out: it is excluded", path.display()));
            return Ok(());
        }
        let there = look(fd, name).map_err(|cause| unreadable(&path, cause))?;
        if there.is_some_and(|look| self.from.excluded.is(look.seen.id)) {
            return Ok(());
        }
        let record = self.from.wanted.record(self.from.source.snapshot, item);
        let kind = record.map_or(Kind::Dir, |record| record.kind);
        match (role, there) {
            (Role::Absent, None) => Ok(()),
            (Role::Absent, Some(_)) => self.extra(task, fd, dir, name),
            (_, None) => {
                self.add(task, item, None)?;
                Ok(())
            }
            (Role::OnTheWay(_), Some(look)) if look.seen.kind() != Kind::Dir => Err(Error::new(
                format!("{} is in the way: it is not a directory", path.display()),
            )
            .next("move it away, or restore the directory that should be there")),
            (_, Some(look)) if kind == Kind::Dir && look.seen.kind() == Kind::Dir => {
                self.enter(task, fd, item, &path, look)
            }
            (_, Some(look)) => {
                if look.seen.kind() == Kind::File {
                    self.member(&path, &look);
                }
                if look.seen.kind() == kind
                    && let Some(record) = record
                {
                    return self.both(task, fd, item, record, look);
                }
                if self.is_unmakeable(kind) {
                    self.entry(&path, kind, 0, Action::NotMade);
                    return Ok(());
                }
                self.in_the_way(task, fd, &path, &look)?;
                let old_dir = self.traits_if_dir(fd, name, &path, &look)?;
                self.add(task, item, Some((look.seen.id, old_dir)))
            }
        }
    }

    /// The metadata of `name`, if it is a directory.
    fn traits_if_dir(
        &mut self,
        fd: &OwnedFd,
        name: &CStr,
        path: &Path,
        look: &Look,
    ) -> Result<Option<Traits>> {
        if look.seen.kind() != Kind::Dir {
            return Ok(None);
        }
        let opened = self.plan.live.open_dir_at(fd, name);
        let traits = opened.and_then(|dir| self.comparer.traits_of(&dir, &look.seen));
        traits.map(Some).map_err(|cause| unreadable(path, cause))
    }

    /// Something of another kind is replaced: may it be?
    fn in_the_way(&mut self, task: &Task, fd: &OwnedFd, path: &Path, look: &Look) -> Result<()> {
        fixed(path, look)?;
        movable(path, look, task.look.mount)?;
        if look.seen.kind() != Kind::Dir {
            return Ok(());
        }
        let refused = if matches!(self.from.target, Target::To(_)) {
            "it is a directory".into()
        } else if self.from.excluded.is_below(path) {
            "something below it is excluded".into()
        } else {
            let name = super::journal::name_of(path);
            match self.removed(fd, &name, path, false)? {
                Some(mount) => format!("{} is a mount point", mount.display()),
                None => return Ok(()),
            }
        };
        Err(
            Error::new(format!("{} is in the way: {refused}", path.display()))
                .next("move it away, or restore other paths only"),
        )
    }

    /// A directory that is there.
    fn enter(
        &mut self,
        task: &Task,
        fd: &OwnedFd,
        item: usize,
        path: &Path,
        look: Look,
    ) -> Result<()> {
        let name = &self.from.wanted.items[item].name;
        let live = &mut self.plan.live;
        let opened = live.open_dir_at(fd, name);
        let opened = Arc::new(opened.map_err(|cause| unreadable(path, cause))?);
        let node = live.add(task.node, name, Some(look.seen.id), &opened);
        let is_asked = matches!(self.from.wanted.items[item].role, Role::Asked(_));
        let record = self.from.wanted.record(self.from.source.snapshot, item);
        let old = self.traits_of(node, &opened, &look)?;
        let new = match record.filter(|_| is_asked) {
            Some(record) => Some(self.traits(record)?),
            None => None,
        };
        let place = self.place(task, &opened, &look, node)?;
        let mut differs = false;
        if let Some(new) = &new {
            let same = self.comparer.has(&opened, &look.seen, new);
            differs = !same;
            let action = match same {
                true => Action::Unchanged,
                false => Action::Metadata,
            };
            if !same {
                fixed(path, &look)?;
            }
            self.entry(path, Kind::Dir, 0, action);
        }
        let touched = Touched {
            id: look.seen.id,
            old,
            new,
            is_base: false,
            differs,
            place,
        };
        self.plan.touched.insert(node, touched);
        self.tasks.push(Task {
            node,
            of: Some(Parent::Item(item)),
            place,
            look,
            exact: is_asked && matches!(self.from.target, Target::InPlace),
        });
        Ok(())
    }

    /// The staging directory for what is in a directory: that of its parent, unless
    /// nothing can be renamed from there.
    fn place(&mut self, parent: &Task, fd: &OwnedFd, look: &Look, node: Node) -> Result<usize> {
        if look.realm() == parent.look.realm() {
            let is_base = self.plan.live.place(parent.node).is_none();
            let may = |fd: &OwnedFd| {
                let access = Access::WRITE_OK | Access::EXEC_OK;
                rustix::fs::accessat(fd, c".", access, AtFlags::EACCESS).is_ok()
            };
            if !is_base || may(&*self.open(parent.node)?) || !may(fd) {
                return Ok(parent.place);
            }
        }
        self.plan.places.push(self.plan.live.path(node));
        Ok(self.plan.places.len() - 1)
    }

    /// Two of a kind, and no directories.
    fn both(
        &mut self,
        task: &Task,
        fd: &OwnedFd,
        item: usize,
        record: &FileRecord,
        look: Look,
    ) -> Result<()> {
        let name = self.from.wanted.items[item].name.clone();
        let same = self.comparer.compare(
            self.from.source,
            record,
            &self.plan.live,
            (fd, &name, &look),
            self.from.go_on,
        )?;
        self.compared.push(Compared {
            item,
            dir: task.node,
            name,
            look,
            place: task.place,
            same,
        });
        Ok(())
    }

    /// Something that the snapshot does not have.
    fn extra(&mut self, task: &Task, fd: &OwnedFd, dir: &Path, name: &CStr) -> Result<()> {
        let path = dir.join(as_path(name));
        if name.to_bytes() == STAGING || self.from.excluded.has(&path) {
            return Ok(());
        }
        let there = look(fd, name).map_err(|cause| unreadable(&path, cause))?;
        let Some(look) = there.filter(|look| !self.from.excluded.is(look.seen.id)) else {
            return Ok(());
        };
        let is_dir = look.seen.kind() == Kind::Dir;
        let kept = if !self.from.excluded.is_known {
            Some("the snapshot does not say what was excluded")
        } else if look.mount != task.look.mount {
            Some("it is a mount point")
        } else {
            None
        };
        if let Some(why) = kept {
            self.plan.notes.push(format!(
                "{} is not in the snapshot, but is kept: {why}",
                path.display()
            ));
            return Ok(());
        }
        if is_dir && self.from.excluded.is_below(&path) {
            return self.emptied(task, fd, &path, look);
        }
        fixed(&path, &look)?;
        self.in_dir(task)?;
        if let Some(mount) = self.removed(fd, name, &path, true)? {
            // It would go along with the directory, and what is mounted be emptied.
            self.plan.notes.push(format!(
                "{} is not in the snapshot, but is kept: {} in it is a mount point",
                path.display(),
                mount.display()
            ));
            return self.emptied(task, fd, &path, look);
        }
        let old_dir = self.traits_if_dir(fd, name, &path, &look)?;
        self.plan.ops.push(Op {
            old_dir,
            dir: task.node,
            name: name.to_owned(),
            item: None,
            old: Some(look.seen.id),
            place: task.place,
        });
        Ok(())
    }

    /// A directory that the snapshot does not have, but that stays, for something below it
    /// does: all else in it goes.
    fn emptied(&mut self, task: &Task, fd: &OwnedFd, path: &Path, look: Look) -> Result<()> {
        let name = super::journal::name_of(path);
        let opened = self.plan.live.open_dir_at(fd, &name);
        let opened = Arc::new(opened.map_err(|cause| unreadable(path, cause))?);
        let id = Some(look.seen.id);
        let node = self.plan.live.add(task.node, &name, id, &opened);
        let old = self.traits_of(node, &opened, &look)?;
        let place = self.place(task, &opened, &look, node)?;
        let touched = Touched {
            id: look.seen.id,
            old,
            new: None,
            is_base: false,
            differs: false,
            place,
        };
        self.plan.touched.insert(node, touched);
        self.tasks.push(Task {
            node,
            of: None,
            look,
            place,
            exact: true,
        });
        Ok(())
    }

    /// Whether something can be swapped in a directory.
    fn in_dir(&self, task: &Task) -> Result<()> {
        fixed(&self.plan.live.path(task.node), &task.look)
    }

    /// Notes all that goes with `name`; nothing if there is a mount point in it, which
    /// is returned.
    fn removed(
        &mut self,
        fd: &OwnedFd,
        name: &CStr,
        path: &Path,
        with_top: bool,
    ) -> Result<Option<PathBuf>> {
        let before = (self.plan.entries.len(), self.plan.members.len());
        let mount = look_at(fd).map_err(|cause| unreadable(path, cause))?.mount;
        let mut dirs = Dirs::new().without_atime();
        let top = rustix::io::dup(fd).map_err(|cause| unreadable(path, cause))?;
        let top = dirs.add_top(path.parent().unwrap_or(path), top);
        let mut pending = vec![(top, name.to_owned())];
        let mut is_top = true;
        while let Some((parent, name)) = pending.pop() {
            let path = dirs.path(parent).join(as_path(&name));
            let failed = |cause| unreadable(&path, cause);
            let fd = dirs.open(parent).map_err(failed)?;
            let Some(look) = look(&fd, &name).map_err(failed)? else {
                continue;
            };
            if look.mount != mount {
                self.plan.entries.truncate(before.0);
                self.plan.members.truncate(before.1);
                return Ok(Some(path));
            }
            fixed(&path, &look)?;
            let kind = look.seen.kind();
            let size = if kind == Kind::File {
                look.seen.size
            } else {
                0
            };
            if kind == Kind::File {
                self.member(&path, &look);
            }
            if !is_top || with_top {
                self.entry(&path, kind, size, Action::Remove);
            }
            is_top = false;
            if kind != Kind::Dir {
                continue;
            }
            let opened = Arc::new(dirs.open_dir_at(&fd, &name).map_err(failed)?);
            let names = names_in(&opened).map_err(failed)?;
            let node = dirs.add(parent, &name, Some(look.seen.id), &opened);
            if names.iter().any(|name| name.to_bytes() == STAGING) {
                return Err(Error::new(format!(
                    "{} would be removed, but another restore has its staging directory in it",
                    path.display()
                ))
                .next(format!(
                    "finish that one first: `snapshim restore --undo --path {}`",
                    path.display()
                )));
            }
            pending.extend(names.into_iter().map(|name| (node, name)));
        }
        Ok(None)
    }

    fn member(&mut self, path: &Path, look: &Look) {
        self.plan.members.push(Member {
            path: path.to_owned(),
            id: look.seen.id,
        });
    }

    fn entry(&mut self, path: &Path, kind: Kind, size: u64, action: Action) {
        self.plan.entries.push(Entry {
            path: path.to_owned(),
            kind,
            size,
            action,
        });
    }

    fn is_unmakeable(&self, kind: Kind) -> bool {
        kind == Kind::Device && !self.can_make_devices
    }

    /// Notes that an item is made; further names of a file are links.
    fn made(&mut self, item: usize, size: u64) {
        let wanted = &self.from.wanted.items[item];
        let groups = &self.from.wanted.groups;
        if let Role::Asked(record) | Role::OnTheWay(Some(record)) = wanted.role
            && wanted.group.is_none_or(|group| groups[group][0] == item)
        {
            self.plan.files.push(record);
            self.plan.bytes = self.plan.bytes.saturating_add(size);
        }
    }

    /// Puts an item, with all below it, in the place of `old`, or of nothing.
    fn add(
        &mut self,
        task: &Task,
        item: usize,
        old: Option<(FileId, Option<Traits>)>,
    ) -> Result<()> {
        let (old, old_dir) = old.unzip();
        let old_dir = old_dir.flatten();
        let mut pending = vec![item];
        let mut is_top = true;
        while let Some(at) = pending.pop() {
            let wanted = &self.from.wanted.items[at];
            let record = self.from.wanted.record(self.from.source.snapshot, at);
            let kind = record.map_or(Kind::Dir, |record| record.kind);
            let size = record.map_or(0, |record| record.size);
            let path = self.from.wanted.path(at);
            let action = match (self.is_unmakeable(kind), old.filter(|_| is_top)) {
                (true, _) => Action::NotMade,
                (false, Some(_)) => Action::Replace,
                (false, None) => Action::Add,
            };
            self.entry(&path, kind, size, action);
            pending.extend(&wanted.children);
            if action == Action::NotMade && is_top {
                return Ok(());
            }
            self.made(at, size);
            is_top = false;
        }
        self.in_dir(task)?;
        self.plan.ops.push(Op {
            dir: task.node,
            name: self.from.wanted.items[item].name.clone(),
            item: Some(item),
            old,
            old_dir,
            place: task.place,
        });
        Ok(())
    }

    /// Of those that are there and of the right kind, decides which are replaced: all
    /// names of a file, or none.
    fn decide(&mut self) -> Result<()> {
        let wanted = self.from.wanted;
        let mut ids: Vec<HashSet<FileId>> = vec![HashSet::new(); wanted.groups.len()];
        let mut equal = vec![0; wanted.groups.len()];
        let mut owners: HashMap<FileId, HashSet<Option<usize>>> = HashMap::new();
        for c in &self.compared {
            let group = wanted.items[c.item].group;
            if let Some(group) = group {
                ids[group].insert(c.look.seen.id);
                equal[group] += usize::from(c.same.body && c.same.metadata);
            }
            if c.look.seen.nlink > 1 {
                // Of those in no group each is one of its own: two of them are two owners.
                let owners = owners.entry(c.look.seen.id).or_default();
                if !owners.insert(group) && group.is_none() {
                    owners.insert(Some(usize::MAX));
                }
            }
        }
        for c in std::mem::take(&mut self.compared) {
            let group = wanted.items[c.item].group;
            let is_whole = group.is_none_or(|group| equal[group] == wanted.groups[group].len());
            let is_linked = group.is_none_or(|group| ids[group].len() == 1)
                && owners.get(&c.look.seen.id).is_none_or(|o| o.len() == 1);
            let path = self.plan.live.path(c.dir).join(as_path(&c.name));
            let kind = c.look.seen.kind();
            let record = wanted.record(self.from.source.snapshot, c.item);
            let size = record.map_or(0, |record| record.size);
            if c.same.body && c.same.metadata && is_linked && is_whole {
                self.entry(&path, kind, size, Action::Unchanged);
                continue;
            }
            if self.is_unmakeable(kind) {
                self.entry(&path, kind, size, Action::NotMade);
                continue;
            }
            let dir = look_at(&*self.open(c.dir)?).map_err(|cause| unreadable(&path, cause))?;
            fixed(&path, &c.look)?;
            fixed(&self.plan.live.path(c.dir), &dir)?;
            movable(&path, &c.look, dir.mount)?;
            let action = match c.same.body && is_linked {
                true => Action::Metadata,
                false => Action::Replace,
            };
            self.entry(&path, kind, size, action);
            self.made(c.item, size);
            self.plan.ops.push(Op {
                dir: c.dir,
                name: c.name,
                item: Some(c.item),
                old: Some(c.look.seen.id),
                old_dir: None,
                place: c.place,
            });
        }
        if !self.from.may_overwrite
            && let Some(op) = self.plan.ops.iter().find(|op| op.old.is_some())
        {
            let path = self.plan.live.path(op.dir).join(as_path(&op.name));
            return Err(Error::new(format!("{} is there already", path.display()))
                .next("choose an empty directory, or pass --overwrite"));
        }
        Ok(())
    }
}

/// Refuses what cannot be renamed or changed.
fn fixed(path: &Path, look: &Look) -> Result<()> {
    if !look.is_fixed {
        return Ok(());
    }
    Err(Error::new(format!(
        "{} is immutable or append-only, and so cannot be replaced, removed, or changed",
        path.display()
    ))
    .next(format!(
        "take that away with `chattr -i -a {}` first; nothing was changed",
        path.display()
    )))
}

/// Refuses a mount point, be it a file: nothing else can get its name.
fn movable(path: &Path, look: &Look, mount: u64) -> Result<()> {
    if look.mount == mount {
        return Ok(());
    }
    Err(Error::new(format!(
        "{} is in the way: it is a mount point",
        path.display()
    ))
    .next("unmount it, or restore other paths only; nothing was changed"))
}

fn unreadable(path: &Path, cause: Errno) -> Error {
    match cause {
        Errno::STALE | Errno::LOOP => Error::new(format!(
            "{} was replaced while it was looked at",
            path.display()
        ))
        .next("end what changes these files, and try again"),
        Errno::ACCESS | Errno::PERM => {
            Error::new(format!("cannot look at {}: {cause}", path.display()))
                .next("run as its owner or as root")
        }
        _ => fault("look at", path, cause),
    }
}

fn not_opened(path: &Path, cause: Errno) -> Error {
    let error = |what: &str| Error::new(format!("cannot restore in {}: {what}", path.display()));
    match cause {
        Errno::NOENT => {
            error("it does not exist").next("make it first, or restore to another place with --to")
        }
        Errno::LOOP => {
            error("it, or a directory above it, is a symbolic link, which is not followed")
                .next("restore to another place with --to, and move the files yourself")
        }
        Errno::NOTDIR => error("it is not a directory").next("choose another place with --to"),
        _ => unreadable(path, cause),
    }
}
