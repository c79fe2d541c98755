//! What is said of a snapshot besides its list of files: enough to list and to judge it.

use std::fmt;
use std::io::{BufReader, Read, Seek};

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::manifest::{FileRecord, Kind, Manifest, Pin, Reason, Totals, VERSION};
use super::policy::Class;
use super::prediction::Prediction;
use super::{Store, read};
use crate::Result;

/// Manifests up to this many bytes are read whole, so that damage shows; of larger
/// ones only what stands before the list of files.
const WHOLE: u64 = 256 << 10;

/// What stands before the list of files has fewer bytes, or the whole is read.
const LONGEST_HEAD: u64 = 16 << 20;

/// A manifest without its list of files.
#[derive(Clone, Debug, Deserialize)]
pub struct Head {
    version: u32,
    id: String,
    /// When the cut was made, RFC 3339, UTC.
    pub time: String,
    /// The commit point the cut was made at.
    pub commit_point: String,
    /// The one that was asked for; empty in manifests that do not say.
    #[serde(default)]
    commit_point_asked: String,
    /// Whether everything the commit point promises was proved.
    pub verified: bool,
    /// Why not.
    pub reasons: Vec<Reason>,
    /// From shutting the gate to opening it, µs.
    pub hold_us: u64,
    /// From shutting the gate to the last call in flight having returned, µs.
    pub drain_us: u64,
    /// How long processes were stopped from outside, µs.
    #[serde(default)]
    pub stop_us: Option<u64>,
    /// `reflink`, `copy`, `mixed`, or `none`.
    pub capture: String,
    /// How long files were captured after the hold, µs.
    #[serde(default)]
    pub guard_us: Option<u64>,
    /// What capturing was expected to take, and what it took.
    #[serde(default)]
    pub prediction: Option<Prediction>,
    /// How much there is in the snapshot.
    pub totals: Totals,
    /// Whether it stays whatever a policy says.
    #[serde(default)]
    pub pin: Option<Pin>,
    /// Whether it is of one file alone.
    #[serde(default, rename = "only", deserialize_with = "is_there")]
    is_partial: bool,
}

fn is_there<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<bool, D::Error> {
    Option::<IgnoredAny>::deserialize(json).map(|only| only.is_some())
}

impl Head {
    /// How good the snapshot is.
    pub fn class(&self) -> Class {
        Class::of(self.verified, &self.reasons, self.is_partial)
    }

    /// When the cut was made; `None` if the manifest has something else there.
    pub fn cut_at(&self) -> Option<Timestamp> {
        self.time.parse().ok()
    }
}

impl From<Manifest> for Head {
    fn from(manifest: Manifest) -> Head {
        let totals = manifest
            .totals
            .unwrap_or_else(|| Totals::of(&manifest.files));
        Head {
            version: manifest.version,
            id: manifest.id,
            time: manifest.time,
            commit_point: manifest.commit_point,
            commit_point_asked: manifest.commit_point_asked,
            verified: manifest.verified,
            reasons: manifest.reasons,
            hold_us: manifest.hold_us,
            drain_us: manifest.drain_us,
            stop_us: manifest.stop_us,
            capture: manifest.capture,
            guard_us: manifest.guard_us,
            prediction: manifest.prediction,
            totals,
            pin: manifest.pin,
            is_partial: manifest.only.is_some(),
        }
    }
}

/// A published snapshot and the head of its manifest.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// The head, or why the manifest cannot be used.
    pub head: std::result::Result<Head, String>,
}

