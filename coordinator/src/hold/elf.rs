//! Whether the shim can be loaded into a program, asked before it is started.
//!
//! The dynamic linker fails open: a program that cannot take the shim runs
//! without it and says nothing. So everything that is known to make that happen
//! is refused here, by name.

use std::env;
use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::prctl;
use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::process::{getegid, geteuid, getgid, getuid};

/// How many interpreters the kernel follows.
const MAX_INTERPRETERS: usize = 5;
/// Most program headers that are read (the kernel takes no more than 64 KiB of them).
const MAX_HEADERS: u16 = 1024;
const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

/// Why a program cannot be run under the shim.
#[derive(Debug)]
pub struct Refusal {
    /// The program, or the interpreter it names.
    pub path: PathBuf,
    /// What is in the way.
    pub cause: Cause,
}

/// What is in the way.
#[derive(Debug)]
pub enum Cause {
    /// There is no such program.
    NotFound,
    /// It cannot be executed at all.
    NotExecutable(String),
    /// It is made for another kind of machine.
    Machine(u16),
    /// It is a 32-bit program.
    Class,
    /// It is statically linked; `go` if by the Go toolchain.
    Static {
        /// Whether it carries a Go build id.
        go: bool,
    },
    /// It runs as another user or group, and so ignores preload libraries.
    SetId,
    /// It gains capabilities, and so ignores preload libraries.
    Capabilities,
}

impl Refusal {
    /// The exit code that shells use for it, or 1.
    pub fn exit_code(&self) -> u8 {
        match self.cause {
            Cause::NotFound => 127,
            Cause::NotExecutable(_) => 126,
            _ => 1,
        }
    }

    /// What the user can do.
    pub fn next(&self) -> &'static str {
        match self.cause {
            Cause::NotFound => "check the name, or give the path of the program",
            Cause::NotExecutable(_) => "check its permissions and its first line",
            Cause::Machine(_) | Cause::Class => {
                "use a build of the program for this machine, of the same width as snapshim"
            }
            Cause::Static { .. } => {
                "use a dynamically linked build of the program, or start it as usual and take \
                 snapshots from outside with `snapshim snap`; `snapshim doctor -- APP` says more"
            }
            Cause::SetId | Cause::Capabilities => {
                "run snapshim as the user it would run as, or use a copy without these rights, or \
                 take snapshots from outside with `snapshim snap`; `snapshim doctor -- APP` says more"
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.cause {
            Cause::NotFound => write!(f, "{path}: there is no such program"),
            Cause::NotExecutable(why) => write!(f, "{path}: it cannot be executed: {why}"),
            Cause::Machine(machine) => write!(
                f,
                "{path}: the shim cannot be loaded: it is a program for another machine (ELF machine {machine})"
            ),
            Cause::Class => {
                write!(
                    f,
                    "{path}: the shim cannot be loaded: it is a 32-bit program"
                )
            }
            Cause::Static { go: false } => {
                write!(
                    f,
                    "{path}: the shim cannot be loaded: it is statically linked"
                )
            }
            Cause::Static { go: true } => write!(
                f,
                "{path}: the shim cannot be loaded: it is a statically linked Go program"
            ),
            Cause::SetId => write!(
                f,
                "{path}: the shim cannot be loaded: it is set-user-id or set-group-id, and the \
                 system ignores preload libraries for it"
            ),
            Cause::Capabilities => write!(
                f,
                "{path}: the shim cannot be loaded: it has file capabilities, and the system \
                 ignores preload libraries for it"
            ),
        }
    }
}

/// Checks the program that a shell would run for `name`; returns its path.
pub fn check_program(name: &OsStr) -> Result<PathBuf, Refusal> {
    let path = find(name)?;
    check_chain(&path)?;
    Ok(path)
}

/// Finds `name` as execvp(3) does.
fn find(name: &OsStr) -> Result<PathBuf, Refusal> {
    let plain = PathBuf::from(name);
    if name.as_bytes().contains(&b'/') {
        return executable(&plain).map(|()| plain);
    }
    // What execvp uses when PATH is not set.
    let search = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    let mut denied = None;
    for dir in env::split_paths(&search).filter(|_| !name.is_empty()) {
        let path = if dir.as_os_str().is_empty() {
            Path::new(".").join(name)
        } else {
            dir.join(name)
        };
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err(refusal) if matches!(refusal.cause, Cause::NotFound) => {}
            Err(refusal) => denied = denied.or(Some(refusal)),
        }
    }
    Err(denied.unwrap_or(Refusal {
        path: plain,
        cause: Cause::NotFound,
    }))
}

