//! A set: the files and the programs of one gate, under a name.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs as stdfs;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use snapshim_gate::abi::{
    DEFAULT_HOLD_BOUND_MS, DEFAULT_SLOTS, Gate, MARK_BLOCKS, REFUSE_RINGS, STDIO_RECORDS,
};
use snapshim_gate::reap::Claimed;
use snapshim_gate::slot::Owner;
use snapshim_gate::table::FileId;

use super::gate_file::{self, CONFIG, GATE, LOCK, OpenGate, Places, SetDir, Sharing};
use super::locate::Locator;
use crate::error::Context;
use crate::store::manifest::{PathName, VERSION};
use crate::store::policy::Policy;
use crate::store::{Store, check_set_name};
use crate::verify::command::Verify;
use crate::{Error, Result};

/// Largest `set.json` that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// What a set watches and where its snapshots go; kept in `set.json` beside the gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ConfigForm", into = "ConfigForm")]
pub struct Config {
    /// The watched files and directories: absolute, without symbolic links as far
    /// as they exist, none inside another.
    pub roots: Vec<PathBuf>,
    /// What is never captured; the store is always among them.
    pub excludes: Vec<PathBuf>,
    /// Where the snapshots of the set go.
    pub store: PathBuf,
    /// Longest hold unless a checkpoint asks otherwise, ms.
    pub max_hold_ms: u32,
    /// Which snapshots are kept unless a checkpoint asks otherwise.
    pub policy: Policy,
    /// The command that its snapshots have to pass, unless a checkpoint asks otherwise.
    pub verify: Option<Verify>,
    /// Whether its snapshots go without digests.
    pub no_digest: bool,
    /// What its programs are asked to do differently.
    pub asks: Asks,
    /// Who else may use the gate.
    pub sharing: Sharing,
}

/// What the programs of a set are asked to do differently than they would alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asks {
    /// A stdio call that made libc write flushes the rest before it returns.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stdio_records: bool,
    /// io_uring looks as if the kernel did not have it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refuse_rings: bool,
    /// Calls mark which blocks they change, so that a snapshot can be made of the one before it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mark_blocks: bool,
}

impl Asks {
    /// The form in the gate.
    fn options(self) -> u32 {
        let option = |asked, option| if asked { option } else { 0 };
        option(self.stdio_records, STDIO_RECORDS)
            | option(self.refuse_rings, REFUSE_RINGS)
            | option(self.mark_blocks, MARK_BLOCKS)
    }
}

/// The form of [`Config`] in `set.json`.
#[derive(Clone, Serialize, Deserialize)]
struct ConfigForm {
    version: u32,
    roots: Vec<PathName>,
    excludes: Vec<PathName>,
    store: PathName,
    max_hold_ms: u32,
    #[serde(flatten)]
    policy: Policy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    verify: Option<Verify>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    no_digest: bool,
    #[serde(flatten)]
    asks: Asks,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gate_owner: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gate_group: Option<u32>,
}

impl From<ConfigForm> for Config {
    fn from(form: ConfigForm) -> Config {
        let plain = |names: Vec<PathName>| names.into_iter().map(|n| n.0).collect();
        Config {
            roots: plain(form.roots),
            excludes: plain(form.excludes),
            store: form.store.0,
            max_hold_ms: form.max_hold_ms,
            policy: form.policy,
            verify: form.verify,
            no_digest: form.no_digest,
            asks: form.asks,
            sharing: Sharing {
                owner: form.gate_owner,
                group: form.gate_group,
            },
        }
    }
}

impl From<Config> for ConfigForm {
    fn from(config: Config) -> ConfigForm {
        let names = |paths: Vec<PathBuf>| paths.into_iter().map(PathName).collect();
        ConfigForm {
            version: VERSION,
            roots: names(config.roots),
            excludes: names(config.excludes),
            store: PathName(config.store),
            max_hold_ms: config.max_hold_ms,
            policy: config.policy,
            verify: config.verify,
            no_digest: config.no_digest,
            asks: config.asks,
            gate_owner: config.sharing.owner,
            gate_group: config.sharing.group,
        }
    }
}

