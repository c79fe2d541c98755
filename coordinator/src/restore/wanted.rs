//! What of a snapshot is asked for, and where each entry of it is to be.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::{Target, What};
use crate::store::Snapshot;
use crate::store::manifest::{FileRecord, Kind};
use crate::{Error, Result};

/// The entries asked for, as a forest: below each [`Base`], directories that exist already,
/// stand the entries that are to be there.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) bases: Vec<Base>,
    pub(super) items: Vec<Item>,
    /// Items that are names of one file, two or more.
    pub(super) groups: Vec<Vec<usize>>,
    /// Names that were not asked for, but are those of a file that was.
    pub(super) further_names: Vec<PathBuf>,
    by_name: HashMap<(Parent, Box<[u8]>), usize>,
}

/// A directory that is there, in which things are restored.
#[derive(Debug)]
pub(super) struct Base {
    /// Absolute.
    pub(super) path: PathBuf,
    pub(super) children: Vec<usize>,
    /// The record of the directory it stands for itself, if it does.
    pub(super) record: Option<usize>,
}

/// What an item is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Parent {
    /// A base, by number.
    Base(usize),
    /// An item, by number.
    Item(usize),
}

/// One name that is to be as in the snapshot.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) name: CString,
    pub(super) parent: Parent,
    pub(super) children: Vec<usize>,
    pub(super) role: Role,
    /// Which of [`Wanted::groups`] it is in.
    pub(super) group: Option<usize>,
}

/// Why an item is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It was asked for; its record in the manifest.
    Asked(usize),
    /// Something below it was asked for: made if it is missing, else left as it is.
    OnTheWay(Option<usize>),
    /// It was not there when the snapshot was taken.
    Absent,
}

impl Wanted {
    /// Finds what is asked for in the manifest.
    ///
    /// # Errors
    ///
    /// Something asked for is not in the snapshot; the manifest contradicts itself.
    pub(super) fn new(snapshot: &Snapshot, what: &What, target: &Target) -> Result<Wanted> {
        let files = &snapshot.manifest.files;
        let roots: Vec<&Path> = snapshot.manifest.roots.iter().map(AsRef::as_ref).collect();
        let all = what.into.iter().chain(&what.paths).collect::<Vec<_>>();
        let is_asked = |path: &Path| all.is_empty() || all.iter().any(|a| path.starts_with(a));
        let mut wanted = Wanted::default();
        let mut chosen = vec![false; files.len()];
        for (chosen, record) in chosen.iter_mut().zip(files) {
            *chosen = is_asked(record.path.as_ref());
        }
        let is_there = |path: &Path| files.iter().any(|file| file.path.0 == path);
        // If one file was captured, nothing is known of the others.
        let knows_all = snapshot.manifest.only.is_none();
        let absent: Vec<&Path> = roots
            .iter()
            .copied()
            .filter(|root| knows_all && is_asked(root) && !is_there(root))
            .collect();
        for path in &all {
            let some = files.iter().any(|file| file.path.0.starts_with(path));
            if !some && !absent.iter().any(|root| root.starts_with(path)) {
                return Err(Error::new(format!(
                    "{} is not in the snapshot {}",
                    path.display(),
                    snapshot.id
                ))
                .next("`snapshim show` lists what is"));
            }
        }
        let links = links(files);
        // Where else files go is not for somebody else's manifest to say.
        if matches!(target, Target::InPlace) && snapshot.is_own {
            for names in &links {
                if names.iter().any(|i| chosen[*i]) {
                    for i in names.iter().filter(|i| !chosen[**i]) {
                        wanted.further_names.push(files[*i].path.0.clone());
                    }
                    names.iter().for_each(|i| chosen[*i] = true);
                }
            }
        }
        let records: HashMap<&Path, usize> = files
            .iter()
            .enumerate()
            .map(|(i, file)| (file.path.as_ref(), i))
            .collect();
        let place = Placing {
            snapshot,
            what,
            target,
            roots: &roots,
            records,
        };
        let mut items = vec![None; files.len()];
        for (i, _) in chosen.iter().enumerate().filter(|(_, chosen)| **chosen) {
            items[i] = place.add(&mut wanted, files[i].path.as_ref(), Role::Asked(i))?;
        }
        if matches!(target, Target::InPlace) {
            for root in absent {
                place.add(&mut wanted, root, Role::Absent)?;
            }
        }
        if let Target::To(dir) = target
            && wanted.bases.is_empty()
        {
            wanted.base(dir);
        }
        for names in links {
            let names: Vec<usize> = names.iter().filter_map(|i| items[*i]).collect();
            if names.len() > 1 {
                for item in &names {
                    wanted.items[*item].group = Some(wanted.groups.len());
                }
                wanted.groups.push(names);
            }
        }
        Ok(wanted)
    }

