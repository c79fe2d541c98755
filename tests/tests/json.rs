//! The shape of what each command prints with `--json`: which keys there are and of what
//! type their values are, as `tests/json/COMMAND.txt` has it. A key that vanishes, or
//! whose type changes, breaks whoever reads it; a new one is written down on purpose:
//! `SNAPSHIM_TEST_UPDATE=1 cargo test -p snapshim-tests --test json`, then read the diff.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use snapshim_tests::process::{Proc, run, tool, wait_until};
use snapshim_tests::{Fs, Lab};

/// Each command: the name of the file its object is described in, and its arguments. `SET`, `DATA`, `STORE`, `PID` (of
/// a program of the set) and `OLD` (an older snapshot) are filled in.
const COMMANDS: &[(&str, &[&str])] = &[
    ("checkpoint", &["checkpoint", "SET"]),
    (
        "checkpoint",
        &["snap", "DATA", "--name", "snapped", "--store", "STORE"],
    ),
    ("list", &["list", "SET"]),
    ("show", &["show", "SET", "latest"]),
    ("show-path", &["show", "SET", "latest:DATA"]),
    ("status", &["status", "SET"]),
    (
        "env",
        &[
            "env", "--name", "SET", "--watch", "DATA", "--store", "STORE",
        ],
    ),
    ("doctor", &["doctor", "PID", "--watch", "DATA"]),
    ("doctor", &["doctor", "--", "bash"]),
    ("diff", &["diff", "SET", "OLD", "latest"]),
    ("diff", &["diff", "--live", "SET", "OLD"]),
    ("pin", &["pin", "SET", "latest", "--note", "why"]),
    ("list", &["list", "SET"]),
    ("show", &["show", "SET", "latest"]),
    ("prune", &["prune", "SET", "--keep-last", "1", "--dry-run"]),
    ("verify", &["verify", "SET", "latest"]),
    ("hold", &["hold", "SET", "--", "true"]),
    (
        "restore",
        &["restore", "SET", "latest", "--in-place", "--dry-run"],
    ),
    ("pin", &["unpin", "SET", "latest"]),
    ("delete", &["delete", "SET", "OLD"]),
];

/// What is known of the values at one place of an object.
#[derive(Clone, Debug, Default, PartialEq)]
struct Place {
    /// It may be missing.
    is_optional: bool,
    types: BTreeSet<String>,
}

/// Places by their paths: `files[].size`.
type Shape = BTreeMap<String, Place>;

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Calls `each` for every object, with its path.
fn objects<'a>(
    path: &str,
    value: &'a Value,
    each: &mut dyn FnMut(&str, &'a serde_json::Map<String, Value>),
) {
    match value {
        Value::Object(object) => {
            each(path, object);
            for (key, value) in object {
                objects(&under(path, key), value, each);
            }
        }
        Value::Array(values) => {
            for value in values {
                objects(&format!("{path}[]"), value, each);
            }
        }
        _ => {}
    }
}

fn under(path: &str, key: &str) -> String {
    match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    }
}

/// Calls `each` for every value but the object itself, with its path.
fn values(path: &str, value: &Value, each: &mut dyn FnMut(String, &Value)) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let path = under(path, key);
                each(path.clone(), value);
                values(&path, value, each);
            }
        }
        Value::Array(elements) => {
            for value in elements {
                let path = format!("{path}[]");
                each(path.clone(), value);
                values(&path, value, each);
            }
        }
        _ => {}
    }
}

/// Keys that belong to the object at `path`.
fn keys<'a>(shape: &'a Shape, path: &str) -> Vec<(&'a str, &'a Place)> {
    shape
        .iter()
        .filter_map(|(known, place)| {
            let key = match path {
                "" => known.as_str(),
                path => known.strip_prefix(path)?.strip_prefix('.')?,
            };
            (!key.contains(['.', '['])).then_some((key, place))
        })
        .collect()
}

