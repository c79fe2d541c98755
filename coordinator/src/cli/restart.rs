//! `run --restore-on-crash --restart`: what becomes of a program that crashed.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use crate::Result;
use crate::checkpoint::{Options, checkpoint};
use crate::commit::{CommitPoint, Otherwise};
use crate::crash;
use crate::hold::set::Set;
use crate::hold::witness::Witness;

use super::args::CrashArgs;
use super::output;
use super::progress::Meter;

/// Before the second start in a row, and doubled for each after it.
const FIRST: Duration = Duration::from_millis(100);
/// But never longer than this.
const LONGEST: Duration = Duration::from_secs(30);

/// Decides, from crash to crash.
pub struct Crashes<'a> {
    args: &'a CrashArgs,
    set: &'a Set,
    options: Options,
    /// Starts since there was last a new good snapshot.
    in_a_row: u32,
    /// The newest good snapshot at the last start.
    newest: Option<String>,
    /// The snapshot taken before the first start.
    first: Option<String>,
    /// Tells every coordinator of the set of the program's end.
    witness: Option<Witness>,
}

/// What to do about the end of the program.
pub enum Next {
    /// Nothing: we end as it did.
    End,
    /// Start it again, after so long.
    Start(Duration),
}

impl<'a> Crashes<'a> {
    /// Before the first start. If files are to be put back, there is something to put back
    /// from the beginning.
    pub fn new(args: &'a CrashArgs, set: &'a Set, options: Options) -> Result<Crashes<'a>> {
        let options = Options {
            wait: Duration::from_secs(10),
            ..options
        };
        let mut first = None;
        let mut witness = None;
        if args.restore_on_crash {
            let at_rest = Options {
                at: CommitPoint::Write,
                otherwise: Otherwise::Fail,
                ..options.clone()
            };
            let made = checkpoint(set, &at_rest, &mut Meter::new(false))?;
            if let Some(reason) = made.manifest.reasons.first() {
                output::note(&format!(
                    "snapshim: the files as they are now are no good to go back to: {}",
                    output::name(&reason.text)
                ));
            }
            first = Some(made.manifest.id);
            witness = Some(Witness::of(set)?);
        }
        let mut crashes = Crashes {
            newest: None,
            first,
            witness,
            args,
            set,
            options,
            in_a_row: 0,
        };
        if crashes.are_handled() {
            crashes.newest = crashes.newest_now();
        }
        Ok(crashes)
    }

    /// After the program was started.
    pub fn started(&self, pid: u32) {
        if let Some(witness) = &self.witness
            && let Err(error) = witness.name(pid)
        {
            output::error(&format!("snapshim: {error}"));
        }
    }

    /// After the program has ended. `asked`: somebody told it to, through us.
    pub fn ended(&mut self, status: ExitStatus, asked: bool) -> Next {
        let now = jiff::Timestamp::now();
        let Some(how) = self.crash(status).filter(|_| !asked) else {
            return Next::End;
        };
        if !self.are_handled() {
            return Next::End;
        }
        let newest = self.newest_now();
        if newest != self.newest {
            self.in_a_row = 0;
            self.newest = newest;
        }
        if self.args.restore_on_crash {
            match crash::put_back(
                self.set,
                &self.options,
                self.first.as_deref(),
                now,
                &how,
                &mut Meter::new(false),
            ) {
                Ok(done) => output::note(&format!(
                    "snapshim: the program {how}: put back {}; what it left is {}",
                    done.id, done.crashed
                )),
                Err(error) => {
                    output::error(&format!(
                        "snapshim: the program {how}, and its files stay as they are: {}",
                        output::name(&error.to_string())
                    ));
                    return Next::End;
                }
            }
        }
        let Some(most) = self.args.restart else {
            return Next::End;
        };
        if self.in_a_row >= most {
            output::error(&format!(
                "snapshim: the program {how}, {} times in a row without a new good snapshot: it is \
                 not started again",
                self.in_a_row + 1
            ));
            return Next::End;
        }
        let pause = match self.in_a_row {
            0 => Duration::ZERO,
            n => FIRST.saturating_mul(1 << (n - 1).min(16)).min(LONGEST),
        };
        self.in_a_row += 1;
        Next::Start(pause)
    }

    fn are_handled(&self) -> bool {
        self.args.restart.is_some() || self.args.restore_on_crash
    }

    /// The newest good snapshot. A store that cannot be used has none, and keeps no program
    /// from starting.
    fn newest_now(&self) -> Option<String> {
        crash::newest(self.set).ok().flatten()
    }

    /// How it ended, if that is a crash.
    fn crash(&self, status: ExitStatus) -> Option<String> {
        if let Some(signal) = status.signal() {
            return Some(format!("was ended by signal {signal}"));
        }
        let code = status.code()?;
        self.args
            .crash_status
            .contains(&code)
            .then(|| format!("ended with status {code}"))
    }
}
