//! Which layer holds a process: what is patched in it, seen from outside.
//!
//! The shim says nothing; the bytes do. A process is held by its sites if every
//! file it has mapped executable has a complete table, and every window of every
//! table begins with a jump into the shim's memory.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{Mode, OFlags};
use snapshim_gate::sites::JUMP;

use super::cache::{self, Cache, Entry};
use crate::hold::process::{self, Pid};

/// The first byte of the jump that replaces a window: `jmp rel32`.
const JMP: u8 = 0xe9;
/// Most lines of a map that are read.
const MAX_LINES: usize = 100_000;
/// How the shim names memory of its own.
const SHIM_MEMORY: &[u8] = b"/memfd:snapshim";

/// What holds a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Why its sites do not; `None` if they do.
    pub not_sites: Option<String>,
    /// Executable memory that is of no file.
    pub notes: Vec<String>,
}

impl Layer {
    /// `sites` or `symbols`.
    pub fn name(&self) -> &'static str {
        match self.not_sites {
            None => "sites",
            Some(_) => "symbols",
        }
    }

    /// The weaker of two looks.
    #[must_use]
    pub fn and(mut self, other: Layer) -> Layer {
        self.not_sites = self.not_sites.or(other.not_sites);
        for note in other.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        self
    }

    /// All there is to say, for people.
    pub fn all_notes(&self) -> Vec<String> {
        self.not_sites.iter().chain(&self.notes).cloned().collect()
    }
}

/// Looks at processes with one directory of tables; computes those that are missing,
/// so that the next start finds them.
#[derive(Debug)]
pub struct Looker {
    cache: Result<Cache, String>,
    /// Tables of files, by inode and path as the map shows them.
    known: RefCell<Tables>,
}

/// Files by inode and path.
type Tables = HashMap<(u64, Vec<u8>), Rc<Known>>;

/// A mapped file.
#[derive(Debug)]
struct Known {
    file: File,
    table: Result<Entry, String>,
}

impl Default for Looker {
    fn default() -> Looker {
        Looker {
            cache: Cache::open(None),
            known: RefCell::default(),
        }
    }
}

impl Looker {
    /// A looker with these tables.
    pub fn with(cache: Cache) -> Looker {
        Looker {
            cache: Ok(cache),
            known: RefCell::default(),
        }
    }

    /// What holds a process that has the gate mapped.
    pub fn look(&self, pid: Pid) -> Layer {
        match self.try_look(pid) {
            Ok(layer) => layer,
            Err(why) => Layer {
                not_sites: Some(why),
                notes: Vec::new(),
            },
        }
    }

    fn try_look(&self, pid: Pid) -> Result<Layer, String> {
        let cache = self
            .cache
            .as_ref()
            .map_err(|why| format!("there are no site tables: {why}"))?;
        // The first thread may have ended before the others.
        let pid = process::live_thread(pid).unwrap_or(pid);
        let map = Map::of(pid)?;
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|why| format!("its memory cannot be read: {why}"))?;
        let mut layer = Layer::default();
        let mut add = |why: String| {
            layer.not_sites.get_or_insert(why);
        };
        for instance in map.instances() {
            let line = instance.line;
            let name = base_name(&line.path);
            let known = match self.known(cache, pid, line) {
                Ok(known) => known,
                Err(why) => {
                    add(format!("{name} is not patched: {why}"));
                    continue;
                }
            };
            match &known.table {
                Ok(table) if table.is_unpatchable() => {
                    add(format!(
                        "{name} must not be patched: its libc cancels threads by address"
                    ));
                }
                Ok(table) if !table.is_complete() => {
                    add(format!(
                        "{name} is not patched: it has system calls that cannot be"
                    ));
                }
                Ok(table) => {
                    let bias = cache::load_bias(&known.file, instance.start);
                    let patched = |bias: u64| {
                        let mut records = table.records.iter();
                        records.all(|r| map.is_patched(&memory, bias.wrapping_add(r.address)))
                    };
                    if !bias.is_some_and(patched) {
                        add(format!("{name} is not patched"));
                    }
                }
                Err(_) if !instance.is_executable => {}
                Err(why) => add(format!("{name} is not patched: {why}")),
            }
        }
        layer.notes = map.generated();
        Ok(layer)
    }

    /// The file behind a line of a map, and its table.
    fn known(&self, cache: &Cache, pid: Pid, line: &Line) -> Result<Rc<Known>, String> {
        let key = (line.ino, line.path.to_vec());
        if let Some(known) = self.known.borrow().get(&key) {
            return Ok(Rc::clone(known));
        }
        let file = open(pid, line)?;
        let table = cache.table_of(&file);
        let known = Rc::new(Known { file, table });
        self.known.borrow_mut().insert(key, Rc::clone(&known));
        Ok(known)
    }
}

