use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::manifest::{FileRecord, Kind, Manifest, PathName, Totals, VERSION};
use super::pace::Pace;
use super::policy::{Count, Policy};
use super::scratch::Scratch;
use super::{Draft, Store, StoreLock, check_set_name};

fn manifest(id: &str, verified: bool) -> Manifest {
    Manifest {
        version: VERSION,
        id: id.to_owned(),
        set: "db".to_owned(),
        time: "2026-11-20T23:17:00Z".to_owned(),
        commit_point: "write".to_owned(),
        commit_point_asked: "write".to_owned(),
        claim: None,
        verified,
        reasons: Vec::new(),
        assumptions: Vec::new(),
        hold_us: 42,
        drain_us: 7,
        stop_us: None,
        guard_us: None,
        guard_asked: None,
        capture: "copy".to_owned(),
        marked: None,
        hashed_bytes: None,
        prediction: None,
        checks: Vec::new(),
        roots: vec![PathName("/data".into())],
        excludes: None,
        mounted: None,
        only: None,
        files: Vec::new(),
        writers: Vec::new(),
        foreign: Vec::new(),
        totals: None,
        pin: None,
        unknown: serde_json::Map::new(),
    }
}

fn open(scratch: &Scratch) -> (Store, StoreLock) {
    let store = Store::open_or_create(&scratch.join("store"), "db").unwrap();
    let lock = store.lock(Duration::ZERO).unwrap();
    (store, lock)
}

fn publish(draft: Draft, verified: bool) -> String {
    let manifest = manifest(draft.id(), verified);
    let id = draft.id().to_owned();
    draft.publish(&manifest).unwrap();
    id
}

fn keep_last(store: &Store, lock: &StoreLock, n: u32) -> Vec<String> {
    let policy = Policy {
        last: Some(Count::Only(n)),
        ..Policy::default()
    };
    let retired = store.apply(lock, &policy).unwrap();
    assert_eq!(store.clear(&mut Pace::brisk()).unwrap(), retired.ids.len());
    retired.ids
}

fn ids(store: &Store) -> Vec<String> {
    store
        .list()
        .unwrap()
        .into_iter()
        .map(|entry| entry.id)
        .collect()
}

fn names(path: &Path) -> Vec<String> {
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(path).unwrap().map(name).collect();
    names.sort_unstable();
    names
}

#[test]
fn set_names() {
    for good in ["a", "db", "My-set_2.0", &"x".repeat(64)] {
        check_set_name(good).unwrap();
    }
    for bad in [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a b",
        "a\0",
        "ä",
        "a\n",
        &"x".repeat(65),
    ] {
        assert!(check_set_name(bad).is_err(), "{bad:?}");
        assert!(Store::open_or_create(Path::new("/nonexistent"), bad).is_err());
    }
}

#[test]
fn publish_list_find_latest() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    assert!(store.list().unwrap().is_empty());
    assert!(store.find("latest").is_err());
    let draft = store.begin(&lock).unwrap();
    fs::write(draft.tree().join("file"), "content").unwrap();
    assert!(store.list().unwrap().is_empty(), "a draft is not listed");
    let first = publish(draft, true);
    let second = publish(store.begin(&lock).unwrap(), false);
    assert!(second > first);
    assert_eq!(ids(&store), [first.clone(), second.clone()]);
    assert_eq!(
        store.latest().as_ref(),
        Some(&first),
        "only a verified one is the latest"
    );
    let found = store.find("latest").unwrap();
    assert_eq!(found.id, first);
    assert_eq!(
        fs::read_to_string(found.tree().join("file")).unwrap(),
        "content"
    );
    assert_eq!(found.manifest.unwrap(), manifest(&first, true));
    let third = publish(store.begin(&lock).unwrap(), true);
    assert_eq!(store.latest().as_ref(), Some(&third));
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    for private in [
        store.path(),
        &store.path().join(&third),
        &store.find(&third).unwrap().tree(),
    ] {
        assert_eq!(mode(private), 0o700);
    }
    let expected = [".lock", &first, &second, &third, "latest"].map(str::to_owned);
    assert_eq!(names(store.path()), expected);
    // What another process opens to read is the same.
    let again = Store::open(&scratch.join("store"), "db").unwrap();
    assert_eq!(ids(&again), [first, second, third]);
}

