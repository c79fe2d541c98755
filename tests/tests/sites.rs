//! The layer of system call sites: what it patches, when, and what it leaves alone.
#![cfg(target_arch = "x86_64")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::process::{self, Proc};
use snapshim_tests::{Fs, Lab, product};

const LIMIT: Duration = Duration::from_secs(120);

/// The layer that holds the process named `name`, and what is noted of it.
fn layer(lab: &Lab, name: &str) -> (String, String) {
    let outcome = lab.checkpoint(&[]);
    let certificate = outcome.certificate();
    let writers = certificate.0["writers"].as_array().unwrap();
    let writer = writers
        .iter()
        .find(|w| w["name"] == name)
        .unwrap_or_else(|| panic!("{name} is not among {writers:?}"));
    (
        writer["layer"].as_str().unwrap().to_owned(),
        writer["notes"].to_string(),
    )
}

/// Runs a program to its end under the shim, with tables; returns what it printed.
fn run(lab: &Lab, program: &Path, args: &[&str]) -> String {
    let mut command = lab.run_command(&[]);
    command.arg(program).args(args);
    process::run(command, LIMIT)
        .ok(&format!("{}", program.display()))
        .out()
}

/// A program that writes until it is told to stop.
fn writer(lab: &Lab, wrapper: &[&str], env: &[(&str, &str)]) -> Proc {
    let program = product::program("ordered");
    let mut command = lab.run_command(&[]);
    command.args(wrapper).arg(program);
    command
        .arg(lab.data())
        .args(["2", "1", "1", "512", "500", "60"]);
    command.envs(env.iter().copied());
    let mut proc = Proc::piped(command);
    lab.wait_for_beats(&mut proc, 3);
    proc
}

fn end(mut proc: Proc) {
    proc.signal(Signal::SIGTERM);
    proc.end();
}

#[test]
fn a_program_is_held_by_its_sites() {
    let lab = Lab::new("sites-plain", Fs::Xfs, LIMIT).unwrap();
    let proc = writer(&lab, &[], &[]);
    assert_eq!(layer(&lab, "ordered").0, "sites");
    end(proc);
}

#[test]
fn without_tables_it_is_the_symbols_and_the_certificate_says_so() {
    let lab = Lab::new("sites-none", Fs::Xfs, LIMIT).unwrap();
    let env = lab.env(&[]);
    let mut command = lab.command(product::program("ordered"));
    command
        .arg(lab.data())
        .args(["2", "1", "1", "512", "500", "60"]);
    command
        .envs(env.iter().cloned())
        .env("SNAPSHIM_SITES", lab.beside("no-tables"));
    let mut proc = Proc::piped(command);
    lab.wait_for_beats(&mut proc, 3);
    let (layer, notes) = layer(&lab, "ordered");
    assert_eq!(layer, "symbols");
    assert!(notes.contains("libc.so.6 is not patched"), "{notes}");
    end(proc);
}

#[test]
fn plain_preload_finds_the_tables_by_itself() {
    let lab = Lab::new("sites-preload", Fs::Xfs, LIMIT).unwrap();
    // `env` has written them to the usual place of root.
    let mut env = lab.env(&[]);
    env.retain(|(name, _)| name != "SNAPSHIM_SITES");
    let mut command = lab.command(product::program("ordered"));
    command
        .arg(lab.data())
        .args(["2", "1", "1", "512", "500", "60"]);
    command.envs(env).env_remove("SNAPSHIM_SITES");
    let mut proc = Proc::piped(command);
    lab.wait_for_beats(&mut proc, 3);
    // The program itself may have no table yet: the first look makes one.
    layer(&lab, "ordered");
    assert_eq!(layer(&lab, "ordered").0, "sites");
    end(proc);
}

