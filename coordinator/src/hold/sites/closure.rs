//! Which ELF files a program will have mapped when it begins.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::hold::elf;

/// The program and everything that the dynamic linker would load with it, from the
/// linker itself: it knows the search rules of its system, and with `--list` it says
/// what it finds and runs nothing of the program.
pub fn closure(program: &Path) -> Vec<PathBuf> {
    let mut files = BTreeSet::new();
    for path in elf::interpreters(program) {
        let Some(linker) = elf::dynamic_linker(&path) else {
            continue;
        };
        files.insert(path.clone());
        // Its name is in the program, which may not be a linker's at all.
        if !elf::is_dynamic_linker(&linker) {
            continue;
        }
        files.insert(linker.clone());
        files.extend(listed(&linker, &path));
    }
    files.into_iter().collect()
}

fn listed(linker: &Path, program: &Path) -> Vec<PathBuf> {
    let output = Command::new(linker)
        .arg("--list")
        .arg(program)
        // Its code would run.
        .env_remove("LD_AUDIT")
        .env_remove("LD_DEBUG")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let Ok(output) = output else {
        return Vec::new();
    };
    output
        .stdout
        .split(|b| *b == b'\n')
        .filter_map(path_in)
        .collect()
}

/// `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)`. What has no slash is the kernel's; a
/// path that begins with none is relative to where we, and so the program, are.
fn path_in(line: &[u8]) -> Option<PathBuf> {
    let end = line.windows(4).rposition(|w| w == b" (0x")?;
    let line = line[..end].trim_ascii_start();
    let path = match line.windows(4).position(|w| w == b" => ") {
        Some(arrow) => &line[arrow + 4..],
        None => line,
    };
    let is_path = path.contains(&b'/');
    std::path::absolute(OsStr::from_bytes(path))
        .ok()
        .filter(|_| is_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_linker_says() {
        let path = |line: &str| path_in(line.as_bytes()).map(|p| p.display().to_string());
        assert_eq!(path("\tlinux-vdso.so.1 (0x00007ffd)"), None);
        assert_eq!(path("\tlibx.so => not found"), None);
        let libc = path("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)");
        assert_eq!(libc.as_deref(), Some("/lib/x86_64-linux-gnu/libc.so.6"));
        let odd = path("\t/opt/a b/ld.so (0x00007f)");
        assert_eq!(odd.as_deref(), Some("/opt/a b/ld.so"));
        let here = |name: &str| Some(std::env::current_dir().unwrap().join(name));
        let relative = |line: &str| path_in(line.as_bytes());
        assert_eq!(relative("\tlib/x.so (0x00007f)"), here("lib/x.so"));
        assert_eq!(relative("\tx.so => ./x.so (0x00007f)"), here("x.so"));
    }

    #[test]
    fn a_program_and_a_script() {
        for program in ["/bin/sh", "/usr/bin/ldd"] {
            let files = closure(Path::new(program));
            let has = |name: &str| files.iter().any(|f| f.ends_with(name));
            assert!(has("libc.so.6") && has("ld-linux-x86-64.so.2"), "{files:?}");
        }
    }
}
