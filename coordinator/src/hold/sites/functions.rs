//! Where functions begin and end, as the symbols and the exception index say.

use std::collections::HashMap;
use std::ops::Range;

use super::image::{Image, u16_at, u32_at, u64_at};

/// Most entries of the exception index.
const MAX_ENTRIES: usize = 1 << 22;
const FUNCTION: u8 = 2;
const UNTYPED: u8 = 0;
const INDIRECT_FUNCTION: u8 = 10;

/// A stretch of code that is decoded from its first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its addresses.
    pub range: Range<u64>,
    /// A symbol or the exception index says that it is code; otherwise it may be
    /// padding, a table, or code that nothing describes.
    pub is_sure: bool,
    /// A function starts here; otherwise one only ends.
    pub is_start: bool,
}

/// Cuts all code into pieces: at each start and each end of a function.
pub fn pieces(image: &Image<'_>) -> Vec<Piece> {
    let mut sure: Vec<Range<u64>> = Vec::new();
    // Of two cuts at one address, the start comes first.
    let mut cuts: Vec<(u64, bool)> = Vec::new();
    let mut add = |start: u64, size: u64| {
        if !image.is_code(start) {
            return;
        }
        cuts.push((start, false));
        if let Some(end) = start.checked_add(size).filter(|_| size > 0) {
            cuts.push((end, true));
            sure.push(start..end);
        }
    };
    for symbol in image.symbols() {
        match symbol.kind {
            FUNCTION | INDIRECT_FUNCTION => add(symbol.address, symbol.size),
            // A label in hand-written assembly.
            UNTYPED => add(symbol.address, 0),
            _ => {}
        }
    }
    for range in unwound(image).unwrap_or_default() {
        add(range.start, range.end - range.start);
    }
    add(image.entry, 0);
    cuts.extend(
        image
            .code
            .iter()
            .flat_map(|r| [(r.start, false), (r.end, true)]),
    );
    let sure = united(sure);
    let is_inside = |address: u64| {
        let index = sure.partition_point(|r| r.end <= address);
        sure.get(index).is_some_and(|r| r.start < address)
    };
    // Unwind information may stop in the middle of a function: glibc's clone.
    cuts.retain(|(address, is_end)| !is_end || !is_inside(*address));
    cuts.sort_unstable();
    cuts.dedup_by_key(|cut| cut.0);
    let mut pieces = Vec::with_capacity(cuts.len());
    for pair in cuts.windows(2) {
        let range = pair[0].0..pair[1].0;
        if !image.is_code(range.start) {
            continue;
        }
        let index = sure.partition_point(|r| r.end <= range.start);
        let is_sure = sure.get(index).is_some_and(|r| r.contains(&range.start));
        pieces.push(Piece {
            range,
            is_sure,
            is_start: !pair[0].1,
        });
    }
    pieces
}

/// The union of ranges, sorted.
pub fn united(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|r| r.start);
    let mut united: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match united.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => united.push(range),
        }
    }
    united
}

/// The ranges of code in the exception index (`.eh_frame_hdr`, Linux Standard Base),
/// in the one form that linkers write.
fn unwound(image: &Image<'_>) -> Option<Vec<Range<u64>>> {
    let header = image.eh_frame_hdr.clone()?;
    let bytes = image.bytes_of(&header)?;
    // Version 1; the count as u32; the table sorted, as i32 relative to the header.
    if bytes.first() != Some(&1) || bytes.get(2..4) != Some(&[0x03, 0x3b]) {
        return None;
    }
    let count = (u32_at(bytes, 8)? as usize).min(MAX_ENTRIES);
    let relative = |offset: u32| header.start.wrapping_add_signed((offset as i32).into());
    let mut common = HashMap::new();
    let entries = bytes.get(12..)?.chunks_exact(8).take(count);
    let ranges = entries.filter_map(|entry| {
        let start = relative(u32_at(entry, 0)?);
        let description = relative(u32_at(entry, 4)?);
        let (size, is_signal) = size_of(image, description, &mut common).unwrap_or((0, false));
        // The description of a signal's return begins a byte early, for unwinders
        // look up the byte before the return address.
        let early = u64::from(is_signal);
        Some(start.checked_add(early)?..start.checked_add(size)?.max(start + early))
    });
    Some(ranges.collect())
}

/// What descriptions have in common: how addresses are encoded, and whether the
/// code is where signal handlers return to.
type Common = (u8, bool);

/// How many bytes of code the description at `address` is about, and whether it is
/// a signal's return.
fn size_of(
    image: &Image<'_>,
    address: u64,
    known: &mut HashMap<u64, Common>,
) -> Option<(u64, bool)> {
    let bytes = image.from(address)?;
    let back = u32_at(bytes, 4)?;
    let at = address.checked_add(4)?.checked_sub(back.into())?;
    let (encoding, is_signal) = match known.get(&at) {
        Some(known) => *known,
        None => {
            let found = common(image, at)?;
            *known.entry(at).or_insert(found)
        }
    };
    // The start comes first, in the same width.
    let size = match encoding & 0x0f {
        0x0 | 0x4 | 0xc => u64_at(bytes, 16),
        0x3 | 0xb => u32_at(bytes, 12).map(u64::from),
        0x2 | 0xa => u16_at(bytes, 10).map(u64::from),
        _ => None,
    };
    Some((size?, is_signal))
}

/// Reads the part that descriptions refer to.
fn common(image: &Image<'_>, address: u64) -> Option<Common> {
    let bytes = image.from(address)?;
    let version = *bytes.get(8)?;
    let augmentation = bytes.get(9..)?.split(|b| *b == 0).next()?;
    let is_signal = augmentation.contains(&b'S');
    if !augmentation.starts_with(b"z") {
        return Some((0, is_signal));
    }
    let mut rest = bytes.get(9 + augmentation.len() + 1..)?;
    skip_leb(&mut rest)?; // code alignment
    skip_leb(&mut rest)?; // data alignment
    if version == 1 {
        rest = rest.get(1..)?; // return address register
    } else {
        skip_leb(&mut rest)?;
    }
    skip_leb(&mut rest)?; // length of what follows
    for letter in &augmentation[1..] {
        match letter {
            b'R' => return Some((*rest.first()?, is_signal)),
            b'L' => rest = rest.get(1..)?,
            b'P' => {
                let width = match rest.first()? & 0x0f {
                    0x0 | 0x4 | 0xc => 8,
                    0x3 | 0xb => 4,
                    0x2 | 0xa => 2,
                    _ => return None,
                };
                rest = rest.get(1 + width..)?;
            }
            b'S' | b'B' => {}
            _ => return None,
        }
    }
    Some((0, is_signal))
}

fn skip_leb(bytes: &mut &[u8]) -> Option<()> {
    let end = bytes.iter().position(|b| b & 0x80 == 0)?;
    *bytes = &bytes[end + 1..];
    Some(())
}
