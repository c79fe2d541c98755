//! What a capture was expected to take, and what it took: in certificates, and in `status`.
//!
//! Like the manifest, of which it is a part: fields are only added.

use serde::{Deserialize, Serialize};

use super::manifest::PathName;

/// What was expected of each way to capture, and which was chosen.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Prediction {
    /// One of the `methods`, or `none` if there is nothing that could be captured.
    pub choice: String,
    /// Why, in words.
    pub why: String,
    /// Regular files that it is about.
    pub files: u64,
    /// The largest of them, which were looked at one by one.
    pub looked_at: u64,
    /// Whether there are more files than it is about.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
    /// What each method is expected to take for all of them.
    pub methods: Vec<Expected>,
    /// The few files that would make a hold long, the longest first.
    pub dominant: Vec<Dominant>,
    /// What came of it; `None` of a prediction alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// What one method is expected to take.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Expected {
    /// `reflink`, `copy`, `mixed`, `copy-before-write` or `subvolume`.
    pub method: String,
    /// How long programs are held, µs. Of a file, its part in that.
    pub hold_us: u64,
    /// Bytes to be written.
    pub bytes: u64,
    /// From the cut until all of it is on disk, µs.
    pub wall_us: u64,
    /// Why it cannot be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

/// A file that has a large part in a hold.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Dominant {
    /// Its path.
    #[serde(flatten)]
    pub path: PathName,
    /// Bytes.
    pub size: u64,
    /// The name of its file system.
    pub file_system: String,
    /// Bytes of it that are in memory only.
    pub dirty: u64,
    /// Pieces that it is in on disk, where the file system tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extents: Option<u64>,
    /// Whether it was seen to be overwritten in place, so that what is shared with a clone has to
    /// be written elsewhere.
    pub overwritten: bool,
    /// What makes the hold long, in words.
    pub cause: String,
    /// The methods there are for it.
    pub methods: Vec<Expected>,
}

/// What a capture took.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Outcome {
    /// As `capture` in the manifest.
    pub method: String,
    /// How long programs were held, µs.
    pub hold_us: u64,
    /// Bytes that were written.
    pub bytes: u64,
    /// From the beginning of the capture at the cut until all of it was on disk, µs.
    pub wall_us: u64,
    /// Why not what was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead: Option<String>,
}

impl Prediction {
    /// What was expected of a method.
    pub fn of(&self, method: &str) -> Option<&Expected> {
        self.methods.iter().find(|m| m.method == method)
    }
}
