//! Taking snapshots out of the store: those a policy does not keep, and what must go to make
//! room.

use std::time::Duration;

use jiff::tz::TimeZone;
use rustix::fs::{Access, AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::pace::Pace;
use super::policy::{self, Candidate, Class, Policy, Room, Why};
use super::{DEL, Listed, Store, StoreLock, fault};
use crate::{Error, Result};

/// How often, and how long apart, free space is looked at: file systems free what was removed
/// a little later.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// What a policy says of a snapshot.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The snapshot.
    pub listed: Listed,
    /// Why it is kept; nothing if it is to be removed.
    pub why: Vec<Why>,
}

impl Judged {
    /// Whether it stays.
    pub fn is_kept(&self) -> bool {
        !self.why.is_empty()
    }
}

/// What became of snapshots that were to be taken out.
#[derive(Clone, Debug, Default)]
pub struct Retired {
    /// Taken out.
    pub ids: Vec<String>,
    /// Left, because somebody reads them.
    pub busy: Vec<String>,
}

/// The space on the store's file system, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// What an ordinary user may still write.
    pub free: u64,
    /// What is asked to be free.
    pub wanted: u64,
}

impl Space {
    /// Whether there is less free than was asked for.
    pub fn is_short(self) -> bool {
        self.free < self.wanted
    }
}

impl Store {
    /// What `policy` says of every snapshot, oldest first. One whose manifest cannot be used
    /// is kept: it may be of a later version.
    ///
    /// # Errors
    ///
    /// The store's directory cannot be read.
    pub fn judge(&self, policy: &Policy) -> Result<Vec<Judged>> {
        let candidate = |listed: &Listed| {
            let head = listed.head.as_ref().ok()?;
            Some(Candidate {
                id: listed.id.clone(),
                time: head.cut_at()?,
                class: head.class(),
                is_pinned: head.pin.is_some(),
            })
        };
        let (candidates, mut judged): (Vec<_>, Vec<_>) = self
            .heads()?
            .into_iter()
            .map(|listed| {
                let why = Vec::new();
                (candidate(&listed), Judged { listed, why })
            })
            .unzip();
        let readable: Vec<Candidate> = candidates.iter().flatten().cloned().collect();
        let latest = self.latest();
        let zone = TimeZone::system();
        let mut why = policy::judge(&readable, latest.as_deref(), policy, &zone).into_iter();
        for (judged, candidate) in judged.iter_mut().zip(&candidates) {
            judged.why = match candidate {
                Some(_) => why.next().unwrap_or_default(),
                None => vec!["unreadable".into()],
            };
        }
        Ok(judged)
    }

    /// Takes out of the list what the policy does not keep.
    ///
    /// # Errors
    ///
    /// As [`Store::retire`].
    pub fn apply(&self, lock: &StoreLock, policy: &Policy) -> Result<Retired> {
        let judged = self.judge(policy)?.into_iter();
        let old: Vec<String> = judged
            .filter(|judged| !judged.is_kept())
            .map(|judged| judged.listed.id)
            .collect();
        self.retire(lock, &old)
    }