/// What a command asks of the set it starts; `None` and empty mean "not said".
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Files and directories to watch, as given.
    pub roots: Vec<PathBuf>,
    /// What not to capture, as given.
    pub excludes: Vec<PathBuf>,
    /// Where the snapshots go.
    pub store: Option<PathBuf>,
    /// Longest hold.
    pub max_hold_ms: Option<u32>,
    /// Which snapshots are kept.
    pub policy: Policy,
    /// The command that its snapshots have to pass.
    pub verify: Option<Verify>,
    /// Whether its snapshots go without digests.
    pub no_digest: bool,
    /// What the programs are asked to do differently.
    pub asks: Asks,
    /// Who else may use the gate.
    pub sharing: Sharing,
}

impl Wanted {
    /// The configuration asked for, complete and checked.
    pub fn resolve(&self) -> Result<Config> {
        let mut roots = self
            .roots
            .iter()
            .map(|p| resolve(p))
            .collect::<Result<Vec<_>>>()?;
        if roots.is_empty() {
            return Err(
                Error::usage("nothing is watched").next("name files or directories with --watch")
            );
        }
        let all = roots.clone();
        roots.retain(|root| {
            !all.iter()
                .any(|other| root != other && root.starts_with(other))
        });
        let mut seen = Vec::new();
        roots.retain(|root| {
            !seen.contains(root) && {
                seen.push(root.clone());
                true
            }
        });

        let mut excludes = self
            .excludes
            .iter()
            .map(|p| resolve(p))
            .collect::<Result<Vec<_>>>()?;
        let store = match &self.store {
            Some(store) => resolve(store)?,
            None => Store::default_place(&roots),
        };
        for root in &roots {
            if let Some(exclude) = excludes.iter().find(|e| root.starts_with(e)) {
                return Err(Error::usage(format!(
                    "{} is watched and excluded (by {})",
                    root.display(),
                    exclude.display()
                ))
                .next("take away one of --watch and --exclude"));
            }
            if root.starts_with(&store) {
                return Err(Error::usage(format!(
                    "{} is watched, but lies in the store {}",
                    root.display(),
                    store.display()
                ))
                .next("choose another place for the snapshots with --store"));
            }
            let usual = root.join(".snapshim");
            if store.starts_with(root)
                && store != usual
                && !excludes.iter().any(|e| store.starts_with(e))
            {
                return Err(Error::usage(format!(
                    "the store {} lies inside {}, which is watched",
                    store.display(),
                    root.display()
                ))
                .next(format!(
                    "choose a store outside, or add --exclude {}",
                    store.display()
                )));
            }
        }
        excludes.push(store.clone());
        excludes.sort();
        excludes.dedup();
        Ok(Config {
            roots,
            excludes,
            store,
            max_hold_ms: self.max_hold_ms.unwrap_or(DEFAULT_HOLD_BOUND_MS),
            policy: self.policy.clone(),
            verify: self.verify.clone(),
            no_digest: self.no_digest,
            asks: self.asks,
            sharing: self.sharing,
        })
    }