    fn base(&mut self, path: &Path) -> usize {
        if let Some(found) = self.bases.iter().position(|base| base.path == path) {
            return found;
        }
        self.bases.push(Base {
            path: path.to_owned(),
            children: Vec::new(),
            record: None,
        });
        self.bases.len() - 1
    }

    /// The item `name` in `parent`, made if there is none.
    fn item(&mut self, parent: Parent, name: &OsStr) -> Result<usize> {
        let key = (parent, Box::from(name.as_bytes()));
        if let Some(found) = self.by_name.get(&key) {
            return Ok(*found);
        }
        let number = self.items.len();
        self.items.push(Item {
            name: CString::new(name.as_bytes())
                .map_err(|_| Error::new("a name has a NUL in it"))?,
            parent,
            children: Vec::new(),
            role: Role::OnTheWay(None),
            group: None,
        });
        match parent {
            Parent::Base(base) => self.bases[base].children.push(number),
            Parent::Item(item) => self.items[item].children.push(number),
        }
        self.by_name.insert(key, number);
        Ok(number)
    }

    /// Where an item is to be.
    pub(super) fn path(&self, item: usize) -> PathBuf {
        let mut names = Vec::new();
        let mut at = Parent::Item(item);
        loop {
            match at {
                Parent::Item(item) => {
                    names.push(&self.items[item].name);
                    at = self.items[item].parent;
                }
                Parent::Base(base) => {
                    let mut bytes = self.bases[base].path.as_os_str().as_bytes().to_vec();
                    for name in names.iter().rev() {
                        if !bytes.ends_with(b"/") {
                            bytes.push(b'/');
                        }
                        bytes.extend_from_slice(name.to_bytes());
                    }
                    return OsStr::from_bytes(&bytes).into();
                }
            }
        }
    }

    /// The record of an item, if the manifest has one.
    pub(super) fn record<'a>(&self, snapshot: &'a Snapshot, item: usize) -> Option<&'a FileRecord> {
        match self.items[item].role {
            Role::Asked(record) | Role::OnTheWay(Some(record)) => {
                snapshot.manifest.files.get(record)
            }
            Role::OnTheWay(None) | Role::Absent => None,
        }
    }
}

/// The entries that are names of one file, by what the manifest says of their inodes. Those
/// with different contents are not, whatever it says: a number is given anew once its file is gone.
fn links(files: &[FileRecord]) -> Vec<Vec<usize>> {
    let mut by_id: BTreeMap<(u64, u64), Vec<usize>> = BTreeMap::new();
    for (i, file) in files.iter().enumerate() {
        if file.kind != Kind::Dir {
            by_id.entry((file.dev, file.ino)).or_default().push(i);
        }
    }
    let agree = |a: &FileRecord, b: &FileRecord| {
        let digests = (a.digest.as_ref(), b.digest.as_ref());
        let same = !matches!(digests, (Some(a), Some(b)) if a != b);
        same && (a.kind, a.size) == (b.kind, b.size)
    };
    by_id
        .into_values()
        .filter(|names| names.len() > 1)
        .filter(|names| names.iter().all(|i| agree(&files[names[0]], &files[*i])))
        .collect()
}

/// Where a path of the snapshot goes.
struct Placing<'a> {
    snapshot: &'a Snapshot,
    what: &'a What,
    target: &'a Target,
    roots: &'a [&'a Path],
    records: HashMap<&'a Path, usize>,
}