#[test]
fn ids_increase_although_the_clock_steps_back() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    fs::create_dir(store.path().join(".del-20990101T000000.000000Z")).unwrap();
    let draft = store.begin(&lock).unwrap();
    assert_eq!(draft.id(), "20990101T000000.000001Z");
    symlink("20990301T000000.000009Z", store.path().join("latest")).unwrap();
    assert_eq!(store.begin(&lock).unwrap().id(), "20990301T000000.000010Z");
    fs::create_dir(store.path().join("99991230T220000.999999Z")).unwrap();
    assert!(
        store
            .begin(&lock)
            .unwrap_err()
            .message
            .contains("99991230T220000.999999Z")
    );
}

#[test]
fn find_by_prefix() {
    let scratch = Scratch::new();
    let (store, _lock) = open(&scratch);
    for id in [
        "20261120T231700.123456Z",
        "20261120T231800.123456Z",
        "20261121T000000.000000Z",
    ] {
        fs::create_dir(store.path().join(id)).unwrap();
    }
    assert_eq!(
        store.find("20261121").unwrap().id,
        "20261121T000000.000000Z"
    );
    assert_eq!(
        store.find("20261120T2317").unwrap().id,
        "20261120T231700.123456Z"
    );
    for (name, found) in [
        ("20261121~1", "20261120T231800.123456Z"),
        ("20261121~", "20261120T231800.123456Z"),
        ("20261121~2", "20261120T231700.123456Z"),
        ("20261120T2317~0", "20261120T231700.123456Z"),
    ] {
        assert_eq!(store.resolve(name).unwrap(), found, "{name}");
    }
    for wrong in [
        "20261121~3",
        "20261121~+1",
        "20261121~x",
        "20261121~1~1",
        "~1",
    ] {
        assert!(store.resolve(wrong).is_err(), "{wrong}");
    }
    let several = store.find("20261120").unwrap_err();
    assert!(several.message.contains("2 snapshots"), "{several}");
    for none in [
        "",
        "2025",
        "..",
        "../db",
        "latest/",
        "20261120T231700.123456Z/",
        ".",
    ] {
        let error = store.find(none).unwrap_err();
        assert!(error.next.unwrap().contains("20261121T000000.000000Z"));
    }
}

#[test]
fn what_a_crash_left_is_swept_and_never_listed() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let kept = publish(store.begin(&lock).unwrap(), true);
    // Killed while capturing, while publishing, while replacing `latest`, while removing.
    for crashed in [
        ".tmp-20261120T231700.123456Z",
        ".del-20261120T231701.123456Z",
    ] {
        let tree = store.path().join(crashed).join("tree/data");
        fs::create_dir_all(&tree).unwrap();
        fs::write(tree.join("file"), "half").unwrap();
        fs::DirBuilder::new()
            .mode(0o500)
            .create(tree.join("locked"))
            .unwrap();
        symlink(scratch.path(), tree.join("link")).unwrap();
    }
    symlink(&kept, store.path().join(".tmp-latest")).unwrap();
    fs::write(
        store
            .path()
            .join(".tmp-20261120T231700.123456Z/manifest.json.tmp"),
        "{",
    )
    .unwrap();
    assert_eq!(ids(&store), [kept.as_str()]);
    let swept = store.sweep(&lock).unwrap().names;
    assert_eq!(swept, [".tmp-20261120T231700.123456Z", ".tmp-latest"]);
    assert_eq!(store.clear(&mut Pace::brisk()).unwrap(), 1);
    assert_eq!(names(store.path()), [".lock", &kept, "latest"]);
    assert!(store.sweep(&lock).unwrap().names.is_empty());
    // Killed between taking a snapshot out and pointing `latest` elsewhere.
    let newer = publish(store.begin(&lock).unwrap(), true);
    store.retire(&lock, &[newer]).unwrap();
    store.sweep(&lock).unwrap();
    assert_eq!(store.latest().as_ref(), Some(&kept));
}