    /// Names what was said and differs from `present`.
    fn conflicts(&self, wanted: &Config, present: &Config) -> Vec<String> {
        let list = |paths: &[PathBuf]| {
            paths
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let mut found = Vec::new();
        if wanted.roots != present.roots {
            found.push(format!(
                "it watches {}, not {}",
                list(&present.roots),
                list(&wanted.roots)
            ));
        }
        if self.store.is_some() && wanted.store != present.store {
            found.push(format!(
                "its store is {}, not {}",
                present.store.display(),
                wanted.store.display()
            ));
        }
        let missing: Vec<PathBuf> = wanted
            .excludes
            .iter()
            .filter(|e| **e != wanted.store && !present.excludes.contains(e))
            .cloned()
            .collect();
        if !missing.is_empty() {
            found.push(format!("it does not exclude {}", list(&missing)));
        }
        if self.max_hold_ms.is_some() && wanted.max_hold_ms != present.max_hold_ms {
            found.push(format!(
                "its longest hold is {} ms, not {} ms",
                present.max_hold_ms, wanted.max_hold_ms
            ));
        }
        // As far as it was said.
        if wanted.policy.clone().or(&present.policy) != present.policy {
            found.push(match present.policy.to_string() {
                none if none.is_empty() => "it keeps all of its snapshots".into(),
                policy => format!("it was made with {policy}"),
            });
        }
        if self.verify.is_some() && wanted.verify != present.verify {
            let command = present.verify.as_ref();
            let command = command.map_or("none".into(), |v| format!("'{}'", v.command));
            found.push(format!("its command to verify with is {command}"));
        }
        for (asked, present, what) in [
            (wanted.no_digest, present.no_digest, "--no-digest"),
            (
                wanted.asks.stdio_records,
                present.asks.stdio_records,
                "--stdio-records",
            ),
            (
                wanted.asks.refuse_rings,
                present.asks.refuse_rings,
                "--io-uring refuse",
            ),
            (
                wanted.asks.mark_blocks,
                present.asks.mark_blocks,
                "--mark-blocks",
            ),
        ] {
            if asked && !present {
                found.push(format!("it was made without {what}"));
            }
        }
        if self.sharing.is_shared() && wanted.sharing != present.sharing {
            found.push("its gate has another owner or group".into());
        }
        found
    }
}

/// Makes a path absolute and free of symbolic links as far as it exists; what is
/// watched may appear later.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path)
        .map_err(|cause| Error::usage(format!("cannot use the path {path:?}: {cause}")))?;
    let mut rest = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match existing.canonicalize() {
            Ok(found) => return Ok(rest.iter().rev().fold(found, |p, name| p.join(name))),
            Err(cause) if matches!(cause.kind(), ErrorKind::NotFound) => {}
            Err(cause) => {
                return Err(
                    Error::usage(format!("cannot use {}: {cause}", absolute.display()))
                        .next("name a file or directory you can reach"),
                );
            }
        }
        match (existing.components().next_back(), existing.parent()) {
            (Some(Component::Normal(name)), Some(parent)) => {
                rest.push(name);
                existing = parent;
            }
            _ => {
                return Err(Error::usage(format!(
                    "cannot use {}: there is a \"..\" behind a directory that does not exist",
                    absolute.display()
                ))
                .next("name the path without \"..\""));
            }
        }
    }
}

/// A name for a set, made of a file name.
pub fn name_from(path: &Path) -> String {
    let name = path.file_name().unwrap_or(OsStr::new("set"));
    gate_file::sanitise(name)
}

/// A set whose gate is open in this process.
#[derive(Debug)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// The directory of its gate.
    pub dir: PathBuf,
    /// What it watches.
    pub config: Config,
    /// Its gate.
    pub gate: Gate,
    /// Device and inode of the gate file.
    pub gate_id: FileId,
    /// The gate file.
    pub gate_path: PathBuf,
    pub(super) set_dir: SetDir,
    /// Holds the shared lock that says "in use", if [`Set::create_or_open`] took it.
    use_lock: Option<OwnedFd>,
}

/// A set that [`Set::list`] found.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The directory of its gate.
    pub dir: PathBuf,
    /// The set, or why it cannot be used.
    pub set: Result<Set>,
}

impl Set {
    /// Opens the set `name`, making it if there is none, with what is `wanted`.
    ///
    /// A set nobody uses takes on the new configuration; one in use keeps its own,
    /// and anything said that differs from it is an error. As long as the value
    /// lives, the set is in use.
    pub fn create_or_open(name: &str, wanted: &Wanted) -> Result<Set> {
        Set::create_among(&Search::from_env()?.places, name, wanted)
    }

    fn create_among(places: &Places, name: &str, wanted: &Wanted) -> Result<Set> {
        check_set_name(name)?;
        let config = wanted.resolve()?;
        let mut existing = None;
        for place in &places.dirs {
            if let Some(dir) = SetDir::open(place, name)?.filter(SetDir::has_gate) {
                existing = Some(dir);
                break;
            }
        }
        let dir = match existing {
            Some(dir) => dir,
            None => SetDir::create(&places.for_new(&config.sharing)?, name, &config.sharing)?,
        };
        // One at a time, so that nobody changes the configuration of a set that
        // somebody else is just beginning to use. Released when this process or
        // the descriptor ends.
        fs::flock(dir.fd(), FlockOperation::LockExclusive)
            .context(|| format!("lock {}", dir.path.display()))?;
        let mut set = if dir.has_gate() {
            Set::reuse(dir, name, wanted, config)?
        } else {
            write_config(&dir, &config)?;
            drop(open_lock(&dir, &config.sharing)?);
            gate_file::create(&dir, DEFAULT_SLOTS, config.max_hold_ms, &config.sharing)?;
            Set::open_in(dir, name)?
        };
        set.apply_asks()?;
        let file = set.open_for_lock()?;
        fs::flock(&file, FlockOperation::LockShared)
            .context(|| format!("lock {}", set.gate_path.display()))?;
        set.use_lock = Some(file);
        fs::flock(set.set_dir.fd(), FlockOperation::Unlock)
            .context(|| format!("unlock {}", set.dir.display()))?;
        Ok(set)
    }

