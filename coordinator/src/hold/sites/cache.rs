//! Site tables on disk: one file for each ELF file, named after its identity: what
//! nobody but root can have made by its build id, which anybody can copy into a file
//! of his own; every other file by what tells it, and this content of it, from others.
//!
//! A table is written under another name and renamed into place; programs read it
//! when they start. Not to be able to write one is no reason not to run a program.

use std::env;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{self, FileType, Mode, OFlags};
use snapshim_gate::sites::{COMPLETE, Header, LIBC, MAX_SITES, Record, SUFFIX, Table, UNPATCHABLE};

use super::super::gate_file::{self, Sharing};
use super::super::shim_file;
use super::image;
use super::{Sites, compute};

/// The variable that tells programs, and us, where the tables are.
pub const SITES: &str = "SNAPSHIM_SITES";

/// Largest file that is read for its table.
const MAX_FILE: u64 = 1 << 30;
/// How much of a file is read to find its build id.
const HEAD: usize = 4096;
const MAX_TABLE: usize = size_of::<Header>() + MAX_SITES as usize * size_of::<Record>();

/// What one table says.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name of the table.
    pub name: String,
    /// [`COMPLETE`] and the like.
    pub flags: u32,
    /// Its records.
    pub records: Vec<Record>,
    /// It was there already.
    pub was_there: bool,
}

impl Entry {
    /// Every system call of the file that matters is in it.
    pub fn is_complete(&self) -> bool {
        self.flags & COMPLETE != 0
    }

    /// The file must be left as it is.
    pub fn is_unpatchable(&self) -> bool {
        self.flags & UNPATCHABLE != 0
    }

    /// It is a C library.
    pub fn is_libc(&self) -> bool {
        self.flags & LIBC != 0
    }
}

/// A directory of tables, checked: nobody else can change what is in it.
#[derive(Debug)]
pub struct Cache {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cache {
    /// The directory the environment and the user select: `$SNAPSHIM_SITES`, the
    /// system's or the user's cache, or beside the shim. Made if it is absent.
    pub fn open(shim: Option<&Path>) -> Result<Cache, String> {
        let path = place(shim).ok_or("there is no place for it: set SNAPSHIM_SITES")?;
        Cache::open_at(&path).map_err(|cause| format!("{}: {cause}", path.display()))
    }

    /// Opens, or makes, this directory.
    pub fn open_at(path: &Path) -> Result<Cache, String> {
        if !path.is_absolute() {
            return Err("it is not an absolute path".into());
        }
        shim_file::make_dirs(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = fs::open(path, flags, Mode::empty()).map_err(|e| e.to_string())?;
        let stat = fs::fstat(&dir).map_err(|e| e.to_string())?;
        shim_file::check_above(path)?;
        Sharing::default()
            .check(&stat, "it", path)
            .map_err(|e| e.message)?;
        Ok(Cache {
            path: path.to_owned(),
            dir,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The table of the file at `path`: the one that is there, or a new one.
    pub fn table(&self, path: &Path) -> Result<Entry, String> {
        // A FIFO must not stop us.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = fs::open(path, flags, Mode::empty()).map_err(|e| e.to_string())?;
        self.table_of(&File::from(file))
    }

    /// The same for an open file.
    pub fn table_of(&self, file: &File) -> Result<Entry, String> {
        let name = identity(file).map_err(|e| e.to_string())?;
        if let Some(entry) = self.load(&name) {
            return Ok(entry);
        }
        let mut bytes = Vec::new();
        let mut limited = file.take(MAX_FILE + 1);
        limited.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if bytes.len() as u64 > MAX_FILE {
            return Err("it is larger than 1 GiB".into());
        }
        let sites = compute(&bytes).map_err(|e| e.to_string())?;
        if identity(file).map_err(|e| e.to_string())? != name {
            return Err("it was changed while it was read".into());
        }
        self.store(&name, &sites).map_err(|cause| {
            format!(
                "its table cannot be written to {}: {cause}",
                self.path.display()
            )
        })?;
        Ok(Entry {
            name,
            flags: sites.flags,
            records: sites.records,
            was_there: false,
        })
    }

    /// The table of this name, if there is one that can be used.
    pub fn load(&self, name: &str) -> Option<Entry> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = fs::openat(&self.dir, name, flags, Mode::empty()).ok()?;
        let stat = fs::fstat(&file).ok()?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let len = usize::try_from(stat.st_size)
            .ok()
            .filter(|len| *len <= MAX_TABLE)?;
        Sharing::default().check(&stat, "it", &self.path).ok()?;
        // Aligned as the table must be.
        let mut words = vec![0_u64; len.div_ceil(8)];
        // SAFETY: the bytes of the words, which any bits are valid for, and no longer.
        let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), len) };
        File::from(file).read_exact_at(bytes, 0).ok()?;
        let table = Table::read(bytes).filter(|_| is_file)?;
        let is_sound = table.records.iter().all(|r| r.window().is_some());
        is_sound.then(|| Entry {
            name: name.to_owned(),
            flags: table.header.flags,
            records: table.records.to_vec(),
            was_there: true,
        })
    }

