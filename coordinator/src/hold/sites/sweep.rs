//! Finds the system call instructions of a file, and everything that jumps near them.
//!
//! Code is decoded from the starts of functions. What no symbol and no entry of the
//! exception index describes is taken for code only where sure code branches to it;
//! bytes that look like a system call elsewhere may be a table, are never patched,
//! and make the table incomplete.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use super::functions::{self, Piece};
use super::image::{Image, u32_at, u64_at};

/// Most entries of a jump table that are read.
const MAX_TABLE: usize = 4096;
/// Longest function that is taken apart, bytes.
const MAX_FUNCTION: usize = 4 << 20;
/// Most instructions that are followed in what nothing describes.
const MAX_INSTRUCTIONS: usize = 1 << 22;
/// Most branches, and most entries of jump tables, that are looked at.
const MAX_TARGETS: usize = 1 << 24;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// The code around system calls: each in order of address, all instructions sure.
    pub blocks: Vec<Vec<Instruction>>,
    /// What jumps into them.
    pub targets: Targets,
    /// Addresses of bytes that may be a system call, in what may be code.
    pub doubtful: Vec<u64>,
}

/// Where control may come from otherwise than from the instruction before.
#[derive(Debug, Default)]
pub struct Targets {
    /// Direct branches: to, from.
    branches: Vec<(u64, u64)>,
    /// Direct calls: to, from.
    calls: Vec<(u64, u64)>,
    /// From anywhere: functions, calls, jump tables, pointers.
    entries: Vec<u64>,
    /// There were more than are looked at.
    pub is_cut_short: bool,
}

impl Targets {
    /// Whether anything leads to `address` from elsewhere.
    pub fn contains(&self, address: u64) -> bool {
        self.is_entry(address) || self.branches_to(address).next().is_some()
    }

    /// Whether it may be reached from unknown places.
    pub fn is_entry(&self, address: u64) -> bool {
        self.entries.binary_search(&address).is_ok()
    }

    /// The direct branches to it.
    pub fn branches_to(&self, address: u64) -> impl Iterator<Item = u64> {
        let first = self.branches.partition_point(|(to, _)| *to < address);
        let of = self.branches[first..].iter();
        of.take_while(move |(to, _)| *to == address)
            .map(|(_, from)| *from)
    }

    fn sort(&mut self) {
        self.branches.sort_unstable();
        self.branches.dedup();
        self.entries.sort_unstable();
        self.entries.dedup();
    }
}

/// Whether an instruction enters the kernel.
pub fn is_kernel_entry(instruction: &Instruction) -> bool {
    is_syscall(instruction) || is_old_entry(instruction)
}

/// Whether it is the one that tables are about.
pub fn is_syscall(instruction: &Instruction) -> bool {
    instruction.code() == Code::Syscall
}

/// The 32-bit ways into the kernel, which a 64-bit program may use as well.
pub fn is_old_entry(instruction: &Instruction) -> bool {
    let is_80 = instruction.code() == Code::Int_imm8 && instruction.immediate8() == 0x80;
    is_80 || instruction.mnemonic() == Mnemonic::Sysenter
}

/// Whether the bytes of a kernel entry are in there, at whatever place.
fn has_candidate(bytes: &[u8]) -> bool {
    bytes
        .windows(2)
        .any(|pair| matches!(pair, [0x0f, 0x05 | 0x34] | [0xcd, 0x80]))
}

/// Goes through the whole file.
pub fn sweep(image: &Image<'_>) -> Found {
    let mut found = Found::default();
    let (sure, unsure) = settle(image, &mut found.blocks);
    if found.blocks.is_empty() && unsure.is_empty() {
        return found;
    }
    let blocks = found.blocks.iter();
    let mut near: Vec<Range<u64>> = blocks
        .map(|b| b[0].ip()..b[b.len() - 1].next_ip())
        .collect();
    if !unsure.is_empty() {
        let pieces = sure.iter().filter(|p| !p.is_sure);
        near.extend(pieces.map(|p| p.range.clone()));
    }
    let near = functions::united(near);
    found.targets = targets(image, &sure, &near);
    reach(image, &sure, &unsure, &mut found);
    found.targets.sort();
    found
}

