//! What was found of one application.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::bench::{HOT, Sound};
use crate::Certificate;

/// A row of the matrix.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Of which application.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Snapshots published, and restored and checked.
    pub taken: u64,
    /// Of these, with a certificate that says verified.
    pub verified: u64,
    /// Points that were reached, how often.
    pub points: BTreeMap<String, u64>,
    /// Reasons why others were not verified: code, how often.
    pub reasons: BTreeMap<String, u64>,
    /// The first text of each.
    pub why: BTreeMap<String, String>,
    /// Checkpoints that published nothing: why, how often.
    pub unpublished: BTreeMap<String, u64>,
    /// How writers were held.
    pub layers: BTreeMap<String, u64>,
    /// What `status` saw the program do.
    pub observed: BTreeMap<String, u64>,
    /// Of each, µs.
    pub holds: Vec<f64>,
    /// What the program had to do to open the copies, of each.
    pub recovery: BTreeMap<String, Vec<f64>>,
    /// Of the copies with a hot journal: at which points.
    pub hot: BTreeMap<String, u64>,
    /// What was wrong with copies.
    pub failures: Vec<String>,
    /// Updates the first and the last copy had seen.
    pub units: (u64, u64),
    /// Controls: name, copies, unsound, with a hot journal.
    pub controls: Vec<(String, u64, u64, u64)>,
    /// How long all of it took, s.
    pub seconds: f64,
}

impl Row {
    /// Of an application.
    pub fn new(name: &str) -> Row {
        Row {
            name: name.to_owned(),
            ..Row::default()
        }
    }

    /// A checkpoint that published nothing.
    pub fn not_published(&mut self, code: i32, line: &str) {
        let why = format!("exit {code}: {line}");
        *self.unpublished.entry(why).or_default() += 1;
    }

    /// A snapshot, and what a check says of it.
    pub fn published(&mut self, certificate: &Certificate, found: Result<Sound, String>) {
        self.taken += 1;
        self.verified += u64::from(certificate.is_verified());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let point = text(&certificate.0["commit_point"]);
        *self.points.entry(point.clone()).or_default() += 1;
        let is_hot = |sound: &Sound| sound.recovery.iter().any(|(what, n)| what == HOT && *n > 0);
        if found.as_ref().is_ok_and(is_hot) {
            *self.hot.entry(point).or_default() += 1;
        }
        let mut codes: Vec<String> = certificate.reasons().into_iter().map(|r| r.0).collect();
        codes.sort();
        codes.dedup();
        for code in codes {
            *self.reasons.entry(code).or_default() += 1;
        }
        if let Some((code, text)) = certificate.reasons().into_iter().next() {
            self.why.entry(code).or_insert(text);
        }
        let writers = certificate.0["writers"].as_array();
        let mut layers: Vec<String> = writers
            .into_iter()
            .flatten()
            .map(|writer| text(&writer["layer"]))
            .collect();
        layers.sort();
        layers.dedup();
        for layer in layers {
            *self.layers.entry(layer).or_default() += 1;
        }
        self.holds.push(certificate.hold_us());
        self.found(found, certificate.id());
    }

    /// What a check says of the copy `id`.
    pub fn found(&mut self, found: Result<Sound, String>, id: &str) {
        match found {
            Ok(sound) => {
                for (what, number) in sound.recovery {
                    self.recovery.entry(what).or_default().push(number as f64);
                }
                if self.units.0 == 0 {
                    self.units.0 = sound.units;
                }
                self.units.1 = self.units.1.max(sound.units);
            }
            Err(text) => self.failures.push(format!("{id}: {text}")),
        }
    }

    /// How many copies had some of `what`.
    pub fn with(&self, what: &str) -> u64 {
        let all = self.recovery.get(what).into_iter().flatten();
        all.filter(|number| **number > 0.0).count() as u64
    }

    /// Keeps it in a file.
    pub fn save(&self, file: &Path) -> std::io::Result<()> {
        let value = json!({
            "name": self.name, "version": self.version, "taken": self.taken,
            "verified": self.verified, "points": self.points, "reasons": self.reasons, "why": self.why,
            "unpublished": self.unpublished, "layers": self.layers, "observed": self.observed,
            "holds": self.holds, "recovery": self.recovery, "hot": self.hot, "failures": self.failures,
            "units": [self.units.0, self.units.1], "controls": self.controls, "seconds": self.seconds,
        });
        std::fs::write(file, format!("{value:#}\n"))
    }

    /// Reads what was kept.
    pub fn load(file: &Path) -> Option<Row> {
        let value: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let counts = |name: &str| -> BTreeMap<String, u64> {
            let all = value[name].as_object().into_iter().flatten();
            all.map(|(key, count)| (key.clone(), number(count)))
                .collect()
        };
        let list = |value: &Value| -> Vec<f64> {
            let all = value.as_array().into_iter().flatten();
            all.filter_map(Value::as_f64).collect()
        };
        let why = value["why"].as_object().into_iter().flatten();
        let recovery = value["recovery"].as_object().into_iter().flatten();
        let failures = value["failures"].as_array().into_iter().flatten();
        let controls = value["controls"].as_array().into_iter().flatten();
        Some(Row {
            name: text(&value["name"]),
            version: text(&value["version"]),
            taken: number(&value["taken"]),
            verified: number(&value["verified"]),
            points: counts("points"),
            reasons: counts("reasons"),
            why: why.map(|(code, said)| (code.clone(), text(said))).collect(),
            unpublished: counts("unpublished"),
            layers: counts("layers"),
            observed: counts("observed"),
            holds: list(&value["holds"]),
            recovery: recovery.map(|(k, v)| (k.clone(), list(v))).collect(),
            hot: counts("hot"),
            failures: failures.map(text).collect(),
            units: (number(&value["units"][0]), number(&value["units"][1])),
            controls: controls
                .map(|c| (text(&c[0]), number(&c[1]), number(&c[2]), number(&c[3])))
                .collect(),
            seconds: value["seconds"].as_f64().unwrap_or(0.0),
        })
    }
}