/// Opens the file that is mapped, and no other of that name.
fn open(pid: Pid, line: &Line) -> Result<File, String> {
    let direct = format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        line.range.start, line.range.end
    );
    let mut named = PathBuf::from(format!("/proc/{pid}/root"));
    named.push(
        Path::new(OsStr::from_bytes(&line.path))
            .strip_prefix("/")
            .unwrap_or(Path::new("")),
    );
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    // The first needs privileges, but finds files that were replaced.
    for path in [Path::new(&direct), &named] {
        if let Ok(file) = rustix::fs::open(path, flags, Mode::empty()).map(File::from)
            && file
                .metadata()
                .is_ok_and(|m| m.ino() == line.ino && m.is_file())
        {
            return Ok(file);
        }
    }
    Err("its file was replaced, or cannot be read".into())
}

/// What `/proc/PID/maps` says.
struct Map {
    lines: Vec<Line>,
}

/// One line of it.
#[derive(Debug)]
struct Line {
    range: Range<u64>,
    is_executable: bool,
    offset: u64,
    ino: u64,
    path: Vec<u8>,
}

/// A file as it was loaded once.
struct Instance<'a> {
    line: &'a Line,
    /// Where its beginning is mapped.
    start: u64,
    /// It has executable mappings of its own; else the shim's memory is in their place.
    is_executable: bool,
}

impl Map {
    fn of(pid: Pid) -> Result<Map, String> {
        let text = fs::read(format!("/proc/{pid}/maps"))
            .map_err(|why| format!("its mappings cannot be read: {why}"))?;
        Ok(Map::parse(&text))
    }

    fn parse(text: &[u8]) -> Map {
        let lines = text.split(|b| *b == b'\n').take(MAX_LINES);
        Map {
            lines: lines.filter_map(Line::parse).collect(),
        }
    }

    /// The files that are mapped executable, or whose code the shim has replaced.
    fn instances(&self) -> Vec<Instance<'_>> {
        let mut found: Vec<Instance<'_>> = Vec::new();
        // Where the beginning of each file was mapped last, going upwards.
        let mut starts: HashMap<(u64, &[u8]), u64> = HashMap::new();
        let mut last: Option<&Line> = None;
        for line in &self.lines {
            let is_file = line.is_file();
            if is_file && line.offset == 0 {
                starts.insert((line.ino, &line.path), line.start());
            }
            let of = match is_file {
                true => Some(line),
                false if line.path.starts_with(SHIM_MEMORY) => last,
                false => None,
            };
            if line.is_executable
                && let Some(of) = of
                && !of.is_shim()
            {
                let start = starts.get(&(of.ino, of.path.as_slice())).copied();
                // Mapped without its beginning: it is not loaded as a library is.
                let start = start.unwrap_or(0);
                let known = found
                    .iter_mut()
                    .find(|i| i.start == start && i.line.ino == of.ino);
                match known {
                    Some(known) => known.is_executable |= is_file,
                    None => found.push(Instance {
                        line: of,
                        start,
                        is_executable: is_file,
                    }),
                }
            }
            if is_file {
                last = Some(line);
            }
        }
        found
    }

    /// Whether the code at `address` is a jump into the shim's memory.
    fn is_patched(&self, memory: &File, address: u64) -> bool {
        let mut jump = [0; JUMP];
        if memory.read_exact_at(&mut jump, address).is_err() || jump[0] != JMP {
            return false;
        }
        let offset = i32::from_le_bytes([jump[1], jump[2], jump[3], jump[4]]);
        let target = address
            .wrapping_add(JUMP as u64)
            .wrapping_add_signed(offset.into());
        let index = self.lines.partition_point(|l| l.range.end <= target);
        let line = self.lines.get(index).filter(|l| l.range.contains(&target));
        line.is_some_and(|l| l.is_executable && (l.is_shim() || l.is_memory()))
    }

    /// Executable memory that neither a file nor the shim put there.
    fn generated(&self) -> Vec<String> {
        let is_generated = |line: &&Line| {
            line.is_executable
                && !line.is_file()
                && !line.path.starts_with(SHIM_MEMORY)
                && !line.path.starts_with(b"[")
        };
        let bytes: u64 = self
            .lines
            .iter()
            .filter(is_generated)
            .map(|l| l.range.end - l.range.start)
            .sum();
        // The shim's own jumps may be in anonymous memory: a few pages.
        const FEW: u64 = 1 << 20;
        match bytes > FEW {
            true => vec![format!(
                "{} KiB of code made at run time: system calls in it are not seen",
                bytes / 1024
            )],
            false => Vec::new(),
        }
    }
}

