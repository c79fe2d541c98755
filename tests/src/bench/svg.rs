//! Pictures: the latency of the writer over one window, for each method.

use std::fmt::Write as _;

use super::Run;
use super::figures::{Cell, Group, Row, ms};
use super::method::Method;
use crate::Fs;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 230.0;
const ROW: f64 = 54.0;
const PLOT: f64 = 40.0;
const TOP: f64 = 46.0;
/// The axis: 10 µs to 10 s, six decades.
const LOWEST_US: f64 = 10.0;
const DECADES: f64 = 6.0;

/// The window of each method that its picture shows, without a checkpoint first: the one whose
/// stall is the median.
fn typical(run: &Run, cell: Cell) -> Vec<(String, &Row)> {
    let mut shown = Vec::new();
    let mut add = |name: String, method: &str, gated: bool| {
        if let Some(row) = Group::of(&run.rows, cell, method, gated).typical() {
            shown.push((name, row));
        }
    };
    add("no checkpoint".into(), "none", false);
    for method in &run.methods {
        add(label(method), &method.name(), method.is_ours());
    }
    shown
}

/// Shorter than in the tables: there is little room.
fn label(method: &Method) -> String {
    match method {
        Method::Cp => "cp -a".into(),
        Method::Ficlone => "cp --reflink=always".into(),
        Method::Sigstop => "SIGSTOP + clone or copy".into(),
        Method::Fsfreeze => "fsfreeze + copy".into(),
        Method::Subvolume => "btrfs subvolume snapshot".into(),
        Method::Rsync => "rsync, twice".into(),
        Method::Restic => "restic".into(),
        Method::Snapshim(capture) => format!("snapshim {capture}"),
    }
}

/// The cell of a file system that is drawn: the last state of the stalls.
fn drawn(run: &Run, fs: Fs) -> Option<Cell> {
    let mut rows = run.rows.iter().rev();
    rows.find(|r| r.fs == fs && r.part == "stall")
        .map(Row::cell)
}

/// One picture for each file system.
pub fn pictures(run: &Run) -> Vec<(Fs, String)> {
    let cells = run.fs.iter().filter_map(|fs| Some((*fs, drawn(run, *fs)?)));
    cells
        .map(|(fs, cell)| (fs, picture(cell, &typical(run, cell))))
        .collect()
}

/// The numbers behind them: file system, method, ms, longest latency, calls.
pub fn timelines(run: &Run) -> String {
    let mut text = "fs\tmethod\tms\tlongest_us\tcalls\n".to_owned();
    for cell in run.fs.iter().filter_map(|fs| drawn(run, *fs)) {
        for (_, row) in typical(run, cell) {
            for (at, bucket) in row.window.timeline.iter().enumerate() {
                let _ = writeln!(
                    text,
                    "{}\t{}\t{at}\t{}\t{}",
                    cell.fs.name(),
                    row.method,
                    bucket.longest_us,
                    bucket.calls
                );
            }
        }
    }
    text
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn picture(cell: Cell, rows: &[(String, &Row)]) -> String {
    let shown_ms = rows
        .iter()
        .map(|(_, r)| r.window.seconds * 1e3)
        .fold(1.0, f64::max)
        // What takes much longer is cut off, and says so.
        .min(3000.0);
    let height = TOP + ROW * rows.len() as f64 + 34.0;
    let plot_width = WIDTH - LEFT - 16.0;
    let x = |ms: f64| LEFT + (ms / shown_ms).clamp(0.0, 1.0) * plot_width;
    let up = |us: f64| ((us / LOWEST_US).max(1.0).log10() / DECADES).min(1.0) * PLOT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>Latency of a paced writer on {}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"18\" font-size=\"14\" fill=\"#222\">{}: latency of each call from the time \
         it was due, {} MiB, {}</text>\n\
         <text x=\"12\" y=\"34\" fill=\"#666\">longest in each millisecond, log scale; shaded: \
         the method at work; the window with the median stall</text>\n",
        cell.fs.name(),
        cell.fs.name(),
        cell.mib,
        cell.state
    );
    for (index, (name, row)) in rows.iter().enumerate() {
        let top = TOP + ROW * index as f64;
        let base = top + PLOT;
        let _ = write!(
            svg,
            "<text x=\"12\" y=\"{:.0}\" fill=\"#222\">{}</text>\n\
             <text x=\"12\" y=\"{:.0}\" fill=\"#666\">longest {} ms</text>\n\
             <rect x=\"{LEFT}\" y=\"{top:.0}\" width=\"{plot_width:.0}\" height=\"{PLOT}\" fill=\"#f6f6f6\"/>\n",
            top + 17.0,
            escape(name),
            top + 33.0,
            ms(row.window.stall_us)
        );
        for (from, to) in &row.window.worked {
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{top:.0}\" width=\"{:.1}\" height=\"{PLOT}\" fill=\"#dbe7f5\"/>",
                x(*from),
                (x(*to) - x(*from)).max(1.0)
            );
        }
        for (us, text) in [(1e3, "1 ms"), (1e5, "100 ms")] {
            let y = base - up(us);
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ccc\" stroke-width=\"0.5\"/>\n\
                 <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"8\" fill=\"#888\">{text}</text>\n",
                LEFT + plot_width,
                LEFT - 4.0,
                y + 3.0
            );
        }
        let colour = if row.gated { "#c2410c" } else { "#475569" };
        svg.push_str(&format!(
            "<path stroke=\"{colour}\" stroke-width=\"1\" d=\""
        ));
        // As many bars as there are dots to draw them with.
        let step = (shown_ms / plot_width).max(1.0);
        let buckets = &row.window.timeline;
        let mut from = 0.0;
        while from < shown_ms.min(buckets.len() as f64) {
            let to = (from + step).min(buckets.len() as f64);
            let longest = buckets[from as usize..(to.ceil() as usize).min(buckets.len())].iter();
            let longest = longest.map(|b| b.longest_us).max().unwrap_or(0);
            if longest > 0 {
                let _ = write!(
                    svg,
                    "M{:.1} {base:.0}v-{:.1}",
                    x(from),
                    up(f64::from(longest)).max(0.3)
                );
            }
            from = to;
        }
        svg.push_str("\"/>\n");
        if row.window.seconds * 1e3 > shown_ms + 1.0 {
            let _ = writeln!(
                svg,
                "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\" font-size=\"9\" fill=\"#444\">… \
                 {:.1} s</text>",
                LEFT + plot_width - 3.0,
                top + 10.0,
                row.window.seconds
            );
        }
    }
    let foot = TOP + ROW * rows.len() as f64 + 4.0;
    let mut at = 0.0;
    while at <= shown_ms {
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"10\" fill=\"#666\">{:.1} s</text>",
            x(at),
            foot + 10.0,
            at / 1e3
        );
        at += if shown_ms > 1500.0 { 500.0 } else { 200.0 };
    }
    svg.push_str("</svg>\n");
    svg
}
