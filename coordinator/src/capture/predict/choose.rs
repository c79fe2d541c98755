//! Which method is taken, and why.

use std::time::Duration;

use super::super::Method;
use super::costs::Cost;

/// A hold that is not worth avoiding.
const SHORT: Duration = Duration::from_millis(1);
/// From this size on, bytes, a file that is overwritten in place is not cloned again and again.
pub(super) const LARGE: u64 = 16 << 20;
/// A copy that takes longer than this is dearer than what clones do to a file, and than a hold that is
/// shorter than its [`WORTH`]th part.
const PATIENCE: Duration = Duration::from_secs(10);
const WORTH: u32 = 100;

/// How a set is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Clones or copies, whichever the file systems can.
    UnderHold,
    Guarded,
    Subvolume,
}

/// What the choice depends on.
#[derive(Clone, Debug, Default)]
pub(super) struct Weighed {
    /// All files cloned or copied under the hold, without what every hold takes.
    pub(super) under: Cost,
    /// All files captured after the cut.
    pub(super) guarded: Cost,
    /// Room in the store, bytes, if that is known.
    pub(super) room: Option<u64>,
    /// Files that would be cloned, are large, and are overwritten in place: how many, and the name of
    /// the largest. Not where all is written elsewhere anyway.
    pub(super) breaking: Option<(usize, String)>,
    /// Of files that are shared with the previous snapshot, the one that takes longest if it is written to
    /// before the cut, and how long it would be copied under the hold.
    pub(super) at_worst: Option<(Duration, String)>,
    /// Whether the subvolume can be frozen, and is worth it.
    pub(super) can_freeze: bool,
    /// What makes the hold long, in words.
    pub(super) cause: Option<String>,
    /// Why they cannot be captured after the cut.
    pub(super) not_guarded: Option<String>,
}

impl Weighed {
    /// Whether it would be better to capture after the cut, if that is possible.
    fn is_better_guarded(&self) -> bool {
        self.is_worth_guarding() && !self.lacks_room()
    }

    /// The same, if there is room.
    fn is_worth_guarding(&self) -> bool {
        let is_long = self.under.hold > SHORT && !self.is_too_dear();
        let breaks = self.breaking.is_some() && self.guarded.wall <= PATIENCE;
        let may_be_long = self
            .at_worst
            .as_ref()
            .is_some_and(|(hold, _)| *hold > SHORT);
        is_long || breaks || may_be_long
    }

    /// Whether it is better to hold for a while than to copy for long.
    fn is_too_dear(&self) -> bool {
        self.guarded.wall > PATIENCE.max(self.under.hold.saturating_mul(WORTH))
    }

    /// Whether there is no room for copies, and clones take none.
    fn lacks_room(&self) -> bool {
        let more = self.guarded.bytes.saturating_sub(self.under.bytes);
        more > 0 && self.room.is_some_and(|room| self.guarded.bytes > room)
    }

    /// Whether it has to be known if they can be captured after the cut.
    pub(super) fn asks_for_guard(&self, method: Method) -> bool {
        match method {
            Method::CopyBeforeWrite => true,
            Method::Auto => !self.can_freeze && self.is_better_guarded(),
            Method::Reflink | Method::Copy | Method::Subvolume => false,
        }
    }

    /// The choice, and why.
    pub(super) fn choose(&self, method: Method) -> (Choice, String) {
        let asked = |choice| (choice, "it was asked for".to_owned());
        match method {
            Method::Reflink | Method::Copy => asked(Choice::UnderHold),
            Method::CopyBeforeWrite => match &self.not_guarded {
                None => asked(Choice::Guarded),
                Some(why) => (
                    Choice::UnderHold,
                    format!("copy-before-write was asked for, but {why}"),
                ),
            },
            Method::Subvolume => asked(Choice::Subvolume),
            Method::Auto => self.best(),
        }
    }

    fn best(&self) -> (Choice, String) {
        if self.can_freeze {
            let why = "freezing the subvolume takes as long for many files as for one";
            return (Choice::Subvolume, why.to_owned());
        }
        let hold = human(self.under.hold);
        let because = match &self.cause {
            Some(cause) => format!(" ({cause})"),
            None => String::new(),
        };
        let is_long = self.under.hold > SHORT;
        if self.is_better_guarded() {
            let better = match (is_long, &self.breaking, &self.at_worst) {
                (false, None, Some((hold, name))) => format!(
                    "{name} has not changed since the previous snapshot; if it is written to before the cut, it would take {} under the hold",
                    human(*hold)
                ),
                (false, Some((count, name)), _) => {
                    let others = match count {
                        0 | 1 => String::new(),
                        more => format!(" and {} more", more - 1),
                    };
                    format!(
                        "{name}{others} is being overwritten in place: each clone would make \
                         the next writes go elsewhere, and leave it in more pieces"
                    )
                }
                _ => format!("under the hold it would take {hold}{because}"),
            };
            return match &self.not_guarded {
                None => (Choice::Guarded, better),
                Some(why) => (Choice::UnderHold, format!("{better}; but {why}")),
            };
        }
        let why = match &self.breaking {
            _ if self.is_worth_guarding() => format!(
                "it takes {hold}{because}, and the store has no room for a copy ({} MiB)",
                self.guarded.bytes >> 20
            ),
            _ if is_long => format!(
                "it takes {hold}{because}, but a copy after the cut would take {}",
                human(self.guarded.wall)
            ),
            None => format!("it takes no longer than {hold}"),
            Some((_, name)) => format!(
                "it takes no longer than {hold}; {name} is being overwritten and clones leave it in more \
                 pieces, but a copy after the cut would take {}",
                human(self.guarded.wall)
            ),
        };
        (Choice::UnderHold, why)
    }
}

