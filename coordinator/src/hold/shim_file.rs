//! The shim that this binary carries inside, put where programs can load it.
//!
//! A preload library that cannot be loaded is skipped by the dynamic linker with
//! no more than a message: the program would run, unprotected. So the file is
//! checked: that its place lets code be mapped, that its name survives in
//! `LD_PRELOAD`, that its bytes are ours, and by loading it once for a test.

use std::env;
use std::ffi::OsStr;
use std::fs as stdfs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::elf;
use super::gate_file::{self, Sharing};
use crate::{Error, Result};

/// `libsnapshim.so`, as built with this binary.
pub(super) static SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libsnapshim.so"));

/// The hidden command that the test of [`unpack`] runs, with the path to look for.
pub const LOAD_TEST: &str = "internal-load-test";

/// A path of a shim that programs can load: `$SNAPSHIM_SHIM`, or the embedded
/// one, unpacked into the first place that serves. `place` is where the gates lie.
pub fn unpack(place: &Path) -> Result<PathBuf> {
    if let Some(path) = env::var_os("SNAPSHIM_SHIM").filter(|p| !p.is_empty()) {
        let path = PathBuf::from(path);
        return nameable(&path)
            .and_then(|()| test_load(&path))
            .map(|()| path.clone())
            .map_err(|cause| {
                Error::usage(format!(
                    "cannot use SNAPSHIM_SHIM={}: {cause}",
                    path.display()
                ))
                .next("name a libsnapshim.so by its absolute path, or unset it")
            });
    }
    let mut refusals = Vec::new();
    for dir in candidates(place) {
        match unpack_into(&dir).and_then(|path| test_load(&path).map(|()| path)) {
            Ok(path) => return Ok(path),
            Err(cause) => refusals.push(format!("{}: {cause}", dir.display())),
        }
    }
    Err(Error::new(format!(
        "there is no place for libsnapshim.so that programs could load it from: {}",
        refusals.join("; ")
    ))
    .next(
        "set SNAPSHIM_DIR or XDG_CACHE_HOME to a directory of yours on a file system mounted \
         without noexec, with neither space nor colon in its path",
    ))
}

/// The directories to try, in this order.
fn candidates(place: &Path) -> Vec<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let variable = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let temporary = variable("TMPDIR").unwrap_or_else(|| "/tmp".into());
    let own = format!("snapshim-{uid}");
    let root = |path: &str| (uid == 0).then(|| PathBuf::from(path));
    let mut dirs: Vec<PathBuf> = [
        // A name no set can have.
        Some(place.join(".lib")),
        (uid != 0)
            .then(|| Some(variable("XDG_RUNTIME_DIR")?.join("snapshim/.lib")))
            .flatten(),
        root("/run/snapshim/lib"),
        Some(Path::new("/dev/shm").join(&own).join(".lib")),
        // Not what somebody else's HOME says: a root that kept it would leave
        // root's files there.
        (uid != 0)
            .then(|| cache.map(|c| c.join("snapshim/lib")))
            .flatten(),
        root("/var/cache/snapshim/lib"),
        Some(temporary.join(&own).join("lib")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut seen = Vec::new();
    dirs.retain(|dir| {
        !seen.contains(dir) && {
            seen.push(dir.clone());
            true
        }
    });
    dirs
}

/// Whether `LD_PRELOAD` can name `path`: the dynamic linker splits it at spaces
/// and colons and expands `$`.
fn nameable(path: &Path) -> std::result::Result<(), String> {
    if !path.is_absolute() {
        return Err("it is not an absolute path".into());
    }
    let bytes = path.as_os_str().as_bytes();
    if bytes
        .iter()
        .any(|b| matches!(b, b' ' | b':' | b'$' | b'\t' | b'\n'))
    {
        return Err("LD_PRELOAD cannot name it (space, colon or $ in the path)".into());
    }
    Ok(())
}

/// Name of the unpacked file: another content is another file, so that programs
/// keep what they have mapped.
fn file_name() -> String {
    // FNV-1a: only has to tell builds apart; the bytes are compared as well.
    let hash = SHIM.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("libsnapshim-{hash:016x}.so")
}

/// Writes the shim into `dir`, unless it is there; says why if that cannot be.
fn unpack_into(dir: &Path) -> std::result::Result<PathBuf, String> {
    let path = dir.join(file_name());
    nameable(&path)?;
    make_dirs(dir)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let at = fs::open(dir, flags, Mode::empty()).map_err(text)?;
    let stat = fs::fstat(&at).map_err(text)?;
    check_above(dir)?;
    Sharing::default()
        .check(&stat, "it", dir)
        .map_err(|e| e.message)?;
    if !is_in_place(at.as_fd(), &path)? {
        write(at.as_fd())?;
    }
    let file = fs::openat(
        &at,
        file_name(),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(text)?;
    // What the dynamic linker will do, and what noexec forbids.
    // SAFETY: a fresh private mapping, of a page that the file has, unmapped below.
    let mapped = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            4096,
            ProtFlags::READ | ProtFlags::EXEC,
            MapFlags::PRIVATE,
            &file,
            0,
        )
    };
    let at = mapped.map_err(|cause| match cause {
        Errno::PERM | Errno::ACCESS => "code cannot be run from there (mounted noexec?)".into(),
        other => text(other),
    })?;
    // SAFETY: the mapping made above, which nothing refers to.
    let _ = unsafe { rustix::mm::munmap(at, 4096) };
    Ok(path)
}