#[test]
fn memory_that_may_not_be_written_and_executed_is_no_obstacle() {
    let wrapper = product::program("deny_write_execute");
    for how in ["prctl", "seccomp"] {
        let lab = Lab::new(&format!("sites-{how}"), Fs::Xfs, LIMIT).unwrap();
        let proc = writer(&lab, &[wrapper.to_str().unwrap(), how], &[]);
        assert_eq!(layer(&lab, "ordered").0, "sites", "{how}");
        end(proc);
    }
}

/// A directory of tables that are copies of those this machine has.
fn copied_tables(lab: &Lab, change: impl Fn(&mut Vec<u8>)) -> PathBuf {
    let env = lab.env(&[]);
    let find = |n: &str| env.iter().find(|(name, _)| name == n);
    let from = PathBuf::from(&find("SNAPSHIM_SITES").expect("tables").1);
    let to = lab.beside("tables");
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let mut bytes = fs::read(entry.path()).unwrap();
        change(&mut bytes);
        let path = to.join(entry.file_name());
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    to
}

/// Runs `steps`, which prints how far unwinding works, with tables at `tables`; it
/// must come to its end whatever they say.
fn survives(lab: &Lab, tables: &Path) -> String {
    let env = lab.env(&[]);
    let mut command = lab.command(product::compiled("cc", "steps", "steps", STEPS));
    command
        .arg(lab.data().join("steps"))
        .envs(env)
        .env("SNAPSHIM_SITES", tables);
    process::run(command, LIMIT).ok("steps").out()
}

const STEPS: &[&str] = &[
    "-O1",
    "-fno-reorder-blocks",
    "-Wno-unused-result",
    "-Wno-dangling-pointer",
];

#[test]
fn tables_that_do_not_fit_are_not_used() {
    const HEADER: usize = 64;
    const RECORD: usize = 40;
    let lab = Lab::new("sites-hostile", Fs::Xfs, LIMIT).unwrap();
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 7] = [
        ("cut short", |b| b.truncate(b.len() / 2)),
        ("empty", |b| b.clear()),
        ("another version", |b| b[8] = 99),
        ("too many", |b| b[12..16].copy_from_slice(&[0xff; 4])),
        ("other bytes", |b| {
            // The last byte of each window is another than the file has.
            for record in b[HEADER..].chunks_mut(RECORD) {
                let (before, after) = (record[13] as usize, record[14] as usize);
                record[16 + (before + 1 + after).min(23)] ^= 0x40;
            }
        }),
        ("other places", |b| {
            for record in b[HEADER..].chunks_mut(RECORD) {
                record[0] = record[0].wrapping_add(1);
            }
        }),
        ("wild places", |b| {
            for record in b[HEADER..].chunks_mut(RECORD) {
                record[5] = 0x7f;
            }
        }),
    ];
    for (what, change) in changes {
        let tables = copied_tables(&lab, change);
        let said = survives(&lab, &tables);
        assert!(said.contains("lost 0"), "{what}: {said}");
        fs::remove_dir_all(&tables).unwrap();
    }
}

#[test]
fn tables_that_others_may_write_are_not_used() {
    let lab = Lab::new("sites-others", Fs::Xfs, LIMIT).unwrap();
    let tables = copied_tables(&lab, |_| {});
    for entry in fs::read_dir(&tables).unwrap().flatten() {
        let mode = fs::Permissions::from_mode(0o666);
        fs::set_permissions(entry.path(), mode).unwrap();
    }
    let wrapper = format!("SNAPSHIM_SITES={}", tables.display());
    let proc = writer(&lab, &["env", &wrapper], &[]);
    assert_eq!(layer(&lab, "ordered").0, "symbols");
    end(proc);
}

#[test]
fn registers_are_as_the_kernel_leaves_them() {
    let lab = Lab::new("sites-registers", Fs::Tmpfs, LIMIT).unwrap();
    let file = lab.data().join("file");
    for (name, flags) in [
        ("registers", &["-pie", "-fPIE"][..]),
        ("registers-fixed", &["-no-pie"]),
    ] {
        let program = product::compiled("cc", "registers", name, flags);
        let said = run(&lab, &program, &[file.to_str().unwrap()]);
        assert_eq!(said, "0 damaged\n", "{name}");
    }
}