#[test]
fn a_dropped_draft_is_removed() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let draft = store.begin(&lock).unwrap();
    fs::write(draft.tree().join("file"), "x").unwrap();
    drop(draft);
    let draft = store.begin(&lock).unwrap();
    draft
        .publish(&manifest("20200101T000000.000000Z", true))
        .unwrap_err();
    assert_eq!(names(store.path()), [".lock"]);
}

#[test]
fn retention_spares_the_latest() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let made: Vec<String> = (0..6)
        .map(|n| publish(store.begin(&lock).unwrap(), n == 1))
        .collect();
    let inside = store.find(&made[0]).unwrap().tree().join("locked/deeper");
    fs::create_dir_all(&inside).unwrap();
    fs::write(inside.join("file"), "x").unwrap();
    for dir in [&inside, inside.parent().unwrap()] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o500)).unwrap();
    }
    assert_eq!(keep_last(&store, &lock, 9), Vec::<String>::new());
    let removed = keep_last(&store, &lock, 3);
    assert_eq!(removed, [made[0].clone(), made[2].clone()]);
    assert_eq!(
        ids(&store),
        [&made[1], &made[3], &made[4], &made[5]].map(Clone::clone)
    );
    assert_eq!(keep_last(&store, &lock, 1).len(), 2);
    assert_eq!(ids(&store), [made[1].clone(), made[5].clone()]);
}

#[test]
fn removal_follows_no_link_and_goes_to_any_depth() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    fs::create_dir(scratch.join("outside")).unwrap();
    fs::write(scratch.join("outside/precious"), "x").unwrap();
    let draft = store.begin(&lock).unwrap();
    symlink(scratch.join("outside"), draft.tree().join("link")).unwrap();
    symlink("..", draft.tree().join("up")).unwrap();
    // A name the removal would like to use for itself.
    fs::create_dir_all(draft.tree().join(".snapshim-remove-1/x/y")).unwrap();
    let mut dir: std::os::fd::OwnedFd = fs::File::open(draft.tree()).unwrap().into();
    for _ in 0..2000 {
        use rustix::fs::{Mode, OFlags, mkdirat, openat};
        mkdirat(&dir, "a-directory", Mode::RWXU).unwrap();
        mkdirat(&dir, "another", Mode::RUSR | Mode::XUSR).unwrap();
        dir = openat(&dir, "a-directory", OFlags::RDONLY, Mode::empty()).unwrap();
    }
    drop(draft);
    assert_eq!(names(store.path()), [".lock"]);
    assert_eq!(
        fs::read_to_string(scratch.join("outside/precious")).unwrap(),
        "x"
    );
}

#[test]
fn names_that_are_not_ids_are_not_listed() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let kept = publish(store.begin(&lock).unwrap(), true);
    for name in ["junk", "20261320T231700.123456Z", "20261120T231700", "-rf"] {
        fs::create_dir(store.path().join(name)).unwrap();
    }
    fs::create_dir(store.path().join(OsString::from_vec(b"\xff\xfe".to_vec()))).unwrap();
    assert_eq!(ids(&store), [kept.as_str()]);
    assert!(keep_last(&store, &lock, 1).is_empty());
    assert!(store.path().join("junk").exists());
    // A link that leads out is no latest.
    for hostile in ["../../etc", "/etc", "..", "junk", ""] {
        let _ = fs::remove_file(store.path().join("latest"));
        if !hostile.is_empty() {
            symlink(hostile, store.path().join("latest")).unwrap();
        }
        assert_eq!(store.latest(), None);
        assert!(
            store
                .find("latest")
                .unwrap_err()
                .next
                .unwrap()
                .contains(&kept)
        );
    }
}