/// Makes `dir` and what is missing above it. Programs that run as another user
/// must be able to read it, so its mode does not depend on the umask.
pub(super) fn make_dirs(dir: &Path) -> std::result::Result<(), String> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|a| !a.exists()).collect();
    for step in missing.into_iter().rev() {
        match fs::mkdir(step, Mode::from_raw_mode(0o755)) {
            // The directory of the gates is made with its own mode by its own code.
            Ok(()) => fs::chmod(step, Mode::from_raw_mode(0o755)).map_err(text)?,
            Err(Errno::EXIST) => {}
            Err(cause) => return Err(format!("cannot make {}: {cause}", step.display())),
        }
    }
    Ok(())
}

/// Refuses a directory that somebody else could replace after it was checked:
/// programs will load code from this path for as long as they live.
pub(super) fn check_above(dir: &Path) -> std::result::Result<(), String> {
    for above in dir.ancestors().skip(1) {
        let mut stat = fs::stat(above).map_err(text)?;
        // Sticky: others may write there, but not touch what is ours.
        if stat.st_mode & 0o1000 != 0 {
            stat.st_mode &= !0o022;
        }
        Sharing::default()
            .check(&stat, "it", above)
            .map_err(|e| e.message)?;
    }
    Ok(())
}

/// Whether the file is there, ours or root's, not written by others, and byte for byte the shim.
fn is_in_place(dir: rustix::fd::BorrowedFd<'_>, path: &Path) -> std::result::Result<bool, String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match fs::openat(dir, file_name(), flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(false),
        // A link or the like: the new file takes its place.
        Err(Errno::LOOP | Errno::ACCESS) => return Ok(false),
        Err(cause) => return Err(text(cause)),
    };
    let stat = fs::fstat(&file).map_err(text)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
        || stat.st_mode & 0o555 != 0o555
        || Sharing::default().check(&stat, "it", path).is_err()
    {
        return Ok(false);
    }
    let mut found = Vec::with_capacity(SHIM.len());
    let limit = SHIM.len() as u64 + 1;
    stdfs::File::from(file)
        .take(limit)
        .read_to_end(&mut found)
        .map_err(text)?;
    Ok(found == SHIM)
}

/// Writes the file under another name and renames it into place.
fn write(dir: rustix::fd::BorrowedFd<'_>) -> std::result::Result<(), String> {
    let temporary = format!(
        ".{}.{:016x}",
        file_name(),
        gate_file::random().map_err(|e| e.message)?
    );
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o755);
    let file = fs::openat(dir, &temporary, flags, mode)
        .map_err(|cause| format!("cannot write there: {cause}"))?;
    let mut file = stdfs::File::from(file);
    let written = file
        .write_all(SHIM)
        .and_then(|()| Ok(fs::fchmod(&file, mode)?))
        .and_then(|()| Ok(fs::renameat(dir, &temporary, dir, file_name())?));
    if written.is_err() {
        let _ = fs::unlinkat(dir, &temporary, fs::AtFlags::empty());
    }
    written.map_err(text)
}

