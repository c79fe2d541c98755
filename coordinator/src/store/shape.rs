//! What a manifest must be like before anything relies on it: paths that stay inside the
//! tree and together make a tree, and not so much of anything that memory would not do.

use std::cmp::Ordering;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::manifest::{FileRecord, Kind, Manifest};

/// Most entries of a tree.
const MOST_FILES: usize = 4_000_000;
/// Bytes of a manifest from which on its fields are measured before they are taken in.
const LARGE: usize = 4 << 20;
/// Most bytes of any field but the list of files: what is taken in of one that is not
/// known here needs some thirty times as much memory.
const MOST_FIELD: usize = 4 << 20;

type Checked = std::result::Result<(), String>;

/// Refuses a large manifest of which something else than the list of files is large.
pub(super) fn check_size(text: &[u8]) -> Checked {
    if text.len() < LARGE {
        return Ok(());
    }
    // What is no JSON is found by whoever takes it in.
    let Ok(Large(large)) = serde_json::from_slice(text) else {
        return Ok(());
    };
    match large {
        Some(name) => Err(format!(
            "manifest.json is damaged: its field '{}' has more than {MOST_FIELD} bytes",
            name.escape_default()
        )),
        None => Ok(()),
    }
}

/// The name of the first field that is too large.
struct Large(Option<String>);

impl<'de> Deserialize<'de> for Large {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Large;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Large, A::Error> {
                let mut large = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "files" {
                        map.next_value::<IgnoredAny>()?;
                    } else if map.next_value::<&RawValue>()?.get().len() > MOST_FIELD {
                        large.get_or_insert(name);
                    }
                }
                Ok(Large(large))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Takes in the list of files, up to [`MOST_FILES`].
pub(super) fn files<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<FileRecord>, D::Error> {
    struct Files;
    impl<'de> Visitor<'de> for Files {
        type Value = Vec<FileRecord>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of files")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut files = Vec::new();
            while let Some(file) = list.next_element()? {
                if files.len() == MOST_FILES {
                    return Err(serde::de::Error::custom(format!(
                        "it lists more than {MOST_FILES} files"
                    )));
                }
                files.push(file);
            }
            Ok(files)
        }
    }
    deserializer.deserialize_seq(Files)
}

/// Checks that the paths of a manifest are paths inside a tree, in the one form that is
/// written; that none is there twice; and that what is below another is below a directory.
pub(super) fn check(manifest: &Manifest) -> Checked {
    let roots = manifest.roots.iter().map(|root| root.0.as_path());
    let files = manifest.files.iter().map(|file| file.path.0.as_path());
    if let Some(bad) = files.clone().chain(roots).find(|path| !is_inside(path)) {
        return Err(format!(
            "'{}' is not a path inside the tree",
            bad.display().to_string().escape_default()
        ));
    }
    let is_sorted = manifest
        .files
        .is_sorted_by(|a, b| order(bytes(a), bytes(b)) == Ordering::Less);
    if is_sorted {
        return pairs(manifest.files.iter());
    }
    let mut sorted: Vec<&FileRecord> = manifest.files.iter().collect();
    sorted.sort_unstable_by(|a, b| order(bytes(a), bytes(b)));
    pairs(sorted.into_iter())
}

fn bytes(file: &FileRecord) -> &[u8] {
    file.path.0.as_os_str().as_bytes()
}

/// In order, whatever is below a path comes right behind it: neighbours tell all.
fn pairs<'a>(sorted: impl Iterator<Item = &'a FileRecord>) -> Checked {
    let mut before: Option<&FileRecord> = None;
    for file in sorted {
        if let Some(before) = before {
            let (first, second) = (bytes(before), bytes(file));
            let name = || before.path.0.display().to_string();
            if first == second {
                return Err(format!("'{}' is listed twice", name().escape_default()));
            }
            let is_below = second
                .strip_prefix(first)
                .is_some_and(|rest| rest.starts_with(b"/"));
            if is_below && before.kind != Kind::Dir {
                return Err(format!(
                    "'{}' is not a directory, but others are listed below it",
                    name().escape_default()
                ));
            }
        }
        before = Some(file);
    }
    Ok(())
}

/// Compares component by component: a slash is less than all that a name may have in it.
pub(crate) fn order(a: &[u8], b: &[u8]) -> Ordering {
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let next = |path: &[u8]| path.get(same).map(|byte| (*byte != b'/').then_some(*byte));
    next(a).cmp(&next(b))
}

/// Whether an absolute path, taken relative to the tree, stays inside it, and has the
/// one form that two equal paths share.
fn is_inside(path: &Path) -> bool {
    let Some(names) = path.as_os_str().as_bytes().strip_prefix(b"/") else {
        return false;
    };
    !names.contains(&0)
        && names
            .split(|byte| *byte == b'/')
            .all(|name| !matches!(name, b"" | b"." | b".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_inside_a_tree() {
        for good in ["/a", "/a/b", "/a/..b", "/a/...", "/a b\n"] {
            assert!(is_inside(Path::new(good)), "{good}");
        }
        for bad in [
            "", "/", "a", "a/b", "//a", "/a//b", "/a/", "/./a", "/a/.", "/..", "/a/../b", "/a/..",
            "/a\0b",
        ] {
            assert!(!is_inside(Path::new(bad)), "{bad:?}");
        }
    }

    #[test]
    fn what_is_below_comes_right_behind() {
        let mut paths = ["/a.b", "/a/c", "/a", "/a-b", "/a/b/c", "/b", "/a/b"];
        paths.sort_by(|a, b| order(a.as_bytes(), b.as_bytes()));
        assert_eq!(
            paths,
            ["/a", "/a/b", "/a/b/c", "/a/c", "/a-b", "/a.b", "/b"]
        );
        // As paths are sorted when a manifest is written.
        assert!(paths.is_sorted_by(|a, b| Path::new(a) < Path::new(b)));
    }
}