    /// Takes snapshots out of the list: each loses its name, by a rename to `.del-<id>`, and all
    /// of that is made durable, so that no half removed snapshot is ever listed. Their files
    /// go by [`Store::clear`]. One that somebody reads is left.
    ///
    /// # Errors
    ///
    /// One cannot be renamed; those before it are.
    pub fn retire(&self, lock: &StoreLock, ids: &[String]) -> Result<Retired> {
        let _ = lock;
        let mut retired = Retired::default();
        for id in ids {
            let failed = |cause| fault("remove the snapshot", &self.path.join(id), cause);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // What is no directory is read by nobody.
            let dir = rustix::fs::openat(&self.dir, id, flags, Mode::empty());
            if let Ok(dir) = &dir {
                match rustix::fs::flock(dir, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => {}
                    Err(Errno::WOULDBLOCK) => {
                        retired.busy.push(id.clone());
                        continue;
                    }
                    Err(cause) => return Err(failed(cause)),
                }
            }
            let gone = format!("{DEL}{id}");
            match rustix::fs::renameat(&self.dir, id, &self.dir, &gone) {
                // A copy of a store that was made over an older one has both.
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    super::remove_tree(&self.dir, gone.as_ref()).map_err(failed)?;
                    rustix::fs::renameat(&self.dir, id, &self.dir, &gone).map_err(failed)?;
                }
                renamed => renamed.map_err(failed)?,
            }
            retired.ids.push(id.clone());
        }
        if !retired.ids.is_empty() {
            rustix::fs::fsync(&self.dir).map_err(|cause| fault("write", &self.path, cause))?;
        }
        Ok(retired)
    }

    /// The space on the store's file system, when `room` is to be free there.
    ///
    /// # Errors
    ///
    /// The file system does not say.
    pub fn space(&self, room: Room) -> Result<Space> {
        let (free, size) = self.free_of()?;
        Ok(Space {
            free,
            wanted: room.of(size),
        })
    }

    /// What is free on the store's file system, bytes.
    ///
    /// # Errors
    ///
    /// The file system does not say.
    pub fn free(&self) -> Result<u64> {
        self.free_of().map(|(free, _)| free)
    }

    /// Whether so little is free that what is on its way out had better go at once.
    ///
    /// # Errors
    ///
    /// The file system does not say.
    pub fn is_nearly_full(&self) -> Result<bool> {
        let (free, size) = self.free_of()?;
        Ok(free < size / 20)
    }

    /// What is free on the store's file system, and its size, in bytes.
    fn free_of(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::fstatvfs(&self.dir)
            .map_err(|cause| fault("ask for the free space at", &self.path, cause))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok((bytes(stat.f_bavail), bytes(stat.f_blocks)))
    }

    /// Removes snapshots while less than `room` is free: first what the policy does not keep,
    /// then the failed, the unverified and the good ones, each oldest first. Never pinned ones,
    /// the one `latest` points to, the newest good one, the newest of all, and those that
    /// cannot be read. Returns what was removed, and what there is now.
    ///
    /// # Errors
    ///
    /// The store cannot be read, or one cannot be removed; those before it are.
    pub fn make_room(
        &self,
        lock: &StoreLock,
        room: Room,
        policy: &Policy,
    ) -> Result<(Vec<String>, Space)> {
        let mut space = self.space(room)?;
        let mut removed = Vec::new();
        if !space.is_short() {
            return Ok((removed, space));
        }
        let (_, size) = self.free_of()?;
        if space.wanted > size {
            return Err(Error::new(format!(
                "--min-free {room} asks for {} bytes, and the file system of the store {} has only \
                 {size} in all; nothing was removed for it",
                space.wanted,
                self.path.display(),
            ))
            .next("ask for less with --min-free, or for a share (10%)"));
        }
        // What cannot be removed is told of by whoever clears last.
        if self
            .clear(&mut Pace::brisk())
            .map_or(true, |cleared| cleared > 0)
        {
            space = self.settled_space(room, space)?;
        }
        if !space.is_short() {
            return Ok((removed, space));
        }
        for id in self.expendable(policy)? {
            let retired = self.retire(lock, &[id])?;
            if retired.ids.is_empty() {
                continue;
            }
            let names = retired.ids.iter().map(|id| format!("{DEL}{id}"));
            let is_there = |name: String| {
                rustix::fs::accessat(&self.dir, name, Access::EXISTS, AtFlags::empty()).is_ok()
            };
            let cleared = self.clear(&mut Pace::brisk());
            if cleared.is_err() && names.into_iter().any(is_there) {
                // To take out more would not help, and cost them.
                cleared?;
            }
            removed.extend(retired.ids);
            space = self.settled_space(room, space)?;
            if !space.is_short() {
                break;
            }
        }
        Ok((removed, space))
    }

    /// The error that [`Store::make_room`] did not suffice.
    pub fn no_room(&self, room: Room, space: Space, removed: &[String]) -> Error {
        let after = match removed.len() {
            0 => "no snapshot may be removed for it".into(),
            _ => format!("to remove {} was not enough", removed.join(" ")),
        };
        Error::new(format!(
            "{} bytes are free on the file system of the store {}, and --min-free {room} asks for \
             {}; {after}",
            space.free,
            self.path.display(),
            space.wanted,
        ))
        .next(
            "free space there, unpin snapshots (`snapshim unpin`), ask for less with --min-free, \
             or choose another store with --store",
        )
    }

    /// What may go to make room, in that order.
    fn expendable(&self, policy: &Policy) -> Result<Vec<String>> {
        const NEVER: [&str; 4] = ["pinned", "latest", "newest", "unreadable"];
        let judged = self.judge(policy)?;
        let class = |judged: &Judged| judged.listed.head.as_ref().ok().map(|head| head.class());
        let is_good = |judged: &&Judged| class(judged) == Some(Class::Good);
        let newest_good = judged.iter().rev().find(is_good);
        let newest_good = newest_good.map(|judged| judged.listed.id.clone());
        let mut old: Vec<_> = judged
            .iter()
            .filter(|judged| !judged.why.iter().any(|why| NEVER.contains(&why.as_ref())))
            .filter(|judged| Some(&judged.listed.id) != newest_good.as_ref())
            .map(|judged| (judged.is_kept(), class(judged), judged.listed.id.clone()))
            .collect();
        old.sort();
        Ok(old.into_iter().map(|(_, _, id)| id).collect())
    }

    /// The space after something was removed, when the file system has come to it.
    fn settled_space(&self, room: Room, before: Space) -> Result<Space> {
        let mut space = before;
        // Best effort: it only makes the answer come sooner.
        let _ = rustix::fs::syncfs(&self.dir);
        for _ in 0..LOOKS {
            let now = self.space(room)?;
            let is_settled = now.free > before.free && now.free == space.free;
            space = now;
            if is_settled || !space.is_short() {
                break;
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
        Ok(space)
    }

    /// Whether the snapshot is pinned; also of one whose manifest is of a later version.
    pub fn is_pinned(&self, id: &str) -> bool {
        #[derive(serde::Deserialize)]
        struct Pinned {
            #[serde(default)]
            pin: Option<serde::de::IgnoredAny>,
        }
        let text = self
            .open_manifest(id)
            .and_then(|(_, file)| super::read::read_text(file));
        let pinned = text.map(|text| serde_json::from_slice::<Pinned>(&text));
        matches!(pinned, Ok(Ok(Pinned { pin: Some(_) })))
    }
}