/// Whether `path` is a file that may be executed.
fn executable(path: &Path) -> Result<(), Refusal> {
    let refuse = |cause| {
        Err(Refusal {
            path: path.into(),
            cause,
        })
    };
    match path.metadata() {
        Ok(meta) if meta.is_dir() => {
            return refuse(Cause::NotExecutable("it is a directory".into()));
        }
        Ok(_) => {}
        Err(cause)
            if matches!(
                cause.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return refuse(Cause::NotFound);
        }
        Err(cause) => return refuse(Cause::NotExecutable(cause.to_string())),
    }
    // With the effective ids, as execve; and it knows of noexec mounts.
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    match accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => Ok(()),
        Err(cause) => refuse(Cause::NotExecutable(cause.to_string())),
    }
}

/// Follows the interpreters of a script to the program that is really loaded.
fn check_chain(path: &Path) -> Result<(), Refusal> {
    let mut path = path.to_owned();
    for _ in 0..MAX_INTERPRETERS {
        match interpreter(&path)? {
            None => return check_file(&path),
            Some(next) => {
                executable(&next).map_err(|refusal| Refusal {
                    path: path.clone(),
                    cause: Cause::NotExecutable(format!("its interpreter {refusal}")),
                })?;
                path = next;
            }
        }
    }
    let cause = Cause::NotExecutable("too many interpreters call each other".into());
    Err(Refusal { path, cause })
}

/// The program file that the kernel would load for `path`, after the interpreters of
/// scripts, each of which is a program as well; in this order.
pub fn interpreters(path: &Path) -> Vec<PathBuf> {
    let mut chain = vec![path.to_owned()];
    while chain.len() <= MAX_INTERPRETERS
        && let Ok(Some(next)) = interpreter(&chain[chain.len() - 1])
    {
        chain.push(next);
    }
    chain
}

/// The dynamic linker an ELF file names, or which it is; `None` if there is none.
pub fn dynamic_linker(path: &Path) -> Option<PathBuf> {
    const MAX_NAME: u64 = 4096;
    let file = File::open(path).ok()?;
    let mut head = [0; EHDR_SIZE];
    let head = read_up_to(&file, &mut head, 0).ok()?;
    if !head.starts_with(b"\x7fELF") {
        return None;
    }
    let offset = u64_at(head, 32)?;
    for index in 0..u64::from(u16_at(head, 56)?.min(MAX_HEADERS)) {
        let mut header = [0; PHDR_SIZE];
        let at = offset.checked_add(index * PHDR_SIZE as u64)?;
        file.read_exact_at(&mut header, at).ok()?;
        if u32_at(&header, 0) == Some(PT_INTERP) {
            let mut name = vec![0; u64_at(&header, 32)?.min(MAX_NAME) as usize];
            file.read_exact_at(&mut name, u64_at(&header, 8)?).ok()?;
            let name = name.split(|b| *b == 0).next()?;
            return Some(PathBuf::from(OsStr::from_bytes(name)));
        }
    }
    is_dynamic_linker(path).then(|| path.to_owned())
}

/// The interpreter of a script; `None` for a program.
fn interpreter(path: &Path) -> Result<Option<PathBuf>, Refusal> {
    let mut head = [0; 256];
    // A program that may be run but not read: nothing can be said against it here.
    let Ok(head) = File::open(path).and_then(|f| read_up_to(&f, &mut head, 0)) else {
        return Ok(None);
    };
    if head.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    let Some(rest) = head.strip_prefix(b"#!") else {
        // execvp gives a file of no known kind to the shell.
        return Ok(Some("/bin/sh".into()));
    };
    let line = rest.split(|b| *b == b'\n').next().unwrap_or(&[]);
    let name = line
        .split(|b| matches!(b, b' ' | b'\t' | 0))
        .find(|word| !word.is_empty());
    match name {
        Some(name) => Ok(Some(PathBuf::from(OsStr::from_bytes(name)))),
        None => Err(Refusal {
            path: path.into(),
            cause: Cause::NotExecutable("its first line names no interpreter".into()),
        }),
    }
}

/// Checks one program file, which is not a script.
pub fn check_file(path: &Path) -> Result<(), Refusal> {
    let refuse = |cause| Refusal {
        path: path.into(),
        cause,
    };
    check_privileges(path).map_err(refuse)?;
    let Ok(file) = File::open(path) else {
        return Ok(());
    };
    check_elf(&file, path).map_err(refuse)
}

