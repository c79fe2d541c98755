//! The digests of a snapshot in the making.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use blake3::Hash;
use blake3::hazmat::ChainingValue;
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use super::in_memory::InMemory;
use super::sidecar::{Identity, SMALL, Sidecar, Writer};
use super::tree::{self, CHUNK, Hashed};
use super::{Parsed, form, parse};
use crate::Result;
use crate::progress::Progress;
use crate::stop::Stop;
use crate::store::manifest::{FileRecord, Kind};
use crate::store::{Draft, Snapshot, extents, fault, open_below};
use crate::tree::seen::Seen;
use crate::urgency::Pauses;

/// What came of digesting a snapshot's files.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Digested {
    /// Bytes that were hashed; of all others the digest was known.
    pub hashed_bytes: u64,
    /// Files without a digest: they cannot be read, or there was no time.
    pub missing: Vec<PathBuf>,
}

/// Digests the regular files of a draft, from the draft's own copies as far as `in_memory` does not know
/// what was captured, and writes the draft's file `digests`. Compares with the newest snapshot of the
/// store, `previous`.
///
/// # Errors
///
/// A file cannot be read (but for want of permission), the store cannot be written.
pub fn digest(
    files: &mut [FileRecord],
    draft: &Draft,
    previous: Option<&Snapshot>,
    in_memory: &InMemory,
    stop: &Stop,
    progress: &mut dyn Progress,
) -> Result<Digested> {
    let previous = previous.and_then(Previous::of);
    let previous = previous.as_ref().map(Previous::indexed);
    let tree = draft.tree_fd()?;
    let sidecar = |cause| fault("write the digests of", &draft.tree(), cause);
    let mut writer = Writer::create(draft.dir()).map_err(sidecar)?;
    let is_file = |file: &&mut FileRecord| file.kind == Kind::File;
    let bytes = files.iter_mut().filter(is_file).map(|file| file.size);
    progress.begin("digesting", bytes.fold(0, u64::saturating_add));
    // Hard links: once for each inode.
    let mut linked: HashMap<u64, String> = HashMap::new();
    let mut digested = Digested::default();
    let mut pauses = Pauses::begin();
    for record in files.iter_mut().filter(is_file) {
        // Shared with the snapshot before, and not in the file: what it was there.
        if record.digest.is_some() && record.size <= SMALL {
            progress.advance(record.size);
            continue;
        }
        let path = record.path.0.as_path();
        let failed = |cause| {
            let place = draft.tree().join(path.strip_prefix("/").unwrap_or(path));
            fault("read back", &place, cause)
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match open_below(tree.as_fd(), path, flags) {
            Ok(file) => file,
            // Its mode keeps out even its owner, who is not root.
            Err(Errno::ACCESS | Errno::PERM) => {
                digested.missing.push(path.to_owned());
                continue;
            }
            Err(cause) => return Err(failed(cause)),
        };
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        // Nothing is read ahead: the device is to have pauses, in which the program gets its turn.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Random);
        let id = Identity::from(&Seen::of(&stat));
        if let Some(known) = linked.get(&id.ino) {
            progress.advance(id.size);
            record.digest = Some(known.clone());
            continue;
        }
        // Likewise; but what is known of its chunks goes on being known.
        let shared = record.digest.as_deref().map(parse);
        if let Some(Parsed::Blake3(digest)) = shared {
            progress.advance(id.size);
            if id.size > SMALL
                && let Some(known) = previous.as_ref().and_then(|p| p.values(id, &digest))
            {
                writer.add(id, &known).map_err(sidecar)?;
            }
            if stat.st_nlink > 1 {
                linked.insert(id.ino, form(&digest));
            }
            continue;
        }
        let captured = in_memory.find(path, id.size).unwrap_or_default();
        let hashed = one(path, &file, id, previous.as_ref(), captured, &mut |bytes| {
            pauses.pause();
            progress.advance(bytes);
            !stop.is_asked()
        });
        let hashed = match hashed {
            Ok(hashed) => hashed,
            Err(Errno::INTR) => {
                digested.missing.push(path.to_owned());
                continue;
            }
            Err(cause) => return Err(failed(cause)),
        };
        digested.hashed_bytes += hashed.hashed;
        if id.size > SMALL {
            writer.add(id, &hashed).map_err(sidecar)?;
        }
        let text = form(&hashed.digest);
        if stat.st_nlink > 1 {
            linked.insert(id.ino, text.clone());
        }
        record.digest = Some(text);
    }
    progress.end();
    writer.finish().map_err(sidecar)?;
    Ok(digested)
}

fn one(
    path: &Path,
    file: &OwnedFd,
    id: Identity,
    previous: Option<&Indexed<'_>>,
    captured: &[Option<ChainingValue>],
    go_on: &mut dyn FnMut(u64) -> bool,
) -> rustix::io::Result<Hashed> {
    let range = |number: u64| {
        let start = number * CHUNK;
        start..start.saturating_add(CHUNK).min(id.size)
    };
    // That was hashed, too, only earlier.
    let count = Cell::new(0);
    let known_since = |number: u64| {
        let value = (*captured.get(usize::try_from(number).ok()?)?)?;
        let range = range(number);
        count.set(count.get() + (range.end - range.start));
        Some(value)
    };
    let counted = |hashed: Hashed| Hashed {
        hashed: hashed.hashed + count.get(),
        ..hashed
    };
    let known = match previous {
        Some(previous) if id.size > SMALL => previous.find(path, file),
        _ => None,
    };
    let Some((known, known_size, differing)) = known else {
        return tree::hash_with(file, id.size, &known_since, go_on).map(counted);
    };
    if differing.is_empty() && known_size == id.size {
        return match go_on(id.size) {
            true => Ok(known),
            false => Err(Errno::INTR),
        };
    }
    let value = |number: u64| {
        let std::ops::Range { start, end } = range(number);
        // In order, and not overlapping.
        let after = differing.partition_point(|range| range.end <= start);
        let differs = differing.get(after).is_some_and(|range| range.start < end);
        let value = || known.values.get(usize::try_from(number).ok()?).copied();
        // The last chunk of a file that had another size is another chunk.
        let is_whole = start.saturating_add(CHUNK).min(known_size) == end;
        let value = (!differs && is_whole).then(value).flatten();
        value.or_else(|| known_since(number))
    };
    tree::hash_with(file, id.size, &value, go_on).map(counted)
}

/// The snapshot to compare with.
struct Previous<'a> {
    snapshot: &'a Snapshot,
    sidecar: Sidecar,
}

