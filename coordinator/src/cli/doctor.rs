//! `snapshim doctor`: what will hold a program, and what would make it better.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use crate::Result;
use crate::hold::elf::{self, Cause, Refusal};
use crate::hold::evidence;
use crate::hold::inspect::{FileSystem, Machine, Process};
use crate::hold::process;
use crate::hold::set::Set;
use crate::hold::sites::cache::{self, Cache, Entry};
use crate::hold::sites::image::Image;
use crate::hold::sites::layer::Looker;
use crate::hold::sites::{self, Library};
use crate::store::manifest::{PathName, VERSION};

use super::args::DoctorArgs;
use super::points::Points;
use super::{output, usage};

#[derive(Serialize)]
struct Report {
    version: u32,
    machine: Machine,
    watched: Vec<Watched>,
    subjects: Vec<Subject>,
}

#[derive(Serialize)]
struct Watched {
    #[serde(flatten)]
    path: PathName,
    #[serde(flatten)]
    file_system: FileSystem,
}

/// A program, or a process.
#[derive(Serialize)]
struct Subject {
    pid: Option<u32>,
    name: String,
    /// The program, after the interpreters of scripts.
    chain: Vec<PathName>,
    kind: &'static str,
    libc: Option<Libc>,
    /// ELF files it has, or will have, mapped.
    files: Vec<Object>,
    process: Option<Process>,
    /// Of a process in a set: its commit points.
    points: Option<Points>,
    /// `sites`, `symbols`, `ptrace` or `none`.
    layer: &'static str,
    /// Why it is not a better one.
    because: Option<String>,
    /// What would make it better.
    advice: Vec<String>,
}

#[derive(Serialize)]
struct Libc {
    #[serde(flatten)]
    path: PathName,
    flavour: &'static str,
    version: Option<String>,
    build_id: Option<String>,
}

#[derive(Serialize)]
struct Object {
    #[serde(flatten)]
    path: PathName,
    /// The name of its table.
    table: Option<String>,
    /// System call instructions that are patched.
    sites: usize,
    complete: bool,
    /// Has system calls that neither sites nor symbols hold.
    #[serde(skip)]
    escapes: bool,
    /// Why it cannot be patched.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// Runs the command.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    if args.pids.is_empty() && args.command.is_empty() {
        return Err(usage(
            "there is nothing to look at",
            "name processes, or a program: snapshim doctor -- APP ARGS",
        ));
    }
    let machine = Machine::look();
    let cache = Cache::open(None);
    let mut subjects = Vec::new();
    if let Some(app) = args.command.first() {
        subjects.push(program(app.as_ref(), &machine, &cache));
    }
    for pid in &args.pids {
        subjects.push(running(*pid, &machine, &cache));
    }
    let watched = args.watch.iter().map(|path| Watched {
        path: PathName(path.clone()),
        file_system: FileSystem::look(path),
    });
    let report = Report {
        version: VERSION,
        watched: watched.collect(),
        machine,
        subjects,
    };
    if args.output.json {
        output::json(&report)?;
    } else {
        output::text(&describe(&report))?;
    }
    let is_held = report.subjects.iter().all(|s| s.layer != "none");
    Ok(ExitCode::from(u8::from(!is_held)))
}

/// A program that is not started yet.
fn program(app: &Path, machine: &Machine, cache: &std::result::Result<Cache, String>) -> Subject {
    let found = elf::check_program(app.as_os_str());
    let path = match &found {
        Ok(path) => path.clone(),
        Err(refusal) => refusal.path.clone(),
    };
    let chain = elf::interpreters(&path);
    let mut subject = subject(app.display().to_string(), &chain, cache);
    match found {
        Err(refusal) => refused(&mut subject, &refusal, machine),
        Ok(_) => judge_files(&mut subject, machine, cache),
    }
    subject
}