/// Refuses what makes the kernel set AT_SECURE.
fn check_privileges(path: &Path) -> Result<(), Cause> {
    let Ok(meta) = path.metadata() else {
        return Ok(());
    };
    let nosuid = statvfs(path).is_ok_and(|fs| fs.f_flag.contains(StatVfsMountFlags::NOSUID));
    if nosuid || prctl::get_no_new_privs().unwrap_or(false) {
        return Ok(());
    }
    let mode = meta.mode();
    let other_user = mode & 0o4000 != 0 && meta.uid() != getuid().as_raw();
    // Without the group's execute bit, set-group-id means mandatory locking.
    let other_group = mode & 0o2010 == 0o2010 && meta.gid() != getgid().as_raw();
    if other_user || other_group || getuid() != geteuid() || getgid() != getegid() {
        return Err(Cause::SetId);
    }
    // Root gains nothing by them.
    if !getuid().is_root() && has_capabilities(path) {
        return Err(Cause::Capabilities);
    }
    Ok(())
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    let mut value = [0_u8; 64];
    rustix::fs::getxattr(&path, c"security.capability", &mut value[..]).is_ok_and(|len| len > 0)
}

/// Checks the headers of an ELF file. What is not one is left to execve.
fn check_elf(file: &File, path: &Path) -> Result<(), Cause> {
    let mut head = [0; EHDR_SIZE];
    let head = read_up_to(file, &mut head, 0).unwrap_or(&[]);
    if !head.starts_with(b"\x7fELF") {
        return Ok(());
    }
    let malformed = || Cause::NotExecutable("its ELF headers are damaged".into());
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    let machine = u16_at(head, 18).ok_or_else(malformed)?;
    if head.get(5) != Some(&LITTLE_ENDIAN) {
        return Err(Cause::Machine(machine.swap_bytes()));
    }
    if head.get(4) != Some(&CLASS_64) {
        return Err(Cause::Class);
    }
    if machine != MACHINE {
        return Err(Cause::Machine(machine));
    }
    let offset = u64_at(head, 32).ok_or_else(malformed)?;
    let size = u16_at(head, 54).ok_or_else(malformed)?;
    let count = u16_at(head, 56).ok_or_else(malformed)?;
    if usize::from(size) != PHDR_SIZE || count > MAX_HEADERS {
        return Err(malformed());
    }
    let mut go = false;
    for index in 0..u64::from(count) {
        let mut header = [0; PHDR_SIZE];
        let at = offset
            .checked_add(index * PHDR_SIZE as u64)
            .ok_or_else(malformed)?;
        file.read_exact_at(&mut header, at)
            .map_err(|_| malformed())?;
        match u32_at(&header, 0) {
            Some(PT_INTERP) => return Ok(()),
            Some(PT_NOTE) => go |= u64_at(&header, 8).is_some_and(|at| is_go_note(file, at)),
            _ => {}
        }
    }
    if is_dynamic_linker(path) {
        return Ok(());
    }
    Err(Cause::Static { go })
}

/// Whether the note at `offset` is the Go toolchain's: its name follows three words.
fn is_go_note(file: &File, offset: u64) -> bool {
    let mut note = [0; 16];
    file.read_exact_at(&mut note, offset).is_ok() && note[12..] == *b"Go\0\0"
}

/// The dynamic linker names no interpreter, but run as a program it loads one
/// with its preload libraries.
pub fn is_dynamic_linker(path: &Path) -> bool {
    let path = path.canonicalize().unwrap_or_else(|_| path.into());
    let name = path.file_name().unwrap_or_default().as_bytes();
    [&b"ld-linux"[..], b"ld-musl", b"ld-2.", b"ld.so"].iter().any(|p| name.starts_with(p))
        // musl's linker is its libc.
        || (name.starts_with(b"libc.") && path.parent().is_some_and(|d| d.ends_with("lib")))
}

