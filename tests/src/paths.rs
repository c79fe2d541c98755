//! The path suite: every way by which a program can change a file, as programs that
//! do it again and again (`programs/paths`).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use crate::Lab;
use crate::process::{self, installed};
use crate::product::{self, compiled};

/// One way to change a file.
#[derive(Clone, Debug)]
pub struct Way {
    /// As in the table: "C: pwrite".
    pub name: String,
    kind: Kind,
    word: String,
}

/// What a program is made of and how it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `paths.c`.
    C,
    /// `odd.c`.
    Odd,
    /// `paths.c`, set-user-id.
    SetUserId,
    /// `tiny.c`, built as its word says.
    Tiny,
    Cpp,
    Dbm,
    Python,
    Sqlite,
    Perl,
    Java,
    Node,
    Erlang,
    Rust,
    GoStatic,
    GoCgo,
    Shell,
}

/// What is needed to run a way.
#[derive(Clone, Debug)]
pub struct Ready {
    before: Vec<OsString>,
    plugin: PathBuf,
}

impl Ready {
    /// The command line for `file`, as arguments; `count` 0 for ever.
    pub fn arguments(&self, file: &Path, count: usize) -> Vec<OsString> {
        let mut all = self.before.clone();
        all.push(file.into());
        all.push(count.to_string().into());
        all
    }

    /// What it needs in the environment.
    pub fn environment(&self, command: &mut Command) {
        command.env("PATHS_PLUGIN", &self.plugin);
        // Elsewhere than in the data, and the same in each run.
        command.env("TMPDIR", "/tmp").env("HOME", "/nonexistent");
    }
}

/// The ways of each kind, beside those that `paths list` and `odd list` print.
const OTHERS: &[(Kind, &str, &str)] = &[
    (Kind::SetUserId, "set-user-id", "pwrite"),
    (
        Kind::Tiny,
        "built as",
        "static-glibc static-musl musl 32-bit static-32-bit",
    ),
    (Kind::Cpp, "C++", "ofstream filesystem"),
    (Kind::Dbm, "C", "gdbm"),
    (
        Kind::Python,
        "Python",
        "open print os.write mmap ctypes ctypes-stdio multiprocessing subprocess shutil",
    ),
    (Kind::Sqlite, "SQLite", "delete truncate wal"),
    (Kind::Perl, "Perl", "print syswrite sysopen truncate"),
    (
        Kind::Java,
        "Java",
        "FileOutputStream RandomAccessFile FileChannel FileChannel.map Files transferTo",
    ),
    (
        Kind::Node,
        "Node",
        "writeSync promises stream copyFile writeFileSync",
    ),
    (Kind::Erlang, "Erlang", "write pwrite write_file"),
    (Kind::Rust, "Rust", "write write_at copy"),
    (Kind::GoStatic, "Go static", "write syscall rename"),
    (Kind::GoCgo, "Go cgo", "write syscall rename"),
    (
        Kind::Shell,
        "shell",
        "echo printf dd cp mv tee sed awk sort tar gzip install truncate touch ln rsync sqlite3",
    ),
];

/// All ways.
pub fn all() -> Vec<Way> {
    let mut ways = Vec::new();
    for (kind, program) in [(Kind::C, c_program()), (Kind::Odd, odd_program())] {
        let ended = process::run(command_of(&program, &["list"]), Duration::from_secs(10));
        ways.extend(ended.ok("list").out().lines().map(|word| Way {
            name: format!("C: {word}"),
            kind,
            word: word.to_owned(),
        }));
    }
    for (kind, title, words) in OTHERS {
        ways.extend(words.split(' ').map(|word| Way {
            name: format!("{title}: {word}"),
            kind: *kind,
            word: word.to_owned(),
        }));
    }
    ways
}

/// The way of that name.
#[track_caller]
pub fn way(name: &str) -> Way {
    let found = all().into_iter().find(|way| way.name == name);
    found.unwrap_or_else(|| panic!("no way is named {name}"))
}