impl Line {
    /// "start-end perms offset major:minor inode   path"
    fn parse(text: &[u8]) -> Option<Line> {
        let mut fields = text.splitn(6, |b| *b == b' ');
        let (start, end) = std::str::from_utf8(fields.next()?).ok()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let permissions = fields.next()?;
        let offset = hex(std::str::from_utf8(fields.next()?).ok()?)?;
        let _device = fields.next()?;
        let ino = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        Some(Line {
            range: hex(start)?..hex(end)?,
            is_executable: permissions.get(2) == Some(&b'x'),
            offset,
            ino,
            path: fields
                .next()
                .unwrap_or_default()
                .trim_ascii_start()
                .to_vec(),
        })
    }

    fn start(&self) -> u64 {
        self.range.start
    }

    fn is_file(&self) -> bool {
        self.ino != 0 && self.path.starts_with(b"/") && !self.is_memory()
    }

    /// Memory without a file that could be named.
    fn is_memory(&self) -> bool {
        let is_named = [&b"/memfd:"[..], b"/dev/zero", b"/SYSV", b"/anon_hugepage"];
        self.path.is_empty() || is_named.iter().any(|name| self.path.starts_with(name))
    }

    fn is_shim(&self) -> bool {
        let name = self.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        name.starts_with(b"libsnapshim") && name.windows(3).any(|w| w == b".so")
    }
}