/// Decodes the pieces that may hold a kernel entry. Returns all pieces, with those
/// cut in two where decoding failed, and the unsure ones that hold candidates.
fn settle(image: &Image<'_>, blocks: &mut Vec<Vec<Instruction>>) -> (Vec<Piece>, Vec<Range<u64>>) {
    let mut pieces = Vec::new();
    let mut unsure = Vec::new();
    for piece in functions::pieces(image) {
        let Some(bytes) = image.bytes_of(&piece.range) else {
            continue;
        };
        if !has_candidate(bytes) {
            pieces.push(piece);
            continue;
        }
        if !piece.is_sure || bytes.len() > MAX_FUNCTION {
            unsure.push(piece.range.clone());
            pieces.push(Piece {
                is_sure: false,
                ..piece
            });
            continue;
        }
        let mut decoder = Decoder::with_ip(64, bytes, piece.range.start, DecoderOptions::NONE);
        let mut block = Vec::new();
        let mut end = piece.range.end;
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                // Data among the code: what follows is not known to be in step.
                end = instruction.ip();
                break;
            }
            block.push(instruction);
        }
        if block.iter().any(is_kernel_entry) {
            blocks.push(block);
        }
        let rest = end..piece.range.end;
        if end > piece.range.start {
            pieces.push(Piece {
                range: piece.range.start..end,
                ..piece
            });
        }
        if !rest.is_empty() {
            if image.bytes_of(&rest).is_some_and(has_candidate) {
                unsure.push(rest.clone());
            }
            pieces.push(Piece {
                range: rest,
                is_sure: false,
                is_start: false,
            });
        }
    }
    (pieces, unsure)
}

/// Decodes everything for the sake of what leads into the ranges `near`.
fn targets(image: &Image<'_>, pieces: &[Piece], near: &[Range<u64>]) -> Targets {
    let is_near = |address: u64| {
        let index = near.partition_point(|r| r.end <= address);
        near.get(index).is_some_and(|r| r.contains(&address))
    };
    let mut targets = Targets::default();
    // What a function that jumps through a register takes the address of may be a
    // jump table.
    let mut tables = HashSet::new();
    let mut leas = Vec::new();
    let mut instruction = Instruction::default();
    for piece in pieces {
        if piece.is_start && is_near(piece.range.start) {
            targets.entries.push(piece.range.start);
        }
        let Some(bytes) = image.bytes_of(&piece.range) else {
            continue;
        };
        let mut decoder = Decoder::with_ip(64, bytes, piece.range.start, DecoderOptions::NONE);
        leas.clear();
        let mut switches = false;
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            switches |= instruction.flow_control() == FlowControl::IndirectBranch;
            if let Some(to) = branch_target(&instruction) {
                if targets.branches.len() + targets.calls.len() > MAX_TARGETS {
                    targets.is_cut_short = true;
                } else if is_near(to) && is_call(&instruction) {
                    targets.entries.push(to);
                    targets.calls.push((to, instruction.ip()));
                } else if is_near(to) {
                    targets.branches.push((to, instruction.ip()));
                }
            } else if instruction.code() == Code::Lea_r64_m
                && instruction.is_ip_rel_memory_operand()
            {
                let to = instruction.ip_rel_memory_address();
                if image.is_code(to) {
                    // A label whose address is taken.
                    targets.entries.extend(is_near(to).then_some(to));
                } else {
                    leas.push(to);
                }
            }
        }
        if switches {
            tables.extend(leas.drain(..));
        }
    }
    let mut left = MAX_TARGETS;
    for table in tables {
        let bytes = image.from(table).unwrap_or_default();
        for entry in bytes.chunks_exact(4).take(MAX_TABLE.min(left)) {
            left -= 1;
            let offset = u32_at(entry, 0).unwrap_or(0) as i32;
            let to = table.wrapping_add_signed(offset.into());
            if !image.is_code(to) {
                break;
            }
            targets.entries.extend(is_near(to).then_some(to));
        }
    }
    targets.is_cut_short |= left == 0;
    let mut point = |to: u64| targets.entries.extend(is_near(to).then_some(to));
    image.relocated(&mut point);
    if image.is_fixed {
        // Its pointers need no relocation, and may be anywhere in its data.
        for segment in image.segments.iter().filter(|s| !s.is_code) {
            let aligned = segment.range.start.next_multiple_of(8);
            for word in image.from(aligned).unwrap_or_default().chunks_exact(8) {
                point(u64_at(word, 0).unwrap_or(0));
            }
        }
    }
    targets
}