impl Placing<'_> {
    /// Adds the item for `path` and those above it. `None` if a base stands for it.
    fn add(&self, wanted: &mut Wanted, path: &Path, role: Role) -> Result<Option<usize>> {
        let (base, above, below) = self.split(path)?;
        let base = wanted.base(&base);
        if below.as_os_str().is_empty() {
            if let Role::Asked(record) = role {
                wanted.bases[base].record = Some(record);
            }
            return Ok(None);
        }
        let mut parent = Parent::Base(base);
        let mut here = above;
        let mut last = None;
        for part in below.components() {
            let Component::Normal(name) = part else {
                return Err(self.contradicts(path, "is not a plain path"));
            };
            if let Some(item) = last {
                self.enter(wanted, item, &here)?;
                parent = Parent::Item(item);
            }
            here.push(name);
            last = Some(wanted.item(parent, name)?);
        }
        let Some(item) = last else {
            return Err(self.contradicts(path, "is not a path of a file"));
        };
        let new = &mut wanted.items[item];
        let is_free = match new.role {
            Role::OnTheWay(None) => true,
            // Met before as a directory above something.
            Role::OnTheWay(known) => matches!(role, Role::Asked(r) if Some(r) == known),
            Role::Asked(_) | Role::Absent => false,
        };
        let is_dir = |role: &Role| matches!(role, Role::Asked(r) if self.kind(*r) == Kind::Dir);
        if !is_free || !(new.children.is_empty() || is_dir(&role)) {
            return Err(self.contradicts(path, "is there twice, or has something below it"));
        }
        new.role = role;
        Ok(Some(item))
    }

    /// Notes that `item`, which is `here` in the snapshot, has something below it.
    fn enter(&self, wanted: &mut Wanted, item: usize, here: &Path) -> Result<()> {
        let known = match wanted.items[item].role {
            Role::Asked(record) => Some(record),
            Role::OnTheWay(Some(_)) => return Ok(()),
            Role::OnTheWay(None) => {
                let record = self.records.get(here).copied();
                wanted.items[item].role = Role::OnTheWay(record);
                record
            }
            Role::Absent => None,
        };
        match known {
            Some(record) if self.kind(record) == Kind::Dir => Ok(()),
            Some(_) => Err(self.contradicts(here, "is no directory, but has something below it")),
            // Above what was watched there are directories that no record is about.
            None if self.snapshot.manifest.only.is_none()
                && self.roots.iter().any(|root| here.starts_with(root)) =>
            {
                Err(self.contradicts(here, "has something below it, but is not there itself"))
            }
            None => Ok(()),
        }
    }

    fn kind(&self, record: usize) -> Kind {
        self.snapshot.manifest.files[record].kind
    }

    /// The base of a path of the snapshot, what of the path is above it, and what is below.
    fn split<'p>(&self, path: &'p Path) -> Result<(PathBuf, PathBuf, &'p Path)> {
        match (self.target, &self.what.into) {
            (Target::InPlace, _) => {
                let root = self.roots.iter().find(|root| path.starts_with(root));
                let base = root.and_then(|root| root.parent());
                let Some(base) = base else {
                    return Err(self.contradicts(path, "is outside of what was watched"));
                };
                let below = path.strip_prefix(base).unwrap_or(path);
                Ok((base.to_owned(), base.to_owned(), below))
            }
            (Target::To(dir), None) => {
                let below = path.strip_prefix("/").unwrap_or(path);
                Ok((dir.clone(), PathBuf::from("/"), below))
            }
            (Target::To(dir), Some(into)) => {
                let is_file = |r: &usize| self.kind(*r) != Kind::Dir;
                let above = match self.records.get(into.as_path()).filter(|r| is_file(r)) {
                    Some(_) => into.parent().unwrap_or(into),
                    None => into,
                };
                let below = path.strip_prefix(above).unwrap_or(path);
                Ok((dir.clone(), above.to_owned(), below))
            }
        }
    }

    fn contradicts(&self, path: &Path, what: &str) -> Error {
        Error::new(format!(
            "the manifest of {} is damaged: {} {what}",
            self.snapshot.id,
            path.display()
        ))
        .next("use another snapshot; nothing was changed")
    }
}
