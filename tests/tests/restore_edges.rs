//! `snapshim restore` where it could do harm: what is mounted below, what was written since,
//! other restores near by, full file systems, names that drive terminals.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use snapshim_tests::process::Ended;
use snapshim_tests::{Certificate, Fs, Lab, process};

const STAGING: &str = ".snapshim-restore";

fn lab(name: &str, kind: Fs) -> Option<Lab> {
    Lab::new(name, kind, Duration::from_secs(120))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Takes a snapshot of `dir` as the set `name`.
#[track_caller]
fn snap(lab: &Lab, name: &str, dir: &Path) -> Certificate {
    let mut command = lab.snapshim(&["snap", "--json", "--name", name, "--capture", "copy"]);
    command.arg(dir).arg("--store").arg(lab.store());
    let ended = process::run(command, Duration::from_secs(60)).ok("snap");
    Certificate(serde_json::from_str(&ended.out()).unwrap())
}

fn restore(lab: &Lab, options: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["restore"]);
    command.args(options).arg("--store").arg(lab.store());
    process::run(command, Duration::from_secs(60))
}

fn undo(lab: &Lab, options: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["restore", "--undo"]);
    command.args(options).arg("--store").arg(lab.store());
    process::run(command, Duration::from_secs(60))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

/// Something mounted, for as long as this is there.
struct Mounted(PathBuf);

impl Mounted {
    fn bind(from: &Path, to: &Path) -> Mounted {
        process::tool("mount", &["--bind", text(from), text(to)]);
        Mounted(to.to_owned())
    }

    fn tmpfs(at: &Path, size: &str) -> Mounted {
        fs::create_dir(at).unwrap();
        let size = format!("size={size}");
        process::tool("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", text(at)]);
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("umount");
        command.arg(&self.0);
        process::run(command, Duration::from_secs(30));
    }
}

#[test]
fn what_is_mounted_in_a_directory_that_goes_is_not_emptied() {
    let Some(lab) = lab("edges-mounts", Fs::Ext4) else {
        return;
    };
    let (data, other) = (lab.data(), lab.beside("other"));
    fs::create_dir(&other).unwrap();
    fs::write(other.join("precious"), "precious").unwrap();
    fs::write(data.join("file"), "then").unwrap();
    fs::write(data.join("was-file"), "then").unwrap();
    snap(&lab, lab.set(), &data);
    fs::remove_file(data.join("was-file")).unwrap();
    for at in ["extra/mnt", "extra/deep/mnt"] {
        fs::create_dir_all(data.join(at)).unwrap();
        fs::write(data.join("extra/other"), "now").unwrap();
        fs::write(data.join("file"), "now").unwrap();
        let mounted = Mounted::bind(&other, &data.join(at));
        let ended = restore(&lab, &[lab.set(), "latest", "--in-place"]).ok("restore");
        assert!(ended.err().contains("is a mount point"), "{}", ended.err());
        assert_eq!(read(other.join("precious")), "precious", "{at}");
        assert_eq!(read(data.join(at).join("precious")), "precious");
        assert_eq!(read(data.join("file")), "then");
        assert!(!data.join("extra/other").exists());
        drop(mounted);
        fs::remove_dir_all(data.join("extra")).unwrap();
    }
    // A file in the place of the directory it is mounted in.
    fs::remove_file(data.join("was-file")).unwrap();
    fs::create_dir_all(data.join("was-file/mnt")).unwrap();
    let mounted = Mounted::bind(&other, &data.join("was-file/mnt"));
    let ended = restore(&lab, &[lab.set(), "latest", "--in-place"]);
    assert_eq!(ended.code(), 1);
    assert!(ended.err().contains("is a mount point"), "{}", ended.err());
    assert_eq!(read(other.join("precious")), "precious");
    drop(mounted);
    restore(&lab, &[lab.set(), "latest", "--in-place"]).ok("without it");
    // A file can be a mount point as well; found before anything is replaced.
    for (name, code) in [("file", 1), ("extra", 0)] {
        fs::write(data.join(name), "now").unwrap();
        let mounted = Mounted::bind(&other.join("precious"), &data.join(name));
        let ended = restore(&lab, &[lab.set(), "latest", "--in-place"]);
        assert_eq!(ended.code(), code, "{}", ended.err());
        assert!(
            ended.err().contains("it is a mount point"),
            "{}",
            ended.err()
        );
        assert_eq!(read(data.join(name)), "precious");
        assert!(!lab.beside(STAGING).exists());
        drop(mounted);
    }
}

#[test]
fn an_undo_is_of_what_was_named() {
    let Some(lab) = lab("edges-undo-other", Fs::Ext4) else {
        return;
    };
    let (one, two) = (lab.beside("one"), lab.beside("two"));
    for dir in [&one, &two] {
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("file"), "then").unwrap();
    }
    snap(&lab, "one", &one);
    snap(&lab, "two", &two);
    fs::write(two.join("file"), "now").unwrap();
    restore(&lab, &["two", "latest", "--in-place", "--keep-replaced"]).ok("restore");
    for options in [&["one"] as &[&str], &["--path", text(&one)]] {
        let ended = undo(&lab, options);
        assert_eq!(ended.code(), 1, "{}", ended.err());
        assert!(ended.err().contains("is of other files"), "{}", ended.err());
        assert_eq!(read(two.join("file")), "then");
    }
    undo(&lab, &["--path", text(&two.join("file"))]).ok("undo");
    assert_eq!(read(two.join("file")), "now");
    assert!(!lab.beside(STAGING).exists());
}