#[test]
fn damaged_manifests_are_reported() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let id = publish(store.begin(&lock).unwrap(), true);
    let path = store.path().join(&id).join("manifest.json");
    let good = fs::read_to_string(&path).unwrap();
    let complaint = |text: Option<&str>| {
        let _ = fs::remove_file(&path);
        if let Some(text) = text {
            fs::write(&path, text).unwrap();
        }
        let mut listed = store.list().unwrap();
        assert_eq!(listed.len(), 1);
        listed.remove(0).manifest.unwrap_err()
    };
    assert!(complaint(None).contains("missing"));
    assert!(complaint(Some("")).contains("damaged"));
    assert!(complaint(Some(&good[..good.len() / 2])).contains("damaged"));
    assert!(complaint(Some(&"[".repeat(100_000))).contains("damaged"));
    assert!(complaint(Some("{\"version\": 99, \"id\": 5}")).contains("newer snapshim"));
    assert!(
        complaint(Some(&good.replace("\"version\": 1", "\"version\": 2")))
            .contains("newer snapshim")
    );
    assert!(
        complaint(Some(&good.replace("\"version\": 1", "\"version\": 0"))).contains("no version 0")
    );
    assert!(
        complaint(Some(&good.replace(&id, "20200101T000000.000000Z"))).contains("another snapshot")
    );
    let _ = fs::remove_file(&path);
    symlink("/dev/zero", &path).unwrap();
    assert!(
        store.list().unwrap()[0]
            .manifest
            .as_ref()
            .unwrap_err()
            .contains("symbolic link")
    );
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(
        store.list().unwrap()[0]
            .manifest
            .as_ref()
            .unwrap_err()
            .contains("regular file")
    );
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(store.list().unwrap()[0].manifest.is_err());
    // A file where a snapshot should be.
    fs::write(store.path().join("20300101T000000.000000Z"), "").unwrap();
    assert!(
        store.list().unwrap()[1]
            .manifest
            .as_ref()
            .unwrap_err()
            .contains("not a directory")
    );
}

#[test]
fn manifests_keep_every_name_and_unknown_fields() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let draft = store.begin(&lock).unwrap();
    let mut written = manifest(draft.id(), true);
    let record = |path: PathBuf| FileRecord {
        path: PathName(path),
        kind: Kind::Symlink,
        size: 1,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime_ns: -5,
        ctime_ns: i64::MAX,
        dev: u64::MAX,
        ino: 9,
        target: Some(PathName(OsString::from_vec(b"to/\xff".to_vec()).into())),
        capture: None,
        digest: None,
        device: None,
    };
    let all_bytes: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    let mut odd = b"/data/".to_vec();
    odd.extend(all_bytes);
    written.files = vec![
        record("/data/plain \"quoted\"\n".into()),
        record(OsString::from_vec(odd).into()),
    ];
    written
        .unknown
        .insert("from_the_future".to_owned(), serde_json::json!({"a": [1]}));
    let id = draft.id().to_owned();
    draft.publish(&written).unwrap();
    assert_eq!(store.find(&id).unwrap().manifest.unwrap(), written);
}

#[test]
fn manifests_cannot_name_paths_outside_the_tree() {
    for path in ["relative", "/data/../../etc", "/data/a\0b", ""] {
        let scratch = Scratch::new();
        let (store, lock) = open(&scratch);
        let draft = store.begin(&lock).unwrap();
        let mut hostile = manifest(draft.id(), true);
        hostile.files = vec![FileRecord {
            path: PathName(path.into()),
            kind: Kind::File,
            size: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime_ns: 0,
            ctime_ns: 0,
            dev: 0,
            ino: 0,
            target: None,
            capture: None,
            digest: None,
            device: None,
        }];
        draft.publish(&hostile).unwrap();
        assert!(
            store.list().unwrap()[0]
                .manifest
                .as_ref()
                .unwrap_err()
                .contains("inside the tree")
        );
    }
}

