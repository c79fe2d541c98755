use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::{Base, Captured, Method, Moved, Prepared, Scope, prepare, prepare_after, record};
use crate::store::manifest::{FileRecord, Kind, Mounted, VERSION};
use crate::store::scratch::Scratch;
use crate::store::{Snapshot, Store};
use crate::tally::Tally;
use crate::{Exit, Result};

/// A directory `data` to capture and an empty `tree` beside it.
struct Bench {
    scratch: Scratch,
    data: PathBuf,
    tree: PathBuf,
}

impl Bench {
    fn new() -> Bench {
        let scratch = Scratch::new();
        let (data, tree) = (scratch.join("data"), scratch.join("tree"));
        fs::create_dir(&data).unwrap();
        fs::create_dir(&tree).unwrap();
        Bench {
            scratch,
            data,
            tree,
        }
    }

    fn scope(&self) -> Scope {
        Scope {
            roots: vec![self.data.clone()],
            excludes: Vec::new(),
        }
    }

    fn prepare(&self) -> Prepared {
        prepare(&self.scope(), &self.tree, Method::Auto).unwrap()
    }

    fn capture(&self) -> Captured {
        self.prepare().capture(&mut || true).unwrap()
    }

    fn records(&self) -> Vec<FileRecord> {
        self.capture().finish().unwrap()
    }

    /// Where a file of `data` is in the tree.
    fn copy_of(&self, name: impl AsRef<Path>) -> PathBuf {
        let live = self.data.join(name);
        self.tree.join(live.strip_prefix("/").unwrap())
    }

    fn record(&self, records: &[FileRecord], name: impl AsRef<Path>) -> FileRecord {
        let path = self.data.join(name);
        records
            .iter()
            .find(|record| record.path.0 == path)
            .unwrap()
            .clone()
    }
}

