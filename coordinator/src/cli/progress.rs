//! Progress on standard error: a bar on a terminal, a line or an event now and then elsewhere.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::progress::Progress;

use super::{offer, output};

/// What takes no longer is not worth a bar.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two lines where there is no terminal; the same with `--verbose`; and between events.
const PACE: Duration = Duration::from_secs(10);
const VERBOSE_PACE: Duration = Duration::from_secs(2);
const EVENT_PACE: Duration = Duration::from_secs(1);
/// Between two looks of a line on a terminal.
const REDRAWN: Duration = Duration::from_millis(200);

/// The bar that is on the terminal now. Whoever else writes there takes it away first.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn set_shown(bar: Option<ProgressBar>) {
    *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Writes something to the terminal, above the bar if there is one.
pub(super) fn above<T>(write: impl FnOnce() -> T) -> T {
    let bar = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let line = offer::take_line();
    if !line.is_empty() {
        let _ = io::Write::write_all(&mut io::stderr(), line.as_bytes());
    }
    match bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Tells people how far work is: bytes, rate and time left.
#[derive(Debug)]
pub struct Meter {
    shape: Shape,
    step: Option<Step>,
}

/// How it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// On a terminal, in place.
    Bar,
    Lines,
    /// With `--json`: an object in a line.
    Events,
    Nothing,
}

impl Shape {
    /// In the form that standard error takes; none with `--quiet`.
    pub(super) fn new(json: bool) -> Shape {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        match io::stderr().is_terminal() && !is_dumb {
            _ if output::is_quiet() => Shape::Nothing,
            true => Shape::Bar,
            false if json => Shape::Events,
            false => Shape::Lines,
        }
    }

    /// Time between two times that it is told.
    pub(super) fn pace(self) -> Duration {
        match self {
            Shape::Bar => REDRAWN,
            Shape::Events => EVENT_PACE,
            Shape::Lines if output::is_verbose() => VERBOSE_PACE,
            Shape::Lines | Shape::Nothing => PACE,
        }
    }
}

/// How far a step is.
#[derive(Debug)]
pub(super) struct Far {
    what: String,
    /// 0: not known.
    bytes: u64,
    pub(super) done: u64,
    begun: Instant,
}

/// The same, with `--json`.
#[derive(Serialize)]
struct Event<'a> {
    event: &'static str,
    step: &'a str,
    bytes: u64,
    total: Option<u64>,
    bytes_per_second: u64,
    seconds_left: Option<u64>,
}

#[derive(Debug)]
struct Step {
    far: Far,
    said: Instant,
    bar: Option<Bar>,
}

#[derive(Debug)]
struct Bar {
    bar: ProgressBar,
    is_shown: bool,
}

impl Meter {
    /// In the form that standard error takes; none with `--quiet`. With `json`, events where it
    /// is no terminal.
    pub fn new(json: bool) -> Meter {
        Meter {
            shape: Shape::new(json),
            step: None,
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.end();
    }
}

impl Progress for Meter {
    fn begin(&mut self, what: &str, bytes: u64) {
        self.end();
        self.step = (self.shape != Shape::Nothing).then(|| Step {
            far: Far::new(what, bytes),
            said: Instant::now(),
            // From the beginning, for its estimates; on the terminal only later.
            bar: (self.shape == Shape::Bar).then(|| Bar::hidden(what, bytes)),
        });
    }

    fn advance(&mut self, bytes: u64) {
        let Some(step) = &mut self.step else {
            return;
        };
        step.far.done = step.far.done.saturating_add(bytes);
        match &mut step.bar {
            Some(bar) => bar.advance(bytes, step.far.begun),
            None if step.said.elapsed() >= self.shape.pace() => {
                step.said = Instant::now();
                match self.shape {
                    Shape::Events => offer::line(&step.far.event()),
                    _ => offer::line(&format!("snapshim: {}", step.far.line())),
                }
            }
            None => {}
        }
    }

    fn end(&mut self) {
        if let Some(Step { bar: Some(bar), .. }) = self.step.take() {
            set_shown(None);
            bar.bar.finish_and_clear();
        }
    }

    fn note(&mut self, line: &str) {
        output::note(&format!("snapshim: {}", output::name(line)));
    }

