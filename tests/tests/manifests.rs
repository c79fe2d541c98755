//! Manifests of every form there was, and manifests and trees that somebody has made up.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::sys::stat::{Mode, SFlag};
use nix::sys::time::TimeSpec;
use serde_json::{Value, json};
use snapshim_tests::process::{self, Ended};
use snapshim_tests::{Fs, Lab, full};

const LIMIT: Duration = Duration::from_secs(180);
/// The set in the fixtures.
const SET: &str = "old";

fn fixtures() -> Vec<(String, Value)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/manifests");
    let entries = fs::read_dir(dir).expect("the fixtures").flatten();
    let mut found: Vec<(String, Value)> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(OsStr::new("json")))
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (
                name,
                serde_json::from_slice(&fs::read(&path).unwrap()).unwrap(),
            )
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(found.len() >= 6, "{} fixtures", found.len());
    found
}

/// Makes the tree that the fixtures are about, below `top`.
fn furnish(top: &Path) {
    let data = top.join("srv/data");
    fs::create_dir_all(data.join("sub")).unwrap();
    let at = |name: &[u8]| data.join(OsStr::from_bytes(name));
    let write = |name: &[u8], bytes: &[u8], mode: u32| {
        fs::write(at(name), bytes).unwrap();
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    let large: Vec<u8> = (0..1_500_000_u64).map(|i| (i * 7 % 251) as u8).collect();
    write(b"plain", b"plain\n", 0o640);
    write(b"sub/large", &large, 0o644);
    write(b"owned", b"owned\n", 0o600);
    write(b"not \xff utf8", b"bytes\n", 0o644);
    write(b"sparse", b"", 0o644);
    let sparse = fs::OpenOptions::new()
        .write(true)
        .open(at(b"sparse"))
        .unwrap();
    sparse.set_len(4 << 20).unwrap();
    std::os::unix::fs::chown(at(b"owned"), Some(1234), Some(4321)).unwrap();
    fs::hard_link(at(b"plain"), at(b"hard")).unwrap();
    symlink("plain", at(b"link")).unwrap();
    nix::unistd::mkfifo(&at(b"fifo"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    for dir in ["", "sub"] {
        fs::set_permissions(data.join(dir), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let time = TimeSpec::new(1_000_000_000, 123_456_789);
    let names = [
        "plain",
        "sub/large",
        "owned",
        "sparse",
        "link",
        "fifo",
        "sub",
        "",
    ];
    let names = names.iter().map(|name| name.as_bytes());
    for name in names.chain([&b"not \xff utf8"[..]]) {
        let flag = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &at(name), &time, &time, flag).unwrap();
    }
}

/// A store with one snapshot, which has this manifest and the fixtures' tree.
struct Made {
    lab: Lab,
    id: String,
}

impl Made {
    fn new(name: &str, manifest: &Value) -> Option<Made> {
        let lab = Lab::new(name, Fs::Tmpfs, LIMIT)?;
        let id = manifest["id"].as_str().unwrap().to_owned();
        let made = Made { lab, id };
        fs::create_dir_all(made.dir().join("tree")).unwrap();
        fs::set_permissions(made.set(), fs::Permissions::from_mode(0o700)).unwrap();
        furnish(&made.dir().join("tree"));
        made.write(&serde_json::to_vec_pretty(manifest).unwrap());
        Some(made)
    }

    fn set(&self) -> PathBuf {
        self.lab.store().join(SET)
    }

    fn dir(&self) -> PathBuf {
        self.set().join(&self.id)
    }

    fn manifest(&self) -> PathBuf {
        self.dir().join("manifest.json")
    }

    fn write(&self, text: &[u8]) {
        fs::write(self.manifest(), text).unwrap();
    }

    fn read(&self) -> Value {
        serde_json::from_slice(&fs::read(self.manifest()).unwrap()).unwrap()
    }

    /// A command about the snapshot, with at most this much memory (KiB).
    #[track_caller]
    fn within(&self, memory: u64, args: &[&str]) -> Ended {
        let mut command = self.lab.command("bash");
        let line = format!("ulimit -v {memory}; exec \"$@\"");
        command.args(["-c", &line, "bash"]);
        command.arg(snapshim_tests::product::snapshim());
        command.args(args).arg("--store").arg(self.lab.store());
        let ended = process::run(command, Duration::from_secs(60));
        assert!(
            matches!(ended.code(), 0..=5),
            "{args:?}: exit {}\n{}\n{}",
            ended.code(),
            ended.out(),
            ended.err()
        );
        ended
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> Ended {
        self.within(2 << 20, args)
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let ended = self.run(args);
        serde_json::from_str(&ended.out())
            .unwrap_or_else(|e| panic!("{args:?}: {e}\n{}\n{}", ended.out(), ended.err()))
    }
}

/// What one JSON value has that another has, too: everything of `part` is in `whole`.
#[track_caller]
fn assert_within(part: &Value, whole: &Value, at: &str) {
    match (part, whole) {
        (Value::Object(part), Value::Object(whole)) => {
            for (name, value) in part {
                let other = whole
                    .get(name)
                    .unwrap_or_else(|| panic!("{at}.{name} is gone"));
                assert_within(value, other, &format!("{at}.{name}"));
            }
        }
        (Value::Array(part), Value::Array(whole)) => {
            assert_eq!(part.len(), whole.len(), "{at}");
            for (i, (part, whole)) in part.iter().zip(whole).enumerate() {
                assert_within(part, whole, &format!("{at}[{i}]"));
            }
        }
        _ => assert_eq!(part, whole, "{at}"),
    }
}

/// Puts a field that nobody knows into every object, however deep.
fn add_unknown(value: &mut Value, count: &mut u32) {
    match value {
        Value::Object(fields) => {
            for value in fields.values_mut() {
                add_unknown(value, count);
            }
            *count += 1;
            fields.insert(
                format!("zz_{count}"),
                json!({"of": ["later", *count, null]}),
            );
        }
        Value::Array(list) => list.iter_mut().for_each(|value| add_unknown(value, count)),
        _ => {}
    }
}

#[test]
fn every_form_there_was_is_read_and_kept() {
    for (i, (name, manifest)) in fixtures().into_iter().enumerate() {
        let Some(made) = Made::new(&format!("form-{i}"), &manifest) else {
            return;
        };
        let id = made.id.clone();
        let listed = made.json(&["list", SET, "--json"]);
        let line = &listed["snapshots"][0];
        assert!(line.get("damage").is_none(), "{name}: {line}");
        assert_eq!(
            (&line["files"], &line["bytes"]),
            (&6.into(), &5_694_328.into()),
            "{name}"
        );
        assert_within(&manifest, &made.json(&["show", SET, &id, "--json"]), &name);
        let text = made.run(&["show", SET, &id]).ok("show").out();
        assert!(text.contains("/srv/data/sub/large"), "{text}");

        let has_digests = manifest.get("hashed_bytes").is_some();
        let report = made.json(&["verify", SET, &id, "--json"]);
        let line = &report["snapshots"][0];
        assert_eq!(report["good"], true, "{name}: {report:#}");
        assert_eq!(line["unchecked"], if has_digests { 0 } else { 6 }, "{name}");
        // Once: two names of one file.
        assert_eq!(
            line["bytes"],
            if has_digests { 5_694_322 } else { 0 },
            "{name}"
        );

        // A rewrite keeps what is not known, at every depth.
        let mut odd = manifest.clone();
        let mut count = 0;
        add_unknown(&mut odd, &mut count);
        assert!(count > 15, "{count}");
        made.write(&serde_json::to_vec_pretty(&odd).unwrap());
        fs::write(made.dir().join("tree/srv/data/extra"), "").unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        let dir = fs::File::open(made.dir().join("tree/srv/data")).unwrap();
        dir.set_modified(time).unwrap();
        let report = made.json(&["verify", SET, &id, "--json"]);
        assert_eq!(report["snapshots"][0]["damaged"], 1, "{name}: {report:#}");
        assert_eq!(report["snapshots"][0]["marked"], true, "{name}");
        let kept = made.read();
        let reasons = kept["reasons"].as_array().unwrap();
        assert_eq!(reasons.last().unwrap()["code"], "damaged-content");
        let mut before = kept.clone();
        before["reasons"].as_array_mut().unwrap().pop();
        before["checks"].as_array_mut().unwrap().pop();
        before["verified"] = odd["verified"].clone();
        assert_within(&odd, &before, &name);
    }
}

#[test]
fn a_later_version_is_refused_with_the_cause() {
    let (_, manifest) = fixtures().pop().unwrap();
    // Also if nothing else is as it was.
    let later = json!({"version": 2, "id": {"is": "an object now"}, "files": 7});
    let mut same = manifest.clone();
    same["version"] = 2.into();
    let Some(made) = Made::new("later", &manifest) else {
        return;
    };
    for value in [same, later] {
        made.write(&serde_json::to_vec(&value).unwrap());
        let listed = made.json(&["list", SET, "--json"]);
        let damage = listed["snapshots"][0]["damage"].as_str().unwrap();
        assert!(
            damage.contains("version 2") && damage.contains("newer snapshim"),
            "{damage}"
        );
        for args in [&["show", SET, &made.id][..], &["verify", SET, &made.id]] {
            let ended = made.run(args);
            let said = ended.out() + &ended.err();
            assert!(
                ended.code() == 1 && said.contains("version 2"),
                "{args:?}: {said}"
            );
        }
        assert_eq!(made.read(), value, "it was written to");
    }
}

/// Reads a snapshot with `list`, `show` and `verify`; each ends, in bounds, and the last two say
/// that it cannot be used, with this cause.
#[track_caller]
fn refused(made: &Made, case: &str, cause: &str) {
    refused_within(made, case, cause, 2 << 20);
}

#[track_caller]
fn refused_within(made: &Made, case: &str, cause: &str, memory: u64) {
    made.within(memory, &["list", SET]).ok(case);
    for args in [&["show", SET, &made.id][..], &["verify", SET, &made.id]] {
        let ended = made.within(memory, args);
        let said = ended.out() + &ended.err();
        assert_eq!(ended.code(), 1, "{case}: {args:?}: {said}");
        assert!(
            said.contains(cause),
            "{case}: {args:?} says not '{cause}': {said}"
        );
    }
}

type Change = fn(&mut Value);

#[test]
fn made_up_manifests_are_refused() {
    let (_, manifest) = fixtures().pop().unwrap();
    let Some(made) = Made::new("made-up", &manifest) else {
        return;
    };
    fn file(value: &mut Value) -> &mut Value {
        let files = value["files"].as_array_mut().unwrap();
        files
            .iter_mut()
            .find(|file| file["path"] == "/srv/data/plain")
            .unwrap()
    }
    let cases: &[(&str, Change, &str)] = &[
        (
            "up",
            |v| file(v)["path"] = "/srv/data/../../../etc/passwd".into(),
            "not a path inside",
        ),
        (
            "relative",
            |v| file(v)["path"] = "srv/data/plain".into(),
            "not a path inside",
        ),
        (
            "relative up",
            |v| file(v)["path"] = "../plain".into(),
            "not a path inside",
        ),
        (
            "dot",
            |v| file(v)["path"] = "/srv/./data/plain2".into(),
            "not a path inside",
        ),
        (
            "slashes",
            |v| file(v)["path"] = "/srv//data/plain2".into(),
            "not a path inside",
        ),
        (
            "slash at the end",
            |v| file(v)["path"] = "/srv/data/plain2/".into(),
            "not a path inside",
        ),
        (
            "the root",
            |v| file(v)["path"] = "/".into(),
            "not a path inside",
        ),
        (
            "nothing",
            |v| file(v)["path"] = "".into(),
            "not a path inside",
        ),
        (
            "NUL",
            |v| file(v)["path"] = "/srv/data/a\0b".into(),
            "not a path inside",
        ),
        (
            "NUL in hex",
            |v| file(v)["path_hex"] = "2f612f0062".into(),
            "not a path inside",
        ),
        (
            "up in hex",
            |v| file(v)["path_hex"] = "2f2e2e2f61".into(),
            "not a path inside",
        ),
        (
            "odd hex",
            |v| file(v)["path_hex"] = "2f6".into(),
            "hexadecimal",
        ),
        (
            "no hex",
            |v| file(v)["path_hex"] = "2fxy".into(),
            "hexadecimal",
        ),
        (
            "signed hex",
            |v| file(v)["path_hex"] = "2f+1".into(),
            "hexadecimal",
        ),
        (
            "roots up",
            |v| v["roots"][0]["path"] = "/srv/..".into(),
            "not a path inside",
        ),
        (
            "twice",
            |v| file(v)["path"] = "/srv/data/owned".into(),
            "listed twice",
        ),
        (
            "twice, not in order",
            |v| {
                let first = v["files"][0].clone();
                v["files"].as_array_mut().unwrap().push(first);
            },
            "listed twice",
        ),
        (
            "below a file",
            |v| file(v)["path"] = "/srv/data/owned/below".into(),
            "not a directory, but",
        ),
        (
            "below a link",
            |v| file(v)["path"] = "/srv/data/link/passwd".into(),
            "not a directory, but",
        ),
        (
            "below itself",
            |v| v["files"][0]["kind"] = "file".into(),
            "not a directory, but",
        ),
        ("size", |v| file(v)["size"] = json!(1e30), "damaged"),
        ("negative", |v| file(v)["size"] = json!(-1), "damaged"),
        ("mode", |v| file(v)["mode"] = json!(1_u64 << 32), "damaged"),
        ("time", |v| file(v)["mtime_ns"] = json!(u64::MAX), "damaged"),
        ("kind", |v| file(v)["kind"] = "blackhole".into(), "damaged"),
        (
            "no path",
            |v| drop(file(v).as_object_mut().unwrap().remove("path")),
            "damaged",
        ),
        (
            "another id",
            |v| v["id"] = "20200101T000000.000000Z".into(),
            "another snapshot",
        ),
        ("version 0", |v| v["version"] = 0.into(), "version 0"),
        ("version -1", |v| v["version"] = json!(-1), "damaged"),
        ("no list", |v| v["files"] = json!({}), "damaged"),
    ];
    for (case, change, cause) in cases {
        let mut value = manifest.clone();
        change(&mut value);
        made.write(&serde_json::to_vec(&value).unwrap());
        refused(&made, case, cause);
    }
    for (case, text, cause) in [
        ("empty", &b""[..], "damaged"),
        ("no JSON", b"\xff\xfe{}", "damaged"),
        (
            "cut",
            &serde_json::to_vec(&manifest).unwrap()[..700],
            "damaged",
        ),
        ("a list", b"[]", "damaged"),
        ("null", b"null", "damaged"),
    ] {
        made.write(text);
        refused(&made, case, cause);
    }
    // Deep, where something is expected and where nothing is.
    for depth in [1_000, 1_000_000] {
        let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let start = serde_json::to_string(&manifest).unwrap();
        let text = format!("{},\"deep\":{deep}}}", &start[..start.len() - 1]);
        made.write(text.as_bytes());
        refused(&made, "deep", "damaged");
        made.write(deep.as_bytes());
        refused(&made, "only deep", "damaged");
    }
}

#[test]
fn what_is_not_a_manifest_is_refused() {
    let (_, manifest) = fixtures().pop().unwrap();
    let Some(made) = Made::new("not-a-manifest", &manifest) else {
        return;
    };
    let good = fs::read(made.manifest()).unwrap();
    let elsewhere = made.lab.beside("manifest.json");
    fs::write(&elsewhere, &good).unwrap();
    let path = made.manifest();
    let instead = |make: &dyn Fn()| {
        fs::remove_file(&path).unwrap();
        make();
    };
    instead(&|| symlink(&elsewhere, &path).unwrap());
    refused(&made, "a link", "symbolic link");
    instead(&|| nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap());
    refused(&made, "a FIFO", "not a regular file");
    let zero = nix::sys::stat::makedev(1, 5);
    instead(&|| nix::sys::stat::mknod(&path, SFlag::S_IFCHR, Mode::S_IRWXU, zero).unwrap());
    refused(&made, "/dev/zero", "not a regular file");
    instead(&|| fs::create_dir(&path).unwrap());
    refused(&made, "a directory", "not a regular file");
    fs::remove_dir(&path).unwrap();
    refused(&made, "nothing", "missing");
    // Larger than any, and nothing in it: found without reading it.
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    refused_within(&made, "a terabyte", "larger than", 200 << 10);

    // The snapshot itself is a link.
    fs::remove_file(&path).unwrap();
    fs::write(&path, &good).unwrap();
    let moved = made.lab.beside("moved");
    fs::rename(made.dir(), &moved).unwrap();
    symlink(&moved, made.dir()).unwrap();
    refused(&made, "the snapshot is a link", "directory");
}

#[test]
fn much_of_anything_is_bounded() {
    let (_, manifest) = fixtures().pop().unwrap();
    let Some(made) = Made::new("much", &manifest) else {
        return;
    };
    let start = serde_json::to_string(&manifest).unwrap();
    let start = &start[..start.len() - 1];
    // Some thirty times its size if it were taken in.
    let zeros = format!("[{}0]", "0,".repeat(20_000_000));
    made.write(format!("{start},\"later\":{zeros}}}").as_bytes());
    refused_within(
        &made,
        "a field of 40 MB",
        "'later' has more than",
        400 << 10,
    );

    // In a file's record what is not known is passed over.
    let mut value = manifest.clone();
    value["files"][3]["later"] = "HERE".into();
    let text = serde_json::to_string(&value)
        .unwrap()
        .replace("\"HERE\"", &zeros);
    made.write(text.as_bytes());
    let ended = made
        .within(400 << 10, &["verify", SET, &made.id])
        .ok("verify");
    assert!(ended.out().contains("good"), "{}", ended.out());

    // Records without end, none of them whole.
    let mut value = manifest.clone();
    value["files"] = "HERE".into();
    let text = serde_json::to_string(&value).unwrap();
    let empty = format!("[{}{{}}]", "{},".repeat(10_000_000));
    made.write(text.replace("\"HERE\"", &empty).as_bytes());
    refused_within(&made, "10,000,000 records", "damaged", 400 << 10);

    // Sizes that no disk has: found without reading anything.
    let mut value = manifest.clone();
    for file in value["files"].as_array_mut().unwrap() {
        if file["kind"] == "file" {
            file["size"] = u64::MAX.into();
        }
    }
    value.as_object_mut().unwrap().remove("totals");
    made.write(&serde_json::to_vec(&value).unwrap());
    made.run(&["list", SET]).ok("list");
    made.run(&["show", SET, &made.id]).ok("show");
    let report = made.json(&["verify", SET, &made.id, "--json"]);
    assert_eq!(report["snapshots"][0]["damaged"], 6, "{report:#}");
    assert_eq!(report["snapshots"][0]["damage"][0]["what"], "size");

    if full() {
        let mut text = start[..start.find("\"files\":").unwrap()].to_owned();
        text.push_str("\"files\":[");
        for i in 0..4_000_001 {
            let comma = if i == 0 { "" } else { "," };
            text.push_str(&format!(
                "{comma}{{\"path\":\"/{i:08}\",\"kind\":\"fifo\",\"size\":0,\"mode\":0,\"uid\":0,\"gid\":0,\"mtime_ns\":0,\"ctime_ns\":0,\"dev\":0,\"ino\":0}}"
            ));
        }
        text.push_str("]}");
        made.write(text.as_bytes());
        refused_within(
            &made,
            "too many records",
            "more than 4000000 files",
            4 << 20,
        );
    }
}

#[test]
fn a_wrong_digest_is_damage_and_one_of_a_later_kind_is_not() {
    let (_, manifest) = fixtures().pop().unwrap();
    let Some(made) = Made::new("digest", &manifest) else {
        return;
    };
    for (digest, found) in [
        ("blake3:0123", Some("digest")),
        ("blake3", Some("digest")),
        ("\u{1b}[2J", Some("digest")),
        (&format!("blake3:{}", "0".repeat(64)), Some("content")),
        (&"x".repeat(1 << 20), Some("digest")),
        ("sha3-512:00ff", None),
    ] {
        let mut value = manifest.clone();
        for file in value["files"].as_array_mut().unwrap() {
            if file["path"] == "/srv/data/owned" {
                file["digest"] = digest.into();
            }
        }
        made.write(&serde_json::to_vec(&value).unwrap());
        let ended = made.run(&["verify", SET, &made.id, "--json"]);
        let report: Value = serde_json::from_str(&ended.out()).unwrap();
        let line = &report["snapshots"][0];
        match found {
            Some(what) => {
                assert_eq!(line["damage"][0]["what"], what, "{line}");
                assert_eq!(line["damage"][0]["path"], "/srv/data/owned");
                assert_eq!(ended.code(), 1);
            }
            None => assert_eq!(
                (&line["good"], &line["unchecked"]),
                (&true.into(), &1.into())
            ),
        }
        assert!(!ended.err().contains('\u{1b}'));
        let text = made.run(&["verify", SET, &made.id]).out();
        assert!(text.len() < 10_000 && !text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn made_up_trees_are_damage_and_lead_nowhere() {
    let (_, manifest) = fixtures().pop().unwrap();
    let secret = "what nobody may see";
    let damage = |made: &Made| -> Vec<(String, String)> {
        let ended = made.run(&["verify", SET, &made.id, "--json"]);
        assert!(!(ended.out() + &ended.err()).contains(secret));
        let report: Value = serde_json::from_str(&ended.out()).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let found = report["snapshots"][0]["damage"].as_array().unwrap().iter();
        found
            .map(|d| (text(&d["path"]), text(&d["what"])))
            .collect()
    };
    let has = |found: &[(String, String)], path: &str, what: &str| {
        assert!(
            found.contains(&(path.into(), what.into())),
            "{path} {what}: {found:?}"
        );
    };
    type Put = fn(&Path, &Path);
    let puts: [(&str, Put); 6] = [
        ("link", |at, outside| symlink(outside, at).unwrap()),
        ("fifo", |at, _| {
            nix::unistd::mkfifo(at, Mode::S_IRWXU).unwrap()
        }),
        ("socket", |at, _| {
            drop(std::os::unix::net::UnixListener::bind(at).unwrap())
        }),
        ("zero", |at, _| {
            let zero = nix::sys::stat::makedev(1, 5);
            nix::sys::stat::mknod(at, SFlag::S_IFCHR, Mode::S_IRWXU, zero).unwrap();
        }),
        ("dir", |at, _| fs::create_dir(at).unwrap()),
        ("nothing", |_, _| ()),
    ];
    for (name, put) in puts {
        let Some(made) = Made::new(&format!("tree-{name}"), &manifest) else {
            return;
        };
        let outside = made.lab.beside("outside");
        fs::create_dir(&outside).unwrap();
        for name in ["large", "plain"] {
            fs::write(outside.join(name), secret).unwrap();
        }
        let what = if name == "nothing" { "missing" } else { "kind" };
        let data = made.dir().join("tree/srv/data");
        // In place of a file.
        fs::remove_file(data.join("owned")).unwrap();
        // A short name: a socket's path is bounded.
        let here = std::env::temp_dir().join(format!("made-{}-{name}", std::process::id()));
        put(&here, &outside.join("plain"));
        move_into(&here, &data.join("owned"));
        has(&damage(&made), "/srv/data/owned", what);
        // Of a directory: what it leads to is not looked at.
        if name != "dir" {
            fs::remove_dir_all(data.join("sub")).unwrap();
            put(&here, &outside);
            move_into(&here, &data.join("sub"));
            let found = damage(&made);
            has(&found, "/srv/data/sub", what);
            has(&found, "/srv/data/sub/large", "missing");
            // Of a directory above the roots.
            let srv = made.dir().join("tree/srv");
            fs::remove_dir_all(&srv).unwrap();
            put(&here, &outside);
            move_into(&here, &srv);
            let found = damage(&made);
            has(&found, "/srv/data", "missing");
            if name != "nothing" {
                has(&found, "/srv", "kind");
            }
            // Of the tree.
            fs::remove_dir_all(made.dir().join("tree")).unwrap();
            put(&here, &outside);
            move_into(&here, &made.dir().join("tree"));
            let ended = made.run(&["verify", SET, &made.id]);
            assert_eq!(ended.code(), 1, "{name}");
            assert!(ended.out().contains("damaged"), "{name}: {}", ended.out());
        }
        assert_eq!(fs::read_to_string(outside.join("plain")).unwrap(), secret);
    }
}

/// Moves something, if it is there, whatever it is, to another file system.
#[track_caller]
fn move_into(from: &Path, to: &Path) {
    if from.symlink_metadata().is_ok() {
        let mut command = std::process::Command::new("mv");
        command.arg("-T").arg(from).arg(to);
        process::run(command, Duration::from_secs(20)).ok("mv");
    }
}

/// What is only recorded is not in a tree; a node there would be somebody's trap.
#[test]
fn a_device_that_is_only_recorded_is_not_in_the_tree() {
    let (_, manifest) = fixtures().pop().unwrap();
    let Some(made) = Made::new("recorded", &manifest) else {
        return;
    };
    let data = made.dir().join("tree/srv/data");
    let null = nix::sys::stat::makedev(1, 3);
    let mode = Mode::from_bits_truncate(0o666);
    nix::sys::stat::mknod(&data.join("null"), SFlag::S_IFCHR, mode, null).unwrap();
    // A sparse file that is larger than anybody could read is no longer what it was.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(data.join("sparse"))
        .unwrap();
    file.set_len(1 << 50).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    let report = made.json(&["verify", SET, &made.id, "--json"]);
    let found = report["snapshots"][0]["damage"].as_array().unwrap();
    let has = |path: &str, what: &str| found.iter().any(|d| d["path"] == path && d["what"] == what);
    assert!(has("/srv/data/null", "extra"), "{report:#}");
    assert!(has("/srv/data/sparse", "size"), "{report:#}");
}
