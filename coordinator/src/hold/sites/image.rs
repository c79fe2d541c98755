//! An ELF file, as far as its code is concerned. Every number in it is somebody
//! else's: each is checked before it is used, and what contradicts itself is refused.

use std::ops::Range;

/// Most program headers that are read.
const MAX_SEGMENTS: usize = 1024;
/// Most bytes of code in one file.
const MAX_CODE: u64 = 1 << 29;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_NOTE: u32 = 4;
const PT_GNU_EH_FRAME: u32 = 0x6474_e550;
const PF_X: u32 = 1;
const PF_W: u32 = 2;
const SHT_SYMTAB: u32 = 2;
const SHT_NOBITS: u32 = 8;
const SHT_DYNSYM: u32 = 11;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const DT_NULL: u64 = 0;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_STRSZ: u64 = 10;
const DT_SONAME: u64 = 14;
const DT_TEXTREL: u64 = 22;
const DT_FLAGS: u64 = 30;
const DT_RELRSZ: u64 = 35;
const DT_RELR: u64 = 36;
const DT_GNU_HASH: u64 = 0x6fff_fef5;
const DT_VERDEF: u64 = 0x6fff_fffc;
const DT_VERDEFNUM: u64 = 0x6fff_fffd;
const DF_TEXTREL: u64 = 4;
const NOTE_BUILD_ID: u32 = 3;

/// Beginnings of names of sections that the Go toolchain makes.
const GO_SECTIONS: [&[u8]; 3] = [b".go.buildinfo\0", b".gopclntab\0", b".note.go."];
/// The name of its notes.
const GO_NOTE: &[u8] = b"Go\0\0";
/// What its build information begins with, and the alignment of that (debug/buildinfo).
const GO_MAGIC: &[u8] = b"\xff Go buildinf:";
const GO_ALIGN: usize = 16;

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;

/// Why a file has no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is not an ELF file.
    NotElf,
    /// It is for another machine, or of another kind than a program or library.
    Foreign,
    /// Its headers contradict themselves; says which.
    Damaged(&'static str),
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refused::NotElf => f.write_str("it is not an ELF file"),
            Refused::Foreign => f.write_str("it is not a program or library for x86-64"),
            Refused::Damaged(what) => write!(f, "its {what} contradict the file"),
        }
    }
}

/// A loadable segment.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Virtual addresses that have bytes in the file.
    pub range: Range<u64>,
    offset: usize,
    /// Whether it is executable.
    pub is_code: bool,
    /// Whether it is writable from the start.
    pub is_writable: bool,
}

/// A symbol that names an address of this file.
#[derive(Clone, Copy, Debug)]
pub struct Symbol<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Its address.
    pub address: u64,
    /// Its size; 0 if unknown.
    pub size: u64,
    /// The ELF type: function, object, none …
    pub kind: u8,
}

/// The parts of an ELF file.
#[derive(Debug)]
pub struct Image<'a> {
    bytes: &'a [u8],
    /// Loadable segments.
    pub segments: Vec<Segment>,
    /// Where code is, sorted, without overlap: executable sections, or segments if
    /// there are no sections.
    pub code: Vec<Range<u64>>,
    /// Whether its addresses are fixed.
    pub is_fixed: bool,
    /// Where it begins to run; 0 if nowhere.
    pub entry: u64,
    /// Address of the exception index, if there is one.
    pub eh_frame_hdr: Option<Range<u64>>,
    dynamic: Vec<(u64, u64)>,
    notes: Vec<Range<usize>>,
    has_go_section: bool,
    symbol_tables: Vec<SymbolTable>,
}

/// File ranges of symbols and of their names.
#[derive(Debug)]
struct SymbolTable {
    symbols: Range<usize>,
    names: Range<usize>,
}

