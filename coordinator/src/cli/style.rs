//! Colours: few, and only where somebody looks.

use std::io;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};

/// What is good.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// What is not good, but no failure.
pub const DOUBTFUL: Style = AnsiColor::Yellow.on_default();
/// What failed or is damaged.
pub const BAD: Style = AnsiColor::Red.on_default();
/// What is named: ids.
pub const NAME: Style = Style::new().bold();
/// Headers.
pub const HEAD: Style = Style::new().bold();
/// As everything else.
pub const PLAIN: Style = Style::new();

/// Whether standard output takes colours: as `--color` says, else by `NO_COLOR`,
/// `CLICOLOR_FORCE`, `CLICOLOR`, and whether it is a terminal that knows them.
pub fn on_stdout() -> bool {
    AutoStream::choice(&io::stdout()) != ColorChoice::Never
}

/// Whether standard error takes colours.
pub fn on_stderr() -> bool {
    AutoStream::choice(&io::stderr()) != ColorChoice::Never
}

/// The text in a style, if `colored`.
pub fn paint(text: &str, style: Style, colored: bool) -> String {
    match colored && !style.is_plain() && !text.is_empty() {
        true => format!("{style}{text}{style:#}"),
        false => text.to_owned(),
    }
}