#[test]
fn an_undo_takes_nothing_back_that_was_written_since() {
    let Some(lab) = lab("edges-undo-written", Fs::Xfs) else {
        return;
    };
    let data = lab.data();
    let names = ["file", "linked", "in/dir", "untouched"];
    fs::create_dir(data.join("in")).unwrap();
    for name in names {
        fs::write(data.join(name), "then").unwrap();
    }
    fs::hard_link(data.join("linked"), data.join("linked-2")).unwrap();
    snap(&lab, lab.set(), &data);
    fs::remove_dir_all(data.join("in")).unwrap();
    for name in ["file", "linked", "untouched"] {
        fs::write(data.join(name), "now").unwrap();
    }
    restore(
        &lab,
        &[lab.set(), "latest", "--in-place", "--keep-replaced"],
    )
    .ok("restore");
    std::thread::sleep(Duration::from_millis(50));
    // In place, so that each is the same file.
    for name in ["file", "linked", "in/dir"] {
        use std::io::Write;
        let mut file = fs::File::options()
            .append(true)
            .open(data.join(name))
            .unwrap();
        file.write_all(b" and since").unwrap();
    }
    // Also the second time, when some were put back.
    for _ in 0..2 {
        let ended = undo(&lab, &[lab.set()]);
        assert_eq!(ended.code(), 1, "{}", ended.err());
        assert!(
            ended.err().contains("4 that were changed"),
            "{}",
            ended.err()
        );
        for name in ["file", "linked", "linked-2", "in/dir"] {
            assert_eq!(read(data.join(name)), "then and since", "{name}");
        }
        assert_eq!(read(data.join("untouched")), "now");
    }
    undo(&lab, &["--force", lab.set()]).ok("undo --force");
    assert_eq!(read(data.join("linked-2")), "now");
    assert!(!data.join("in").exists());
}

/// Fills what is left of a file system.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(path).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

#[test]
fn a_full_file_system_keeps_nobody_from_undoing() {
    let Some(lab) = lab("edges-full", Fs::Ext4) else {
        return;
    };
    for is_undone in [true, false] {
        let small = Mounted::tmpfs(&lab.beside(&format!("small-{is_undone}")), "4m");
        let data = small.0.join("data");
        fs::create_dir(&data).unwrap();
        let at = |i: usize| data.join(format!("file-{i}"));
        for i in 0..100 {
            fs::write(at(i), "then").unwrap();
        }
        let set = format!("full-{is_undone}");
        let id = snap(&lab, &set, &data).id().to_owned();
        for i in 0..100 {
            fs::write(at(i), "now").unwrap();
        }
        // Killed when some are in place.
        let mut command = std::process::Command::new("strace");
        command.args([
            "-f",
            "-o",
            "/dev/null",
            "-e",
            "inject=renameat2:signal=KILL:when=50",
        ]);
        let mut run = lab.snapshim(&["restore", &set, &id, "--in-place", "--store"]);
        run.arg(lab.store());
        command.arg(run.get_program()).args(run.get_args());
        for (name, value) in run.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        process::run(command, Duration::from_secs(60));
        let count = |word| (0..100).filter(|i| read(at(*i)) == word).count();
        assert!(
            count("then") > 10 && count("now") > 10,
            "{} are new",
            count("then")
        );
        fill(&small.0.join("full"));
        let word = if is_undone {
            undo(&lab, &["--path", text(&data)]).ok("undo");
            "now"
        } else {
            restore(&lab, &[&set, &id, "--in-place"]).ok("restore");
            "then"
        };
        assert_eq!(count(word), 100);
        assert!(!small.0.join(STAGING).exists());
    }
}

#[test]
fn names_in_messages_cannot_drive_a_terminal() {
    let Some(lab) = lab("edges-names", Fs::Ext4) else {
        return;
    };
    let (data, name) = (lab.data(), "a\u{1b}[31mb");
    fs::create_dir(data.join(name)).unwrap();
    fs::write(data.join(name).join("file"), "x").unwrap();
    let id = snap(&lab, lab.set(), &data).id().to_owned();
    fs::remove_dir_all(data.join(name)).unwrap();
    symlink("nowhere", data.join(name)).unwrap();
    let file = format!("{id}:{}", text(&data.join(name).join("file")));
    let ended = restore(&lab, &[lab.set(), &file, "--in-place"]);
    assert_eq!(ended.code(), 1);
    assert!(ended.err().contains("is in the way"), "{}", ended.err());
    assert!(!ended.err().contains('\u{1b}'), "{:?}", ended.err());
}

#[test]
fn names_of_files_with_other_contents_are_no_links() {
    let Some(lab) = lab("edges-links", Fs::Ext4) else {
        return;
    };
    let data = lab.data();
    for name in ["one", "two"] {
        fs::write(data.join(name), name).unwrap();
    }
    let certificate = snap(&lab, lab.set(), &data);
    // As a number that was given anew while the files were walked would have it.
    let path = lab
        .store()
        .join(lab.set())
        .join(certificate.id())
        .join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&read(&path)).unwrap();
    for file in manifest["files"].as_array_mut().unwrap() {
        if file["kind"] == "file" {
            file["ino"] = 7.into();
        }
    }
    fs::write(&path, manifest.to_string()).unwrap();
    let out = lab.beside("out");
    let from = format!("{}:{}", certificate.id(), text(&data));
    restore(&lab, &[lab.set(), &from, "--to", text(&out)]).ok("restore");
    for name in ["one", "two"] {
        assert_eq!(read(out.join(name)), name);
    }
}
