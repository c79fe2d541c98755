//! The file `digests` of a snapshot: what is known of its files' chunks.
//!
//! All numbers are little-endian. A head (`HEAD` bytes): the mark, the version, the
//! chunk's size as a power of two, the number of entries. Then the entries: inode number
//! and ctime (ns since 1970) of the file in the snapshot when it was digested, its size, its
//! digest; and, if it has more than one chunk, the chaining value of each.
//!
//! It only saves work. One that is missing, damaged or of another version is no error, and
//! no value is used before all of a file's were merged to its digest.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use blake3::Hash;
use blake3::hazmat::ChainingValue;
use rustix::fs::{FileType, Mode, OFlags};

use super::tree::{self, CHUNK, Hashed};
use crate::tree::seen::Seen;

/// Its name in the snapshot's directory.
const NAME: &str = "digests";
const MARK: &[u8; 16] = b"snapshim digests";
const VERSION: u32 = 1;
const HEAD: u64 = 16 + 4 + 4 + 8;
/// Bytes of an entry without chaining values.
const ENTRY: usize = 8 + 8 + 8 + 32;
/// One larger than this (of some 250 TB of files) is not read.
const MAX: u64 = 8 << 30;
/// Files up to this size are not in it: to read one again is cheaper than to look it up.
pub(super) const SMALL: u64 = 16 << 10;

/// What is written for a file beside its digest: as what it can be known again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) ino: u64,
    /// ns since 1970. It moves with every write: what was written to since is not used.
    pub(super) ctime_ns: i64,
    pub(super) size: u64,
}

impl From<&Seen> for Identity {
    fn from(seen: &Seen) -> Identity {
        Identity {
            ino: seen.id.ino,
            ctime_ns: seen.ctime_ns,
            size: seen.size,
        }
    }
}

/// Written while the files are digested.
pub(super) struct Writer {
    out: BufWriter<File>,
    count: u64,
}

impl Writer {
    pub(super) fn create(dir: impl AsFd) -> rustix::io::Result<Writer> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, NAME, flags, Mode::RUSR | Mode::WUSR)?;
        let mut out = BufWriter::new(File::from(file));
        out.write_all(&head(0)).map_err(errno)?;
        Ok(Writer { out, count: 0 })
    }

    pub(super) fn add(&mut self, id: Identity, hashed: &Hashed) -> rustix::io::Result<()> {
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&id.ino.to_le_bytes());
        entry[8..16].copy_from_slice(&id.ctime_ns.to_le_bytes());
        entry[16..24].copy_from_slice(&id.size.to_le_bytes());
        entry[24..].copy_from_slice(hashed.digest.as_bytes());
        self.count += 1;
        self.out
            .write_all(&entry)
            .and_then(|()| self.out.write_all(hashed.values.as_flattened()))
            .map_err(errno)
    }

    /// Completes it and makes it durable.
    pub(super) fn finish(mut self) -> rustix::io::Result<()> {
        self.out.flush().map_err(errno)?;
        let file = self.out.get_ref();
        file.write_all_at(&head(self.count), 0)
            .and_then(|()| file.sync_all())
            .map_err(errno)
    }
}

fn errno(error: io::Error) -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)
}

fn head(count: u64) -> Vec<u8> {
    let mut head = MARK.to_vec();
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&CHUNK.trailing_zeros().to_le_bytes());
    head.extend_from_slice(&count.to_le_bytes());
    head
}

/// Of a published snapshot.
#[derive(Debug)]
pub(super) struct Sidecar {
    file: File,
    /// By inode number.
    entries: HashMap<u64, Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    id: Identity,
    digest: Hash,
    /// Where its chaining values begin.
    values: u64,
}

impl Sidecar {
    /// That of the snapshot with this directory; `None` if there is none to use.
    pub(super) fn open(dir: impl AsFd) -> Option<Sidecar> {
        // O_NONBLOCK: a FIFO in its place must not make us wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, NAME, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return None;
        }
        let length = u64::try_from(stat.st_size).ok().filter(|l| *l <= MAX)?;
        let file = File::from(file);
        let entries = index(&file, length)?;
        Some(Sidecar { file, entries })
    }

    /// What is known of a file of the snapshot: its digest and chaining values, if
    /// it is still what it was and they belong together.
    pub(super) fn find(&self, id: Identity) -> Option<Hashed> {
        let place = self.entries.get(&id.ino).filter(|place| place.id == id)?;
        self.read(place)
    }

    /// The chaining values of a file of this digest, if they are known: whatever its ctime, which
    /// moves with each further name.
    pub(super) fn values(&self, id: Identity, digest: &Hash) -> Option<Hashed> {
        let is_it = |place: &&Place| place.id.size == id.size && place.digest == *digest;
        self.read(self.entries.get(&id.ino).filter(is_it)?)
    }

    fn read(&self, place: &Place) -> Option<Hashed> {
        let id = place.id;
        let count = usize::try_from(tree::kept(id.size)).ok()?;
        let mut values: Vec<ChainingValue> = vec![[0; 32]; count];
        self.file
            .read_exact_at(values.as_flattened_mut(), place.values)
            .ok()?;
        if count > 0 && tree::root(&values) != place.digest {
            return None;
        }
        Some(Hashed {
            digest: place.digest,
            values,
            hashed: 0,
        })
    }
}