/// A process.
fn running(pid: u32, machine: &Machine, cache: &std::result::Result<Cache, String>) -> Subject {
    let Some(process) = Process::look(pid) else {
        let mut subject = subject(format!("process {pid}"), &[], cache);
        subject.pid = Some(pid);
        subject.because = Some("there is no such process".into());
        return subject;
    };
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    let shown = fs::read_link(&exe).unwrap_or(exe);
    let mut subject = subject(process::name(pid), &[shown], cache);
    subject.pid = Some(pid);
    if process.shim && process.set.is_some() {
        let layer = Looker::default().look(pid);
        subject.layer = layer.name();
        subject.because = layer.not_sites.clone();
        if layer.escapes {
            escaping(&mut subject, machine);
        }
        subject.advice.extend(layer.notes);
    } else {
        let cannot = match &process {
            _ if process.is_kernel => Some("it is a thread of the kernel, and has no files"),
            _ if process.hidden => Some(
                "it belongs to somebody else, or is more privileged than this command, or hides its memory: run this as root",
            ),
            _ if process.tracer.is_some() => Some("somebody traces it already"),
            _ => None,
        };
        if let Some(why) = cannot {
            subject.because = Some(why.into());
        } else {
            from_outside(&mut subject, machine);
            let why = match process.shim {
                true => "the shim is loaded, but has no gate",
                false => "the shim is not loaded",
            };
            subject.because = Some(why.into());
            subject.advice.push(
                "start it with `snapshim run`, so that it is held without being stopped".into(),
            );
        }
    }
    if process.io_uring.iter().any(|r| r.sqpoll) {
        subject.advice.push(
            "it has an io_uring that a kernel thread submits for (SQPOLL): nothing holds that, and \
             snapshots are not verified; `run --io-uring refuse` makes it do without, if it can"
                .into(),
        );
    } else if !process.io_uring.is_empty() && subject.layer != "sites" {
        subject
            .advice
            .push("it has an io_uring: only stopping the process holds what it submits".into());
    }
    if process.aio {
        subject.advice.push(
            "it has an AIO context: snapshots are verified where files are captured by reflink \
             (XFS, btrfs)"
                .into(),
        );
    }
    if let Some(first) = process.shared_writable.first() {
        subject.advice.push(format!("it can store into {first} through a mapping: if that is watched, only stopping the process holds it"));
    }
    subject.points = points(pid, &process);
    subject.process = Some(process);
    subject
}

/// What the set of a process was seen to do, if that is one that we can find.
fn points(pid: u32, process: &Process) -> Option<Points> {
    let set = Set::open(Some(process.set.as_deref()?)).ok()?;
    // There may be one of that name elsewhere.
    let is_its = evidence::attached_here(&set.gate).contains(&pid);
    is_its.then(|| Points::of(&set))
}

/// What is known of the files alone.
fn subject(name: String, chain: &[PathBuf], cache: &std::result::Result<Cache, String>) -> Subject {
    let tables = match (cache, chain.last()) {
        (Ok(cache), Some(program)) => sites::prepare(cache, program),
        _ => Vec::new(),
    };
    let libc = tables
        .iter()
        .find(|(_, t)| t.as_ref().is_ok_and(Entry::is_libc));
    Subject {
        pid: None,
        name,
        kind: chain
            .last()
            .map_or("unknown", |p| kind(p, libc.map(|l| l.0.as_path()))),
        chain: chain.iter().cloned().map(PathName).collect(),
        libc: libc.map(|(path, _)| describe_libc(path)),
        files: tables.iter().map(object).collect(),
        process: None,
        points: None,
        layer: "none",
        because: None,
        advice: Vec::new(),
    }
}

fn kind(program: &Path, libc: Option<&Path>) -> &'static str {
    match elf::check_file(program) {
        Err(Refusal { cause, .. }) => match cause {
            Cause::Static { go: true } => "static Go",
            Cause::Static { go: false } => "static",
            Cause::Class => "32-bit",
            Cause::Machine(_) => "another machine",
            Cause::SetId => "set-user-id",
            Cause::Capabilities => "with file capabilities",
            Cause::NotFound | Cause::NotExecutable(_) => "unknown",
        },
        Ok(()) if !program.exists() => "unknown",
        Ok(()) => match libc.map(library) {
            Some(Library::Glibc { .. }) => "dynamic, glibc",
            Some(Library::Musl) => "dynamic, musl",
            Some(Library::Other) | None => "dynamic",
        },
    }
}

fn library(path: &Path) -> Library {
    let bytes = fs::read(path).unwrap_or_default();
    Image::parse(&bytes).map_or(Library::Other, |image| sites::library(&image))
}

fn describe_libc(path: &Path) -> Libc {
    let (flavour, version) = match library(path) {
        Library::Glibc { minor: u32::MAX } => ("glibc", None),
        Library::Glibc { minor } => ("glibc", Some(format!("2.{minor}"))),
        Library::Musl => ("musl", None),
        Library::Other => ("unknown", None),
    };
    let id = File::open(path)
        .ok()
        .and_then(|file| cache::build_id(&file));
    Libc {
        path: PathName(path.to_owned()),
        flavour,
        version,
        build_id: id.map(|id| id.iter().map(|b| format!("{b:02x}")).collect()),
    }
}