impl<'a> Image<'a> {
    /// Reads the headers.
    pub fn parse(bytes: &'a [u8]) -> Result<Image<'a>, Refused> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err(Refused::NotElf);
        }
        let headers = Refused::Damaged("ELF headers");
        let kind = u16_at(bytes, 16).ok_or(headers)?;
        let machine = u16_at(bytes, 18).ok_or(headers)?;
        let is_ours = bytes.get(4) == Some(&2) && bytes.get(5) == Some(&1) && machine == EM_X86_64;
        if !is_ours || !matches!(kind, ET_EXEC | ET_DYN) {
            return Err(Refused::Foreign);
        }
        let mut image = Image {
            bytes,
            segments: Vec::new(),
            code: Vec::new(),
            is_fixed: kind == ET_EXEC,
            entry: u64_at(bytes, 24).ok_or(headers)?,
            eh_frame_hdr: None,
            dynamic: Vec::new(),
            notes: Vec::new(),
            has_go_section: false,
            symbol_tables: Vec::new(),
        };
        image.read_segments()?;
        image.has_go_section = image.find_go_section().unwrap_or(false);
        let has_sections = image.read_sections().unwrap_or(false);
        if !has_sections {
            let code = image.segments.iter().filter(|s| s.is_code);
            image.code = code.map(|s| s.range.clone()).collect();
        }
        image.code.retain(|r| !r.is_empty());
        image.code.sort_by_key(|r| r.start);
        if image.code.windows(2).any(|w| w[0].end > w[1].start) {
            return Err(Refused::Damaged("executable sections"));
        }
        if image.code.iter().map(|r| r.end - r.start).sum::<u64>() > MAX_CODE {
            return Err(Refused::Damaged("sizes of code"));
        }
        if image.symbol_tables.is_empty() {
            image.symbol_tables.extend(image.dynamic_symbols());
        }
        Ok(image)
    }

    fn read_segments(&mut self) -> Result<(), Refused> {
        let bad = Refused::Damaged("program headers");
        let bytes = self.bytes;
        let at = to_usize(u64_at(bytes, 32).ok_or(bad)?).ok_or(bad)?;
        let size = usize::from(u16_at(bytes, 54).ok_or(bad)?);
        let count = usize::from(u16_at(bytes, 56).ok_or(bad)?);
        if size != 56 || count > MAX_SEGMENTS {
            return Err(bad);
        }
        let table = span(at, count * size)
            .and_then(|r| bytes.get(r))
            .ok_or(bad)?;
        for header in table.chunks_exact(size) {
            let kind = u32_at(header, 0).ok_or(bad)?;
            let flags = u32_at(header, 4).ok_or(bad)?;
            let word = |at| u64_at(header, at).ok_or(bad);
            let (offset, address, size, memory) = (word(8)?, word(16)?, word(32)?, word(40)?);
            let file = to_usize(offset).and_then(|o| span(o, to_usize(size)?));
            match kind {
                PT_LOAD => {
                    let file = file.filter(|r| r.end <= bytes.len()).ok_or(bad)?;
                    let end = address.checked_add(size).ok_or(bad)?;
                    if size > memory || address.checked_add(memory).is_none() {
                        return Err(bad);
                    }
                    self.segments.push(Segment {
                        range: address..end,
                        offset: file.start,
                        is_code: flags & PF_X != 0,
                        is_writable: flags & PF_W != 0,
                    });
                }
                PT_DYNAMIC => {
                    let table = file.and_then(|r| bytes.get(r)).ok_or(bad)?;
                    let pairs = table
                        .chunks_exact(16)
                        .filter_map(|pair| Some((u64_at(pair, 0)?, u64_at(pair, 8)?)));
                    self.dynamic = pairs.take_while(|(tag, _)| *tag != DT_NULL).collect();
                }
                PT_NOTE => self.notes.extend(file.filter(|r| r.end <= bytes.len())),
                PT_GNU_EH_FRAME => {
                    self.eh_frame_hdr = address.checked_add(size).map(|end| address..end);
                }
                _ => {}
            }
        }
        self.segments.sort_by_key(|s| s.range.start);
        match self
            .segments
            .windows(2)
            .any(|w| w[0].range.end > w[1].range.start)
        {
            true => Err(Refused::Damaged("segments")),
            false => Ok(()),
        }
    }

    /// Whether a section has a name that only the Go toolchain gives.
    fn find_go_section(&self) -> Option<bool> {
        let bytes = self.bytes;
        let size = usize::from(u16_at(bytes, 58)?);
        let count = usize::from(u16_at(bytes, 60)?);
        let names = usize::from(u16_at(bytes, 62)?);
        if size != 64 {
            return None;
        }
        let table = bytes.get(span(
            to_usize(u64_at(bytes, 40)?)?,
            count.checked_mul(size)?,
        )?)?;
        let names = table.get(span(names.checked_mul(size)?, size)?)?;
        let begin = to_usize(u64_at(names, 24)?)?;
        let names = bytes.get(span(begin, to_usize(u64_at(names, 32)?)?)?)?;
        let mut sections = table.chunks_exact(size);
        Some(sections.any(|header| {
            let name = u32_at(header, 0).and_then(|at| names.get(at as usize..));
            name.is_some_and(|name| GO_SECTIONS.iter().any(|go| name.starts_with(go)))
        }))
    }

    /// Whether it was made by the Go toolchain, in whole or in part.
    pub fn is_go(&self) -> bool {
        self.has_go_section || self.notes().any(|note| note.name == GO_NOTE) || {
            // Stripped of everything: what `go version` looks for.
            let mut segments = self.segments.iter();
            segments.any(|segment| {
                let bytes = self.from(segment.range.start).unwrap_or_default();
                let skipped = segment.range.start.wrapping_neg() as usize % GO_ALIGN;
                let mut places = bytes.get(skipped..).unwrap_or_default().chunks(GO_ALIGN);
                places.any(|place| place.starts_with(GO_MAGIC))
            })
        }
    }

    /// Whether the dynamic linker changes the code when it loads the file.
    pub fn has_text_relocations(&self) -> bool {
        let flags = self.dynamic(DT_FLAGS).unwrap_or(0);
        self.dynamic(DT_TEXTREL).is_some() || flags & DF_TEXTREL != 0
    }

    /// Whether the code at `address` may be written by the program.
    pub fn is_writable(&self, address: u64) -> bool {
        self.segment(address).is_none_or(|s| s.is_writable)
    }

    /// Whether it has code that the program may write.
    pub fn has_writable_code(&self) -> bool {
        self.segments.iter().any(|s| s.is_code && s.is_writable)
    }

    fn notes(&self) -> impl Iterator<Item = Note<'a>> {
        let bytes = self.bytes;
        let ranges = self.notes.iter();
        ranges.flat_map(move |range| notes_in(bytes.get(range.clone()).unwrap_or_default()))
    }

    /// Finds executable sections and symbol tables; `None` or false if there are none
    /// to be believed (they are not needed to run a program).
    fn read_sections(&mut self) -> Option<bool> {
        let bytes = self.bytes;
        let at = to_usize(u64_at(bytes, 40)?)?;
        let size = usize::from(u16_at(bytes, 58)?);
        let count = usize::from(u16_at(bytes, 60)?);
        if at == 0 || size != 64 || count == 0 {
            return None;
        }
        let table = bytes.get(span(at, count.checked_mul(size)?)?)?;
        let file_range = |header: &[u8]| -> Option<Range<usize>> {
            let range = span(
                to_usize(u64_at(header, 24)?)?,
                to_usize(u64_at(header, 32)?)?,
            )?;
            (range.end <= bytes.len()).then_some(range)
        };
        let mut code = Vec::new();
        for header in table.chunks_exact(size) {
            let kind = u32_at(header, 4)?;
            let flags = u64_at(header, 8)?;
            if flags & SHF_EXECINSTR != 0 && flags & SHF_ALLOC != 0 && kind != SHT_NOBITS {
                let start = u64_at(header, 16)?;
                let range = start..start.checked_add(u64_at(header, 32)?)?;
                // The program headers say what is mapped, and how.
                self.segments.iter().find(|s| {
                    s.is_code && s.range.start <= range.start && range.end <= s.range.end
                })?;
                code.push(range);
            }
            if matches!(kind, SHT_SYMTAB | SHT_DYNSYM) {
                let names = usize::try_from(u32_at(header, 40)?)
                    .ok()?
                    .checked_mul(size)?;
                if let (Some(symbols), Some(names)) = (
                    file_range(header),
                    table.get(span(names, size)?).and_then(file_range),
                ) {
                    self.symbol_tables.push(SymbolTable { symbols, names });
                }
            }
        }
        self.code = code;
        Some(!self.code.is_empty())
    }

    /// The dynamic symbols of a file without sections: their number is in the hash table.
    fn dynamic_symbols(&self) -> Option<SymbolTable> {
        let count = self.gnu_hash_count()?;
        let at = self.file_offset(self.dynamic(DT_SYMTAB)?)?;
        let symbols = span(at, count.checked_mul(24)?)?;
        let names = span(
            self.file_offset(self.dynamic(DT_STRTAB)?)?,
            to_usize(self.dynamic(DT_STRSZ)?)?,
        )?;
        let fits = symbols.end <= self.bytes.len() && names.end <= self.bytes.len();
        fits.then_some(SymbolTable { symbols, names })
    }

    /// One more than the highest index in the GNU hash table's chains.
    fn gnu_hash_count(&self) -> Option<usize> {
        let at = self.file_offset(self.dynamic(DT_GNU_HASH)?)?;
        let table = self.bytes.get(at..)?;
        let word = |i: usize| u32_at(table, i).map(|w| w as usize);
        let (buckets, first, bloom) = (word(0)?, word(4)?, word(8)?);
        let start = bloom.checked_mul(8)?.checked_add(16)?;
        let chains = buckets.checked_mul(4)?.checked_add(start)?;
        let heads = table.get(start..chains)?;
        let mut last = heads.chunks_exact(4).filter_map(|w| u32_at(w, 0)).max()? as usize;
        if last < first {
            return Some(first);
        }
        while word(chains.checked_add(last.checked_sub(first)?.checked_mul(4)?)?)? & 1 == 0 {
            last += 1;
        }
        Some(last + 1)
    }

    fn dynamic(&self, tag: u64) -> Option<u64> {
        self.dynamic
            .iter()
            .find(|(t, _)| *t == tag)
            .map(|(_, v)| *v)
    }

    fn file_offset(&self, address: u64) -> Option<usize> {
        let segment = self.segment(address)?;
        Some(segment.offset + (address - segment.range.start) as usize)
    }

    fn segment(&self, address: u64) -> Option<&Segment> {
        let index = self.segments.partition_point(|s| s.range.end <= address);
        self.segments
            .get(index)
            .filter(|s| s.range.contains(&address))
    }

    /// The bytes from `address` to the end of its segment.
    pub fn from(&self, address: u64) -> Option<&'a [u8]> {
        let segment = self.segment(address)?;
        let len = (segment.range.end - address) as usize;
        let at = self.file_offset(address)?;
        self.bytes.get(at..at + len)
    }

    /// The bytes of a range of addresses.
    pub fn bytes_of(&self, range: &Range<u64>) -> Option<&'a [u8]> {
        self.from(range.start)?
            .get(..to_usize(range.end.checked_sub(range.start)?)?)
    }

    /// Whether code can be at `address`.
    pub fn is_code(&self, address: u64) -> bool {
        let index = self.code.partition_point(|r| r.end <= address);
        self.code.get(index).is_some_and(|r| r.contains(&address))
    }

    /// Symbols of this file that have an address.
    pub fn symbols(&self) -> impl Iterator<Item = Symbol<'a>> {
        let bytes = self.bytes;
        self.symbol_tables.iter().flat_map(move |table| {
            let names = &bytes[table.names.clone()];
            let symbols = bytes[table.symbols.clone()].chunks_exact(24);
            symbols.filter_map(move |symbol| {
                let section = u16_at(symbol, 6)?;
                let name = names.get(u32_at(symbol, 0)? as usize..)?;
                (section != 0).then_some(Symbol {
                    name: name.split(|b| *b == 0).next()?,
                    kind: symbol[4] & 0xf,
                    address: u64_at(symbol, 8)?,
                    size: u64_at(symbol, 16)?,
                })
            })
        })
    }

    /// Addresses that the dynamic linker will put into data: pointers to functions,
    /// among them labels of jump tables.
    pub fn relocated(&self, each: &mut dyn FnMut(u64)) {
        const RELATIVE: u64 = 8;
        const IRELATIVE: u64 = 37;
        let table = |at, size| {
            let at = self.file_offset(self.dynamic(at)?)?;
            self.bytes.get(span(at, to_usize(self.dynamic(size)?)?)?)
        };
        for entry in table(DT_RELA, DT_RELASZ)
            .unwrap_or_default()
            .chunks_exact(24)
        {
            let kind = u64_at(entry, 8).unwrap_or(0) & 0xffff_ffff;
            if let (RELATIVE | IRELATIVE, Some(addend)) = (kind, u64_at(entry, 16)) {
                each(addend);
            }
        }
        // Packed: an even word is an address, an odd one a bit set of the 63 words that follow.
        let mut next = 0_u64;
        let word = |address: u64| self.from(address).and_then(|b| u64_at(b, 0));
        for entry in table(DT_RELR, DT_RELRSZ)
            .unwrap_or_default()
            .chunks_exact(8)
        {
            let entry = u64_at(entry, 0).unwrap_or(0);
            if entry & 1 == 0 {
                word(entry).into_iter().for_each(&mut *each);
                next = entry.wrapping_add(8);
                continue;
            }
            for bit in 0..63 {
                if entry >> (bit + 1) & 1 != 0 {
                    let at = next.wrapping_add(bit * 8);
                    word(at).into_iter().for_each(&mut *each);
                }
            }
            next = next.wrapping_add(63 * 8);
        }
    }

    /// The name libraries are linked by.
    pub fn soname(&self) -> Option<&'a [u8]> {
        self.string(self.dynamic(DT_SONAME)?)
    }

    fn string(&self, offset: u64) -> Option<&'a [u8]> {
        let names = self.from(self.dynamic(DT_STRTAB)?.checked_add(offset)?)?;
        names.split(|b| *b == 0).next()
    }

    /// The symbol versions it defines, as GLIBC_2.36.
    pub fn versions(&self) -> Vec<&'a [u8]> {
        let mut found = Vec::new();
        let Some(mut at) = self.dynamic(DT_VERDEF) else {
            return found;
        };
        let count = self.dynamic(DT_VERDEFNUM).unwrap_or(0).min(4096);
        for _ in 0..count {
            let Some(entry) = self.from(at) else { break };
            let (Some(aux), Some(next)) = (u32_at(entry, 12), u32_at(entry, 16)) else {
                break;
            };
            let name = entry.get(aux as usize..).and_then(|aux| u32_at(aux, 0));
            found.extend(name.and_then(|name| self.string(name.into())));
            if next == 0 {
                break;
            }
            at = at.saturating_add(next.into());
        }
        found
    }
}

