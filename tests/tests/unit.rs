//! The crate for programs that mark their units (`unit/`): nothing without the shim, however
//! it is linked; with it, no snapshot at `--at unit` is in the middle of one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use snapshim_tests::{Fs, Lab, lab, process, product, rounds};

const LIMIT: Duration = Duration::from_secs(600);
const BUILD: Duration = Duration::from_secs(600);

/// Builds the example, linked as these flags say.
fn example(name: &str, flags: &str) -> PathBuf {
    let target = product::target_dir().join("unit-example").join(name);
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .args([
            "build",
            "--release",
            "-p",
            "snapshim-unit",
            "--example",
            "transfer",
        ])
        // Named, so that the flags are for the program alone.
        .args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", flags)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    process::run(command, BUILD).ok("the example");
    target.join("x86_64-unknown-linux-gnu/release/examples/transfer")
}

/// Whether the money is all there; `None` while the files are not.
fn is_whole(dir: &Path) -> Option<bool> {
    let amount = |name| {
        fs::read_to_string(dir.join(name))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    Some(amount("mine")? + amount("yours")? == 1_000_000)
}

#[test]
#[cfg(target_arch = "x86_64")]
fn no_snapshot_is_in_the_middle_of_a_unit() {
    let _serial = lab::serial();
    let linked = [
        ("pie", ""),
        ("fixed", "-C relocation-model=static"),
        ("unoptimised", "-C opt-level=0"),
    ];
    for (name, flags) in linked {
        let program = example(name, flags);
        let lab = Lab::new(&format!("unit-{name}"), Fs::Xfs, LIMIT).unwrap();
        let data = lab.data();
        // Without the shim.
        let mut alone = lab.command(&program);
        alone.arg(&data).arg("10");
        let alone = process::run(alone, LIMIT).ok("without the shim");
        assert_eq!(alone.out(), "alone\n", "{name}");
        assert_eq!(is_whole(&data), Some(true));
        // With it, but without a gate; and with one.
        let mut watched = lab.command(&program);
        watched
            .arg(&data)
            .arg("10")
            .env("LD_PRELOAD", product::shim());
        let watched = process::run(watched, LIMIT).ok("with the shim");
        assert_eq!(watched.out(), "watched\n", "{name}");
        let mut writer = lab.run(&[], &program, &[data.to_str().unwrap()]);
        std::thread::sleep(Duration::from_millis(500));
        let rounds = rounds(500, 60);
        let torn = |at: &str| {
            let torn = (0..rounds).filter(|_| {
                let outcome = lab.checkpoint(&["--at", at, "--keep-last", "1"]);
                let certificate = outcome.verified();
                assert_eq!(certificate.0["commit_point"], at);
                !is_whole(&certificate.copy_of(&data)).unwrap()
            });
            torn.count()
        };
        let (found, control) = (torn("unit"), torn("write"));
        println!(
            "{name}: {found} of {rounds} snapshots at unit in the middle of one; at write {control}"
        );
        assert_eq!(found, 0);
        assert!(control > 0, "the control shows nothing");
        let chosen = lab.checkpoint(&["--at", "auto"]);
        assert_eq!(chosen.verified().0["commit_point"], "unit");
        writer.end();
    }
}

/// Nothing has to be there at run time: not even a dynamic linker.
#[test]
#[cfg(target_arch = "x86_64")]
fn linked_statically_it_does_nothing() {
    let lab = Lab::new("unit-static", Fs::Tmpfs, LIMIT).unwrap();
    for (name, flags) in [
        ("static-pie", "-C target-feature=+crt-static"),
        (
            "static",
            "-C target-feature=+crt-static -C relocation-model=static",
        ),
    ] {
        let program = example(name, flags);
        let mut command = lab.command(&program);
        command
            .arg(lab.data())
            .arg("10")
            .env("LD_PRELOAD", product::shim());
        assert_eq!(process::run(command, LIMIT).ok(name).out(), "alone\n");
        let kind = process::tool("readelf", &["-lW", program.to_str().unwrap()]);
        assert!(!kind.out().contains("INTERP"), "{name} is not static");
    }
}