fn fifo(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

fn what(moved: &[Moved], path: &Path) -> String {
    let of_path = moved.iter().find(|moved| moved.path == path);
    of_path.map_or_else(String::new, |moved| moved.what.clone())
}

#[test]
fn bytes_and_metadata() {
    let bench = Bench::new();
    fs::create_dir(bench.data.join("sub")).unwrap();
    fs::write(bench.data.join("sub/file"), "content").unwrap();
    fs::write(bench.data.join("empty"), "").unwrap();
    let file = File::open(bench.data.join("sub/file")).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(time).unwrap();
    fs::set_permissions(
        bench.data.join("sub/file"),
        fs::Permissions::from_mode(0o4451),
    )
    .unwrap();
    fs::set_permissions(bench.data.join("sub"), fs::Permissions::from_mode(0o1555)).unwrap();
    File::open(bench.data.join("sub"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    let captured = bench.capture();
    assert_eq!(captured.moved(), []);
    assert_eq!(captured.members().len(), 2);
    assert!(["reflink", "copy"].contains(&captured.method().as_str()));
    let records = captured.finish().unwrap();
    let paths: Vec<_> = records.iter().map(|record| record.path.0.clone()).collect();
    let names = ["", "empty", "sub", "sub/file"];
    assert_eq!(
        paths,
        names.map(|name| bench.data.join(name).components().collect::<PathBuf>())
    );
    for name in names {
        let (live, copy) = (
            fs::symlink_metadata(bench.data.join(name)).unwrap(),
            fs::symlink_metadata(bench.copy_of(name)).unwrap(),
        );
        let of = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec());
        assert_eq!(of(&live), of(&copy), "{name}");
    }
    assert_eq!(
        fs::read_to_string(bench.copy_of("sub/file")).unwrap(),
        "content"
    );
    let record = bench.record(&records, "sub/file");
    assert_eq!(
        (record.size, record.mode, record.kind),
        (7, 0o4451, Kind::File)
    );
    assert_eq!(record.mtime_ns, 1_000_000_000_123_456_789);
    assert_eq!(
        record.ino,
        fs::metadata(bench.data.join("sub/file")).unwrap().ino()
    );
    // What is above the root is plain and private.
    let above = bench.copy_of("").parent().unwrap().to_owned();
    assert_eq!(fs::metadata(above).unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn holes_stay_holes() {
    let bench = Bench::new();
    let mut file = File::create(bench.data.join("sparse")).unwrap();
    for at in [0, 3 << 20, (9 << 20) + 1000] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&[at as u8 + 1; 5000]).unwrap();
    }
    file.set_len(64 << 20).unwrap();
    File::create(bench.data.join("hole"))
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    for method in [Method::Auto, Method::Copy] {
        let tree = bench.scratch.join(format!("tree-{method:?}"));
        fs::create_dir(&tree).unwrap();
        let prepared = prepare(&bench.scope(), &tree, method).unwrap();
        prepared.capture(&mut || true).unwrap().finish().unwrap();
        for name in ["sparse", "hole"] {
            let live = bench.data.join(name);
            let copy = tree.join(live.strip_prefix("/").unwrap());
            let (live_stat, copy_stat) =
                (fs::metadata(&live).unwrap(), fs::metadata(&copy).unwrap());
            assert_eq!(live_stat.len(), copy_stat.len());
            assert!(
                copy_stat.blocks() * 512 <= 1 << 20,
                "{} blocks",
                copy_stat.blocks()
            );
            assert!(
                fs::read(&live).unwrap() == fs::read(&copy).unwrap(),
                "{name} differs"
            );
        }
    }
}

#[test]
fn links_fifos_and_what_is_only_recorded() {
    let bench = Bench::new();
    fs::create_dir(bench.data.join("d")).unwrap();
    fs::write(bench.data.join("first"), "shared").unwrap();
    fs::hard_link(bench.data.join("first"), bench.data.join("d/second")).unwrap();
    fs::hard_link(bench.data.join("first"), bench.scratch.join("outside")).unwrap();
    symlink("first", bench.data.join("link")).unwrap();
    symlink("/nowhere/\u{e4}", bench.data.join("d/dangling")).unwrap();
    fifo(&bench.data.join("fifo"));
    fs::set_permissions(bench.data.join("fifo"), fs::Permissions::from_mode(0o620)).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(bench.data.join("socket")).unwrap();
    let captured = bench.capture();
    assert_eq!(captured.moved(), []);
    assert_eq!(captured.members().len(), 2, "each name of a member");
    let records = captured.finish().unwrap();
    drop(socket);
    let ino = |name| fs::metadata(bench.copy_of(name)).unwrap().ino();
    assert_eq!(ino("first"), ino("d/second"));
    assert_ne!(
        ino("first"),
        fs::metadata(bench.data.join("first")).unwrap().ino()
    );
    assert_eq!(fs::metadata(bench.copy_of("first")).unwrap().nlink(), 2);
    let how = |name| bench.record(&records, name).capture.unwrap();
    let both = [how("first"), how("d/second")];
    let links = both.iter().filter(|how| *how == "hardlink");
    assert_eq!(links.count(), 1, "{both:?}");
    assert_eq!(
        fs::read_link(bench.copy_of("link")).unwrap(),
        Path::new("first")
    );
    let dangling = bench.record(&records, "d/dangling");
    assert_eq!(
        (dangling.kind, dangling.target.unwrap().0),
        (Kind::Symlink, "/nowhere/\u{e4}".into())
    );
    let copy = fs::symlink_metadata(bench.copy_of("fifo")).unwrap();
    assert!(copy.file_type().is_fifo());
    assert_eq!(copy.mode() & 0o7777, 0o620);
    assert_eq!(bench.record(&records, "socket").kind, Kind::Socket);
    assert!(fs::symlink_metadata(bench.copy_of("socket")).is_err());
    assert_eq!(
        fs::symlink_metadata(bench.copy_of("link")).unwrap().mtime(),
        fs::symlink_metadata(bench.data.join("link"))
            .unwrap()
            .mtime()
    );
}

#[test]
fn names_of_any_bytes() {
    let bench = Bench::new();
    let name = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let dir = name(b"\xff\x80 dir\n");
    let file = dir.join(name(&[0xfe; 255]));
    fs::create_dir(bench.data.join(&dir)).unwrap();
    fs::write(bench.data.join(&file), "x").unwrap();
    symlink(name(b"\xc3\x28"), bench.data.join("link")).unwrap();
    let records = bench.records();
    assert_eq!(fs::read_to_string(bench.copy_of(&file)).unwrap(), "x");
    assert_eq!(bench.record(&records, &file).size, 1);
    assert_eq!(
        bench.record(&records, "link").target.unwrap().0,
        name(b"\xc3\x28")
    );
}

#[test]
fn extended_attributes() {
    let bench = Bench::new();
    let (file, dir) = (bench.data.join("file"), bench.data.join("dir"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&dir).unwrap();
    for path in [&file, &dir] {
        match rustix::fs::setxattr(path, "user.colour", b"gr\xfcn", XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => return, // nothing to test on this file system
            other => other.unwrap(),
        }
        rustix::fs::setxattr(path, "user.empty", b"", XattrFlags::empty()).unwrap();
    }
    // An ACL: owner rwx, user 12345 r--, group r-x, mask r-x, others ---.
    let acl: Vec<u8> = [
        (1_u16, 7_u16, u32::MAX),
        (2, 4, 12345),
        (4, 5, u32::MAX),
        (16, 5, u32::MAX),
        (32, 0, u32::MAX),
    ]
    .iter()
    .fold(
        2_u32.to_le_bytes().to_vec(),
        |mut acl, (tag, rights, id)| {
            acl.extend(tag.to_le_bytes());
            acl.extend(rights.to_le_bytes());
            acl.extend(id.to_le_bytes());
            acl
        },
    );
    let acls = ["system.posix_acl_access", "system.posix_acl_default"];
    let with_acl = rustix::fs::setxattr(&dir, acls[0], &acl, XattrFlags::empty())
        .and_then(|()| rustix::fs::setxattr(&dir, acls[1], &acl, XattrFlags::empty()))
        .is_ok();
    // No write permission for the owner must not be in the way.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
    bench.records();
    let read = |path: &Path, name: &str| {
        let mut value = [0_u8; 256];
        let length = rustix::fs::getxattr(path, name, value.as_mut_slice()).unwrap();
        value[..length].to_vec()
    };
    for name in ["file", "dir"] {
        assert_eq!(read(&bench.copy_of(name), "user.colour"), b"gr\xfcn");
        assert_eq!(read(&bench.copy_of(name), "user.empty"), b"");
    }
    if with_acl {
        for name in acls {
            assert_eq!(read(&bench.copy_of("dir"), name), acl);
        }
        assert_eq!(
            fs::metadata(bench.copy_of("dir")).unwrap().mode() & 0o7777,
            0o750
        );
    }
    assert_eq!(
        fs::metadata(bench.copy_of("file")).unwrap().mode() & 0o7777,
        0o400
    );
}

#[test]
fn deep_trees() {
    /// Deeper than descriptors are kept, and longer than a path may be.
    const DEPTH: usize = 2000;
    let bench = Bench::new();
    let mut dir: OwnedFd = File::open(&bench.data).unwrap().into();
    for depth in 0..DEPTH {
        // A second branch at each level has the walk come back to directories long closed.
        for name in ["down-here", "aside"] {
            rustix::fs::mkdirat(&dir, name, Mode::RWXU).unwrap();
        }
        if depth % 100 == 0 {
            let flags = OFlags::CREATE | OFlags::WRONLY;
            let file = rustix::fs::openat(&dir, "aside/file", flags, Mode::RUSR).unwrap();
            File::from(file)
                .write_all(depth.to_string().as_bytes())
                .unwrap();
        }
        dir = rustix::fs::openat(&dir, "down-here", OFlags::RDONLY, Mode::empty()).unwrap();
    }
    let captured = bench.capture();
    assert_eq!(captured.moved(), []);
    assert_eq!(captured.members().len(), DEPTH / 100);
    let records = captured.finish().unwrap();
    assert_eq!(records.len(), 1 + 2 * DEPTH + DEPTH / 100);
    let mut dir: OwnedFd = File::open(bench.copy_of("")).unwrap().into();
    for depth in 0..DEPTH {
        if depth % 100 == 0 {
            let file =
                rustix::fs::openat(&dir, "aside/file", OFlags::RDONLY, Mode::empty()).unwrap();
            assert_eq!(
                std::io::read_to_string(File::from(file)).unwrap(),
                depth.to_string()
            );
        }
        dir = rustix::fs::openat(&dir, "down-here", OFlags::RDONLY, Mode::empty()).unwrap();
    }
}

#[test]
fn what_moved_is_noticed() {
    let bench = Bench::new();
    let path = |name: &str| bench.data.join(name);
    for name in [
        "same", "written", "grown", "replaced", "removed", "chmodded",
    ] {
        fs::write(path(name), "before").unwrap();
    }
    for name in ["quiet", "named", "moved"] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("inside"), "x").unwrap();
    }
    let appears = bench.scratch.join("appears");
    let mut scope = bench.scope();
    scope.roots.push(appears.clone());
    let captured = prepare(&scope, &bench.tree, Method::Auto)
        .unwrap()
        .capture(&mut || true)
        .unwrap();
    assert_eq!(captured.moved(), []);
    // Without multigrain timestamps (before Linux 6.13), a change within the same tick would not show.
    std::thread::sleep(std::time::Duration::from_millis(20));
    File::options()
        .write(true)
        .open(path("written"))
        .unwrap()
        .write_at(b"B", 0)
        .unwrap();
    File::options()
        .append(true)
        .open(path("grown"))
        .unwrap()
        .write_all(b"more")
        .unwrap();
    fs::write(path("other"), "before").unwrap();
    fs::rename(path("other"), path("replaced")).unwrap();
    fs::remove_file(path("removed")).unwrap();
    fs::set_permissions(path("chmodded"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(path("named/new"), "").unwrap();
    fs::rename(path("moved"), bench.scratch.join("away")).unwrap();
    fs::write(&appears, "").unwrap();
    let moved = captured.moved();
    let what = |name: &str| what(&moved, &path(name));
    assert!(what("written").contains("written to"), "{moved:?}");
    assert!(what("grown").contains("from 6 to 10 bytes"), "{moved:?}");
    assert!(what("replaced").contains("replaced"), "{moved:?}");
    assert!(what("removed").contains("removed"), "{moved:?}");
    assert!(what("chmodded").contains("metadata"), "{moved:?}");
    assert!(what("named").contains("an entry made"), "{moved:?}");
    assert!(what("moved").contains("removed or renamed"), "{moved:?}");
    for quiet in ["same", "quiet", "quiet/inside"] {
        assert_eq!(what(quiet), "");
    }
    assert_eq!(super::tests::what(&moved, &appears), "appeared");
}

#[test]
fn what_happens_between_prepare_and_capture_counts() {
    let bench = Bench::new();
    for name in ["vanishes", "becomes-fifo", "becomes-link", "rewritten"] {
        fs::write(bench.data.join(name), "before").unwrap();
    }
    fs::create_dir(bench.data.join("becomes-file")).unwrap();
    fs::write(bench.data.join("becomes-dir"), "before").unwrap();
    fs::create_dir_all(bench.data.join("renamed/deeper")).unwrap();
    fs::write(bench.data.join("renamed/deeper/file"), "x").unwrap();
    for name in ["linked", "renamed/deeper/linked"] {
        let _ = fs::write(bench.scratch.join("shared"), "shared");
        fs::hard_link(bench.scratch.join("shared"), bench.data.join(name)).unwrap();
    }
    let prepared = bench.prepare();
    assert_eq!(prepared.members().len(), 8);
    fs::rename(bench.data.join("renamed"), bench.data.join("elsewhere")).unwrap();
    fs::remove_file(bench.data.join("becomes-dir")).unwrap();
    fs::create_dir(bench.data.join("becomes-dir")).unwrap();
    fs::write(bench.data.join("becomes-dir/inside"), "new").unwrap();
    for name in ["vanishes", "becomes-fifo", "becomes-link"] {
        fs::remove_file(bench.data.join(name)).unwrap();
    }
    fifo(&bench.data.join("becomes-fifo"));
    symlink("/etc/passwd", bench.data.join("becomes-link")).unwrap();
    fs::remove_dir(bench.data.join("becomes-file")).unwrap();
    fs::write(bench.data.join("becomes-file"), "now").unwrap();
    fs::write(bench.data.join("rewritten"), "after").unwrap();
    fs::write(bench.data.join("new"), "new").unwrap();
    let captured = prepared.capture(&mut || true).unwrap();
    assert_eq!(captured.moved(), []);
    let records = captured.finish().unwrap();
    let kind = |name| bench.record(&records, name).kind;
    assert_eq!(kind("becomes-fifo"), Kind::Fifo);
    assert_eq!(kind("becomes-link"), Kind::Symlink);
    assert_eq!(kind("becomes-file"), Kind::File);
    assert_eq!(
        fs::read_to_string(bench.copy_of("rewritten")).unwrap(),
        "after"
    );
    assert_eq!(fs::read_to_string(bench.copy_of("new")).unwrap(), "new");
    assert!(!bench.copy_of("vanishes").exists());
    // Nothing is in the tree that is not recorded, and the other way round.
    let mut left: Vec<PathBuf> = records.iter().map(|record| record.path.0.clone()).collect();
    let mut dirs = vec![bench.copy_of("")];
    while let Some(dir) = dirs.pop() {
        left.retain(|path| bench.tree.join(path.strip_prefix("/").unwrap()) != dir);
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let live = Path::new("/").join(path.strip_prefix(&bench.tree).unwrap());
            assert!(
                records.iter().any(|record| record.path.0 == live),
                "{live:?}"
            );
            left.retain(|path| *path != live);
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                dirs.push(path);
            }
        }
    }
    assert_eq!(left, Vec::<PathBuf>::new());
}

#[test]
fn entries_that_vanish_under_the_walk() {
    let bench = Bench::new();
    for n in 0..200 {
        let dir = bench.data.join(format!("dir-{n}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "x").unwrap();
        fs::write(bench.data.join(format!("file-{n}")), "x").unwrap();
    }
    let prepared = bench.prepare();
    let mut asked = 0;
    // After 50 entries, everything that is left goes away or becomes a link that leads out.
    let captured = prepared.capture(&mut || {
        asked += 1;
        if asked == 50 {
            for n in 0..200 {
                let file = bench.data.join(format!("file-{n}"));
                fs::remove_file(&file).unwrap();
                symlink("/etc/passwd", &file).unwrap();
                let dir = bench.data.join(format!("dir-{n}"));
                fs::remove_dir_all(&dir).unwrap();
                symlink("/etc", &dir).unwrap();
            }
        }
        true
    });
    let captured = captured.unwrap();
    let moved = captured.moved();
    assert!(moved.len() > 200, "{} moved", moved.len());
    assert!(what(&moved, &bench.data).contains("an entry made"));
    let records = captured.finish().unwrap();
    assert!(
        records
            .iter()
            .all(|record| record.kind == Kind::Symlink || record.path.0.starts_with(&bench.data))
    );
    assert!(!bench.copy_of("dir-0/passwd").exists());
    for record in records.iter().filter(|record| record.kind == Kind::File) {
        let copy = bench.tree.join(record.path.0.strip_prefix("/").unwrap());
        assert_eq!(
            fs::read_to_string(copy).unwrap(),
            "x",
            "content from inside, or none"
        );
    }
}

#[test]
fn the_end_of_the_hold_is_the_end() {
    let bench = Bench::new();
    for n in 0..10 {
        fs::write(bench.data.join(n.to_string()), vec![n; 3 << 20]).unwrap();
    }
    for limit in [0, 1, 7] {
        let tree = bench.scratch.join(format!("tree-{limit}"));
        fs::create_dir(&tree).unwrap();
        let mut asked = 0;
        let stopped = prepare(&bench.scope(), &tree, Method::Copy)
            .unwrap()
            .capture(&mut || {
                asked += 1;
                asked <= limit
            });
        assert_eq!(stopped.unwrap_err().exit, Exit::Aborted);
        assert_eq!(asked, limit + 1, "not asked again");
    }
}

#[test]
fn roots_and_excludes() {
    let bench = Bench::new();
    for dir in ["in", "in/deep", "out", "outer"] {
        fs::create_dir(bench.data.join(dir)).unwrap();
        fs::write(bench.data.join(dir).join("file"), dir).unwrap();
    }
    fs::write(bench.scratch.join("single"), "1").unwrap();
    fs::write(bench.scratch.join("unwatched"), "2").unwrap();
    // Reached by another path, the excluded directory is still the same.
    symlink(bench.data.join("in/deep"), bench.scratch.join("alias")).unwrap();
    let scope = Scope {
        roots: vec![
            bench.data.join("in"),
            bench.data.clone(),
            bench.scratch.join("./single"),
            bench.scratch.join("absent/too"),
            bench.scratch.join("absent"),
        ],
        excludes: vec![
            bench.data.join("out"),
            bench.scratch.join("alias"),
            bench.scratch.join("nothing"),
        ],
    };
    let prepared = prepare(&scope, &bench.tree, Method::Auto).unwrap();
    let device = fs::metadata(bench.scratch.path()).unwrap().dev();
    assert!(prepared.devices().contains(&device));
    let captured = prepared.capture(&mut || true).unwrap();
    assert_eq!(captured.moved(), []);
    let records = captured.finish().unwrap();
    let found: Vec<String> = records
        .iter()
        .map(|record| {
            record
                .path
                .0
                .strip_prefix(bench.scratch.path())
                .unwrap()
                .display()
                .to_string()
        })
        .collect();
    assert_eq!(
        found,
        [
            "data",
            "data/in",
            "data/in/file",
            "data/outer",
            "data/outer/file",
            "single"
        ]
    );
}

#[test]
fn a_tree_inside_a_root_is_not_captured() {
    let bench = Bench::new();
    fs::write(bench.data.join("file"), "x").unwrap();
    let tree = bench.data.join("store/tree");
    fs::create_dir_all(&tree).unwrap();
    let records = prepare(&bench.scope(), &tree, Method::Auto)
        .and_then(|prepared| prepared.capture(&mut || true)?.finish())
        .unwrap();
    assert_eq!(records.len(), 3);
}

#[test]
fn nothing_there_is_nothing() {
    let bench = Bench::new();
    let scope = Scope {
        roots: vec![bench.scratch.join("absent")],
        excludes: Vec::new(),
    };
    let prepared = prepare(&scope, &bench.tree, Method::Auto).unwrap();
    assert_eq!(
        prepared.devices(),
        [fs::metadata(bench.scratch.path()).unwrap().dev()]
    );
    assert!(prepared.members().is_empty());
    let captured = prepared.capture(&mut || true).unwrap();
    assert_eq!(captured.method(), "none");
    assert_eq!(captured.moved(), []);
    assert!(captured.finish().unwrap().is_empty());
    assert_eq!(fs::read_dir(&bench.tree).unwrap().count(), 0);
}

#[test]
fn a_root_that_appears_is_captured() {
    let bench = Bench::new();
    let root = bench.scratch.join("later/on");
    let scope = Scope {
        roots: vec![root.clone()],
        excludes: Vec::new(),
    };
    let prepared = prepare(&scope, &bench.tree, Method::Auto).unwrap();
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("file"), "x").unwrap();
    let records = prepared.capture(&mut || true).unwrap().finish().unwrap();
    assert_eq!(records.len(), 2);
    let copy = bench
        .tree
        .join(root.strip_prefix("/").unwrap())
        .join("file");
    assert_eq!(fs::read_to_string(copy).unwrap(), "x");
}

#[test]
fn paths_that_are_refused() {
    let bench = Bench::new();
    symlink(&bench.data, bench.scratch.join("link")).unwrap();
    let refused = |root: PathBuf| -> String {
        let scope = Scope {
            roots: vec![root],
            excludes: Vec::new(),
        };
        let result: Result<_> = prepare(&scope, &bench.tree, Method::Auto);
        let error = result.unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        error.to_string()
    };
    assert!(refused("relative".into()).contains("absolute"));
    assert!(refused(bench.data.join("../data")).contains("absolute"));
    assert!(refused("/".into()).contains("'/'"));
    assert!(refused(bench.scratch.join("link")).contains(bench.data.to_str().unwrap()));
}

#[test]
fn an_unreadable_member_is_named() {
    if rustix::process::geteuid().is_root() {
        return; // root reads everything
    }
    let bench = Bench::new();
    let secret = bench.data.join("secret");
    fs::write(&secret, "x").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    let error = prepare(&bench.scope(), &bench.tree, Method::Copy).unwrap_err();
    assert!(error.message.contains(secret.to_str().unwrap()), "{error}");
    assert!(error.next.unwrap().contains("--exclude"));
}

#[test]
fn links_and_attributes_of_what_cannot_be_opened() {
    let bench = Bench::new();
    fifo(&bench.data.join("fifo"));
    fs::hard_link(bench.data.join("fifo"), bench.data.join("fifo2")).unwrap();
    symlink("nowhere", bench.data.join("link")).unwrap();
    // Of the link itself, as hard_link of the standard library does.
    fs::hard_link(bench.data.join("link"), bench.data.join("link2")).unwrap();
    // struct posix_acl_xattr_header, then entries of tag, permissions and id:
    // user::rw-,user:12:r--,group::r--,mask::r--,other::---
    const ANY: u32 = u32::MAX;
    let entries = [
        (1, 6, ANY),
        (2, 4, 12),
        (4, 4, ANY),
        (16, 4, ANY),
        (32, 0, ANY),
    ];
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend([tag, 0, permissions, 0]);
        acl.extend(id.to_le_bytes());
    }
    let name = "system.posix_acl_access";
    let set = rustix::fs::setxattr(bench.data.join("fifo"), name, &acl, XattrFlags::empty());
    assert!(matches!(set, Ok(()) | Err(Errno::OPNOTSUPP)), "{set:?}");
    let records = bench.records();
    let inode = |name: &str| fs::symlink_metadata(bench.copy_of(name)).unwrap().ino();
    assert_eq!(inode("fifo"), inode("fifo2"));
    assert_eq!(inode("link"), inode("link2"));
    let target = bench.record(&records, "link2").target.unwrap();
    assert_eq!(target.0, Path::new("nowhere"));
    assert_eq!(bench.record(&records, "fifo2").capture, None);
    if set.is_ok() {
        let mut value = [0; 256];
        let length = rustix::fs::getxattr(bench.copy_of("fifo"), name, &mut value[..]).unwrap();
        assert_eq!(value[..length], acl);
    }
}

/// A published snapshot of the bench's data, with which files can be shared; `None` if this file
/// system does not let them be.
fn published(bench: &Bench) -> Option<Arc<Snapshot>> {
    std::thread::sleep(std::time::Duration::from_millis(100));
    let store = Store::open_or_create(&bench.scratch.join("store"), "set").unwrap();
    let lock = store.lock(std::time::Duration::ZERO).unwrap();
    let draft = store.begin(&lock).unwrap();
    let prepared = prepare(&bench.scope(), &draft.tree(), Method::Auto).unwrap();
    let mounted = prepared.mounted().cloned();
    let time = jiff::Timestamp::now().to_string();
    let files = prepared.capture(&mut || true).unwrap().finish().unwrap();
    let manifest = serde_json::json!({
        "version": VERSION, "id": draft.id(), "set": "set", "time": time, "commit_point": "write",
        "commit_point_asked": "write", "verified": true, "reasons": [], "assumptions": [],
        "hold_us": 1, "drain_us": 1, "capture": "copy", "roots": [], "writers": [], "foreign": [],
        "mounted": mounted, "files": files,
    });
    draft
        .publish(&serde_json::from_value(manifest).unwrap())
        .unwrap();
    let snapshot = store.newest().map(Arc::new)?;
    match record::shows_stores(File::open(&bench.data).unwrap()) {
        true => Some(snapshot),
        false => {
            eprintln!("SKIPPED: the temporary directory is on a file system that shares nothing");
            None
        }
    }
}

#[test]
fn what_is_not_to_be_shared_after_all_is_made_ready() {
    let bench = Bench::new();
    let names = ["a", "sub/b", "sub/c", "sub/deeper/d"];
    fs::create_dir_all(bench.data.join("sub/deeper")).unwrap();
    for name in names {
        fs::write(bench.data.join(name), name.repeat(5000)).unwrap();
    }
    fs::hard_link(bench.data.join("a"), bench.data.join("sub/link")).unwrap();
    let Some(snapshot) = published(&bench) else {
        return;
    };
    let old = |name: &str| {
        let live = bench.data.join(name);
        snapshot.tree().join(live.strip_prefix("/").unwrap())
    };
    let links = |name: &str| fs::metadata(old(name)).unwrap().nlink();
    for late in [false, true] {
        let mut base = || Base::of(Arc::clone(&snapshot));
        let tally = Tally::default();
        let scope = bench.scope();
        let mut prepared =
            prepare_after(&scope, &bench.tree, Method::Auto, &mut base, &tally).unwrap();
        assert_eq!(prepared.scan.to_capture().count(), 1, "the further name");
        assert_eq!((links("a"), links("sub/b")), (3, 2));
        if late {
            prepared.share_nothing_now();
        } else {
            prepared.share_nothing().unwrap();
            // As much to be captured as there is, into files that are there.
            assert_eq!(prepared.scan.to_capture().count(), 5);
            for name in names {
                let made = fs::metadata(bench.copy_of(name)).unwrap();
                assert_eq!((made.len(), made.nlink()), (0, 1), "{name}");
            }
            assert_eq!((links("a"), links("sub/b")), (2, 1));
            // Again is no harm.
            prepared.share_nothing().unwrap();
        }
        let inode = |name: &str| fs::metadata(bench.copy_of(name)).unwrap().ino();
        let made = names.map(inode);
        let records = prepared.capture(&mut || true).unwrap().finish().unwrap();
        assert_eq!(made == names.map(inode), !late, "made under the hold");
        for name in names {
            assert_ne!(bench.record(&records, name).capture.unwrap(), "shared");
            for copy in [bench.copy_of(name), old(name)] {
                assert_eq!(fs::read_to_string(copy).unwrap(), name.repeat(5000));
            }
        }
        assert_eq!((links("a"), links("sub/b")), (2, 1));
        fs::remove_dir_all(&bench.tree).unwrap();
        fs::create_dir(&bench.tree).unwrap();
    }
}

#[test]
fn what_was_mounted_anew_is_not_shared() {
    let bench = Bench::new();
    fs::write(bench.data.join("file"), "content").unwrap();
    let Some(snapshot) = published(&bench) else {
        return;
    };
    let shared = |change: &dyn Fn(&mut Mounted)| {
        let mut scan = super::prepare::Scan::new();
        let paths = super::walk::Paths::new(&bench.scope(), None).unwrap();
        let mut dirs = crate::tree::dirs::Dirs::new();
        let mut scanner = super::prepare::Scanner { scan: &mut scan };
        super::walk::walk(&paths, &mut dirs, &mut scanner).unwrap();
        let mut now = super::mounted::mounted(&scan).unwrap();
        change(&mut now);
        let mut base = Base::of(Arc::clone(&snapshot)).unwrap();
        base.only_on(&scan.devices, Some(&now));
        base.find(&scan.members[0].seen).is_some()
    };
    assert!(shared(&|_| {}));
    assert!(!shared(&|now| now.boot.push('0')));
    assert!(!shared(&|now| now.mounts[0].mount += 1));
    assert!(!shared(&|now| now.mounts.clear()));
}
