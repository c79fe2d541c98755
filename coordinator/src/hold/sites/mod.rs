//! Site tables: where an executable file has its system calls, and how each can be
//! replaced by a jump (the layout is [`snapshim_gate::sites`]).
//!
//! | module | what it does |
//! |---|---|
//! | [`image`], [`functions`] | reads an ELF file, and where its functions are |
//! | [`sweep`] | finds system call instructions, and what jumps near them |
//! | [`number`], [`window`] | the number of one, and the bytes that can be replaced |
//! | [`cache`] | tables on disk |
//! | [`closure`] | the files a program will have mapped |
//! | [`layer`] | whether the sites of a running process are patched |

pub mod cache;
pub mod closure;
pub mod functions;
pub mod image;
pub mod layer;
pub mod number;
pub mod sweep;
pub mod window;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use iced_x86::Instruction;
use snapshim_gate::calls;
use snapshim_gate::sites::{COMPLETE, Header, LIBC, MAX_SITES, Record, UNPATCHABLE};

use cache::{Cache, Entry};
use image::{Image, Refused};

/// The table of one file.
#[derive(Clone, Debug, Default)]
pub struct Sites {
    /// [`COMPLETE`] and the like.
    pub flags: u32,
    /// Sorted by address.
    pub records: Vec<Record>,
    /// System call instructions, of interest or not.
    pub calls: usize,
    /// Addresses of those that matter and cannot be patched, or cannot be told from data.
    pub missed: Vec<u64>,
}

impl Sites {
    /// The bytes of the table.
    pub fn to_bytes(&self) -> Vec<u8> {
        let begin = self.records.first().map_or(0, |r| r.address);
        let end = self.records.last().map_or(0, |r| r.address + length(r));
        let header = Header::new(self.records.len() as u32, self.flags, begin, end);
        let records = self.records.iter().map(Record::as_bytes);
        let parts: Vec<&[u8]> = std::iter::once(header.as_bytes()).chain(records).collect();
        parts.concat()
    }
}

/// How many bytes a record replaces.
pub fn length(record: &Record) -> u64 {
    record.window().map_or(0, <[u8]>::len) as u64
}

/// Computes the table of the ELF file with these contents.
pub fn compute(bytes: &[u8]) -> Result<Sites, Refused> {
    let image = Image::parse(bytes)?;
    let library = library(&image);
    let mut sites = Sites::default();
    if library != Library::Other {
        sites.flags |= LIBC;
    }
    if library.cancels_by_address() {
        sites.flags |= UNPATCHABLE;
        return Ok(sites);
    }
    // Goroutines run on stacks that are too small for what a patched call needs; and
    // the dynamic linker would relocate over our jumps.
    if image.is_go() || image.has_text_relocations() {
        return Ok(sites);
    }
    let found = sweep::sweep(&image);
    if found.targets.is_cut_short {
        return Err(Refused::Damaged("branches are so many that they"));
    }
    for block in &found.blocks {
        add(&image, block, &found.targets, &mut sites);
    }
    sites.missed.extend(&found.doubtful);
    sites.records.sort_by_key(|r| r.address);
    if sites.records.len() > MAX_SITES as usize {
        let rest = sites.records.split_off(MAX_SITES as usize);
        sites.missed.extend(rest.iter().map(|r| r.address));
    }
    // Code that the program may change is none that anything can be said of.
    let (writable, fixed) = sites
        .records
        .into_iter()
        .partition(|r| image.is_writable(r.address));
    let writable: Vec<Record> = writable;
    sites.records = fixed;
    sites.missed.extend(writable.iter().map(|r| r.address));
    sites.missed.sort_unstable();
    if sites.missed.is_empty() && !image.has_writable_code() {
        sites.flags |= COMPLETE;
    }
    Ok(sites)
}

/// Adds the sites of one block.
fn add(image: &Image<'_>, block: &[Instruction], targets: &sweep::Targets, sites: &mut Sites) {
    let mut free = 0;
    for (index, instruction) in block.iter().enumerate() {
        if !sweep::is_kernel_entry(instruction) {
            continue;
        }
        if sweep::is_old_entry(instruction) {
            sites.missed.push(instruction.ip());
            continue;
        }
        sites.calls += 1;
        let number = number::number(block, index, targets);
        // Known and of no interest. A negative number is no call at all.
        if number.is_some_and(|n| usize::try_from(n).ok().and_then(calls::action).is_none()) {
            continue;
        }
        let record = window::window(block, index, targets, free).and_then(|window| {
            let range = block[window.first].ip()..block[window.last].next_ip();
            let before = (instruction.ip() - range.start) as usize;
            free = range.end;
            let bytes = image.bytes_of(&range)?;
            Record::new(
                range.start,
                number.unwrap_or(-1),
                window.shape,
                before,
                bytes,
            )
        });
        match record {
            Some(record) => sites.records.push(record),
            None => sites.missed.push(instruction.ip()),
        }
    }
}

/// What an ELF file is, as far as its C library is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// glibc's libc.so.6.
    Glibc {
        /// Its second version number: 36 for 2.36.
        minor: u32,
    },
    /// musl's libc, which is its dynamic linker as well.
    Musl,
    /// Anything else.
    Other,
}

impl Library {
    /// Whether it decides by the address that a thread was interrupted at whether to
    /// cancel it: a system call that was moved elsewhere would not be cancelled.
    /// glibc does since 2.41 (`__syscall_cancel_arch`).
    pub fn cancels_by_address(self) -> bool {
        match self {
            Library::Glibc { minor } => minor >= 41,
            Library::Musl => true,
            Library::Other => false,
        }
    }
}

/// Which C library it is.
pub fn library(image: &Image<'_>) -> Library {
    let versions = image.versions();
    let minors = versions.iter().filter_map(|name| {
        let rest = std::str::from_utf8(name.strip_prefix(b"GLIBC_2.")?).ok()?;
        rest.split('.').next()?.parse::<u32>().ok()
    });
    let is_start = |s: image::Symbol<'_>| s.name == b"__libc_start_main";
    match (image.soname(), minors.max()) {
        (Some(b"libc.so.6"), minor) => Library::Glibc {
            // Not to be made out: treated as the newest.
            minor: minor.unwrap_or(u32::MAX),
        },
        // It has no versions, and Debian's has no name.
        (None | Some(b"libc.so"), None) if image.symbols().any(is_start) => Library::Musl,
        (Some(name), None) if name.starts_with(b"libc.musl-") => Library::Musl,
        _ => Library::Other,
    }
}

/// Computes the tables that are missing of what `program` will have mapped. A file
/// that has none then is said to, and is no reason not to run the program.
pub fn prepare(cache: &Cache, program: &Path) -> Vec<(PathBuf, Result<Entry, String>)> {
    let files = closure::closure(program).into_iter();
    let table = |file: PathBuf| {
        let table = cache.table(&file);
        (file, table)
    };
    files.map(table).collect()
}