/// The same, with its files by path.
struct Indexed<'a> {
    previous: &'a Previous<'a>,
    files: HashMap<&'a Path, &'a FileRecord>,
}

impl<'a> Previous<'a> {
    fn of(snapshot: &'a Snapshot) -> Option<Previous<'a>> {
        let sidecar = snapshot.is_own.then(|| Sidecar::open(snapshot.dir()))??;
        Some(Previous { snapshot, sidecar })
    }

    fn indexed(&self) -> Indexed<'_> {
        let files = self.snapshot.manifest.files.iter();
        Indexed {
            previous: self,
            files: files
                .filter(|file| file.kind == Kind::File && file.size > SMALL)
                .map(|file| (file.path.as_ref(), file))
                .collect(),
        }
    }
}

impl Indexed<'_> {
    /// The chaining values of a file that is shared with it.
    fn values(&self, id: Identity, digest: &Hash) -> Option<Hashed> {
        self.previous.sidecar.values(id, digest)
    }

    /// What is known of the file that had the same path: its digest and values, its
    /// size, and the ranges in which `file` may differ from it.
    fn find(
        &self,
        path: &Path,
        file: &OwnedFd,
    ) -> Option<(Hashed, u64, Vec<std::ops::Range<u64>>)> {
        let record = self.files.get(path)?;
        let (theirs, stat) = self.previous.snapshot.open_file(record).ok()?;
        let seen = Seen::of(&stat);
        let id = Identity::from(&seen);
        // The manifest and the file beside it must tell of the same bytes.
        let Parsed::Blake3(digest) = parse(record.digest.as_deref()?) else {
            return None;
        };
        let sidecar = &self.previous.sidecar;
        let known = sidecar.find(id).filter(|known| known.digest == digest);
        // Further names move a ctime, too.
        let known = known.or_else(|| match seen.mtime_ns == record.mtime_ns {
            true => sidecar.values(id, &digest),
            false => None,
        })?;
        let differing = extents::may_differ(file, &theirs).ok()??;
        Some((known, id.size, differing))
    }
}