fn is_call(instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::Call
}

/// Where a direct branch or call leads.
fn branch_target(instruction: &Instruction) -> Option<u64> {
    let is_near =
        matches!(instruction.op0_kind(), OpKind::NearBranch64) && instruction.op_count() > 0;
    is_near.then(|| instruction.near_branch_target())
}

/// Whether control goes on to the next instruction, sometimes at least.
pub fn goes_on(instruction: &Instruction) -> bool {
    !matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Return
            | FlowControl::Exception
    )
}

/// Follows the branches from sure code into unsure pieces: what they reach is code.
/// What looks like a system call and is not reached is doubtful.
fn reach(image: &Image<'_>, pieces: &[Piece], unsure: &[Range<u64>], found: &mut Found) {
    if unsure.is_empty() {
        return;
    }
    let index_of = |address: u64| {
        let index = pieces.partition_point(|p| p.range.end <= address);
        pieces
            .get(index)
            .is_some_and(|p| p.range.contains(&address))
            .then_some(index)
    };
    let unsure_at = |address| index_of(address).map(|i| &pieces[i]).filter(|p| !p.is_sure);
    let targets = &found.targets;
    let branches = targets.branches.iter().chain(&targets.calls);
    let from_sure = branches.filter(|(_, from)| unsure_at(*from).is_none());
    let mut todo: Vec<u64> = from_sure.map(|(to, _)| *to).collect();
    todo.push(image.entry);
    // glibc's clone has no unwind information from the system call on.
    for range in unsure {
        let before = index_of(range.start).and_then(|i| i.checked_sub(1));
        let before = before
            .map(|i| &pieces[i])
            .filter(|p| p.is_sure && p.range.end == range.start);
        if before
            .and_then(|p| decode(image, &p.range).pop())
            .is_some_and(|last| goes_on(&last))
        {
            todo.push(range.start);
        }
    }
    let mut reached = BTreeSet::new();
    while let Some(start) = todo.pop() {
        let Some(piece) = unsure_at(start) else {
            continue;
        };
        let Some(bytes) = image.bytes_of(&(start..piece.range.end)) else {
            continue;
        };
        let mut decoder = Decoder::with_ip(64, bytes, start, DecoderOptions::NONE);
        while decoder.can_decode() && reached.len() < MAX_INSTRUCTIONS {
            let instruction = decoder.decode();
            if instruction.is_invalid() || !reached.insert(instruction.ip()) {
                break;
            }
            todo.extend(branch_target(&instruction));
            if !goes_on(&instruction) {
                break;
            }
            if !decoder.can_decode() {
                todo.push(instruction.next_ip());
            }
        }
    }
    for range in unsure {
        let before = index_of(range.start).and_then(|i| i.checked_sub(1));
        let before = before
            .map(|i| &pieces[i])
            .filter(|p| p.is_sure && p.range.end == range.start);
        let mut block = before.map(|p| decode(image, &p.range)).unwrap_or_default();
        let taken = block.iter().filter(|i| is_kernel_entry(i)).count();
        for address in reached.range(range.clone()) {
            let bytes = image.bytes_of(&(*address..range.end)).unwrap_or_default();
            let instruction = Decoder::with_ip(64, bytes, *address, DecoderOptions::NONE).decode();
            // Two readings of the same bytes: the later one is out of step, or hostile.
            if block.last().is_none_or(|last| last.next_ip() <= *address) {
                block.push(instruction);
            }
        }
        found
            .doubtful
            .extend(doubtful(image, range).into_iter().filter(|address| {
                let index = block.partition_point(|i| i.next_ip() <= *address);
                block.get(index).is_none_or(|i| i.ip() > *address)
            }));
        if block.iter().filter(|i| is_kernel_entry(i)).count() > taken {
            // Not twice.
            found.blocks.retain(|b| b[0].ip() != block[0].ip());
            found.blocks.push(block);
        }
    }
}

