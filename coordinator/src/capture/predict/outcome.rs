//! What a capture took, beside what it was expected to take.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::choose::human;
use crate::store::manifest::{FileRecord, Manifest};
use crate::store::prediction::{Outcome, Prediction};

/// Of a subvolume that was to be frozen: the capture does not say which of the two it was.
const NOT_FROZEN: &str = "the subvolume could not be frozen, or a program may have been in the middle of a call that is not held";

impl Prediction {
    /// With what came of it: `manifest` of the snapshot, whose files are in `tree`; `wall`, the
    /// time from the beginning of the capture until everything was on disk; `instead`, why the cut
    /// was not guarded.
    #[must_use]
    pub fn with_outcome(
        self,
        manifest: &Manifest,
        tree: &Path,
        wall: Duration,
        instead: Option<String>,
    ) -> Prediction {
        let is_chosen = match self.choice.as_str() {
            // The name stays if it was only made ready for that.
            "copy-before-write" => manifest.guard_us.is_some(),
            // If nothing has changed there was nothing to choose.
            choice => choice == manifest.capture || manifest.capture == "shared",
        };
        let instead = match self.choice.as_str() {
            _ if is_chosen => None,
            "copy-before-write" => instead,
            "subvolume" => Some(NOT_FROZEN.to_owned()),
            // What was there by then was of another kind.
            _ => Some("there were other files at the cut than before it".to_owned()),
        };
        let outcome = Outcome {
            method: manifest.capture.clone(),
            hold_us: manifest.hold_us,
            bytes: written(&manifest.files, tree),
            wall_us: u64::try_from(wall.as_micros()).unwrap_or(u64::MAX),
            instead,
        };
        Prediction {
            outcome: Some(outcome),
            ..self
        }
    }

    /// What came of it, in a line; nothing of a prediction alone.
    pub fn outcome_in_words(&self) -> String {
        let Some(outcome) = &self.outcome else {
            return String::new();
        };
        let us = |us| human(Duration::from_micros(us));
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let line = format!(
            "captured by {}: held {}, {} written, on disk after {}",
            outcome.method,
            us(outcome.hold_us),
            mib(outcome.bytes),
            us(outcome.wall_us)
        );
        let expected = match self.of(&self.choice) {
            Some(expected) => format!(
                "; expected of {}: {}, {}, {}",
                self.choice,
                us(expected.hold_us),
                mib(expected.bytes),
                us(expected.wall_us)
            ),
            None => String::new(),
        };
        let instead = match &outcome.instead {
            Some(why) => format!("; not {}: {why}", self.choice),
            None => String::new(),
        };
        format!("{line}{expected}{instead}")
    }
}

/// Bytes written for files that were copied. What clones and links share takes none.
fn written(files: &[FileRecord], tree: &Path) -> u64 {
    let is_copied =
        |file: &&FileRecord| matches!(file.capture.as_deref(), Some("copy" | "copy-before-write"));
    let bytes = |file: &FileRecord| {
        let path = file.path.as_ref();
        let at = tree.join(path.strip_prefix("/").unwrap_or(path));
        let taken = std::fs::symlink_metadata(at).map(|meta| meta.blocks().saturating_mul(512));
        taken.map_or(file.size, |taken| taken.min(file.size))
    };
    files.iter().filter(is_copied).map(bytes).sum()
}
