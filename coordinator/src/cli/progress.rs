//! Progress on standard error.

use crate::progress::Progress;

use super::output;

/// Says what happens, a line each, and not how far it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lines;

impl Progress for Lines {
    fn begin(&mut self, _what: &str, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn end(&mut self) {}

    fn note(&mut self, line: &str) {
        output::note(&format!("snapshim: {}", output::name(line)));
    }
}
