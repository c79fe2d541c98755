//! Which layer holds a process: what is patched in it, seen from outside.
//!
//! The shim says nothing; the bytes do. A process is held by its sites if every
//! file it has mapped executable has a complete table, and every window of every
//! table begins with a jump into the shim's memory.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
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
    /// It has code of its own, outside the C library, whose system calls nothing in the
    /// process can hold: neither sites nor symbols. Only stopping it does.
    pub escapes: bool,
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
        // What can only be held by stopping says more.
        self.not_sites = match other.escapes && !self.escapes {
            true => other.not_sites.or(self.not_sites),
            false => self.not_sites.or(other.not_sites),
        };
        self.escapes |= other.escapes;
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
    /// Tables of files, by device, inode and path as the map shows them.
    known: RefCell<Tables>,
}

/// Files by device, inode and path.
type Tables = HashMap<(Vec<u8>, u64, Vec<u8>), Rc<Known>>;

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
                ..Layer::default()
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
        let mut looked = Looked::default();
        for instance in map.instances() {
            let line = instance.line;
            let name = base_name(&line.path);
            let known = match self.known(cache, pid, line) {
                Ok(known) => known,
                Err(why) => {
                    looked.escapes(format!("{name} is not patched: {why}"));
                    continue;
                }
            };
            match &known.table {
                Ok(table) if table.is_unpatchable() => {
                    looked.weak(format!(
                        "{name} must not be patched: its libc cancels threads by address"
                    ));
                }
                Ok(table) if !table.is_complete() => {
                    let why = format!("{name} is not patched: it has system calls that cannot be");
                    match table.is_libc() {
                        true => looked.weak(why),
                        false => looked.escapes(why),
                    }
                }
                Ok(table) => {
                    let bias = cache::load_bias(&known.file, instance.start);
                    let mut patched = |bias: u64| {
                        table.records.iter().all(|r| {
                            let jump = map.jump(&memory, bias.wrapping_add(r.address));
                            jump.inspect(|to| looked.jumps.push(*to)).is_some()
                        })
                    };
                    if !bias.is_some_and(&mut patched) {
                        let why = format!("{name} is not patched");
                        // libc's calls are what the symbols are for, and the dynamic
                        // linker changes no files. Anybody else's, like those of a library
                        // that had no table when it was loaded, nothing holds.
                        match table.is_libc() || name.starts_with("ld-") {
                            true => looked.weak(why),
                            false => looked.escapes(why),
                        }
                    }
                }
                Err(_) if !instance.is_executable => {}
                Err(why) => looked.escapes(format!("{name} is not patched: {why}")),
            }
        }
        for line in map.lines.iter().filter(|l| l.is_foreign_memory_file()) {
            let name = base_name(&line.path);
            looked.escapes(format!("code in a memory file is not looked into: {name}"));
        }
        Ok(Layer {
            notes: map.generated(&looked.jumps),
            escapes: looked.escaping.is_some(),
            not_sites: looked.escaping.or(looked.weak),
        })
    }

    /// The file behind a line of a map, and its table.
    fn known(&self, cache: &Cache, pid: Pid, line: &Line) -> Result<Rc<Known>, String> {
        let key = (line.device.to_vec(), line.ino, line.path.to_vec());
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

/// What was found so far.
#[derive(Default)]
struct Looked {
    /// What is not held by its sites.
    weak: Option<String>,
    /// What nothing in the process holds.
    escaping: Option<String>,
    /// Where patched windows lead.
    jumps: Vec<u64>,
}

impl Looked {
    fn weak(&mut self, why: String) {
        self.weak.get_or_insert(why);
    }

    fn escapes(&mut self, why: String) {
        self.escaping.get_or_insert(why);
    }
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
    device: Vec<u8>,
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
                let known = found.iter_mut().find(|i| {
                    i.start == start && i.line.ino == of.ino && i.line.device == of.device
                });
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

    /// Where the code at `address` jumps to, if that is the shim's memory.
    fn jump(&self, memory: &File, address: u64) -> Option<u64> {
        let mut jump = [0; JUMP];
        memory.read_exact_at(&mut jump, address).ok()?;
        if jump[0] != JMP {
            return None;
        }
        let offset = i32::from_le_bytes([jump[1], jump[2], jump[3], jump[4]]);
        let target = address
            .wrapping_add(JUMP as u64)
            .wrapping_add_signed(offset.into());
        let index = self.lines.partition_point(|l| l.range.end <= target);
        let line = self
            .lines
            .get(index)
            .filter(|l| l.range.contains(&target))?;
        let is_ours = line.is_shim() || line.is_memory() && !line.is_foreign_memory_file();
        (line.is_executable && is_ours).then_some(target)
    }

    /// Executable memory that neither a file nor the shim put there: `jumps` are where
    /// patched windows lead, which is the shim's.
    fn generated(&self, jumps: &[u64]) -> Vec<String> {
        const PAGE: u64 = 4096;
        let generated = self.lines.iter().filter(|l| l.is_generated());
        let all: u64 = generated.clone().map(|l| l.range.end - l.range.start).sum();
        let ours: BTreeSet<u64> = jumps
            .iter()
            .filter(|to| generated.clone().any(|l| l.range.contains(to)))
            .map(|to| to / PAGE)
            .collect();
        let bytes = all.saturating_sub(ours.len() as u64 * PAGE);
        match bytes > 0 {
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
        let device = fields.next()?.to_vec();
        let ino = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        Some(Line {
            range: hex(start)?..hex(end)?,
            is_executable: permissions.get(2) == Some(&b'x'),
            offset,
            device,
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

    /// A memory file that the shim did not make.
    fn is_foreign_memory_file(&self) -> bool {
        self.is_executable
            && self.path.starts_with(b"/memfd:")
            && !self.path.starts_with(SHIM_MEMORY)
    }

    /// Executable, and neither of a file, nor a memory file, nor the kernel's own.
    fn is_generated(&self) -> bool {
        let is_kernels = [&b"[vdso]"[..], b"[vsyscall]", b"[uprobes]"].contains(&&*self.path);
        self.is_executable && !self.is_file() && !self.path.starts_with(b"/memfd:") && !is_kernels
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
7f0003000000-7f0003002000 r-xp 00000000 00:00 0 
7f0003010000-7f0003011000 r-xp 00000000 00:01 78  /memfd:plugin (deleted)
7f0003012000-7f0003013000 r--p 00000000 00:01 78  /memfd:plugin (deleted)
7ffd00000000-7ffd00002000 rwxp 00000000 00:00 0   [stack]
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
        let kib = |jumps: &[u64]| map.generated(jumps).concat();
        assert!(kib(&[]).starts_with("4112 KiB"), "{}", kib(&[]));
        // What a window jumps into is the shim's; only that page.
        assert!(kib(&[0x7f00_0300_0008]).starts_with("4108 KiB"));
        assert!(kib(&[0x7f00_0200_0008, 0x7f00_0200_0010, 0x5555_0000]).starts_with("4108 KiB"));
        let foreign: Vec<&Line> = map
            .lines
            .iter()
            .filter(|l| l.is_foreign_memory_file())
            .collect();
        assert!(foreign.len() == 1 && foreign[0].start() == 0x7f00_0300_0000_u64 + 0x1_0000);
        assert_eq!(Map::parse(b"nonsense\n-\n1-2 r").lines.len(), 0);
    }

    #[test]
    fn the_weaker_look_counts() {
        let held = Layer::default();
        let not = Layer {
            not_sites: Some("x".into()),
            notes: vec!["n".into()],
            escapes: false,
        };
        let escapes = Layer {
            not_sites: Some("y".into()),
            escapes: true,
            ..Layer::default()
        };
        assert_eq!(not.clone().and(escapes.clone()).all_notes(), ["y", "n"]);
        assert!(escapes.clone().and(held.clone()).escapes);
        assert_eq!(escapes.and(not.clone()).all_notes(), ["y", "n"]);
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
