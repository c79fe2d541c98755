//! Building and finding what is tested.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use crate::process;

/// The directory Cargo builds into.
pub fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("own path");
    let profile = exe
        .ancestors()
        .skip(1)
        .find(|dir| !dir.ends_with("deps"))
        .expect("a build directory");
    profile.parent().expect("a target directory").to_owned()
}

/// The release build of the product: built once, or `$SNAPSHIM_BIN`.
pub fn snapshim() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("SNAPSHIM_BIN") {
            let path = PathBuf::from(path);
            assert!(
                process::is_executable(&path),
                "SNAPSHIM_BIN: {} is not an executable",
                path.display()
            );
            return path;
        }
        build().join("snapshim")
    })
}

/// `libsnapshim.so` as built from this workspace.
pub fn shim() -> PathBuf {
    if let Some(path) = std::env::var_os("SNAPSHIM_SO") {
        return path.into();
    }
    build().join("libsnapshim.so")
}

/// Builds the product in release mode; returns the directory it is in.
fn build() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let target = target_dir();
        let mut command = Command::new(cargo);
        command
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
            .args([
                "build",
                "--release",
                "-p",
                "snapshim",
                "-p",
                "snapshim-shim",
            ])
            .arg("--target-dir")
            .arg(&target);
        // What Cargo tells this process about this package is not meant for those.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                command.env_remove(name);
            }
        }
        process::run(command, Duration::from_secs(900)).ok("cargo build --release -p snapshim");
        target.join("release")
    })
}

/// Where the sources of the programs are.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs")
}

/// When a source was last changed.
pub fn newest_source() -> Option<SystemTime> {
    [sources(), sources().join("paths")]
        .iter()
        .flat_map(|dir| fs::read_dir(dir).expect("the programs").flatten())
        .filter_map(|e| e.metadata().and_then(|m| m.modified()).ok())
        .max()
}

/// Compiles `programs/NAME.c` with threads; returns the program.
pub fn program(name: &str) -> PathBuf {
    compiled("cc", name, name, &["-pthread"])
}

/// Compiles `programs/SOURCE.c` with `compiler` and `flags` as `name`.
pub fn compiled(compiler: &str, source: &str, name: &str, flags: &[&str]) -> PathBuf {
    static DONE: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut done = DONE.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(path) = done.get(name) {
        return path.clone();
    }
    let dir = target_dir().join("test-programs");
    fs::create_dir_all(&dir).expect("a directory for programs");
    let path = dir.join(name);
    let source = sources().join(format!("{source}.c"));
    let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
    if time(&path) < newest_source() {
        let unfinished = dir.join(format!("{name}.{}", std::process::id()));
        let mut command = Command::new(compiler);
        command
            .args([
                "-O2",
                "-g",
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-o",
            ])
            .arg(&unfinished)
            .arg(&source)
            .args(flags);
        process::run(command, Duration::from_secs(120))
            .ok(&format!("compiling {}", source.display()));
        fs::rename(&unfinished, &path).expect("the program in its place");
    }
    done.insert(name.to_owned(), path.clone());
    path
}

/// Compiles `programs/NAME.go` to a static program.
pub fn go_program(name: &str) -> PathBuf {
    go_build(name, false, &[&format!("{name}.go")])
}

/// The same, with `programs/NAME_cgo.go`, to a program that is linked with libc.
pub fn cgo_program(name: &str) -> PathBuf {
    go_build(
        name,
        true,
        &[&format!("{name}.go"), &format!("{name}_cgo.go")],
    )
}

fn go_build(name: &str, cgo: bool, files: &[&str]) -> PathBuf {
    static LOCK: Mutex<()> = Mutex::new(());
    let _one = LOCK.lock().unwrap_or_else(|e| e.into_inner());
    assert!(
        process::installed("go"),
        "this test needs go: apt-get install golang-go"
    );
    let dir = target_dir().join("test-programs");
    fs::create_dir_all(&dir).expect("a directory for programs");
    let path = dir.join(format!("{name}-{}", if cgo { "cgo" } else { "go" }));
    let mut command = Command::new("go");
    command
        .env("CGO_ENABLED", if cgo { "1" } else { "0" })
        .env("GOCACHE", dir.join("go-cache"))
        .arg("build")
        .arg("-o")
        .arg(&path)
        .args(files.iter().map(|file| sources().join(file)));
    process::run(command, Duration::from_secs(300)).ok("go build");
    path
}