fn base_name(path: &[u8]) -> String {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    String::from_utf8_lossy(name)
        .trim_end_matches(" (deleted)")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
55550000-55551000 r--p 00000000 fe:00 7   /bin/app
55551000-55553000 r-xp 00001000 fe:00 7   /bin/app
7f0000000000-7f0000010000 r--p 00000000 fe:00 9   /lib/libc.so.6
7f0000010000-7f0000050000 r-xp 00000000 00:01 77  /memfd:snapshim-text (deleted)
7f0000050000-7f0000060000 r--p 00050000 fe:00 9   /lib/libc.so.6
7f0001000000-7f0001001000 r--p 00000000 fe:00 5   /run/libsnapshim-0.so
7f0001001000-7f0001002000 r-xp 00001000 fe:00 5   /run/libsnapshim-0.so
7f0002000000-7f0002400000 rwxp 00000000 00:00 0 
7ffe00000000-7ffe00002000 r-xp 00000000 00:00 0   [vdso]
";

    #[test]
    fn what_is_mapped() {
        let map = Map::parse(MAPS);
        let found: Vec<(String, u64, bool)> = map
            .instances()
            .iter()
            .map(|i| (base_name(&i.line.path), i.start, i.is_executable))
            .collect();
        let expected = [
            ("app".to_owned(), 0x5555_0000, true),
            ("libc.so.6".to_owned(), 0x7f00_0000_0000, false),
        ];
        assert_eq!(found, expected);
        assert_eq!(map.generated().len(), 1);
        assert_eq!(Map::parse(b"nonsense\n-\n1-2 r").lines.len(), 0);
    }

    #[test]
    fn the_weaker_look_counts() {
        let held = Layer::default();
        let not = Layer {
            not_sites: Some("x".into()),
            notes: vec!["n".into()],
        };
        assert_eq!(held.clone().and(not.clone()).name(), "symbols");
        assert_eq!(not.clone().and(held.clone()).name(), "symbols");
        assert_eq!(held.clone().and(held).name(), "sites");
        assert_eq!(not.all_notes(), ["x", "n"]);
    }

    #[test]
    fn this_process_is_not_patched() {
        let dir = std::env::temp_dir().join(format!("snapshim-layer-{}", std::process::id()));
        let looker = Looker::with(Cache::open_at(&dir).unwrap());
        let layer = looker.look(std::process::id());
        let _ = fs::remove_dir_all(&dir);
        assert!(layer.not_sites.unwrap().contains(" is not patched"));
    }

    /// A process that is patched by hand, with jumps into the shim, and stopped.
    struct Patched {
        child: std::process::Child,
        dir: PathBuf,
        looker: Looker,
    }

    impl Patched {
        fn new() -> Patched {
            let dir = std::env::temp_dir().join(format!("snapshim-patched-{}", std::process::id()));
            let cache = Cache::open_at(&dir.join("sites")).unwrap();
            let shim = dir.join("libsnapshim-test.so");
            fs::write(&shim, crate::hold::shim_file::SHIM).unwrap();
            let mut command = std::process::Command::new("/bin/sleep");
            command
                .arg("60")
                .env("LD_PRELOAD", &shim)
                // It shall not patch itself.
                .env("SNAPSHIM_SITES", dir.join("none"))
                .env_remove("SNAPSHIM_GATE");
            Patched {
                child: command.spawn().unwrap(),
                dir,
                looker: Looker::with(cache),
            }
        }

        /// Where each record of each file is in memory, once the program has begun.
        fn sites(&self) -> Vec<u64> {
            let pid = self.child.id();
            let asleep = |pid| {
                matches!(
                    crate::hold::process::doing(pid, pid),
                    crate::hold::process::Doing::Call {
                        number: 230 | 35,
                        ..
                    }
                )
            };
            while !asleep(pid) {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            let cache = self.looker.cache.as_ref().unwrap();
            let map = Map::of(pid).unwrap();
            let mut sites = Vec::new();
            for instance in map.instances() {
                let known = self.looker.known(cache, pid, instance.line).unwrap();
                let bias = cache::load_bias(&known.file, instance.start).unwrap();
                let records = &known.table.as_ref().unwrap().records;
                sites.extend(records.iter().map(|r| bias.wrapping_add(r.address)));
            }
            sites
        }

        fn patch(&self, at: u64, target: u64) -> [u8; JUMP] {
            let path = format!("/proc/{}/mem", self.child.id());
            let memory = File::options().read(true).write(true).open(path).unwrap();
            let mut before = [0; JUMP];
            memory.read_exact_at(&mut before, at).unwrap();
            let offset = target.wrapping_sub(at + JUMP as u64) as u32;
            let [a, b, c, d] = offset.to_le_bytes();
            memory.write_all_at(&[JMP, a, b, c, d], at).unwrap();
            before
        }
    }

    impl Drop for Patched {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = fs::remove_dir_all(&self.dir);
        }
    }

    #[test]
    fn a_process_is_held_by_its_sites_if_all_are_patched() {
        let patched = Patched::new();
        let pid = patched.child.id();
        let sites = patched.sites();
        assert!(sites.len() > 50, "{}", sites.len());
        let look = || patched.looker.look(pid);
        assert_eq!(
            look().not_sites.as_deref(),
            Some("libc.so.6 is not patched")
        );
        let map = Map::of(pid).unwrap();
        let shim = map
            .lines
            .iter()
            .find(|l| l.is_shim() && l.is_executable)
            .unwrap()
            .range
            .start;
        for site in &sites {
            patched.patch(*site, shim);
        }
        assert_eq!(look(), Layer::default());
        // A jump to elsewhere is none of ours.
        patched.patch(sites[0], sites[1]);
        assert_eq!(look().name(), "symbols");
    }
}
