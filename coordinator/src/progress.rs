//! How long work tells whoever waits for it how far it is.

/// Is told what goes on. All of it is for people; nothing depends on it.
pub trait Progress {
    /// A step begins: what is done in it ("verifying"), and how many bytes that takes;
    /// 0 if unknown. Steps do not nest.
    fn begin(&mut self, what: &str, bytes: u64);

    /// So many bytes more of the step are done. May be called very often.
    fn advance(&mut self, bytes: u64);

    /// The step is over.
    fn end(&mut self);

    /// Something happened that is worth a line.
    fn note(&mut self, line: &str);

    /// A step is done, and how long it took: for those who asked for every one of them.
    fn detail(&mut self, _line: &str) {}
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _what: &str, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn end(&mut self) {}
    fn note(&mut self, _line: &str) {}
}