    /// Tells the programs of the set what they are asked to do differently. If nobody uses the
    /// set, marks that were found to be missing are tried again.
    fn apply_asks(&self) -> Result<()> {
        let header = self.gate.header();
        let asks = self.config.asks;
        if asks.mark_blocks {
            gate_file::reserve_marks(&self.set_dir, header.slot_count.load(Relaxed))?;
            if !self.is_in_use()? {
                self.gate.marks().refute(false);
            }
        }
        header.options.store(asks.options(), Release);
        Ok(())
    }

    /// The directory of the gate, for what belongs to it.
    pub(crate) fn dir_fd(&self) -> BorrowedFd<'_> {
        self.set_dir.fd()
    }

    /// Opens a set that exists, in the light of what is wanted of it.
    fn reuse(dir: SetDir, name: &str, wanted: &Wanted, config: Config) -> Result<Set> {
        let mut set = Set::open_in(dir, name)?;
        let conflicts = wanted.conflicts(&config, &set.config);
        if set.is_in_use()? {
            if conflicts.is_empty() {
                return Ok(set);
            }
            return Err(Error::usage(format!(
                "the set {name} is in use with other settings: {}",
                conflicts.join("; ")
            ))
            .next("choose another set with --name, or end the programs of this one first"));
        }
        if config != set.config {
            if wanted.sharing.is_shared() && config.sharing != set.config.sharing {
                return Err(Error::usage(format!(
                    "the gate of the set {name} exists with another owner or group"
                ))
                .next(format!(
                    "choose another set with --name, or remove {} first",
                    set.dir.display()
                )));
            }
            set.config = Config {
                sharing: set.config.sharing,
                ..config
            };
            write_config(&set.set_dir, &set.config)?;
        }
        Ok(set)
    }

    /// Opens an existing set: the one of that name; without a name the one
    /// `SNAPSHIM_GATE` points into, else the only one, else the only one in use.
    pub fn open(name: Option<&str>) -> Result<Set> {
        let search = Search::from_env()?;
        match name {
            Some(name) => search.named(name),
            None => search.unnamed(),
        }
    }

    /// All sets the environment lets us find, by name.
    pub fn list() -> Result<Vec<Listed>> {
        Search::from_env()?.list()
    }

    /// Opens the set in `dir`.
    fn open_in(dir: SetDir, name: &str) -> Result<Set> {
        let config = read_config(&dir)?;
        // Only now is it known who may own the directory that was opened.
        dir.check(&config.sharing)?;
        let OpenGate { gate, id } = gate_file::open(&dir, &config.sharing)?;
        Ok(Set {
            name: name.to_owned(),
            dir: dir.path.clone(),
            config,
            gate,
            gate_id: id,
            gate_path: dir.path.join(GATE),
            set_dir: dir,
            use_lock: None,
        })
    }

    /// Whether somebody runs a program in the set, or a live process is attached to its gate.
    pub fn is_in_use(&self) -> Result<bool> {
        let file = self.open_for_lock()?;
        match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(true),
            Err(cause) => {
                return Err(Error::new(format!(
                    "cannot lock {}: {cause}",
                    self.gate_path.display()
                )));
            }
        }
        let slots = self.gate.used_slots().iter();
        let claimed: Vec<Claimed> = slots.filter_map(Claimed::read).collect();
        let locator = Locator::default();
        Ok(claimed.iter().any(|claimed| {
            // Who cannot be seen from here may be there.
            Owner::unpack(claimed.owner)
                .is_some_and(|owner| !locator.is_gone(owner, claimed.start_time))
        }))
    }

    /// The gate, opened once more: a lock on it must neither hide that of others nor
    /// last as long as the mapping.
    fn open_for_lock(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat(self.set_dir.fd(), GATE, flags, Mode::empty())
            .context(|| format!("open {}", self.gate_path.display()))
    }

    /// The directory that the set's own directory is in, with those of other sets.
    pub fn place(&self) -> &Path {
        self.dir.parent().unwrap_or(&self.dir)
    }

    /// Becomes the coordinator of the set, once nobody else is, waiting for it up to `wait`.
    pub fn lock(&self, wait: Duration) -> Result<SetLock> {
        let file = open_lock(&self.set_dir, &self.config.sharing)?;
        let started = Instant::now();
        let mut pause = Duration::from_micros(500);
        loop {
            match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(cause) => {
                    let path = self.dir.join(LOCK);
                    return Err(Error::new(format!(
                        "cannot lock {}: {cause}",
                        path.display()
                    )));
                }
            }
            let left = wait.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(self.locked(&file));
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        let lock = SetLock { file };
        lock.note(std::process::id());
        Ok(lock)
    }

    /// The process that is the set's coordinator now, if there is one and it said so.
    pub fn lock_holder(&self) -> Option<u32> {
        let file = open_lock(&self.set_dir, &self.config.sharing).ok()?;
        match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => holder(&file),
            _ => None,
        }
    }

    fn locked(&self, file: &stdfs::File) -> Error {
        let who = match holder(file) {
            Some(pid) => format!("process {pid}"),
            None => "another process".into(),
        };
        Error::new(format!(
            "the set {} is being checkpointed by {who}",
            self.name
        ))
        .next("try again, or wait longer for it with --wait")
    }
}