    fn store(&self, name: &str, sites: &Sites) -> Result<(), String> {
        let random = gate_file::random().map_err(|e| e.message)?;
        let temporary = format!(".{name}.{random:016x}");
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let file = fs::openat(&self.dir, &temporary, flags, mode).map_err(|e| e.to_string())?;
        let mut file = File::from(file);
        let written = file
            .write_all(&sites.to_bytes())
            .and_then(|()| Ok(fs::fchmod(file.as_fd(), mode)?))
            .and_then(|()| Ok(fs::renameat(&self.dir, &temporary, &self.dir, name)?));
        if written.is_err() {
            let _ = fs::unlinkat(&self.dir, &temporary, fs::AtFlags::empty());
        }
        written.map_err(|e| e.to_string())
    }
}

/// Where the tables are, or shall be.
fn place(shim: Option<&Path>) -> Option<PathBuf> {
    let variable = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| !p.as_os_str().is_empty())
    };
    if let Some(chosen) = variable(SITES) {
        return Some(chosen);
    }
    if rustix::process::geteuid().is_root() {
        return Some("/var/cache/snapshim/sites".into());
    }
    let absolute = |name| variable(name).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    match cache {
        Some(cache) => Some(cache.join("snapshim/sites")),
        None => Some(shim?.parent()?.join("sites")),
    }
}

/// The name of a file's table: its build id if only root can have written it, else
/// what stat says of it. The shim does the same.
pub fn identity(file: &File) -> std::io::Result<String> {
    const OTHERS_WRITE: u32 = 0o022;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    let is_roots = meta.uid() == 0 && meta.mode() & OTHERS_WRITE == 0;
    if is_roots && let Some(id) = build_id(file) {
        let id: String = id.iter().map(|b| format!("{b:02x}")).collect();
        return Ok(id + SUFFIX);
    }
    // The mtime is whatever its owner says.
    let ctime = i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec());
    Ok(format!(
        "f-{}-{}-{}-{ctime}{SUFFIX}",
        meta.dev(),
        meta.ino(),
        meta.size()
    ))
}

/// The build id, read without the rest of the file.
pub fn build_id(file: &File) -> Option<Vec<u8>> {
    let headers = program_headers(file)?;
    let headers = headers.chunks_exact(56);
    headers.filter_map(image::note_range).find_map(|range| {
        let mut notes = vec![0; (range.end - range.start).min(HEAD as u64) as usize];
        let len = file.read_at(&mut notes, range.start).ok()?;
        image::build_id_in(&notes[..len]).map(<[u8]>::to_vec)
    })
}

/// What has to be added to a virtual address of the file if its beginning is mapped
/// at `start`.
pub fn load_bias(file: &File, start: u64) -> Option<u64> {
    let headers = program_headers(file)?;
    let first = headers.chunks_exact(56).find_map(image::first_address)?;
    Some(start.wrapping_sub(first))
}

/// The program headers of an ELF file, as far as they are in its first page.
fn program_headers(file: &File) -> Option<Vec<u8>> {
    let mut head = [0; HEAD];
    let len = file.read_at(&mut head, 0).ok()?;
    let head = &head[..len];
    if !head.starts_with(b"\x7fELF\x02\x01") || image::u16_at(head, 54)? != 56 {
        return None;
    }
    let at = usize::try_from(image::u64_at(head, 32)?).ok()?;
    let len = usize::from(image::u16_at(head, 56)?) * 56;
    let rest = head.get(at..)?;
    Some(rest[..len.min(rest.len())].to_vec())
}
