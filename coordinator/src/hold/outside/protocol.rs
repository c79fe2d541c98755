//! The lines between the coordinator and its guardian.
//!
//! | the coordinator says | the guardian answers |
//! |---|---|
//! | (nothing, at the start) | `ready` |
//! | `stop LEFT_US METHODS PID:START …` | `held PID:START METHOD THREADS`, `gone PID:START` or `not PID:START CAUSE` for each, then `end`; before it stops one in a way that would outlive it, `undo PID:START METHOD` |
//! | `release` | `released US`, or `fell CAUSE` if somebody went on before |
//!
//! The end of either pipe is the end of the other side.

use super::{Held, Method, Methods, Target};

/// What came of one target.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Held(Held),
    Gone,
    Not(String),
}

/// The command that stops.
pub(super) fn stop(targets: &[Target], methods: &Methods, left_us: u128) -> String {
    let mut line = format!("stop {left_us} {methods}");
    for target in targets {
        line.push_str(&format!(" {}", write_target(*target)));
    }
    line
}

/// What `stop` says: microseconds, methods and targets.
pub(super) fn read_stop(line: &str) -> Option<(u64, Vec<Method>, Vec<Target>)> {
    let mut words = line.strip_prefix("stop ")?.split(' ');
    let left = words.next()?.parse().ok()?;
    let methods: Methods = words.next()?.parse().ok()?;
    let targets = words.map(read_target).collect::<Option<_>>()?;
    Some((left, methods.0, targets))
}

fn write_target(target: Target) -> String {
    format!("{}:{}", target.pid, target.start)
}

fn read_target(word: &str) -> Option<Target> {
    let (pid, start) = word.split_once(':')?;
    Some(Target {
        pid: pid.parse().ok()?,
        start: start.parse().ok()?,
    })
}

/// An answer as a line.
pub(super) fn answer(target: Target, answer: &Answer) -> String {
    let who = write_target(target);
    match answer {
        Answer::Held(held) => format!("held {who} {} {}", held.method, held.threads),
        Answer::Gone => format!("gone {who}"),
        // One line, whatever a process calls itself.
        Answer::Not(cause) => format!("not {who} {}", cause.replace(['\n', '\r'], " ")),
    }
}

/// What the coordinator has to undo if the guardian cannot.
pub(super) fn undo(target: Target, method: Method) -> String {
    format!("undo {} {method}", write_target(target))
}

/// The same, out of a line.
pub(super) fn read_undo(line: &str) -> Option<(Target, Method)> {
    let (who, method) = line.strip_prefix("undo ")?.split_once(' ')?;
    Some((read_target(who)?, method.parse().ok()?))
}

/// An answer out of a line.
pub(super) fn read_answer(line: &str) -> Option<(Target, Answer)> {
    let (what, rest) = line.split_once(' ')?;
    let (who, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let target = read_target(who)?;
    let answer = match what {
        "gone" => Answer::Gone,
        "not" => Answer::Not(rest.to_owned()),
        "held" => {
            let mut words = rest.split(' ');
            Answer::Held(Held {
                method: words.next()?.parse().ok()?,
                threads: words.next()?.parse().ok()?,
            })
        }
        _ => return None,
    };
    Some((target, answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive() {
        let target = Target { pid: 7, start: 99 };
        let line = stop(&[target, target], &Methods::default(), 1500);
        assert_eq!(line, "stop 1500 ptrace 7:99 7:99");
        let (left, methods, targets) = read_stop(&line).unwrap();
        assert_eq!(
            (left, methods, targets),
            (1500, vec![Method::Ptrace], vec![target; 2])
        );
        let held = Held {
            method: Method::Sigstop,
            threads: 3,
        };
        for (given, expected) in [
            (Answer::Held(held), "held 7:99 sigstop 3"),
            (Answer::Gone, "gone 7:99"),
            (Answer::Not("a b\nc".into()), "not 7:99 a b c"),
        ] {
            let line = answer(target, &given);
            assert_eq!(line, expected);
            let (who, back) = read_answer(&line).unwrap();
            assert_eq!((who, answer(target, &back)), (target, line));
        }
        assert!(read_answer("held 7:99 magic 3").is_none());
        let line = undo(target, Method::Freezer);
        assert_eq!(read_undo(&line), Some((target, Method::Freezer)));
        assert!(read_stop("stop x ptrace").is_none() && read_answer("end").is_none());
    }
}