/// Where sets are looked for.
struct Search {
    places: Places,
    /// Place and name of the set that `SNAPSHIM_GATE` points into.
    pointed: Option<(PathBuf, String)>,
}

impl Search {
    fn from_env() -> Result<Search> {
        Ok(Search {
            places: Places::from_env()?,
            pointed: gate_from_env(),
        })
    }

    fn named(&self, name: &str) -> Result<Set> {
        check_set_name(name)?;
        let pointed = self
            .pointed
            .iter()
            .filter(|(_, n)| n == name)
            .map(|(place, _)| place);
        // By its name, not from the list: a place may let us in without letting
        // us list it.
        for place in pointed.chain(&self.places.dirs) {
            if let Some(dir) = SetDir::open(place, name)?.filter(SetDir::has_gate) {
                return Set::open_in(dir, name);
            }
        }
        let known: Vec<String> = self.known()?.into_keys().collect();
        Err(no_set(format!("there is no set {name}"), &known))
    }

    fn unnamed(&self) -> Result<Set> {
        if let Some((place, name)) = &self.pointed
            && let Some(dir) = SetDir::open(place, name)?.filter(SetDir::has_gate)
        {
            return Set::open_in(dir, name);
        }
        let mut found = self.list()?;
        if found.len() > 1 {
            let used = |l: &Listed| l.set.as_ref().is_ok_and(|s| s.is_in_use().unwrap_or(false));
            let names: Vec<String> = found
                .iter()
                .map(|l| {
                    if used(l) {
                        format!("{} (in use)", l.name)
                    } else {
                        l.name.clone()
                    }
                })
                .collect();
            found.retain(used);
            if found.len() != 1 {
                return Err(
                    Error::usage(format!("there are several sets: {}", names.join(", ")))
                        .next("say which one by its name"),
                );
            }
        }
        match found.pop() {
            Some(only) => only.set,
            None => Err(no_set("there is no set".into(), &[])),
        }
    }

    fn list(&self) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for (name, place) in self.known()? {
            let dir = place.join(&name);
            let set = match SetDir::open(&place, &name) {
                Ok(Some(found)) => Set::open_in(found, &name),
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            listed.push(Listed { name, dir, set });
        }
        Ok(listed)
    }

    /// Every directory that holds a gate: its place by its name; of two with one
    /// name, the one the shim would find.
    fn known(&self) -> Result<BTreeMap<String, PathBuf>> {
        let mut known = BTreeMap::new();
        if let Some((place, name)) = &self.pointed {
            known.insert(name.clone(), place.clone());
        }
        for place in &self.places.dirs {
            let entries = match stdfs::read_dir(place) {
                Ok(entries) => entries,
                Err(cause)
                    if matches!(
                        cause.kind(),
                        ErrorKind::NotFound | ErrorKind::PermissionDenied
                    ) =>
                {
                    continue;
                }
                Err(cause) => {
                    return Err(
                        Error::new(format!("cannot list {}: {cause}", place.display()))
                            .next("point SNAPSHIM_DIR at a directory on a tmpfs, or unset it"),
                    );
                }
            };
            for entry in entries.flatten() {
                let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                    continue;
                };
                let gate = entry.path().join(GATE);
                if check_set_name(&name).is_ok() && gate.symlink_metadata().is_ok() {
                    known.entry(name).or_insert_with(|| place.clone());
                }
            }
        }
        Ok(known)
    }
}