/// Where in the file the notes are that a program header is about.
pub fn note_range(header: &[u8]) -> Option<Range<u64>> {
    let start = u64_at(header, 8)?;
    let end = start.checked_add(u64_at(header, 32)?)?;
    (u32_at(header, 0) == Some(PT_NOTE)).then_some(start..end)
}

/// The address the beginning of the file is loaded at, if this program header says so.
pub fn first_address(header: &[u8]) -> Option<u64> {
    const PAGE: u64 = 4096;
    let (offset, address) = (u64_at(header, 8)?, u64_at(header, 16)?);
    let is_first = u32_at(header, 0) == Some(PT_LOAD) && offset < PAGE;
    is_first.then(|| address.wrapping_sub(offset))
}

/// One note.
struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    content: &'a [u8],
}

/// Takes notes apart, until one contradicts itself.
fn notes_in(mut bytes: &[u8]) -> impl Iterator<Item = Note<'_>> {
    std::iter::from_fn(move || {
        let (name, size) = (u32_at(bytes, 0)?, u32_at(bytes, 4)?);
        let begin = 12_usize.checked_add(padded(name)?)?;
        let note = Note {
            name: bytes.get(12..)?.get(..name as usize)?,
            kind: u32_at(bytes, 8)?,
            content: bytes.get(begin..)?.get(..size as usize)?,
        };
        // The last one may lack its padding.
        let end = begin.checked_add(padded(size)?)?;
        bytes = bytes.get(end..).unwrap_or_default();
        Some(note)
    })
}

/// The build id among notes. One that is too short to tell files apart is none.
pub fn build_id_in(notes: &[u8]) -> Option<&[u8]> {
    let is_id = |note: &Note<'_>| {
        note.name == b"GNU\0"
            && note.kind == NOTE_BUILD_ID
            && (8..=64).contains(&note.content.len())
    };
    notes_in(notes).find(is_id).map(|note| note.content)
}

fn padded(size: u32) -> Option<usize> {
    to_usize(u64::from(size).next_multiple_of(4))
}

fn span(at: usize, len: usize) -> Option<Range<usize>> {
    Some(at..at.checked_add(len)?)
}

fn to_usize(value: u64) -> Option<usize> {
    usize::try_from(value).ok()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
