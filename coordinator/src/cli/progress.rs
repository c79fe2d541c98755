//! Progress on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::progress::Progress;

use super::output;

/// What takes no longer is not worth a bar.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two lines where there is no terminal.
const PACE: Duration = Duration::from_secs(10);

/// The bar that is on the terminal now. Whoever else writes there takes it away first.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn set_shown(bar: Option<ProgressBar>) {
    *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Writes something to the terminal, above the bar if there is one.
pub(super) fn above<T>(write: impl FnOnce() -> T) -> T {
    let bar = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Bar,
    Lines,
    Nothing,
}

#[derive(Debug)]
struct Step {
    what: String,
    /// 0: not known.
    bytes: u64,
    done: u64,
    begun: Instant,
    said: Instant,
    bar: Option<Bar>,
}

#[derive(Debug)]
struct Bar {
    bar: ProgressBar,
    is_shown: bool,
}

impl Meter {
    /// In the form that standard error takes; none with `--quiet`.
    pub fn new() -> Meter {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let shape = match (output::is_quiet(), io::stderr().is_terminal() && !is_dumb) {
            (true, _) => Shape::Nothing,
            (false, true) => Shape::Bar,
            (false, false) => Shape::Lines,
        };
        Meter { shape, step: None }
    }
}

impl Default for Meter {
    fn default() -> Meter {
        Meter::new()
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
        let now = Instant::now();
        self.step = (self.shape != Shape::Nothing).then(|| Step {
            what: output::name(what),
            bytes,
            done: 0,
            begun: now,
            said: now,
            // From the beginning, for its estimates; on the terminal only later.
            bar: (self.shape == Shape::Bar).then(|| Bar::hidden(what, bytes)),
        });
    }

    fn advance(&mut self, bytes: u64) {
        let Some(step) = &mut self.step else {
            return;
        };
        step.done = step.done.saturating_add(bytes);
        match &mut step.bar {
            Some(bar) => bar.advance(bytes, step.begun),
            None if step.said.elapsed() >= PACE => {
                step.said = Instant::now();
                output::note(&format!("snapshim: {}", step.line()));
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

impl Step {
    /// How far it is, in words.
    fn line(&self) -> String {
        let seconds = self.begun.elapsed().as_secs_f64().max(1e-3);
        let rate = self.done as f64 / seconds;
        let (what, done) = (&self.what, output::size(self.done));
        let rate_text = output::size(rate as u64);
        if self.bytes == 0 {
            return format!("{what}: {done}, {rate_text}/s");
        }
        let percent = self.done as f64 * 100.0 / self.bytes as f64;
        let left = match rate > 0.0 {
            true => format!(
                ", {:.0} s left",
                self.bytes.saturating_sub(self.done) as f64 / rate
            ),
            false => String::new(),
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
        let mut step = Step {
            what: "verifying".into(),
            bytes: 4 << 20,
            done: 1 << 20,
            begun,
            said: begun,
            bar: None,
        };
        assert_eq!(
            step.line(),
            "verifying: 1.0 MiB of 4.0 MiB (25%), 102.4 KiB/s, 30 s left"
        );
        step.bytes = 0;
        assert_eq!(step.line(), "verifying: 1.0 MiB, 102.4 KiB/s");
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