#[test]
fn every_instruction_of_a_call_can_be_unwound() {
    let lab = Lab::new("sites-steps", Fs::Tmpfs, LIMIT).unwrap();
    let file = lab.data().join("file");
    let program = product::compiled("cc", "steps", "steps", STEPS);
    let said = run(&lab, &program, &[file.to_str().unwrap()]);
    println!("{said}");
    // Two instructions of `syscall()` are moved to where no table reaches; it is no
    // cancellation point.
    let lost = said.lines().filter(|l| l.starts_with("lost at"));
    assert!(lost.clone().all(|l| l.contains("in syscall(")), "{said}");
    let last = said.lines().last().unwrap();
    let number = |word: &str| word.parse::<u64>().unwrap();
    let words: Vec<&str> = last.split([' ', ',']).filter(|w| !w.is_empty()).collect();
    assert!(number(words[0]) > 5000 && number(words[3]) <= 8, "{said}");
}

#[test]
fn libraries_loaded_later_are_patched_once_they_are_known() {
    let lab = Lab::new("sites-dlopen", Fs::Xfs, LIMIT).unwrap();
    let plugin = lab.beside("plugin.so");
    // Known to nobody: with a build id of its own.
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    let id = format!("-Wl,--build-id=0x{now:032x}");
    compile(&["-shared", "-fPIC", "-DPLUGIN", &id], &plugin);
    let program = lab.beside("host");
    compile(&["-ldl"], &program);
    let file = lab.data().join("file");
    let start = || {
        let _ = fs::remove_file(&file);
        let mut command = lab.run_command(&[]);
        command.arg(&program).arg(&plugin).arg(&file);
        let mut proc = Proc::piped(command);
        process::wait_until(Duration::from_secs(20), || {
            file.metadata().is_ok_and(|m| m.len() > 0)
        });
        assert!(proc.is_running());
        proc
    };
    let proc = start();
    let first = layer(&lab, "host");
    // It writes by instructions that had no table yet: it is stopped.
    assert!(
        first.0 == "ptrace" && first.1.contains("plugin.so"),
        "{first:?}"
    );
    end(proc);
    let proc = start();
    assert_eq!(layer(&lab, "host").0, "sites");
    end(proc);
}

fn compile(flags: &[&str], to: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/plugin.c");
    let mut command = Command::new("cc");
    command.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"]);
    command.arg(to).arg(source).args(flags);
    process::run(command, LIMIT).ok("cc");
}

#[test]
fn what_programs_do_with_executable_memory_is_left_alone() {
    let lab = Lab::new("sites-guests", Fs::Xfs, LIMIT).unwrap();
    let program = product::program("guests");
    let library = lab.data().join("library.so");
    fs::copy(libc_of_this_process(), &library).unwrap();
    let before = fs::read(&library).unwrap();
    // Known as a library, so that its text would be patched if it were mapped as one.
    let library = library.to_str().unwrap();
    for args in [
        &["shared", library][..],
        &["openat2"],
        &["fsize", "/bin/true"],
        &["writable"],
    ] {
        run(&lab, &program, args);
        assert!(fs::read(library).unwrap() == before, "{args:?}");
    }
}

fn libc_of_this_process() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|l| l.ends_with("libc.so.6")).unwrap();
    line.split_whitespace().last().unwrap().into()
}

#[test]
fn a_program_without_a_libc_starts() {
    let lab = Lab::new("sites-no-libc", Fs::Xfs, LIMIT).unwrap();
    let flags = [
        "-nostdlib",
        "-nostartfiles",
        "-pie",
        "-fPIE",
        "-ffreestanding",
    ];
    let program = product::compiled("cc", "no_libc", "no_libc", &flags);
    assert_eq!(run(&lab, &program, &[]), "no libc\n");
}