/// A duration for people.
pub(super) fn human(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    match us {
        ..1e3 => format!("{us:.0} µs"),
        ..1e6 => format!("{:.1} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weighed(hold_ms: u64) -> Weighed {
        Weighed {
            under: Cost {
                hold: Duration::from_millis(hold_ms),
                ..Cost::default()
            },
            guarded: Cost {
                wall: Duration::from_secs(1),
                bytes: 1 << 30,
                ..Cost::default()
            },
            ..Weighed::default()
        }
    }

    fn choice(weighed: &Weighed, method: Method) -> Choice {
        weighed.choose(method).0
    }

    #[test]
    fn what_is_shared_may_still_be_written_to() {
        let worst = |hold| Weighed {
            at_worst: Some((Duration::from_millis(hold), "/d/big".to_owned())),
            ..weighed(0)
        };
        let (choice, why) = worst(100).choose(Method::Auto);
        assert_eq!(choice, Choice::Guarded);
        assert!(why.contains("/d/big has not changed"), "{why}");
        assert_eq!(worst(0).choose(Method::Auto).0, Choice::UnderHold);
    }

    #[test]
    fn what_takes_long_is_guarded() {
        let auto = Method::Auto;
        assert_eq!(choice(&weighed(30), auto), Choice::Guarded);
        assert_eq!(choice(&weighed(0), auto), Choice::UnderHold);
        let asked = Method::CopyBeforeWrite;
        assert_eq!(choice(&weighed(0), asked), Choice::Guarded);
        assert_eq!(choice(&weighed(9_999), Method::Copy), Choice::UnderHold);
        let many = Weighed {
            can_freeze: true,
            ..weighed(30)
        };
        assert_eq!(choice(&many, auto), Choice::Subvolume);
        let cannot = Weighed {
            not_guarded: Some("there is no gate".into()),
            ..weighed(30)
        };
        let (choice, why) = cannot.choose(auto);
        assert_eq!(choice, Choice::UnderHold);
        assert!(why.ends_with("; but there is no gate"), "{why}");
    }

    #[test]
    fn a_copy_may_be_too_dear_or_too_large() {
        let large = |hold_ms, wall| Weighed {
            guarded: Cost {
                wall: Duration::from_secs(wall),
                bytes: 100 << 30,
                ..Cost::default()
            },
            ..weighed(hold_ms)
        };
        let (choice, why) = large(5, 300).choose(Method::Auto);
        assert_eq!(choice, Choice::UnderHold);
        assert!(why.ends_with("would take 300.0 s"), "{why}");
        assert_eq!(large(5, 9).choose(Method::Auto).0, Choice::Guarded);
        assert_eq!(large(5_000, 300).choose(Method::Auto).0, Choice::Guarded);
        let with_room = |room: u64| Weighed {
            room: Some(room << 30),
            ..large(5_000, 300)
        };
        assert_eq!(with_room(101).choose(Method::Auto).0, Choice::Guarded);
        let (choice, why) = with_room(99).choose(Method::Auto);
        assert_eq!(choice, Choice::UnderHold);
        assert!(why.contains("no room for a copy (102400 MiB)"), "{why}");
        // Whoever would clone anyway needs none.
        let (_, why) = Weighed {
            room: Some(0),
            ..large(0, 300)
        }
        .choose(Method::Auto);
        assert_eq!(why, "it takes no longer than 0 µs");
        // Nothing is gained where it would be copied all the same.
        let copied = Weighed {
            under: Cost {
                bytes: 100 << 30,
                ..weighed(5_000).under
            },
            ..with_room(99)
        };
        assert_eq!(copied.choose(Method::Auto).0, Choice::Guarded);
    }

    #[test]
    fn what_clones_would_break_up_is_copied_unless_that_takes_too_long() {
        let breaking = |wall| Weighed {
            breaking: Some((2, "/data/db".into())),
            guarded: Cost {
                wall: Duration::from_secs(wall),
                ..Cost::default()
            },
            ..weighed(0)
        };
        let (choice, why) = breaking(2).choose(Method::Auto);
        assert_eq!(choice, Choice::Guarded);
        assert!(why.starts_with("/data/db and 1 more"), "{why}");
        let (choice, why) = breaking(60).choose(Method::Auto);
        assert_eq!(choice, Choice::UnderHold);
        assert!(why.contains("would take 60.0 s"), "{why}");
        assert_eq!(breaking(2).choose(Method::Reflink).0, Choice::UnderHold);
    }
}
