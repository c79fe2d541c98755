//! Builds the shim, so that the `snapshim` binary can carry it inside.
//!
//! With plain `rustc`: a Cargo inside Cargo would need a target directory, a lock
//! and a network of its own, and would leave the shim's profile to the caller.
//! The shim has one dependency, the gate, and neither has any other. How it is
//! compiled matches `[profile.*.package]` in the workspace; what it is linked
//! with is in `shim/link-args.txt`, which its own build script reads too.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let out = PathBuf::from(variable("OUT_DIR"));
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("..");
    let (gate, shim) = (root.join("gate/src"), root.join("shim/src"));
    let link_args = root.join("shim/link-args.txt");
    for input in [&gate, &shim, &link_args] {
        println!("cargo:rerun-if-changed={}", input.display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    let mut command = rustc(&root, &out);
    command.args(["--crate-name=snapshim_gate", "--crate-type=rlib"]);
    run(command.arg(gate.join("lib.rs")));

    let mut command = rustc(&root, &out);
    command.args(["--crate-name=snapshim", "--crate-type=cdylib"]);
    let rlib = out.join("libsnapshim_gate.rlib");
    command.arg("--extern").arg(joined("snapshim_gate=", &rlib));
    let text = fs::read_to_string(&link_args)
        .unwrap_or_else(|cause| panic!("cannot read {}: {cause}", link_args.display()));
    for arg in text.lines().filter(|line| !line.is_empty()) {
        command.arg(format!("-Clink-arg={arg}"));
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        command.arg(joined("-Clinker=", Path::new(&linker)));
    }
    run(command.arg(shim.join("lib.rs")));
}

/// The compiler, with what both crates have in common.
fn rustc(root: &Path, out: &Path) -> Command {
    let mut command = Command::new(variable("RUSTC"));
    command
        .arg("--edition=2024")
        .arg("--target")
        .arg(variable("TARGET"));
    command.arg("--out-dir").arg(out);
    // The same bytes wherever the sources lie.
    let mut remap = joined("--remap-path-prefix=", root);
    remap.push("=snapshim");
    command.arg(remap);
    command.args([
        // Warnings are for the shim's own build, which everybody's `cargo build` makes too.
        "--cap-lints=allow",
        "-Copt-level=3",
        "-Cpanic=abort",
        "-Ccodegen-units=1",
        "-Cdebuginfo=0",
        "-Cstrip=symbols",
    ]);
    if env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "musl") {
        // There is no such thing as a static shared library.
        command.arg("-Ctarget-feature=-crt-static");
    }
    command
}

/// Runs the compiler; its messages are all there is to say if it fails.
fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|cause| panic!("cannot run {command:?}: {cause}"));
    assert!(
        status.success(),
        "the shim cannot be built: {command:?}: {status}"
    );
}

/// What Cargo tells a build script.
fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run this with Cargo"))
}

fn joined(prefix: &str, path: &Path) -> OsString {
    let mut joined = OsString::from(prefix);
    joined.push(path);
    joined
}