/// Adds what an object shows to what is known.
fn learn(shape: &mut Shape, object: &Value) {
    let mut seen: BTreeMap<String, Vec<BTreeSet<String>>> = BTreeMap::new();
    objects("", object, &mut |path, object| {
        let keys = object.keys().cloned().collect();
        seen.entry(path.to_owned()).or_default().push(keys);
    });
    values("", object, &mut |path, value| {
        shape
            .entry(path)
            .or_default()
            .types
            .insert(type_of(value).to_owned());
    });
    for (path, objects) in seen {
        let names: Vec<String> = keys(shape, &path)
            .iter()
            .map(|(key, _)| (*key).to_owned())
            .collect();
        for key in names {
            let missing = objects.iter().any(|object| !object.contains(&key));
            if let Some(place) = shape.get_mut(&under(&path, &key)) {
                place.is_optional |= missing;
            }
        }
    }
}

/// What in an object is not as it is known to be.
fn problems(shape: &Shape, object: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    objects("", object, &mut |path, object| {
        for (key, place) in keys(shape, path) {
            if !place.is_optional && !object.contains_key(key) {
                problems.push(format!("{} is gone", under(path, key)));
            }
        }
    });
    values("", object, &mut |path, value| match shape.get(&path) {
        None => problems.push(format!("{path} is new")),
        Some(place) if !place.types.contains(type_of(value)) => {
            problems.push(format!("{path} is of type {}", type_of(value)));
        }
        Some(_) => {}
    });
    problems
}

fn parse(text: &str) -> Shape {
    text.lines()
        .map(|line| {
            let (path, types) = line.split_once(": ").expect("PATH: TYPES");
            let place = Place {
                is_optional: path.ends_with('?'),
                types: types.split('|').map(str::to_owned).collect(),
            };
            (path.trim_end_matches('?').to_owned(), place)
        })
        .collect()
}

fn print(shape: &Shape) -> String {
    let mut text = String::new();
    for (path, place) in shape {
        let optional = if place.is_optional { "?" } else { "" };
        let types: Vec<&str> = place.types.iter().map(String::as_str).collect();
        writeln!(text, "{path}{optional}: {}", types.join("|")).unwrap();
    }
    text
}

fn file_of(command: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/json/{command}.txt"))
}

/// Everything that can be in a snapshot, so that all keys are there.
fn furnish(lab: &Lab) {
    let data = lab.data();
    fs::write(data.join("file"), "x\n").unwrap();
    fs::hard_link(data.join("file"), data.join("hard")).unwrap();
    symlink("file", data.join("link")).unwrap();
    fs::create_dir(data.join("dir")).unwrap();
    fs::write(data.join(OsStr::from_bytes(b"odd\xff")), "x").unwrap();
    tool("mkfifo", &[data.join("fifo").to_str().unwrap()]);
    tool(
        "mknod",
        &[data.join("null").to_str().unwrap(), "c", "1", "3"],
    );
}

#[test]
fn every_object_has_its_shape() {
    let Some(lab) = Lab::new("json", Fs::Xfs, Duration::from_secs(240)) else {
        return;
    };
    furnish(&lab);
    let data = lab.data();
    // A program of the set that has a member open, and one that is in no set.
    let busy = "exec 5>>\"$1\"; while :; do echo x >&5; sleep 0.05; done";
    let log = data.join("log");
    let log = log.to_str().unwrap();
    let mut writer = lab.run(&[], Path::new("/bin/bash"), &["-c", busy, "bash", log]);
    let mut outsider = Proc::piped(lab.command_with("bash", &["-c", busy, "bash", log]));
    let pid = || {
        lab.processes_named("bash")
            .into_iter()
            .find(|pid| *pid != outsider.pid())
    };
    assert!(wait_until(Duration::from_secs(20), || {
        lab.gate().exists() && pid().is_some() && fs::metadata(log).is_ok_and(|m| m.len() > 0)
    }));
    let pid = pid().unwrap().to_string();
    let old = lab.checkpoint(&[]).certificate().id().to_owned();
    // One that is damaged, for `list`; older, so that it is in nobody's way.
    let damaged = lab.store().join(lab.set()).join("20200101T000000.000000Z");
    fs::create_dir_all(damaged.join("tree")).unwrap();
    fs::write(damaged.join("manifest.json"), "{}").unwrap();
    // Something of each kind of difference.
    fs::write(data.join("file"), "y\n").unwrap();
    fs::remove_file(data.join("link")).unwrap();
    fs::write(data.join("new"), "").unwrap();

    let mut failures = String::new();
    for (name, args) in COMMANDS {
        let fill = |arg: &&str| match *arg {
            "SET" => lab.set().to_owned(),
            "DATA" => data.display().to_string(),
            "STORE" => lab.store().display().to_string(),
            "PID" => pid.clone(),
            "OLD" => old.clone(),
            "latest:DATA" => format!("latest:{}", data.display()),
            other => other.to_owned(),
        };
        let mut command = lab.snapshim(&[]);
        // Before the arguments: behind `--` they are the program's.
        let (first, rest) = args.split_first().unwrap();
        command.arg(first).arg("--json").args(rest.iter().map(fill));
        let ended = run(command, Duration::from_secs(60));
        assert!([0, 5].contains(&ended.code()), "{name}: {}", ended.err());
        let object: Value = serde_json::from_slice(&ended.stdout)
            .unwrap_or_else(|e| panic!("{name}: not one object: {e}\n{}", ended.out()));
        assert_eq!(object["version"], 1, "{name}");

        let file = file_of(name);
        let mut shape = parse(&fs::read_to_string(&file).unwrap_or_default());
        if std::env::var_os("SNAPSHIM_TEST_UPDATE").is_some_and(|v| v == "1") {
            learn(&mut shape, &object);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, print(&shape)).unwrap();
        }
        for problem in problems(&shape, &object) {
            writeln!(failures, "{name}: {problem}").unwrap();
        }
        // The control: each key that must be there, taken away or changed, is missed.
        control(name, &shape, &object);
    }
    writer.end();
    outsider.end();
    assert!(
        failures.is_empty(),
        "{failures}write down on purpose what is new: SNAPSHIM_TEST_UPDATE=1"
    );
}