/// Reads until the buffer is full or the file ends.
fn read_up_to<'a>(file: &File, buffer: &'a mut [u8], at: u64) -> io::Result<&'a [u8]> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], at + len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(&buffer[..len])
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::{self, Command};

    use super::*;

    /// A directory of its own, removed with the value.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = env::temp_dir().join(format!("snapshim-elf-{name}-{}", process::id()));
            fs::create_dir(&dir).unwrap();
            Scratch(dir)
        }

        fn file(&self, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn check(path: &Path) -> Result<PathBuf, Refusal> {
        check_program(path.as_os_str())
    }

    #[track_caller]
    fn refusal(path: &Path) -> Refusal {
        check(path).expect_err("a refusal")
    }

    #[test]
    fn ordinary_programs_and_scripts_are_taken() {
        let scratch = Scratch::new("taken");
        assert!(check_program(OsStr::new("true")).is_ok());
        assert!(check(Path::new("/bin/sh")).is_ok());
        for (name, text) in [
            ("one", "#!/bin/sh\n"),
            ("two", "#! \t/bin/sh -e\n"),
            ("none", "echo\n"),
        ] {
            let script = scratch.file(name, text.as_bytes(), 0o755);
            check(&script).unwrap();
            let outer = format!("#!{}\n", script.display());
            check(&scratch.file("outer", outer.as_bytes(), 0o755)).unwrap();
        }
    }

    #[test]
    fn what_shells_refuse_is_refused_as_shells_do() {
        let scratch = Scratch::new("shells");
        let codes = [
            (PathBuf::from("no-such-program-anywhere"), 127),
            (scratch.0.join("absent"), 127),
            (PathBuf::new(), 127),
            (scratch.0.clone(), 126),
            (scratch.file("plain", b"#!/bin/sh\n", 0o644), 126),
            (scratch.file("badline", b"#!\n", 0o755), 126),
            (scratch.file("badinterp", b"#!/no/such\n", 0o755), 126),
        ];
        for (path, code) in codes {
            let refusal = refusal(&path);
            assert_eq!(refusal.exit_code(), code, "{refusal}");
        }
        let own = scratch.0.join("loop");
        scratch.file("loop", format!("#!{}\n", own.display()).as_bytes(), 0o755);
        assert!(refusal(&own).to_string().contains("too many interpreters"));
    }

    /// A copy of a real program with some bytes of its head changed.
    fn changed(scratch: &Scratch, at: usize, bytes: &[u8]) -> PathBuf {
        let mut program = fs::read(env::current_exe().unwrap()).unwrap();
        program[at..at + bytes.len()].copy_from_slice(bytes);
        scratch.file("changed", &program, 0o755)
    }

    #[test]
    fn other_machines_are_named() {
        let scratch = Scratch::new("machines");
        assert!(check(&changed(&scratch, 0, b"\x7fELF")).is_ok());
        let path = changed(&scratch, 18, &8_u16.to_le_bytes());
        assert!(
            refusal(&path)
                .to_string()
                .contains("another machine (ELF machine 8)")
        );
        let path = changed(&scratch, 4, &[1]);
        assert!(
            refusal(&path)
                .to_string()
                .contains("it is a 32-bit program")
        );
        // No program headers: nothing names a dynamic linker.
        let path = changed(&scratch, 56, &0_u16.to_le_bytes());
        assert!(
            refusal(&path)
                .to_string()
                .contains("it is statically linked")
        );
    }

    #[test]
    fn static_programs_are_refused() {
        let scratch = Scratch::new("static");
        let source = scratch.file("p.c", b"int main(void) { return 0; }\n", 0o644);
        for flag in ["-static", "-static-pie"] {
            let program = scratch.0.join("p");
            let built = Command::new("cc")
                .arg(flag)
                .arg("-o")
                .arg(&program)
                .arg(&source)
                .output();
            // Without a compiler, or without a static libc, there is nothing to try.
            if built.is_ok_and(|o| o.status.success()) {
                assert!(
                    refusal(&program)
                        .to_string()
                        .contains("it is statically linked")
                );
                let script = format!("#!{}\n", program.display());
                let script = scratch.file("script", script.as_bytes(), 0o755);
                assert_eq!(refusal(&script).path, program);
            }
        }
    }

    #[test]
    fn privileged_programs_are_refused_unless_we_are_that_user() {
        let scratch = Scratch::new("privileged");
        let path = changed(&scratch, 0, b"\x7fELF");
        let set_id = fs::Permissions::from_mode(0o4755);
        fs::set_permissions(&path, set_id.clone()).unwrap();
        assert!(check(&path).is_ok(), "it is ours");
        if geteuid().is_root() && !prctl::get_no_new_privs().unwrap() {
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            // A change of owner takes the bit away.
            fs::set_permissions(&path, set_id).unwrap();
            if !statvfs(&path)
                .unwrap()
                .f_flag
                .contains(StatVfsMountFlags::NOSUID)
            {
                assert!(refusal(&path).to_string().contains("set-user-id"));
            }
        }
    }

    #[test]
    fn damaged_headers_never_panic() {
        let scratch = Scratch::new("damaged");
        let head = fs::read(env::current_exe().unwrap()).unwrap()[..2048].to_vec();
        let mut seed = 88_172_645_463_325_252_u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as usize
        };
        for _ in 0..500 {
            let mut bytes = head.clone();
            for _ in 0..1 + next() % 20 {
                let at = 4 + next() % (64 + 56);
                bytes[at] = next() as u8;
            }
            bytes.truncate(next() % (bytes.len() + 1));
            let _ = check(&scratch.file("damaged", &bytes, 0o755));
        }
    }
}