/// The right to coordinate a set; ends with the value, and with the process.
#[derive(Debug)]
pub struct SetLock {
    file: stdfs::File,
}

impl SetLock {
    /// Writes who holds the lock, for others' messages; nothing depends on it.
    fn note(&self, pid: u32) {
        let _ = self.file.set_len(0);
        if pid != 0 {
            let _ = self.file.write_all_at(format!("{pid}\n").as_bytes(), 0);
        }
    }
}

impl Drop for SetLock {
    fn drop(&mut self) {
        self.note(0);
    }
}

/// Who a lock file says holds it.
fn holder(file: &stdfs::File) -> Option<u32> {
    let mut text = [0; 16];
    let len = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..len]).ok()?.trim().parse().ok()
}

/// Opens the lock file, making it if it is absent.
fn open_lock(dir: &SetDir, shared: &Sharing) -> Result<stdfs::File> {
    let path = dir.path.join(LOCK);
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let cannot = |cause: Errno| {
        Error::new(format!("cannot open {}: {cause}", path.display()))
            .next("run as the user the set belongs to, or have it shared with --gate-group")
    };
    let file = match fs::openat(dir.fd(), LOCK, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => {
            let file = fs::openat(
                dir.fd(),
                LOCK,
                flags | OFlags::CREATE,
                Mode::from_raw_mode(0o600),
            )
            .map_err(cannot)?;
            shared.apply(file.as_fd(), shared.file_mode(), &path)?;
            file
        }
        Err(cause) => return Err(cannot(cause)),
    };
    let stat = fs::fstat(&file).map_err(cannot)?;
    shared.check(&stat, "it", &path)?;
    Ok(file.into())
}

/// Reads `set.json`, which only we or root may have written: it says who else is trusted.
fn read_config(dir: &SetDir) -> Result<Config> {
    let path = dir.path.join(CONFIG);
    let again = || {
        format!(
            "end the programs of the set, remove {} and start again",
            dir.path.display()
        )
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = fs::openat(dir.fd(), CONFIG, flags, Mode::empty()).map_err(|cause| {
        Error::new(format!("cannot open {}: {cause}", path.display())).next(again())
    })?;
    let stat = fs::fstat(&file).context(|| format!("examine {}", path.display()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::new(format!(
            "cannot use {}: it is not a regular file",
            path.display()
        ))
        .next(again()));
    }
    Sharing::default().check(&stat, "it", &path)?;
    let mut text = String::new();
    stdfs::File::from(file)
        .take(MAX_CONFIG)
        .read_to_string(&mut text)
        .context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).map_err(|cause| {
        Error::new(format!("cannot understand {}: {cause}", path.display())).next(again())
    })
}