fn object((path, table): &(PathBuf, std::result::Result<Entry, String>)) -> Object {
    let entry = table.as_ref().ok();
    Object {
        path: PathName(path.clone()),
        table: entry.map(|e| e.name.clone()),
        sites: entry.map_or(0, |e| e.records.len()),
        complete: entry.is_some_and(Entry::is_complete),
        escapes: entry.is_none_or(|e| !e.is_complete() && !e.is_libc()),
        note: match table {
            Err(why) => Some(why.clone()),
            Ok(e) if e.is_unpatchable() => Some(
                "its libc cancels threads by the address of a call, so it is left as it is".into(),
            ),
            Ok(e) if !e.is_complete() => Some("some of its system calls cannot be patched".into()),
            Ok(_) => None,
        },
    }
}

/// The verdict for a program that takes the shim.
fn judge_files(
    subject: &mut Subject,
    machine: &Machine,
    cache: &std::result::Result<Cache, String>,
) {
    subject.layer = "sites";
    if let Err(why) = cache {
        subject.layer = "symbols";
        subject.because = Some(format!("site tables cannot be kept: {why}"));
        subject
            .advice
            .push("set SNAPSHIM_SITES to a directory of yours".into());
    } else if let Some(object) = weakest(&subject.files) {
        subject.layer = "symbols";
        let name = object.path.0.display();
        let note = object.note.as_deref().unwrap_or("it has no table");
        let escapes = object.escapes;
        subject.because = Some(format!("{name}: {note}"));
        if escapes {
            escaping(subject, machine);
            return;
        }
        subject.advice.push("calls that libraries make inside themselves are noticed, not held; stop the process to hold all: `snapshim snap`".into());
    } else if subject.files.is_empty() {
        subject.layer = "symbols";
        subject.because = Some("its libraries could not be listed".into());
    }
}

/// The file that keeps a program from being held by its sites.
fn weakest(files: &[Object]) -> Option<&Object> {
    let mut incomplete = files.iter().filter(|o| !o.complete);
    let first = incomplete.clone().next();
    incomplete.find(|o| o.escapes).or(first)
}

/// The verdict for what has the gate, and calls that it does not hold.
fn escaping(subject: &mut Subject, machine: &Machine) {
    if machine.can_trace() {
        subject.layer = "ptrace";
        subject.advice.push(
            "checkpoints stop it for a moment while it has a watched file open for writing".into(),
        );
    } else {
        from_outside(subject, machine);
    }
}

fn refused(subject: &mut Subject, refusal: &Refusal, machine: &Machine) {
    subject.because = Some(refusal.to_string());
    match refusal.cause {
        Cause::NotFound | Cause::NotExecutable(_) | Cause::Machine(_) => {}
        _ => from_outside(subject, machine),
    }
    subject.advice.push(refusal.next().into());
}

/// The verdict for a process that the shim is not in.
fn from_outside(subject: &mut Subject, machine: &Machine) {
    if machine.can_trace() {
        subject.layer = "ptrace";
        subject
            .advice
            .push("take snapshots of it with `snapshim snap`, which stops it for a moment".into());
    } else {
        subject.advice.push(match machine.ptrace_scope {
            Some(3) => "ptrace is switched off until the machine is started again (yama)".into(),
            _ => "run snapshim as root, or set kernel.yama.ptrace_scope to 0, to stop it from outside".into(),
        });
    }
}

fn describe(report: &Report) -> String {
    let yes = |flag: bool| if flag { "yes" } else { "no" };
    let machine = &report.machine;
    let mut rows = vec![
        vec!["kernel".to_owned(), machine.kernel.clone()],
        vec!["fine ctimes".to_owned(), yes(machine.fine_ctime).into()],
        vec![
            "ptrace".to_owned(),
            match machine.ptrace_scope {
                Some(scope) => format!("{} (yama {scope})", yes(machine.can_trace())),
                None => yes(machine.can_trace()).into(),
            },
        ],
        vec![
            "cgroup v2".to_owned(),
            format!("{}, freezer {}", yes(machine.cgroup2), yes(machine.freezer)),
        ],
    ];
    for watched in &report.watched {
        let fs = &watched.file_system;
        let reflink = fs.reflink.map_or("not tried", yes);
        let kind = fs.kind.as_deref().unwrap_or("unknown");
        rows.push(vec![
            output::name(&watched.path.0.to_string_lossy()),
            format!(
                "{kind}, reflink {reflink}, fine ctimes {}",
                yes(fs.fine_ctime)
            ),
        ]);
    }
    let mut text = output::table(&rows);
    for subject in &report.subjects {
        text.push('\n');
        text.push_str(&output::table(&describe_subject(subject)));
    }
    text
}

