//! Snapshot ids: UTC timestamps with microseconds, `20261120T231700.123456Z`.
//!
//! Fixed width and most significant digit first, so that sorting by name sorts by time.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// `%f` with a width would print nanoseconds cut to it; six digits are microseconds.
const FORMAT: &str = "%Y%m%dT%H%M%S.%6fZ";
/// The form of an id: `0` stands for a digit, anything else for itself.
const FORM: &[u8] = b"00000000T000000.000000Z";

/// Whether `id` is one that [`next`] could have made. Such an id is safe as a file name.
pub(super) fn is_valid(id: &str) -> bool {
    parse(id).is_some()
}

/// The time an id stands for; `None` if it is not an id.
fn parse(id: &str) -> Option<Timestamp> {
    let same_form = id.len() == FORM.len()
        && id.bytes().zip(FORM).all(|(byte, form)| match form {
            b'0' => byte.is_ascii_digit(),
            other => byte == *other,
        });
    if !same_form {
        return None;
    }
    let time = DateTime::strptime(FORMAT, id).ok()?;
    let time = time.to_zoned(TimeZone::UTC).ok()?.timestamp();
    // A leap second, for one, would be read as another time than it says.
    (form(time) == id).then_some(time)
}

fn form(time: Timestamp) -> String {
    time.strftime(FORMAT).to_string()
}

/// An id for `now` that sorts after `last`, even if the clock has been set back since.
/// `None` if no id can follow `last`.
pub(super) fn next(now: Timestamp, last: Option<&str>) -> Option<String> {
    let step = jiff::SignedDuration::from_micros(1);
    let least = match last.and_then(parse) {
        Some(last) => last.checked_add(step).ok()?,
        None => Timestamp::UNIX_EPOCH,
    };
    let id = form(now.max(least));
    is_valid(&id).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn ids_are_timestamps() {
        let id = next(at("2026-11-20T23:17:00.123456789Z"), None).unwrap();
        assert_eq!(id, "20261120T231700.123456Z");
        assert!(is_valid(&id));
    }

    #[test]
    fn a_clock_set_back_does_not_matter() {
        let now = at("2026-11-20T23:17:00Z");
        let last = "20261231T235959.999999Z";
        assert_eq!(next(now, Some(last)).unwrap(), "20270101T000000.000000Z");
        assert_eq!(
            next(now, Some("20261120T231700.000000Z")).unwrap(),
            "20261120T231700.000001Z"
        );
        assert_eq!(
            next(now, Some("20261119T231700.000000Z")).unwrap(),
            "20261120T231700.000000Z"
        );
        assert_eq!(next(now, Some("99991230T220000.999999Z")), None);
    }

    #[test]
    fn what_is_not_an_id() {
        for name in [
            "",
            ".",
            "..",
            "latest",
            ".tmp-20261120T231700.123456Z",
            "../20261120T231700.12345Z",
            "20261120T231700.123456z",
            "20261120T231700.123456Z/",
            "2026112/T231700.123456Z",
            "20261320T231700.123456Z",
            "20261120T231760.123456Z",
            "20261120T231700.123456Z\0",
            "+0261120T231700.123456Z",
            "２0261120T231700.1234Z",
        ] {
            assert!(!is_valid(name), "{name:?}");
        }
    }
}