    fn detail(&mut self, line: &str) {
        output::detail(&format!("snapshim: {}", output::name(line)));
    }
}

impl Bar {
    fn hidden(what: &str, bytes: u64) -> Bar {
        let length = (bytes > 0).then_some(bytes);
        let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::hidden());
        let template = match length {
            Some(_) => {
                "{msg} {binary_bytes} of {binary_total_bytes} [{wide_bar}] {percent}%, {binary_bytes_per_sec}, {eta} left"
            }
            None => "{msg} {binary_bytes}, {binary_bytes_per_sec} {spinner}",
        };
        // The templates are ours, and a test reads them.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(output::name(what));
        Bar {
            bar,
            is_shown: false,
        }
    }

    fn advance(&mut self, bytes: u64, begun: Instant) {
        self.bar.inc(bytes);
        if !self.is_shown && begun.elapsed() >= PATIENCE {
            self.is_shown = true;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            set_shown(Some(self.bar.clone()));
        }
    }
}

impl Far {
    /// At the beginning of a step of so many bytes; 0 if that is not known.
    pub(super) fn new(what: &str, bytes: u64) -> Far {
        Far {
            what: output::name(what),
            bytes,
            done: 0,
            begun: Instant::now(),
        }
    }

    /// Bytes a second.
    fn rate(&self) -> f64 {
        self.done as f64 / self.begun.elapsed().as_secs_f64().max(1e-3)
    }

    /// Seconds, as far as that can be told.
    fn left(&self) -> Option<f64> {
        let rate = self.rate();
        let is_known = self.bytes > 0 && rate > 0.0;
        is_known.then(|| self.bytes.saturating_sub(self.done) as f64 / rate)
    }

    /// How far it is, as an object in a line.
    pub(super) fn event(&self) -> String {
        let event = Event {
            event: "progress",
            step: &self.what,
            bytes: self.done,
            total: Some(self.bytes).filter(|bytes| *bytes > 0),
            bytes_per_second: self.rate() as u64,
            seconds_left: self.left().map(|left| left.ceil() as u64),
        };
        serde_json::to_string(&event).unwrap_or_default()
    }

    /// How far it is, in words.
    pub(super) fn line(&self) -> String {
        let rate = self.rate();
        let (what, done) = (&self.what, output::size(self.done));
        let rate_text = output::size(rate as u64);
        if self.bytes == 0 {
            return format!("{what}: {done}, {rate_text}/s");
        }
        let percent = self.done as f64 * 100.0 / self.bytes as f64;
        let left = match self.left() {
            Some(left) => format!(", {left:.0} s left"),
            None => String::new(),
        };
        format!(
            "{what}: {done} of {} ({:.0}%), {rate_text}/s{left}",
            output::size(self.bytes),
            percent.min(100.0)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let begun = Instant::now() - Duration::from_secs(10);
        let mut far = Far {
            begun,
            done: 1 << 20,
            ..Far::new("verifying", 4 << 20)
        };
        assert_eq!(
            far.line(),
            "verifying: 1.0 MiB of 4.0 MiB (25%), 102.4 KiB/s, 30 s left"
        );
        let event: serde_json::Value = serde_json::from_str(&far.event()).unwrap();
        assert_eq!(event["event"], "progress");
        assert_eq!(
            (&event["step"], &event["bytes"]),
            (&"verifying".into(), &(1 << 20).into())
        );
        assert_eq!(event["total"], 4 << 20);
        assert!(
            event["bytes_per_second"]
                .as_u64()
                .unwrap()
                .abs_diff(104_857)
                < 500
        );
        assert!(event["seconds_left"].as_u64().unwrap().abs_diff(30) <= 1);
        far.bytes = 0;
        assert_eq!(far.line(), "verifying: 1.0 MiB, 102.4 KiB/s");
        assert!(far.event().contains("\"seconds_left\":null"));
    }

    #[test]
    fn the_templates_are_templates() {
        for bytes in [0, 1 << 30] {
            let bar = Bar::hidden("verifying", bytes);
            bar.bar.inc(5);
            assert_eq!((bar.bar.position(), bar.is_shown), (5, false));
        }
    }
}
