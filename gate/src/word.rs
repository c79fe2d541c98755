//! The gate word: state and epoch of the set in one futex.
//!
//! Low three bits: the state. The next: whether calls mark what they change, whatever the
//! state; every change of state leaves it as it is, but for that from a hold to its guard. The
//! rest: the epoch, raised by one on every change of state, so that a compare-and-swap
//! against a word once seen can only succeed if nothing happened since. It wraps after
//! 2²⁷ holds.

/// Bits of the word that hold the state.
pub const STATE_MASK: u32 = 0x7;
/// Calls mark what they change, see [`crate::marks`]: none passes without a further look.
pub const MARKS: u32 = 0x8;
/// One step of the epoch.
pub const EPOCH: u32 = 0x10;

/// Calls pass.
pub const OPEN: u32 = 0;
/// Calls that change a member wait.
pub const CLOSED: u32 = 1;
/// The cut is made, and what it covers is still being captured: calls pass, but for
/// those that would change what is not captured yet, see [`crate::guard`].
pub const GUARDED: u32 = 2;
/// Calls pass, and what they do is noted in [`crate::watch::Watch`]; the call that
/// reaches a commit point shuts the gate.
pub const ARMED: u32 = 3;
// A shim that does not know a state treats it as CLOSED, which is bounded and safe.

/// The state in `word`.
#[inline(always)]
pub const fn state(word: u32) -> u32 {
    word & STATE_MASK
}

/// Whether calls pass without a further look.
#[inline(always)]
pub const fn is_free(word: u32) -> bool {
    word & (STATE_MASK | MARKS) == OPEN
}

/// Whether calls pass, be it that they mark what they change.
#[inline(always)]
pub const fn is_open(word: u32) -> bool {
    state(word) == OPEN
}

/// Whether calls mark what they change.
#[inline(always)]
pub const fn has_marks(word: u32) -> bool {
    word & MARKS != 0
}

/// Whether calls pass and are noted.
#[inline(always)]
pub const fn is_armed(word: u32) -> bool {
    state(word) == ARMED
}

/// Whether calls pass if what they change is captured.
#[inline(always)]
pub const fn is_guarded(word: u32) -> bool {
    state(word) == GUARDED
}

/// The guarded word of the hold `closed`. Of the same epoch: closings go on to alternate
/// between the two tables. From then on calls mark what they change, or do no more.
pub const fn guarded(closed: u32, has_marks: bool) -> u32 {
    let marks = if has_marks { MARKS } else { 0 };
    (closed & !(STATE_MASK | MARKS)) | GUARDED | marks
}

/// The epoch in `word`.
pub const fn epoch(word: u32) -> u32 {
    word >> EPOCH.trailing_zeros()
}

/// The word that follows `word` with another state.
#[inline(always)]
pub const fn next(word: u32, state: u32) -> u32 {
    (word & !STATE_MASK).wrapping_add(EPOCH) | state
}

/// Which of the two member tables `word` selects.
///
/// Open (or armed) and closed alternate, so the second bit of the epoch changes with each
/// close: the table of one hold is left alone until the hold after the next. (Before the
/// gate is armed both are written: each boundary that is refused is a hold.)
#[inline(always)]
pub const fn bank(word: u32) -> usize {
    ((epoch(word) >> 1) & 1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closings_alternate_banks_and_never_repeat_a_word() {
        let mut word = OPEN;
        let mut last_bank = None;
        for _ in 0..9 {
            let closed = next(word, CLOSED);
            assert!(!is_open(closed) && closed != word);
            assert_ne!(Some(bank(closed)), last_bank);
            last_bank = Some(bank(closed));
            // A guarded gate is the same hold.
            assert_ne!(guarded(closed, false), closed);
            assert_eq!(next(guarded(closed, false), OPEN), next(closed, OPEN));
            word = next(closed, OPEN);
            assert!(is_open(word));
        }
    }

    #[test]
    fn marks_outlast_every_state() {
        let mut word = guarded(next(OPEN, CLOSED), true);
        for state in [OPEN, ARMED, CLOSED, OPEN] {
            assert!(has_marks(word) && !is_free(word));
            word = next(word, state);
            assert_eq!(super::state(word), state);
        }
        assert!(is_open(word) && !is_free(word));
        let last = guarded(next(word, CLOSED), false);
        assert!(!has_marks(last) && is_free(next(last, OPEN)));
    }

    #[test]
    fn the_epoch_wraps_without_touching_the_state() {
        let last = !(STATE_MASK | MARKS);
        assert_eq!(next(last, CLOSED), CLOSED);
        assert_eq!(epoch(last), u32::MAX >> 4);
    }
}
