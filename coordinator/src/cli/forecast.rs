//! What capturing takes, for `status` and `show`: what was expected of the last snapshot and what it took,
//! and what would be chosen now.

use std::sync::Arc;

use serde::Serialize;

use crate::capture::predict::now;
use crate::capture::{Base, Scope};
use crate::hold::evidence::{self, Members, View};
use crate::hold::set::Set;
use crate::store::Store;
use crate::store::prediction::{Dominant, Expected, Prediction};

use super::output;

/// What is known of capturing a set.
#[derive(Debug, Serialize)]
pub(super) struct Forecast {
    /// What `--capture auto` would choose now; null if the files cannot be looked at.
    now: Option<Prediction>,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The newest snapshot that says what was expected of it.
    last: Option<Last>,
}

#[derive(Debug, Serialize)]
struct Last {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    guard_us: Option<u64>,
    prediction: Prediction,
}

impl Forecast {
    pub(super) fn of(set: &Set) -> Forecast {
        let scope = Scope {
            roots: set.config.roots.clone(),
            excludes: set.config.excludes.clone(),
        };
        let store = Store::open(&set.config.store, &set.name).ok();
        let looked = now::look(&scope).map(|mut now| {
            let newest = store.as_ref().and_then(Store::newest).map(Arc::new);
            // As a checkpoint without options.
            let verify = set.config.verify.as_ref();
            let shares = verify.is_none_or(|verify| verify.writable);
            if let Some(base) = newest.filter(|_| shares).and_then(Base::of) {
                now.share(base);
            }
            let members = Members::new(now.members());
            let view = View {
                gate: Some((&set.gate, set.gate_id)),
                tries: View::BRIEF,
            };
            let why = match evidence::scan(view, &members) {
                Ok(seen) => seen.not_to_be_guarded(),
                Err(error) => Some(error.message),
            };
            now.predict(&set.config.store, why)
        });
        let (now, error) = match looked {
            Ok(now) => (Some(now), None),
            Err(error) => (None, Some(error.message)),
        };
        let last = store.and_then(|store| store.last_predicted());
        Forecast {
            now,
            error,
            last: last.map(|(id, guard_us, prediction)| Last {
                id,
                guard_us,
                prediction,
            }),
        }
    }

    /// Lines of a label and its value.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        if let Some(error) = &self.error {
            rows.push(row("capture", format!("not known: {error}")));
        }
        if let Some(now) = &self.now {
            rows.push(row(
                "capture",
                format!("would be {}: {}", now.choice, now.why),
            ));
            rows.extend(methods(now));
            rows.extend(now.dominant.iter().map(dominant));
            if now.looked_at < now.files || now.partial {
                rows.push(row("", extent_of(now)));
            }
        }
        if let Some(last) = &self.last {
            rows.push(row("captured", outcome(&last.prediction, Some(&last.id))));
        }
        rows
    }
}

/// Lines for the certificate of one snapshot.
pub(super) fn rows_of(prediction: &Prediction) -> Vec<Vec<String>> {
    let mut rows = vec![row(
        "chosen",
        format!("{}: {}", prediction.choice, prediction.why),
    )];
    rows.extend(methods(prediction));
    rows.push(row("captured", outcome(prediction, None)));
    rows
}

fn row(label: &str, value: String) -> Vec<String> {
    vec![label.to_owned(), output::name(&value)]
}

fn methods(prediction: &Prediction) -> impl Iterator<Item = Vec<String>> {
    prediction.methods.iter().map(|expected| {
        let cannot = match &expected.why_not {
            Some(why) => format!("; not possible: {why}"),
            None => String::new(),
        };
        row("expected", format!("{}{cannot}", cost(expected)))
    })
}

fn cost(expected: &Expected) -> String {
    format!(
        "{}: held {}, {} to write, on disk after {}",
        expected.method,
        output::micros(expected.hold_us),
        output::size(expected.bytes),
        output::micros(expected.wall_us)
    )
}

fn dominant(file: &Dominant) -> Vec<String> {
    let holds: Vec<String> = file
        .methods
        .iter()
        .map(|m| format!("{} {}", m.method, output::micros(m.hold_us)))
        .collect();
    let overwritten = match file.overwritten {
        true => ", being overwritten",
        false => "",
    };
    row(
        "holds for",
        format!(
            "{} ({}, {}{overwritten}): {}",
            file.path.0.display(),
            output::size(file.size),
            file.cause,
            holds.join(", ")
        ),
    )
}

/// How much was looked at.
fn extent_of(now: &Prediction) -> String {
    let more = match now.partial {
        true => "; there are more files, which were not counted",
        false => "",
    };
    format!(
        "of {} files, {} of at least 1 MiB were looked at one by one, the largest{more}",
        now.files, now.looked_at
    )
}

fn outcome(prediction: &Prediction, id: Option<&str>) -> String {
    let words = prediction.outcome_in_words();
    let words = words.strip_prefix("captured ").unwrap_or(&words);
    match id {
        Some(id) => format!("{id} {words}"),
        None => words.to_owned(),
    }
}