/// Finds the entries of a file of `length` bytes, and that it ends with the last of them.
fn index(file: &File, length: u64) -> Option<HashMap<u64, Place>> {
    let mut input = BufReader::new(file);
    let mut start = [0; HEAD as usize];
    input.read_exact(&mut start).ok()?;
    let (known, count) = start.split_at(start.len() - 8);
    if known != &head(0)[..known.len()] {
        return None;
    }
    let count = u64::from_le_bytes(count.try_into().ok()?);
    let mut entries = HashMap::new();
    let mut at = HEAD;
    for _ in 0..count {
        let mut entry = [0; ENTRY];
        input.read_exact(&mut entry).ok()?;
        let word = |i: usize| -> Option<[u8; 8]> { entry.get(i..i + 8)?.try_into().ok() };
        let id = Identity {
            ino: u64::from_le_bytes(word(0)?),
            ctime_ns: i64::from_le_bytes(word(8)?),
            size: u64::from_le_bytes(word(16)?),
        };
        let digest = Hash::from_bytes(entry[24..].try_into().ok()?);
        let values = at + ENTRY as u64;
        at = tree::kept(id.size).checked_mul(32)?.checked_add(values)?;
        if at > length {
            return None;
        }
        input.seek_relative(i64::try_from(at - values).ok()?).ok()?;
        entries.insert(id.ino, Place { id, digest, values });
    }
    (at == length).then_some(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::scratch::Scratch;

    fn id(ino: u64, size: u64) -> Identity {
        Identity {
            ino,
            ctime_ns: 7,
            size,
        }
    }

    fn hashed(size: u64) -> Hashed {
        let values: Vec<ChainingValue> = (0..tree::kept(size)).map(|n| [n as u8; 32]).collect();
        Hashed {
            digest: match values.len() {
                0 => blake3::hash(b"small"),
                _ => tree::root(&values),
            },
            values,
            hashed: 0,
        }
    }

    /// A directory with a sidecar of three files.
    fn written() -> (Scratch, File) {
        let scratch = Scratch::new();
        let dir = File::open(scratch.path()).unwrap();
        let mut writer = Writer::create(&dir).unwrap();
        for (ino, size) in [(1, CHUNK), (2, 5 * CHUNK + 1), (3, 2 * CHUNK)] {
            writer.add(id(ino, size), &hashed(size)).unwrap();
        }
        writer.finish().unwrap();
        (scratch, dir)
    }

    #[test]
    fn what_was_written_is_read() {
        let (_scratch, dir) = written();
        let sidecar = Sidecar::open(&dir).unwrap();
        for (ino, size) in [(1, CHUNK), (2, 5 * CHUNK + 1), (3, 2 * CHUNK)] {
            assert_eq!(sidecar.find(id(ino, size)), Some(hashed(size)));
            assert_eq!(sidecar.find(id(ino, size + 1)), None);
        }
        assert_eq!(sidecar.find(id(4, CHUNK)), None);
        let written_to = Identity {
            ctime_ns: 8,
            ..id(2, 5 * CHUNK + 1)
        };
        assert_eq!(sidecar.find(written_to), None);
    }

    #[test]
    fn damage_is_never_believed() {
        let (scratch, dir) = written();
        let path = scratch.join(NAME);
        let good = std::fs::read(&path).unwrap();
        for cut in 0..good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            assert!(Sidecar::open(&dir).is_none(), "cut at {cut}");
        }
        let mut tried = 0;
        for at in 0..good.len() {
            for value in [0xff, good[at] ^ 1] {
                let mut bad = good.clone();
                bad[at] = value;
                std::fs::write(&path, &bad).unwrap();
                let Some(sidecar) = Sidecar::open(&dir) else {
                    continue;
                };
                for (ino, size) in [(2, 5 * CHUNK + 1), (3, 2 * CHUNK)] {
                    if let Some(found) = sidecar.find(id(ino, size)) {
                        assert_eq!(found, hashed(size), "byte {at}");
                        tried += 1;
                    }
                }
            }
        }
        assert!(tried > 100);
    }

    #[test]
    fn what_is_no_file_is_none() {
        let (scratch, dir) = written();
        let path = scratch.join(NAME);
        std::fs::rename(&path, scratch.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(Sidecar::open(&dir).is_none());
        std::fs::remove_file(&path).unwrap();
        assert!(Sidecar::open(&dir).is_none());
        rustix::fs::mknodat(&dir, NAME, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(Sidecar::open(&dir).is_none());
    }
}