/// All instructions of a sure piece; none of one that is too long.
fn decode(image: &Image<'_>, range: &Range<u64>) -> Vec<Instruction> {
    let bytes = image
        .bytes_of(range)
        .filter(|b| b.len() <= MAX_FUNCTION)
        .unwrap_or_default();
    Decoder::with_ip(64, bytes, range.start, DecoderOptions::NONE)
        .iter()
        .collect()
}

/// System calls in a piece that nothing describes, which is read from its first byte
/// on: code is in step after a few instructions. One is taken for data if it is
/// among what is no instruction, or none that programs use.
fn doubtful(image: &Image<'_>, range: &Range<u64>) -> Vec<u64> {
    const BEFORE: usize = 8;
    const AFTER: usize = 4;
    let bytes = image.bytes_of(range).unwrap_or_default();
    let mut found = Vec::new();
    // Instructions since the last one that makes no sense.
    let mut sane = 0;
    let mut is_all_sane = true;
    let mut pending: Option<(u64, usize)> = None;
    let mut position = 0;
    while position < bytes.len() {
        let ip = range.start + position as u64;
        let instruction =
            Decoder::with_ip(64, &bytes[position..], ip, DecoderOptions::NONE).decode();
        position += if instruction.is_invalid() {
            1
        } else {
            instruction.len()
        };
        if !is_usual(&instruction) && !is_kernel_entry(&instruction) {
            sane = 0;
            is_all_sane = false;
            pending = None;
            continue;
        }
        sane += 1;
        if let Some((address, left)) = pending {
            pending = (left > 1).then_some((address, left - 1));
            if pending.is_none() {
                found.push(address);
            }
        }
        // Nobody has written a 32-bit call for long: most are data, as in libgcrypt.
        let at_start = ip - range.start < 64 && (is_all_sane || is_syscall(&instruction));
        if is_kernel_entry(&instruction) && (sane > BEFORE || at_start) && pending.is_none() {
            pending = Some((ip, AFTER));
        }
    }
    found.extend(pending.map(|(address, _)| address));
    found
}

/// Whether programs have such an instruction: bytes of data often are one that
/// belongs to kernels, or to the time of 16 bits.
fn is_usual(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let is_old = matches!(
        instruction.mnemonic(),
        In | Out
            | Insb
            | Insd
            | Insw
            | Outsb
            | Outsd
            | Outsw
            | Cli
            | Sti
            | Hlt
            | Int1
            | Int
            | Iret
            | Iretd
            | Iretq
            | Retf
            | Enter
            | Loop
            | Loope
            | Loopne
            | Jrcxz
            | Jecxz
            | Xlatb
            | Wait
            | Cmc
            | Stc
            | Std
            | Clc
            | Lahf
            | Sahf
            | Pushf
            | Popf
    );
    let has_odd_segment = matches!(
        instruction.segment_prefix(),
        Register::ES | Register::SS | Register::DS
    );
    !instruction.is_invalid() && !instruction.is_privileged() && !is_old && !has_odd_segment
}