#[test]
fn one_lock_at_a_time() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let error = store.lock(Duration::from_millis(20)).unwrap_err();
    assert!(error.message.contains("in use"), "{error}");
    drop(lock);
    store.lock(Duration::ZERO).unwrap();
}

#[test]
fn places_that_cannot_be_a_store() {
    let scratch = Scratch::new();
    let complaint = |place: &str| Store::open_or_create(&scratch.join(place), "db").unwrap_err();
    assert!(complaint("absent/store").message.contains("does not exist"));
    fs::write(scratch.join("file"), "").unwrap();
    assert!(complaint("file").message.contains("not a directory"));
    assert!(complaint("file/store").message.contains("not a directory"));
    fs::create_dir(scratch.join("elsewhere")).unwrap();
    symlink("elsewhere", scratch.join("link")).unwrap();
    assert!(complaint("link").message.contains("symbolic link"));
    fs::create_dir(scratch.join("open")).unwrap();
    symlink("../elsewhere", scratch.join("open/db")).unwrap();
    assert!(complaint("open").message.contains("symbolic link"));
    assert!(names(&scratch.join("elsewhere")).is_empty());
    fs::remove_file(scratch.join("open/db")).unwrap();
    fs::create_dir(scratch.join("open/db")).unwrap();
    fs::set_permissions(scratch.join("open/db"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(complaint("open").message.contains("other users"));
    let error = Store::open(&scratch.join("nothing"), "db").unwrap_err();
    assert!(error.message.contains("no snapshots"), "{error}");
    assert!(!scratch.join("nothing").exists());
}

#[test]
fn the_default_place() {
    let scratch = Scratch::new();
    let root = scratch.join("data");
    assert_eq!(
        Store::default_place(std::slice::from_ref(&root)),
        scratch.join(".snapshim"),
        "absent"
    );
    fs::create_dir(&root).unwrap();
    assert_eq!(
        Store::default_place(std::slice::from_ref(&root)),
        scratch.join(".snapshim")
    );
    assert_eq!(
        Store::default_place(&[scratch.join("data/file"), root.clone()]),
        root.join(".snapshim")
    );
    fs::create_dir(root.join(".snapshim")).unwrap();
    assert_eq!(
        Store::default_place(std::slice::from_ref(&root)),
        root.join(".snapshim"),
        "the one that exists"
    );
    assert_eq!(Store::default_place(&["/".into()]), Path::new("/.snapshim"));
}

#[test]
fn latest_settles_on_the_newest_good_one() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    assert_eq!(store.settle_latest(&lock).unwrap(), None);
    let made = [true, true, false].map(|good| publish(store.begin(&lock).unwrap(), good));
    assert_eq!(store.settle_latest(&lock).unwrap(), Some(made[1].clone()));
    let mark = |id: &str, code: &str| {
        let reasons = serde_json::json!([{"code": code, "text": "x"}]);
        let changes = [("reasons", Some(reasons))];
        store.annotate(&lock, id, &changes).unwrap();
    };
    mark(&made[1], "damaged-content");
    assert_eq!(store.settle_latest(&lock).unwrap(), Some(made[0].clone()));
    assert_eq!(store.latest().as_ref(), Some(&made[0]));
    mark(&made[0], "verify-command");
    assert_eq!(store.settle_latest(&lock).unwrap(), None);
    assert!(!names(store.path()).contains(&"latest".to_owned()));
}

#[test]
fn an_annotation_changes_nothing_else() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let id = publish(store.begin(&lock).unwrap(), true);
    let path = store.path().join(&id).join("manifest.json");
    // Unknown fields, odd numbers and odd layout, at every depth.
    let good = fs::read_to_string(&path).unwrap();
    let strange = good
        .replace(
            "\"hold_us\": 42",
            "\"hold_us\":   42,\n\t\"later\": {\"x\":[1.50e1, 0.10,\"\\u00e9\"] ,\"y\":{}}",
        )
        .replace(
            "\"path\": \"/data\"",
            "\"path\": \"/data\", \"new\": 18446744073709551616",
        );
    assert!(strange.contains("later") && strange.contains("new"));
    fs::write(&path, &strange).unwrap();
    let owner = fs::metadata(&path).unwrap();
    let pin = serde_json::json!({"note": "n", "time": "t"});
    store.annotate(&lock, &id, &[("pin", Some(pin))]).unwrap();
    let pinned = fs::read_to_string(&path).unwrap();
    for kept in [
        "{\"x\":[1.50e1, 0.10,\"\\u00e9\"] ,\"y\":{}}",
        "\"new\": 18446744073709551616",
    ] {
        assert!(pinned.contains(kept), "{pinned}");
    }
    assert!(
        pinned.find("\"pin\"") < pinned.find("\"files\""),
        "files are last"
    );
    let read = store.find(&id).unwrap().manifest.unwrap();
    assert_eq!(read.pin.unwrap().note, "n");
    store.annotate(&lock, &id, &[("pin", None)]).unwrap();
    let undone = fs::read_to_string(&path).unwrap();
    let squeezed = |text: &str| text.replace([' ', '\n', '\t'], "");
    assert_eq!(squeezed(&undone), squeezed(&strange));
    // Of what we write ourselves, every byte.
    fs::write(&path, &good).unwrap();
    store.annotate(&lock, &id, &[("absent", None)]).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), good);
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.mode(), after.uid()), (owner.mode(), owner.uid()));
    assert_eq!(names(&store.path().join(&id)), ["manifest.json", "tree"]);
    for damaged in ["{", "{\"version\": 2}", "[]"] {
        fs::write(&path, damaged).unwrap();
        assert!(store.annotate(&lock, &id, &[("pin", None)]).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
    }
}

