//! Tables: for people on a terminal, for programs elsewhere.
//!
//! On a terminal a table has a header, its columns line up, and sizes and times are
//! rounded. Elsewhere each row is a line of values separated by tabs, without header,
//! every column there even if empty, sizes in bytes and times in µs: what `cut -f`, `awk`
//! and `read` take. `docs/output.md` describes the columns.

use std::io::{self, IsTerminal};

use anstyle::Style;
use unicode_width::UnicodeWidthStr;

use super::output;
use super::style::{self, paint};
use crate::Result;

/// How a table is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// With a header and aligned columns.
    Aligned,
    /// A line for each row, values separated by tabs.
    Lines,
}

impl Layout {
    /// That of standard output.
    pub fn of_stdout() -> Layout {
        match io::stdout().is_terminal() {
            true => Layout::Aligned,
            false => Layout::Lines,
        }
    }
}

/// One value of a table.
#[derive(Clone, Debug)]
pub struct Cell {
    /// For people. Safe to print: see [`output::name`].
    text: String,
    /// For programs, if that is another.
    exact: Option<String>,
    style: Style,
    is_number: bool,
}

impl Cell {
    /// Text, which is printed as it is: what comes from outside goes through [`Cell::name`].
    pub fn new(text: impl Into<String>) -> Cell {
        Cell {
            text: text.into(),
            exact: None,
            style: style::PLAIN,
            is_number: false,
        }
    }

    /// A name from outside.
    pub fn name(text: &str) -> Cell {
        Cell::new(output::name(text))
    }

    /// A number of things.
    pub fn count(number: u64) -> Cell {
        Cell::number(number.to_string(), number)
    }

    /// A size in bytes.
    pub fn size(bytes: u64) -> Cell {
        Cell::number(output::size(bytes), bytes)
    }

    /// A time in µs.
    pub fn micros(us: u64) -> Cell {
        Cell::number(output::micros(us), us)
    }

    /// A number and how people read it.
    pub fn number(text: String, exact: u64) -> Cell {
        Cell {
            exact: Some(exact.to_string()),
            is_number: true,
            ..Cell::new(text)
        }
    }

    /// In this style.
    #[must_use]
    pub fn styled(mut self, style: Style) -> Cell {
        self.style = style;
        self
    }

    fn text(&self, layout: Layout) -> &str {
        match (layout, &self.exact) {
            (Layout::Lines, Some(exact)) => exact,
            _ => &self.text,
        }
    }
}

/// Rows of cells, and what the columns are.
#[derive(Clone, Debug, Default)]
pub struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// With these columns. A header that is not wanted is left out by an empty list.
    pub fn new(head: &[&'static str]) -> Table {
        Table {
            head: head.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. Cells that are missing at its end are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints it to standard output.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn print(&self) -> Result<()> {
        output::text(&self.to_text())
    }

    /// As standard output takes it.
    pub fn to_text(&self) -> String {
        self.render(Layout::of_stdout(), style::on_stdout())
    }

    /// As a text in this layout, with or without colours.
    pub fn render(&self, layout: Layout, colored: bool) -> String {
        let head: Vec<Cell> = match layout {
            Layout::Aligned => self.head.iter().map(|name| Cell::new(*name)).collect(),
            Layout::Lines => Vec::new(),
        };
        let longest = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let columns: Vec<Column> = (0..longest.max(self.head.len()))
            .map(|i| Column::of(self.rows.iter().chain([&head]).filter_map(|row| row.get(i))))
            .collect();
        let mut text = String::new();
        if head.iter().any(|cell| !cell.text.is_empty()) {
            let head: Vec<Cell> = head.into_iter().map(|c| c.styled(style::HEAD)).collect();
            push(&mut text, &head, &columns, layout, colored);
        }
        for row in &self.rows {
            push(&mut text, row, &columns, layout, colored);
        }
        text
    }
}

struct Column {
    /// Columns of a terminal.
    width: usize,
    is_number: bool,
}

impl Column {
    fn of<'a>(cells: impl Iterator<Item = &'a Cell>) -> Column {
        let start = Column {
            width: 0,
            is_number: false,
        };
        cells.fold(start, |column, cell| Column {
            width: column.width.max(cell.text.width()),
            is_number: column.is_number || cell.is_number,
        })
    }
}

fn push(text: &mut String, row: &[Cell], columns: &[Column], layout: Layout, colored: bool) {
    let mut line = String::new();
    for (i, column) in columns.iter().enumerate() {
        let cell = row.get(i);
        let shown = cell.map_or("", |cell| cell.text(layout));
        let painted = cell.map_or(String::new(), |cell| paint(shown, cell.style, colored));
        if layout == Layout::Lines {
            if i > 0 {
                line.push('\t');
            }
            line.push_str(&painted);
            continue;
        }
        let blank = " ".repeat(column.width.saturating_sub(shown.width()));
        if i > 0 {
            line.push_str("  ");
        }
        match column.is_number {
            true => line.extend([blank, painted]),
            false => line.extend([painted, blank]),
        }
    }
    text.push_str(match layout {
        Layout::Aligned => line.trim_end(),
        // The last values may be empty, and their tabs are there all the same.
        Layout::Lines => &line,
    });
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Table {
        let mut table = Table::new(&["ID", "SIZE", "STATE", ""]);
        table.row([
            Cell::new("a"),
            Cell::size(1536),
            Cell::new("verified").styled(style::GOOD),
            Cell::new("latest"),
        ]);
        table.row([Cell::new("漢字é"), Cell::size(7), Cell::name("x\ty")]);
        table
    }

    #[test]
    fn columns_line_up_by_the_width_on_a_terminal() {
        assert_eq!(
            example().render(Layout::Aligned, false),
            "ID        SIZE  STATE\n\
             a      1.5 KiB  verified  latest\n\
             漢字é      7 B  x\\ty\n"
        );
    }

    #[test]
    fn lines_have_every_column_and_exact_values() {
        assert_eq!(
            example().render(Layout::Lines, false),
            "a\t1536\tverified\tlatest\n漢字é\t7\tx\\ty\t\n"
        );
    }

    #[test]
    fn colours_change_no_width() {
        let colored = example().render(Layout::Aligned, true);
        assert!(colored.contains("\u{1b}[32mverified\u{1b}[0m  latest"));
        let stripped = anstream::adapter::strip_str(&colored).to_string();
        assert_eq!(stripped, example().render(Layout::Aligned, false));
    }
}