impl Store {
    /// Every published snapshot, oldest first, with the head of its manifest or what is
    /// wrong with that.
    ///
    /// # Errors
    ///
    /// The store's directory cannot be read.
    pub fn heads(&self) -> Result<Vec<Listed>> {
        let ids = self.ids()?;
        // Most of the time goes into system calls that take no common lock.
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
        let part = ids.len().div_ceil(threads).max(64);
        let read = |ids: &[String]| -> Vec<Listed> {
            let listed = |id: &String| Listed {
                id: id.clone(),
                head: self.head(id),
            };
            ids.iter().map(listed).collect()
        };
        if ids.len() <= part {
            return Ok(read(&ids));
        }
        std::thread::scope(|scope| {
            let parts: Vec<_> = ids
                .chunks(part)
                .map(|ids| {
                    (
                        ids,
                        std::thread::Builder::new().spawn_scoped(scope, || read(ids)),
                    )
                })
                .collect();
            let all = parts.into_iter().flat_map(|(ids, thread)| match thread {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // No thread to be had: then without.
                Err(_) => read(ids),
            });
            Ok(all.collect())
        })
    }

    /// The newest snapshot, among some of the newest, that was asked for at this point: its id,
    /// and the point that was reached.
    pub(crate) fn last_asked(&self, point: &str) -> Option<(String, String)> {
        /// Snapshots looked at.
        const MOST: usize = 32;
        let ids = self.ids().ok()?;
        ids.into_iter().rev().take(MOST).find_map(|id| {
            let head = self.head(&id).ok()?;
            (head.commit_point_asked == point).then_some((id, head.commit_point))
        })
    }

    /// The newest snapshot, among some of the newest, of which it is said what was expected of its
    /// capture: its id, how long it was guarded, µs, and that.
    pub(crate) fn last_predicted(&self) -> Option<(String, Option<u64>, Prediction)> {
        /// Snapshots looked at.
        const MOST: usize = 8;
        let ids = self.ids().ok()?;
        ids.into_iter().rev().take(MOST).find_map(|id| {
            let head = self.head(&id).ok()?;
            Some((id, head.guard_us, head.prediction?))
        })
    }

    /// The head of one snapshot's manifest, or why it cannot be used.
    pub(super) fn head(&self, id: &str) -> std::result::Result<Head, String> {
        let (_, file) = self.open_manifest(id)?;
        let mut file = std::fs::File::from(file);
        let length = file.metadata().map_or(0, |meta| meta.len());
        if length > WHOLE {
            if let Some(head) = before_files(&mut file)
                && head.version == VERSION
                && head.id == id
            {
                return Ok(head);
            }
            file.rewind()
                .map_err(|cause| format!("manifest.json cannot be read: {cause}"))?;
        }
        let text = read::read_text(file.into())?;
        read::parse(&text, id).map(Head::from)
    }
}

/// The head, if it stands before the list of files, with the totals. Anything else that
/// is in the way is found, and named, by reading the whole.
fn before_files(file: impl Read) -> Option<Head> {
    let mut fields = None;
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(file.take(LONGEST_HEAD)));
    // That it is not read to the end looks like an error.
    let _ = Front(&mut fields).deserialize(&mut json);
    serde_json::from_value(Value::Object(fields?)).ok()
}

/// Takes the fields before `files` of an object, without those that are long and not used.
struct Front<'a>(&'a mut Option<Map<String, Value>>);

impl<'de> DeserializeSeed<'de> for Front<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> std::result::Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Front<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        const LONG: [&str; 5] = ["writers", "foreign", "roots", "assumptions", "checks"];
        let mut front = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "files" {
                *self.0 = Some(front);
                return Ok(());
            }
            if LONG.contains(&name.as_str()) {
                map.next_value::<IgnoredAny>()?;
            } else {
                front.insert(name, map.next_value()?);
            }
        }
        Ok(())
    }
}

impl Totals {
    /// Those of a list of files.
    pub fn of(files: &[FileRecord]) -> Totals {
        let files = || files.iter().filter(|file| file.kind == Kind::File);
        let is_shared = |file: &&FileRecord| file.capture.as_deref() == Some("shared");
        let shared = || files().filter(is_shared);
        let bytes = |sum: u64, file: &FileRecord| sum.saturating_add(file.size);
        let shared_files = Some(shared().count() as u64).filter(|count| *count > 0);
        Totals {
            files: files().count() as u64,
            bytes: files().fold(0, bytes),
            shared_files,
            shared_bytes: shared_files.map(|_| shared().fold(0, bytes)),
        }
    }
}