#[test]
fn of_long_manifests_the_head_is_read() {
    let scratch = Scratch::new();
    let (store, lock) = open(&scratch);
    let draft = store.begin(&lock).unwrap();
    let id = draft.id().to_owned();
    let mut long = manifest(&id, true);
    let record = |n: u64| FileRecord {
        path: PathName(format!("/data/{n}").into()),
        kind: Kind::File,
        size: 10,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime_ns: 0,
        ctime_ns: 0,
        dev: 1,
        ino: n,
        target: None,
        capture: None,
        digest: None,
        device: None,
    };
    long.files = (0..3000).map(record).collect();
    long.totals = Some(Totals::of(&long.files));
    draft.publish(&long).unwrap();
    let path = store.path().join(&id).join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.len() > 256 << 10);
    let head = || store.heads().unwrap().remove(0).head;
    let totals = Totals {
        files: 3000,
        bytes: 30_000,
        ..Totals::default()
    };
    assert_eq!(head().unwrap().totals, totals);
    // What comes after the head is not read: damage there shows when it is.
    fs::write(&path, &text[..text.len() - 3]).unwrap();
    assert_eq!(head().unwrap().totals, totals);
    assert!(store.find(&id).unwrap().manifest.is_err());
    // An older one has no totals, and other fields behind its files: it is read whole.
    let mut older: serde_json::Value = serde_json::from_str(&text).unwrap();
    older.as_object_mut().unwrap().remove("totals");
    let older = serde_json::to_string_pretty(&older).unwrap();
    assert!(
        older.find("\"files\"") < older.find("\"hold_us\""),
        "sorted by name"
    );
    fs::write(&path, &older).unwrap();
    assert_eq!(head().unwrap().totals, totals);
    fs::write(&path, &older[..older.len() - 3]).unwrap();
    assert!(head().unwrap_err().contains("damaged"));
    // A head that is damaged, of another snapshot, or of a later version.
    for (from, to, complaint) in [
        ("\"verified\": true", "\"verified\": 1", "damaged"),
        (id.as_str(), "20200101T000000.000000Z", "another snapshot"),
        ("\"version\": 1", "\"version\": 2", "newer snapshim"),
    ] {
        fs::write(&path, text.replace(from, to)).unwrap();
        let said = head().unwrap_err();
        assert!(said.contains(complaint), "{said}");
    }
}
