//! `LD_PRELOAD`: ours put in front of what is there, and taken away from ourselves.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::hold::set::Set;
use crate::hold::shim_file;
use crate::hold::sites;
use crate::hold::sites::cache::{Cache, SITES};
use crate::{Error, Result};

use super::inherited;

/// The variable the dynamic linker reads.
pub const LD_PRELOAD: &str = "LD_PRELOAD";
/// The variable that tells the shim which gate is its own.
pub const GATE: &str = "SNAPSHIM_GATE";
/// The variable that tells the shim device and inode of the gate, so that it
/// refuses another file in its place.
pub const GATE_ID: &str = "SNAPSHIM_GATE_ID";
/// Set while this program has started itself again without the shim.
const SHED: &str = "SNAPSHIM_INTERNAL_SHED";

/// The variables that bring `program`, or any, into `set`. Computes the site tables
/// that the program will look for.
pub fn environment(
    set: &Set,
    shim: &Path,
    program: Option<&Path>,
) -> Vec<(&'static str, OsString)> {
    let existing = env::var_os(LD_PRELOAD).unwrap_or_default();
    let mut variables = vec![
        (LD_PRELOAD, inject(&existing, shim)),
        (GATE, set.gate_path.clone().into_os_string()),
        (
            GATE_ID,
            format!("{}:{}", set.gate_id.dev, set.gate_id.ino).into(),
        ),
    ];
    // Without tables the shim holds what its symbols see: `snapshim doctor` says so.
    if let Ok(cache) = Cache::open(Some(shim)) {
        // Of a program not known yet, at least the libc: ours.
        let own = env::current_exe().ok();
        if let Some(program) = program.or(own.as_deref()) {
            sites::prepare(&cache, program);
        }
        variables.push((SITES, cache.path().into()));
    }
    variables
}

/// Takes what is only for ourselves out of a program's environment.
pub fn hide_internals(command: &mut Command) {
    command.env_remove(SHED);
}

/// The entries of an `LD_PRELOAD`: the dynamic linker splits it at colons and spaces.
fn entries(value: &OsStr) -> impl Iterator<Item = &[u8]> {
    value
        .as_bytes()
        .split(|b| matches!(b, b':' | b' '))
        .filter(|entry| !entry.is_empty())
}

/// Whether an entry is a shim: by the names it is built and unpacked under, or
/// the one that was chosen.
fn is_shim(entry: &[u8]) -> bool {
    let base = entry.rsplit(|b| *b == b'/').next().unwrap_or(entry);
    let named = base.starts_with(b"libsnapshim") && base.windows(3).any(|w| w == b".so");
    named || env::var_os("SNAPSHIM_SHIM").is_some_and(|chosen| chosen.as_bytes() == entry)
}

fn join(parts: &[&[u8]]) -> OsString {
    OsString::from_vec(parts.join(&b':'))
}

/// `existing` with `shim` in front; no shim and no other library twice.
pub fn inject(existing: &OsStr, shim: &Path) -> OsString {
    let mut parts = vec![shim.as_os_str().as_bytes()];
    for entry in entries(existing) {
        if !is_shim(entry) && !parts.contains(&entry) {
            parts.push(entry);
        }
    }
    join(&parts)
}

/// `existing` without any shim; `None` if there is none in it.
fn without_shim(existing: &OsStr) -> Option<OsString> {
    let all: Vec<&[u8]> = entries(existing).collect();
    let rest: Vec<&[u8]> = all
        .iter()
        .copied()
        .filter(|entry| !is_shim(entry))
        .collect();
    (rest.len() < all.len()).then(|| join(&rest))
}

/// Starts this program again without the shim, if it was loaded: it must never
/// wait at a gate that it shut itself. Returns if there is nothing to do.
pub fn shed(arguments: &[OsString]) -> Result<()> {
    let existing = env::var_os(LD_PRELOAD).unwrap_or_default();
    let Some(rest) = without_shim(&existing) else {
        return Ok(());
    };
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(format!("cannot start again without the shim: {cause}"))
            .next("take libsnapshim.so out of LD_PRELOAD for this command")
    };
    if env::var_os(SHED).is_some() {
        return Err(failed(&"LD_PRELOAD still names it"));
    }
    let mut command = Command::new("/proc/self/exe");
    if let Some((own, others)) = arguments.split_first() {
        command.arg0(own).args(others);
    }
    command.env(SHED, "1");
    if rest.is_empty() {
        command.env_remove(LD_PRELOAD);
    } else {
        command.env(LD_PRELOAD, rest);
    }
    inherited::restore_in(&mut command);
    Err(failed(&command.exec()))
}

/// Answers [`shim_file::LOAD_TEST`]; `None` if that is not what was asked.
pub fn load_test(arguments: &[OsString]) -> Option<ExitCode> {
    match arguments {
        [_, command, shim] if command == shim_file::LOAD_TEST => {
            Some(if shim_file::is_loaded(shim) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_comes_first_and_nothing_twice() {
        let shim = Path::new("/run/lib/libsnapshim-1.so");
        for (existing, expected) in [
            ("", "/run/lib/libsnapshim-1.so"),
            ("/a.so", "/run/lib/libsnapshim-1.so:/a.so"),
            (
                "/a.so /b.so:/a.so::",
                "/run/lib/libsnapshim-1.so:/a.so:/b.so",
            ),
            (
                "/a.so:/old/libsnapshim.so:/b.so",
                "/run/lib/libsnapshim-1.so:/a.so:/b.so",
            ),
            ("/run/lib/libsnapshim-1.so", "/run/lib/libsnapshim-1.so"),
        ] {
            assert_eq!(inject(OsStr::new(existing), shim), expected, "{existing}");
        }
    }

    #[test]
    fn only_the_shim_is_shed() {
        let shed = |text: &str| without_shim(OsStr::new(text));
        assert_eq!(shed(""), None);
        assert_eq!(shed("/a.so:/libsnapshim/b.so"), None);
        assert_eq!(shed("/x/libsnapshim-0123.so /a.so"), Some("/a.so".into()));
        assert_eq!(shed("libsnapshim.so"), Some("".into()));
    }

    #[test]
    fn names_that_are_not_text_survive() {
        let odd = OsString::from_vec(b"/\xff.so:/libsnapshim.so".to_vec());
        assert_eq!(
            without_shim(&odd),
            Some(OsString::from_vec(b"/\xff.so".to_vec()))
        );
    }
}
