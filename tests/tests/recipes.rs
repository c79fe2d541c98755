//! The `snapshim hold` lines of docs/recipes.md, as printed but for the paths. `btrfs` is the real
//! one; for what this kernel lacks there is a stand-in of that name, which copies the files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use snapshim_tests::{Fs, Lab, lab, process, product, rounds};

const LIMIT: Duration = Duration::from_secs(600);
const STAND_INS: [&str; 4] = ["lvcreate", "zfs", "rbd", "mkcp"];

/// Whether all numbers in all files of `units` are the same.
fn is_whole(dir: &Path) -> bool {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with('f') {
            let bytes = fs::read(entry.path()).unwrap();
            numbers.extend(bytes.chunks(8).map(<[u8]>::to_vec));
        }
    }
    !numbers.is_empty() && numbers.windows(2).all(|pair| pair[0] == pair[1])
}

/// The lines in the `text` blocks.
fn recipes() -> Vec<String> {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/recipes.md");
    let text = fs::read_to_string(document).unwrap();
    let lines = text.lines().filter(|l| l.starts_with("snapshim hold "));
    lines.map(str::to_owned).collect()
}

#[test]
fn every_hold_takes_whole_units() {
    let _serial = lab::serial();
    // The set has this name, as in the recipes.
    let Some(lab) = Lab::new("db", Fs::Btrfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    fs::remove_dir(&data).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    process::tool("btrfs", &["subvolume", "create", &text(&data)]).ok("a subvolume");
    let (bin, copy, log) = (lab.beside("bin"), lab.beside("snapshot"), lab.beside("log"));
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(product::snapshim(), bin.join("snapshim")).unwrap();
    for name in STAND_INS {
        let (data, copy, log) = (text(&data), text(&copy), text(&log));
        let script =
            format!("#!/bin/sh\necho \"$0\" \"$@\" >> '{log}'\nexec cp -r '{data}' '{copy}'\n");
        fs::write(bin.join(name), script).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let shell = |line: &str| {
        let mut command = lab.command("sh");
        command.args(["-c", line]).env("PATH", &path);
        process::run(command, LIMIT)
    };
    let take_away = || {
        // The top of a subvolume.
        if fs::metadata(&copy).is_ok_and(|meta| meta.ino() == 256) {
            process::tool("btrfs", &["subvolume", "delete", &text(&copy)]).ok("delete");
        }
        let _ = fs::remove_dir_all(&copy);
    };
    let args = ["lock", &text(&data), "3", "4", "150"];
    let mut writer = lab.run(&[], &product::program("units"), &args);
    let begun = process::wait_until(Duration::from_secs(20), || {
        data.join("f0").metadata().is_ok_and(|m| m.len() >= 32)
    });
    assert!(begun, "the program writes nothing");

    let lines = recipes();
    assert_eq!(lines.len(), STAND_INS.len() + 1, "{lines:?}");
    for line in &lines {
        let line = line
            .replace("/srv/snapshot", &text(&copy))
            .replace("/srv/db", &text(&data));
        for _ in 0..rounds(50, 8) {
            shell(&line).ok(&line);
            assert!(is_whole(&copy), "{line}: in the middle of a unit");
            take_away();
        }
    }
    let log = fs::read_to_string(&log).unwrap();
    for name in STAND_INS {
        assert!(
            log.contains(&format!("/{name} ")),
            "{name} was not run: {log}"
        );
    }
    // The control: the stand-in without the hold.
    let torn = (0..rounds(50, 30)).filter(|_| {
        shell("zfs snapshot tank/db@now").ok("a stand-in");
        let torn = !is_whole(&copy);
        take_away();
        torn
    });
    let torn = torn.count();
    println!(
        "{} recipes; {torn} copies without a hold are torn",
        lines.len()
    );
    assert!(torn > 0, "the control shows nothing");
    writer.end();
}