fn control(name: &str, shape: &Shape, object: &Value) {
    let keys: Vec<String> = object.as_object().unwrap().keys().cloned().collect();
    // What is new is told already.
    for key in keys.into_iter().filter(|key| shape.contains_key(key)) {
        if shape.get(&key).is_some_and(|place| !place.is_optional) {
            let mut less = object.clone();
            less.as_object_mut().unwrap().remove(&key);
            let expected = format!("{key} is gone");
            assert!(
                problems(shape, &less).contains(&expected),
                "{name}: {expected}"
            );
        }
        let mut other = object.clone();
        // No field is a number of one kind and a truth of another.
        other[&key] = match &other[&key] {
            Value::Bool(_) => json!(0.5),
            _ => json!(true),
        };
        let expected = format!("{key} is of type {}", type_of(&other[&key]));
        assert!(
            problems(shape, &other).contains(&expected),
            "{name}: {expected}"
        );
    }
    let mut more = object.clone();
    more["surprise"] = json!(1);
    assert!(problems(shape, &more).contains(&"surprise is new".to_owned()));
}

#[test]
fn deep_changes_are_found_too() {
    let shape = parse("a: array\na[]: object\na[].b: number\na[].c?: string\nd: null|string\n");
    assert_eq!(
        problems(
            &shape,
            &json!({"a": [{"b": 1}, {"b": 2, "c": ""}], "d": null})
        ),
        [""; 0]
    );
    assert_eq!(
        problems(&shape, &json!({"a": [{"b": 1}, {"c": ""}], "d": ""})),
        ["a[].b is gone"]
    );
    assert_eq!(
        problems(&shape, &json!({"a": [{"b": ""}], "d": null})),
        ["a[].b is of type string"]
    );
    let mut learnt = Shape::default();
    learn(
        &mut learnt,
        &json!({"a": [{"b": 1}, {"b": 2, "c": ""}], "d": null}),
    );
    learn(&mut learnt, &json!({"a": [], "d": "x"}));
    assert_eq!(learnt, shape);
    assert_eq!(parse(&print(&shape)), shape);
}

/// Every key stands in `docs/manifest.md`.
#[test]
fn every_key_is_documented() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/manifest.md");
    let docs = fs::read_to_string(docs).unwrap();
    let mut missing = BTreeSet::new();
    for (name, _) in COMMANDS {
        let shape = parse(&fs::read_to_string(file_of(name)).unwrap());
        assert!(shape.len() > 2, "{name}");
        for path in shape.keys() {
            let key = path.trim_end_matches("[]").rsplit('.').next().unwrap();
            if !docs.contains(&format!("`{key}`")) {
                missing.insert(format!("{name}: {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "not in docs/manifest.md: {missing:#?}");
    assert!(!docs.contains("`surprise`"));
}