/// Loads the shim into a short-lived process of our own, which looks for it in
/// its own map.
fn test_load(shim: &Path) -> std::result::Result<(), String> {
    // A statically linked coordinator cannot load anything; it says nothing about programs.
    if elf::check_file(Path::new("/proc/self/exe")).is_err() {
        return shim.metadata().map(|_| ()).map_err(text);
    }
    let output = Command::new("/proc/self/exe")
        .arg(LOAD_TEST)
        .arg(shim)
        .env("LD_PRELOAD", shim)
        // The test shall load the shim, not attach it.
        .env_remove("SNAPSHIM_GATE")
        .env_remove("SNAPSHIM_GATE_ID")
        .env_remove("SNAPSHIM_SITES")
        .env_remove("LD_AUDIT")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|cause| format!("cannot test it: {cause}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or("").trim();
    Err(if said.is_empty() {
        format!("the dynamic linker did not load it ({})", output.status)
    } else {
        format!("the dynamic linker did not load it: {said}")
    })
}

/// The other side of the test: whether `shim` is mapped into this process.
pub fn is_loaded(shim: &OsStr) -> bool {
    let Ok(maps) = stdfs::read("/proc/self/maps") else {
        return false;
    };
    // The map shows a path without links.
    let shown = stdfs::canonicalize(shim).unwrap_or_else(|_| shim.into());
    maps.split(|b| *b == b'\n')
        .any(|line| line.ends_with(shown.as_os_str().as_bytes()))
}

fn text(cause: impl std::fmt::Display) -> String {
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// A directory of its own, removed with the value.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Scratch {
            let name = format!("snapshim-shim-{:016x}", gate_file::random().unwrap());
            let dir = env::temp_dir().join(name);
            stdfs::create_dir(&dir).unwrap();
            Scratch(dir.canonicalize().unwrap())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = stdfs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn it_is_unpacked_whole_and_only_once() {
        let scratch = Scratch::new();
        let dir = scratch.0.join("a/lib");
        let path = unpack_into(&dir).unwrap();
        assert_eq!(stdfs::read(&path).unwrap(), SHIM);
        assert!(SHIM.starts_with(b"\x7fELF"));
        let mode = |p: &Path| p.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&dir), mode(&path)), (0o755, 0o755));
        let written = path.metadata().unwrap().modified().unwrap();
        assert_eq!(unpack_into(&dir).unwrap(), path);
        assert_eq!(path.metadata().unwrap().modified().unwrap(), written);
    }

    #[test]
    fn what_stands_in_its_place_is_replaced() {
        let scratch = Scratch::new();
        let path = unpack_into(&scratch.0).unwrap();
        let check = || {
            unpack_into(&scratch.0).unwrap();
            assert!(!path.is_symlink());
            assert_eq!(stdfs::read(&path).unwrap(), SHIM);
        };
        stdfs::write(&path, b"something else").unwrap();
        check();
        let mut other = SHIM.to_vec();
        *other.last_mut().unwrap() ^= 1;
        stdfs::write(&path, other).unwrap();
        check();
        stdfs::remove_file(&path).unwrap();
        symlink("/etc/hostname", &path).unwrap();
        check();
        stdfs::set_permissions(&path, stdfs::Permissions::from_mode(0o777)).unwrap();
        check();
        assert_eq!(
            stdfs::read_dir(&scratch.0).unwrap().count(),
            1,
            "nothing is left behind"
        );
    }

    #[test]
    fn places_that_cannot_serve_say_why() {
        let scratch = Scratch::new();
        let refused = |dir: PathBuf| unpack_into(&dir).unwrap_err();
        for name in ["with space", "with:colon", "with$dollar"] {
            let why = refused(scratch.0.join(name));
            assert!(why.contains("LD_PRELOAD cannot name it"), "{why}");
            assert!(!scratch.0.join(name).exists());
        }
        let open = scratch.0.join("open");
        stdfs::create_dir(&open).unwrap();
        stdfs::set_permissions(&open, stdfs::Permissions::from_mode(0o777)).unwrap();
        for dir in [open.clone(), open.join("lib")] {
            let why = refused(dir);
            assert!(why.contains("can be written by others"), "{why}");
        }
        assert!(refused(PathBuf::from("/proc/snapshim")).contains("cannot make"));
    }
}