fn command_of(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

fn c_program() -> PathBuf {
    for header in ["liburing.h", "libaio.h"] {
        assert!(
            Path::new("/usr/include").join(header).exists(),
            "this needs {header}: apt-get install liburing-dev libaio-dev"
        );
    }
    let flags = ["-pthread", "-DWITH_URING", "-DWITH_AIO", "-luring", "-laio"];
    compiled("cc", "paths/paths", "paths", &flags)
}

fn odd_program() -> PathBuf {
    compiled("cc", "paths/odd", "paths-odd", &[])
}

impl Way {
    /// Builds what it needs; `Err` names what is missing on this machine.
    pub fn prepare(&self, lab: &Lab) -> Result<Ready, String> {
        let source = |name: &str| product::sources().join("paths").join(name);
        let mut before: Vec<OsString> = match self.kind {
            Kind::C => vec![c_program().into()],
            Kind::Odd => vec![odd_program().into()],
            Kind::SetUserId => vec![set_user_id_copy(lab).into()],
            Kind::Tiny => return Ok(self.ready(vec![tiny(&self.word)?.into()])),
            Kind::Cpp => vec![built("cpp", "g++", &source("paths.cpp"), CPP)?.into()],
            Kind::Dbm => vec![built("dbm", "gcc", &source("dbm.c"), &["-O2", "-lgdbm"])?.into()],
            Kind::Python => vec![needs("python3")?, source("paths.py").into()],
            Kind::Sqlite => vec![needs("python3")?, source("sqlite.py").into()],
            Kind::Perl => vec![needs("perl")?, source("paths.pl").into()],
            Kind::Java => {
                let classes = java_classes(&source("Paths.java"))?;
                vec![needs("java")?, "-cp".into(), classes.into(), "Paths".into()]
            }
            Kind::Node => vec![needs("node")?, source("paths.js").into()],
            Kind::Erlang => vec![needs("escript")?, source("paths.escript").into()],
            Kind::Rust => {
                let flags = ["--edition=2021", "-O"];
                vec![built("rust", "rustc", &source("paths.rs"), &flags)?.into()]
            }
            Kind::GoStatic => vec![go("go-static", "0", "without_cgo.go")?.into()],
            Kind::GoCgo => vec![go("go-cgo", "1", "with_cgo.go")?.into()],
            Kind::Shell => {
                if ["rsync", "sqlite3"].contains(&self.word.as_str()) {
                    needs(&self.word)?;
                }
                vec![needs("bash")?, source("shell.sh").into()]
            }
        };
        before.push(self.word.clone().into());
        Ok(self.ready(before))
    }

    fn ready(&self, before: Vec<OsString>) -> Ready {
        let flags = ["-shared", "-fPIC"];
        Ready {
            before,
            plugin: compiled("cc", "paths/plugin", "paths-plugin.so", &flags),
        }
    }
}

const CPP: &[&str] = &["-O2", "-std=c++17", "-pthread"];

fn needs(tool: &str) -> Result<OsString, String> {
    match installed(tool) {
        true => Ok(tool.into()),
        false => Err(tool.to_owned()),
    }
}

/// A copy of `paths` that belongs to nobody and runs as nobody.
fn set_user_id_copy(lab: &Lab) -> PathBuf {
    let copy = lab.beside("set-user-id");
    if !copy.exists() {
        fs::copy(c_program(), &copy).expect("a copy of the program");
        chown(&copy, Some(65534), Some(65534)).expect("chown");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755)).expect("chmod");
    }
    copy
}

/// `tiny.c`, built as `how` says.
fn tiny(how: &str) -> Result<PathBuf, String> {
    let (compiler, flags, needs_file): (_, &[&str], _) = match how {
        "static-glibc" => ("gcc", &["-static"], "/usr/bin/gcc"),
        "static-musl" => ("musl-gcc", &["-static"], "/usr/bin/musl-gcc"),
        "musl" => ("musl-gcc", &[], "/usr/bin/musl-gcc"),
        "32-bit" => ("gcc", &["-m32"], "/usr/lib32/crti.o"),
        _ => ("gcc", &["-m32", "-static"], "/usr/lib32/libc.a"),
    };
    if !Path::new(needs_file).exists() {
        return Err(needs_file.to_owned());
    }
    let name = format!("paths-{how}");
    Ok(compiled(compiler, "paths/tiny", &name, flags))
}

/// What was built so far.
static BUILT: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());

/// Runs `build` with a path to make once a process, if `tool` is there.
fn once(name: &str, tool: &str, build: impl FnOnce(&Path) -> Command) -> Result<PathBuf, String> {
    needs(tool)?;
    let mut done = BUILT.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(path) = done.get(name) {
        return Ok(path.clone());
    }
    let dir = product::target_dir().join("test-programs/paths.d");
    fs::create_dir_all(&dir).expect("a directory for programs");
    let path = dir.join(name);
    let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
    if time(&path) < product::newest_source() {
        // Several test binaries may be at it at once.
        let unfinished = dir.join(format!("{name}.{}", std::process::id()));
        let ended = process::run(build(&unfinished), Duration::from_secs(180));
        if ended.code() != 0 {
            return Err(format!("{tool}: {}", ended.err().trim()));
        }
        let _ = fs::remove_dir_all(&path);
        if fs::rename(&unfinished, &path).is_err() {
            assert!(path.exists(), "{} in its place", path.display());
            let _ = fs::remove_dir_all(&unfinished);
        }
    }
    done.insert(name.to_owned(), path.clone());
    Ok(path)
}

fn built(name: &str, compiler: &str, source: &Path, flags: &[&str]) -> Result<PathBuf, String> {
    once(name, compiler, |path| {
        let mut command = Command::new(compiler);
        command.arg("-o").arg(path).arg(source).args(flags);
        command
    })
}

fn java_classes(source: &Path) -> Result<PathBuf, String> {
    once("java", "javac", |path| {
        let mut command = Command::new("javac");
        command.arg("-d").arg(path).arg(source);
        command
    })
}

fn go(name: &str, cgo: &str, second: &str) -> Result<PathBuf, String> {
    once(name, "go", |path| {
        let mut command = Command::new("go");
        command
            .current_dir(product::sources().join("paths"))
            .env("CGO_ENABLED", cgo)
            .env("GOFLAGS", "-mod=mod")
            .args(["build", "-o"])
            .arg(path)
            .args(["paths.go", second]);
        command
    })
}
