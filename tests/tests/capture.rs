//! What a snapshot holds: everything a directory can, exactly, on every file
//! system; and, of files that come and go meanwhile, those of the cut.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::process::installed;
use snapshim_tests::{Fs, Lab, Proc, fs as kinds, lab, process, product, rounds, tree};

/// Fills `dir` with one of everything.
fn furnish(dir: &Path, fs_kind: Fs) {
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    let mode = |name: &str, mode| {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    write("plain", b"plain\n");
    write("empty", b"");
    write("large", &vec![7; 5 << 20]);
    fs::create_dir_all(dir.join("sub/dir/deep")).unwrap();
    fs::create_dir(dir.join("empty-dir")).unwrap();
    write("sub/dir/deep/file", b"deep\n");

    let sparse = fs::File::create(dir.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"middle", 32 << 20).unwrap();
    fs::File::create(dir.join("hole"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();

    symlink("plain", dir.join("link")).unwrap();
    symlink("/nowhere/at all", dir.join("dangling")).unwrap();
    symlink("sub", dir.join("link-to-dir")).unwrap();
    fs::hard_link(dir.join("plain"), dir.join("hard")).unwrap();
    fs::hard_link(dir.join("plain"), dir.join("sub/hard")).unwrap();
    fs::hard_link(dir.join("large"), dir.join("sub/dir/large-hard")).unwrap();
    nix::unistd::mkfifo(
        &dir.join("fifo"),
        nix::sys::stat::Mode::from_bits_truncate(0o620),
    )
    .unwrap();

    for (name, bits) in [("read-only", 0o400), ("setuid", 0o4755), ("nothing", 0)] {
        write(name, name.as_bytes());
        mode(name, bits);
    }
    write("owned", b"owned\n");
    std::os::unix::fs::chown(dir.join("owned"), Some(1234), Some(4321)).unwrap();
    std::os::unix::fs::lchown(dir.join("dangling"), Some(12), Some(34)).unwrap();
    mode("sub/dir", 0o1777);
    mode("empty-dir", 0o500);

    fs::write(
        dir.join(OsStr::from_bytes(b"not \xff\xfe UTF-8")),
        b"bytes\n",
    )
    .unwrap();
    fs::write(dir.join(OsStr::from_bytes(b"new\nline \" \\ '")), b"odd\n").unwrap();
    fs::write(dir.join("n".repeat(255)), b"long\n").unwrap();

    let user_xattrs = fs_kind != Fs::Tmpfs || tmpfs_has_xattrs(dir);
    if user_xattrs {
        let target = dir.join("plain");
        process::tool(
            "python3",
            &[
                "-c",
                "import os,sys; os.setxattr(sys.argv[1], 'user.colour', b'\\x00green\\xff')",
                target.to_str().unwrap(),
            ],
        );
    }
    if installed("setfacl") && fs_kind != Fs::Tmpfs {
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        process::tool("setfacl", &["-m", "u:1234:rw", &at("owned")]);
        process::tool("setfacl", &["-d", "-m", "g:4321:rx", &at("sub")]);
    }

    // Times last: making the above changed those of the directories.
    let old = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    for name in [
        "plain",
        "large",
        "sub/dir/deep/file",
        "sub/dir/deep",
        "sub/dir",
        "sub",
        "empty-dir",
        "",
    ] {
        let file = fs::File::open(dir.join(name)).unwrap();
        file.set_modified(old).unwrap();
    }
}

fn tmpfs_has_xattrs(dir: &Path) -> bool {
    let path = dir.join("plain");
    let script = "import os,sys; os.setxattr(sys.argv[1], 'user.x', b'')";
    let mut command = std::process::Command::new("python3");
    command.args(["-c", script]).arg(path);
    process::run(command, Duration::from_secs(20)).code() == 0
}

fn everything(fs_kind: Fs) {
    let Some(lab) = Lab::new("capture-everything", fs_kind, Duration::from_secs(120)) else {
        return;
    };
    let data = lab.data();
    furnish(&data, fs_kind);
    let mut idle = lab.run(&[], Path::new("/bin/sleep"), &["600"]);
    lab_is_ready(&lab, &mut idle);
    let mut ways = vec![&[][..], &["--capture", "copy"]];
    if fs_kind == Fs::Btrfs {
        ways.push(&["--capture", "subvolume"]);
    }
    for options in ways {
        let outcome = lab.checkpoint(options);
        let certificate = outcome.verified();
        let copy = certificate.copy_of(&data);
        let difference = tree::rsync_difference(&data, &copy);
        assert_eq!(difference, "", "{} {options:?}", fs_kind.name());
        let inode = |name: &str| fs::metadata(copy.join(name)).unwrap().ino();
        assert_eq!(inode("plain"), inode("hard"));
        assert_eq!(inode("plain"), inode("sub/hard"));
        assert_ne!(
            inode("plain"),
            fs::metadata(data.join("plain")).unwrap().ino()
        );
        for name in ["sparse", "hole"] {
            let blocks = fs::metadata(copy.join(name)).unwrap().blocks();
            assert!(
                blocks * 512 < 1 << 20,
                "{name} takes {blocks} blocks on {}",
                fs_kind.name()
            );
        }
        println!(
            "{}: {} {options:?}, hold {} µs",
            fs_kind.name(),
            certificate.capture(),
            certificate.hold_us()
        );
        if options.is_empty() && fs_kind.has_reflink() {
            assert_eq!(certificate.capture(), "reflink");
        }
        if let ["--capture", "subvolume"] = options {
            assert_eq!(certificate.capture(), "subvolume");
        }
    }
}

/// Waits until checkpoints of the set are possible.
fn lab_is_ready(lab: &Lab, writer: &mut Proc) {
    let ready = process::wait_until(Duration::from_secs(20), || {
        lab.gate().exists() || !writer.is_running()
    });
    assert!(ready && writer.is_running(), "the set did not come up");
    // The gate is there before the program is.
    std::thread::sleep(Duration::from_millis(100));
}

#[test]
fn everything_on_xfs() {
    everything(Fs::Xfs);
}

#[test]
fn everything_on_btrfs() {
    everything(Fs::Btrfs);
}

#[test]
fn everything_on_ext4() {
    everything(Fs::Ext4);
}

#[test]
fn everything_on_tmpfs() {
    everything(Fs::Tmpfs);
}

/// Checks a copy of what `programs/generations.c` writes.
fn check_generations(dir: &Path) -> Result<u64, String> {
    let index = generation(&dir.join("index"))?.ok_or("no index")?;
    let a = generation(&dir.join("a"))?.ok_or("no a")?;
    let b = generation(&dir.join("b"))?.ok_or("no b")?;
    if !(a == index || a == index + 1) || !(b == index || b == index + 1) || b > a {
        return Err(format!("index {index}, a {a}, b {b}"));
    }
    for entry in fs::read_dir(dir).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let found = generation(&entry.path())?;
        match name.strip_prefix("gen-") {
            Some(g) => {
                let g: u64 = g.parse().map_err(|_| name.clone())?;
                // Created, and its one write may be still to come.
                let fresh = g == index + 1 && found.is_none();
                if g + 3 < index || g > index + 1 || !(found == Some(g) || fresh) {
                    return Err(format!("{name} holds {found:?} at index {index}"));
                }
            }
            None if !name.ends_with(".tmp") => {}
            None if found.is_none_or(|g| g == index || g == index + 1) => {}
            None => return Err(format!("{name} holds {found:?} at index {index}")),
        }
    }
    for g in index.saturating_sub(2).max(1)..=index {
        if generation(&dir.join(format!("gen-{g}")))? != Some(g) {
            return Err(format!("gen-{g} is missing at index {index}"));
        }
    }
    Ok(index)
}

/// The generation in a file; `None` if it is empty, an error if it is not whole.
fn generation(path: &Path) -> Result<Option<u64>, String> {
    let bytes = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let words: Vec<u64> = bytes
        .chunks(8)
        .map(|w| u64::from_le_bytes(w.try_into().unwrap_or([255; 8])))
        .collect();
    if words.is_empty() {
        return Ok(None);
    }
    let g = words[0];
    let whole = words.len() >= 2
        && words[1] == words.len() as u64
        && words[2..].iter().enumerate().all(|(i, w)| {
            *w == g
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(i as u64 + 2)
        });
    if whole {
        Ok(Some(g))
    } else {
        Err(format!("{} is torn", path.display()))
    }
}

fn replaced_files(fs_kind: Fs) {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("capture-generations", fs_kind, Duration::from_secs(300)) else {
        return;
    };
    let program = product::program("generations");

    // The control: without the gate, in the order of the directory.
    let (live, copy) = (lab.beside("control"), lab.beside("copy"));
    fs::create_dir_all(&live).unwrap();
    let mut command = lab.command(&program);
    command.arg(&live).arg("600");
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 5);
    let controls = 30;
    let bad = (0..controls)
        .filter(|_| {
            fs::create_dir_all(&copy).unwrap();
            for entry in fs::read_dir(&live).unwrap().flatten() {
                let _ = tree::copy_plainly(&entry.path(), &copy.join(entry.file_name()));
            }
            let verdict = check_generations(&copy);
            fs::remove_dir_all(&copy).unwrap();
            verdict.is_err()
        })
        .count();
    writer.end();
    fs::remove_file(lab.stats().path()).unwrap();

    let data = lab.data();
    let mut writer = lab.run(
        &["--keep-last", "2"],
        &program,
        &[data.to_str().unwrap(), "600"],
    );
    lab.wait_for_beats(&mut writer, 5);
    let count = rounds(200, 60);
    let mut last = 0;
    let mut unverified = Vec::new();
    for _ in 0..count {
        let outcome = lab.checkpoint(&[]);
        let certificate = outcome.certificate();
        let index = check_generations(&certificate.copy_of(&data));
        let index = index.unwrap_or_else(|e| {
            panic!(
                "{}: {e}; verified: {}",
                fs_kind.name(),
                certificate.is_verified()
            )
        });
        assert!(index >= last);
        last = index;
        if !certificate.is_verified() {
            unverified.push(certificate.reasons());
        }
    }
    writer.signal(Signal::SIGTERM);
    let ended = writer.wait(Duration::from_secs(20)).ok("the program");
    println!(
        "{}: {count} checkpoints of replaced files, {} unverified; \
         without the gate {bad} of {controls} copies inconsistent; {}",
        fs_kind.name(),
        unverified.len(),
        ended.out().trim()
    );
    assert!(bad > 0, "the control shows nothing");
    assert!(unverified.is_empty(), "{unverified:?}");
}

#[test]
fn replaced_files_on_every_file_system() {
    for fs_kind in kinds::ALL {
        replaced_files(fs_kind);
    }
}