/// Writes `set.json`, whole or not at all.
fn write_config(dir: &SetDir, config: &Config) -> Result<()> {
    let path = dir.path.join(CONFIG);
    let what = || format!("write {}", path.display());
    let mut text = serde_json::to_vec_pretty(config).context(what)?;
    text.push(b'\n');
    let temporary = format!(".{CONFIG}.{:016x}", gate_file::random()?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Read by those the gate is shared with; the directory keeps out all others.
    let mode = Mode::from_raw_mode(if config.sharing.is_shared() {
        0o644
    } else {
        0o600
    });
    let file = fs::openat(dir.fd(), &temporary, flags, mode).context(what)?;
    let written = fs::fchmod(&file, mode)
        .map_err(std::io::Error::from)
        .and_then(|()| stdfs::File::from(file).write_all_at(&text, 0))
        .and_then(|()| Ok(fs::renameat(dir.fd(), &temporary, dir.fd(), CONFIG)?));
    if written.is_err() {
        let _ = fs::unlinkat(dir.fd(), &temporary, AtFlags::empty());
    }
    written.context(what)
}

/// Place and name of the set that `SNAPSHIM_GATE` points into.
fn gate_from_env() -> Option<(PathBuf, String)> {
    let gate = PathBuf::from(env::var_os("SNAPSHIM_GATE")?);
    if !gate.is_absolute() || gate.file_name()? != GATE || gate.symlink_metadata().is_err() {
        return None;
    }
    let dir = gate.parent()?;
    let name = dir.file_name()?.to_str()?.to_owned();
    check_set_name(&name).ok()?;
    Some((dir.parent()?.to_owned(), name))
}

fn no_set(message: String, known: &[String]) -> Error {
    let next = "start a program with `snapshim run -- APP`, \
                or make a set with `snapshim env --name NAME --watch PATH`";
    if known.is_empty() {
        Error::usage(message).next(next)
    } else {
        Error::usage(message).next(format!("there are: {}; or {next}", known.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;
    use crate::store::policy::{Count, Room};

    /// A place for gates and a directory to watch, removed with the value.
    struct Scratch {
        search: Search,
        data: PathBuf,
    }

    impl Scratch {
        fn new() -> Scratch {
            let id = gate_file::random().unwrap();
            let data = env::temp_dir().join(format!("snapshim-set-{id:016x}"));
            stdfs::create_dir_all(data.join("a")).unwrap();
            let place = PathBuf::from(format!("/dev/shm/snapshim-set-{id:016x}"));
            let places = Places {
                dirs: vec![place],
                chosen: true,
            };
            Scratch {
                search: Search {
                    places,
                    pointed: None,
                },
                data: data.canonicalize().unwrap(),
            }
        }

        fn wanted(&self, root: &str) -> Wanted {
            Wanted {
                roots: vec![self.data.join(root)],
                ..Wanted::default()
            }
        }

        fn make(&self, name: &str, wanted: &Wanted) -> Result<Set> {
            Set::create_among(&self.search.places, name, wanted)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = stdfs::remove_dir_all(&self.data);
            let _ = stdfs::remove_dir_all(&self.search.places.dirs[0]);
        }
    }

    #[track_caller]
    fn message<T>(result: Result<T>) -> String {
        match result {
            Ok(_) => panic!("it should be an error"),
            Err(error) => {
                assert!(error.next.is_some(), "no next step: {}", error.message);
                error.message
            }
        }
    }

    #[test]
    fn a_name_may_be_left_out_while_there_is_one_set() {
        let scratch = Scratch::new();
        assert_eq!(message(scratch.search.unnamed()), "there is no set");
        assert_eq!(message(scratch.search.named("one")), "there is no set one");
        drop(scratch.make("one", &scratch.wanted("a")).unwrap());
        assert_eq!(scratch.search.unnamed().unwrap().name, "one");
        drop(scratch.make("two", &scratch.wanted("a")).unwrap());
        assert_eq!(
            message(scratch.search.unnamed()),
            "there are several sets: one, two"
        );
        assert_eq!(scratch.search.named("two").unwrap().name, "two");
        let error = scratch.search.named("three").unwrap_err();
        assert!(error.next.unwrap().contains("there are: one, two"));

        let used = scratch.make("two", &scratch.wanted("a")).unwrap();
        assert_eq!(
            scratch.search.unnamed().unwrap().name,
            "two",
            "the only one in use"
        );
        let _both = scratch.make("one", &scratch.wanted("a")).unwrap();
        let expected = "there are several sets: one (in use), two (in use)";
        assert_eq!(message(scratch.search.unnamed()), expected);
        let place = used.place().to_owned();
        let pointed = Search {
            places: scratch.search.places.clone(),
            pointed: Some((place, "one".into())),
        };
        assert_eq!(pointed.unnamed().unwrap().name, "one");
        assert!(message(scratch.search.named("../one")).contains("cannot be the name of a set"));
    }

    #[test]
    fn settings_are_kept_while_in_use_and_taken_on_otherwise() {
        let scratch = Scratch::new();
        let first = scratch.make("s", &scratch.wanted("a")).unwrap();
        let gate = first.gate_id;
        let again = scratch.make("s", &scratch.wanted("a")).unwrap();
        assert_eq!(again.config, first.config);
        let other = message(scratch.make("s", &scratch.wanted("b")));
        assert!(
            other.starts_with("the set s is in use with other settings: it watches "),
            "{other}"
        );
        let mut wanted = scratch.wanted("a");
        wanted.policy.last = Some(Count::Only(3));
        wanted.excludes = vec![scratch.data.join("a/x")];
        wanted.max_hold_ms = Some(5);
        let other = message(scratch.make("s", &wanted));
        for part in [
            "does not exclude",
            "longest hold is 1000 ms, not 5 ms",
            "keeps all",
        ] {
            assert!(other.contains(part), "{other}");
        }
        drop((first, again));
        let set = scratch.make("s", &wanted).unwrap();
        assert_eq!(set.config.policy, wanted.policy);
        assert_eq!(set.gate_id, gate, "the gate stays");
        assert_eq!(scratch.search.named("s").unwrap().config, set.config);
    }

    #[test]
    fn one_coordinator_at_a_time() {
        let scratch = Scratch::new();
        let set = scratch.make("s", &scratch.wanted("a")).unwrap();
        let lock = set.lock(Duration::ZERO).unwrap();
        let other = scratch.search.named("s").unwrap();
        let pid = std::process::id();
        assert_eq!(other.lock_holder(), Some(pid));
        let why = message(other.lock(Duration::from_millis(5)));
        assert_eq!(
            why,
            format!("the set s is being checkpointed by process {pid}")
        );
        drop(lock);
        assert_eq!(other.lock_holder(), None);
        assert!(other.lock(Duration::ZERO).is_ok());
    }

    #[test]
    fn a_damaged_or_foreign_configuration_is_refused() {
        let scratch = Scratch::new();
        let set = scratch.make("s", &scratch.wanted("a")).unwrap();
        let config = set.dir.join(CONFIG);
        stdfs::write(&config, "{").unwrap();
        assert!(message(scratch.search.named("s")).starts_with("cannot understand "));
        stdfs::remove_file(&config).unwrap();
        assert!(message(scratch.search.named("s")).starts_with("cannot open "));
        std::os::unix::fs::symlink("/etc/hostname", &config).unwrap();
        assert!(message(scratch.search.named("s")).starts_with("cannot open "));
    }

    #[test]
    fn what_is_watched_is_made_canonical() {
        let scratch = Scratch::new();
        let data = &scratch.data;
        std::os::unix::fs::symlink(data.join("a"), data.join("link")).unwrap();
        assert_eq!(
            resolve(&data.join("link/new/file")).unwrap(),
            data.join("a/new/file")
        );
        assert_eq!(resolve(&data.join("a/../a/./b")).unwrap(), data.join("a/b"));
        assert!(message(resolve(&data.join("absent/../b"))).contains("\"..\""));
        let wanted = Wanted {
            roots: ["a", "a/b", "link", "c", "a"]
                .map(|p| data.join(p))
                .to_vec(),
            ..Wanted::default()
        };
        assert_eq!(
            wanted.resolve().unwrap().roots,
            [data.join("a"), data.join("c")]
        );
        assert_eq!(message(Wanted::default().resolve()), "nothing is watched");
    }

    #[test]
    fn a_store_inside_what_is_watched_must_be_excluded() {
        let scratch = Scratch::new();
        let data = &scratch.data;
        let mut wanted = scratch.wanted("a");
        let with = |wanted: &mut Wanted, store: &str| {
            wanted.store = Some(data.join(store));
            wanted.resolve()
        };
        assert!(message(with(&mut wanted, "a/s")).contains("which is watched"));
        assert!(message(with(&mut wanted, "a")).contains("lies in the store"));
        assert!(message(with(&mut wanted, "")).contains("lies in the store"));
        assert!(with(&mut wanted, "a/.snapshim").is_ok());
        assert!(with(&mut wanted, "beside").is_ok());
        wanted.excludes = vec![data.join("a/s")];
        let config = with(&mut wanted, "a/s/deep").unwrap();
        assert_eq!(config.excludes, [data.join("a/s"), data.join("a/s/deep")]);
        wanted.excludes = vec![data.clone()];
        assert!(message(wanted.resolve()).contains("is watched and excluded"));
    }

    #[test]
    fn a_configuration_survives_the_file() {
        let odd = PathBuf::from(OsStr::from_bytes(b"/\xff\xfe"));
        let config = Config {
            roots: vec![odd.clone(), "/b".into()],
            excludes: vec![odd.clone()],
            store: odd,
            max_hold_ms: 7,
            policy: Policy {
                last: Some(Count::Only(2)),
                min_free: Some(Room::Percent(5)),
                ..Policy::default()
            },
            verify: Some(Verify {
                command: "check $1".to_owned(),
                timeout_ms: 1,
                writable: true,
            }),
            no_digest: true,
            asks: Asks {
                stdio_records: true,
                refuse_rings: false,
                mark_blocks: true,
            },
            sharing: Sharing {
                owner: Some(1),
                group: None,
            },
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
    }
}