fn describe_subject(subject: &Subject) -> Vec<Vec<String>> {
    let shown = |path: &PathName| output::name(&path.0.to_string_lossy());
    let mut rows = Vec::new();
    let mut row = |label: &str, value: String| rows.push(vec![label.to_owned(), value]);
    let pid = subject
        .pid
        .map(|pid| format!(" ({pid})"))
        .unwrap_or_default();
    row("program", format!("{}{pid}", output::name(&subject.name)));
    let chain: Vec<String> = subject.chain.iter().map(shown).collect();
    row(
        "kind",
        format!("{}: {}", subject.kind, chain.join(", run by ")),
    );
    if let Some(libc) = &subject.libc {
        let version = libc.version.as_deref().unwrap_or("?");
        let id = libc.build_id.as_deref().unwrap_or("none");
        row(
            "libc",
            format!(
                "{} {version}, {} (build id {id})",
                libc.flavour,
                shown(&libc.path)
            ),
        );
    }
    for object in &subject.files {
        let note = object
            .note
            .as_ref()
            .map(|n| format!("; {n}"))
            .unwrap_or_default();
        if object.sites > 0 || !object.complete {
            row(
                "calls",
                format!("{} in {}{note}", object.sites, shown(&object.path)),
            );
        }
    }
    if let Some(process) = &subject.process {
        row("set", process.set.clone().unwrap_or_else(|| "none".into()));
        row("threads", process.threads.to_string());
        let sandbox = match process.no_new_privs {
            true => ", no new privileges",
            false => "",
        };
        row("seccomp", format!("{}{sandbox}", process.seccomp));
        if !process.io_uring.is_empty() || process.aio {
            let polled = process.io_uring.iter().filter(|r| r.sqpoll).count();
            let aio = if process.aio { ", AIO" } else { "" };
            row(
                "io_uring",
                format!("{} ({polled} polled){aio}", process.io_uring.len()),
            );
        }
        for path in &process.shared_writable {
            row("mapped", output::name(path));
        }
        if let Some(tracer) = process.tracer {
            row("traced by", tracer.to_string());
        }
    }
    row("held by", subject.layer.into());
    if let Some(why) = &subject.because {
        row("because", output::name(why));
    }
    for advice in &subject.advice {
        row("advice", output::name(advice));
    }
    rows.extend(subject.points.iter().flat_map(Points::rows));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of the object are an interface: none may go or change its name.
    #[test]
    fn the_object_has_these_fields() {
        let machine = Machine::look();
        let me = std::process::id();
        let dir = std::env::temp_dir().join(format!("snapshim-doctor-{me}"));
        let cache = Cache::open_at(&dir);
        let subjects = vec![
            program(Path::new("/bin/true"), &machine, &cache),
            running(me, &machine, &cache),
        ];
        assert_eq!(subjects[0].layer, "sites", "{:?}", subjects[0].because);
        assert_eq!(subjects[0].kind, "dynamic, glibc");
        let absent = program(Path::new("/no/such/program"), &machine, &cache);
        assert_eq!((absent.layer, absent.kind), ("none", "unknown"));
        let report = Report {
            version: VERSION,
            machine,
            watched: vec![Watched {
                path: PathName("/".into()),
                file_system: FileSystem::look(Path::new("/")),
            }],
            subjects,
        };
        let _ = fs::remove_dir_all(&dir);
        assert!(describe(&report).contains("held by"));
        let value = serde_json::to_value(&report).unwrap();
        let keys = |pointer: &str| {
            let object = value.pointer(pointer).unwrap().as_object().unwrap();
            let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
            keys.sort_unstable();
            keys.join(" ")
        };
        for (pointer, expected) in [
            ("", "machine subjects version watched"),
            (
                "/machine",
                "cgroup2 fine_ctime freezer kernel privileged ptrace_scope",
            ),
            ("/watched/0", "fine_ctime kind path reflink"),
            (
                "/subjects/0",
                "advice because chain files kind layer libc name pid points process",
            ),
            ("/subjects/0/libc", "build_id flavour path version"),
            ("/subjects/0/files/0", "complete path sites table"),
            (
                "/subjects/1/process",
                "aio hidden io_uring no_new_privs seccomp set shared_writable shim threads tracer",
            ),
        ] {
            assert_eq!(keys(pointer), expected, "{pointer}");
        }
    }
}