/// Whether a copy of what two steps write, one after the other, could be of one instant.
fn is_in_step(first: u64, second: u64) -> bool {
    first == second || first == second + 1
}

/// Takes snapshots, each of which must be verified, with `name` held by ptrace.
fn held_by_stopping(lab: &Lab, name: &str, noted: &str, is_consistent: impl Fn(&Path) -> bool) {
    for round in 0..20 {
        let outcome = lab.checkpoint(&["--keep-last", "2"]);
        let certificate = outcome.verified();
        let writers = certificate.0["writers"].as_array().unwrap();
        let writer = writers.iter().find(|w| w["name"] == name);
        let writer = writer.unwrap_or_else(|| panic!("{name} is not among {writers:?}"));
        assert_eq!(writer["layer"], "ptrace", "{writer}");
        assert!(writer["notes"].to_string().contains(noted), "{writer}");
        let copy = certificate.copy_of(&lab.data());
        assert!(is_consistent(&copy), "{name}: round {round}");
    }
}

/// What `doctor` says holds this program.
fn advised(lab: &Lab, program: &Path) -> String {
    let mut command = lab.snapshim(&["doctor", "--json", "--"]);
    command.arg(program);
    let said = process::run(command, LIMIT).ok("doctor").out();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    said["subjects"][0]["layer"].as_str().unwrap().to_owned()
}

#[test]
fn a_go_program_with_cgo_is_stopped() {
    let _alone = snapshim_tests::lab::serial();
    let lab = Lab::new("sites-cgo", Fs::Xfs, LIMIT).unwrap();
    let program = product::cgo_program("relay");
    assert_eq!(advised(&lab, &program), "ptrace");
    let mut command = lab.run_command(&[]);
    command.arg(&program).arg(lab.data());
    let mut proc = Proc::piped(command);
    lab.wait_for_beats(&mut proc, 3);
    let word = |path: PathBuf| {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.first_chunk().map_or(0, |w| u64::from_le_bytes(*w))
    };
    held_by_stopping(&lab, "relay-cgo", "relay-cgo is not patched", |dir| {
        is_in_step(word(dir.join("a")), word(dir.join("b")))
    });
    assert!(proc.is_running());
    proc.end();
}

/// Starts `escapes`.
fn escaping(lab: &Lab, name: &str, flags: &[&str]) -> Proc {
    let program = product::compiled("cc", "escapes", name, flags);
    let file = lab.data().join("file");
    let mut proc = lab.run(&[], &program, &[file.to_str().unwrap()]);
    let second = lab.data().join("file.b");
    process::wait_until(Duration::from_secs(20), || {
        second.metadata().is_ok_and(|m| m.len() > 0)
    });
    assert!(proc.is_running());
    proc
}

#[test]
fn code_whose_calls_nothing_holds_is_stopped() {
    let _alone = snapshim_tests::lab::serial();
    for (name, flag, noted) in [
        ("escapes-old", "-DOLD", "escapes-old is not patched"),
        (
            "escapes-memory",
            "-DMEMORY",
            "memory file is not looked into",
        ),
    ] {
        let lab = Lab::new(&format!("sites-{name}"), Fs::Xfs, LIMIT).unwrap();
        let mut proc = escaping(&lab, name, &[flag]);
        held_by_stopping(&lab, name, noted, |dir| {
            let len = |name: &str| dir.join(name).metadata().map_or(0, |m| m.len());
            is_in_step(len("file"), len("file.b"))
        });
        assert!(proc.is_running());
        proc.end();
    }
}

#[test]
fn code_made_at_run_time_is_noted() {
    let lab = Lab::new("sites-anonymous", Fs::Xfs, LIMIT).unwrap();
    let mut proc = escaping(&lab, "escapes", &[]);
    let (layer, notes) = layer(&lab, "escapes");
    assert_eq!(layer, "sites");
    assert!(notes.contains("4 KiB of code made at run time"), "{notes}");
    proc.end();
}
