//! A wish that long work end early, from another thread.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

/// Whether it was asked for. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks for it; cannot be taken back.
    pub fn ask(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether somebody asked for it.
    pub fn is_asked(&self) -> bool {
        self.0.load(Relaxed)
    }
}
