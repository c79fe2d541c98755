//! The coordinator's site tables: a directory of files named after what they are of.

use snapshim_gate::sites::{Header, MAX_SITES, Record, Table};

use super::objects::Id;
use crate::{attach, sys};

/// Where the tables lie: the first directory that has one wins.
pub(super) struct Tables([&'static [u8]; 3]);

impl Tables {
    pub(super) fn find() -> Option<Tables> {
        attach::site_places_known().map(Tables)
    }

    /// Calls `each` with the table of the file `id`, if there is one.
    pub(super) fn with(&self, id: &Id, mut each: impl FnMut(&Table<'_>)) {
        for dir in self.0.iter().filter(|dir| !dir.is_empty()) {
            let Some(path) = Joined::new(dir, id.as_bytes()) else {
                continue;
            };
            let Some((at, len)) = map(path.as_bytes()) else {
                continue;
            };
            // SAFETY: just mapped for `len` bytes, read only, private, unmapped below.
            // The file is never changed once it has its name.
            let bytes = unsafe { core::slice::from_raw_parts(at, len) };
            let table = Table::read(bytes);
            let found = table.is_some();
            if let Some(table) = table {
                each(&table);
            }
            sys::unmap(at.cast_mut(), len);
            if found {
                return;
            }
        }
    }
}

struct Joined {
    bytes: [u8; 640],
    len: usize,
}

impl Joined {
    fn new(dir: &[u8], name: &[u8]) -> Option<Joined> {
        let mut joined = Joined {
            bytes: [0; 640],
            len: 0,
        };
        for part in [dir, b"/", name, b"\0"] {
            let end = joined.len + part.len();
            joined.bytes.get_mut(joined.len..end)?.copy_from_slice(part);
            joined.len = end;
        }
        Some(joined)
    }

    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

/// Maps a file that says what code to change: only one that nobody but root or
/// this user can have written.
fn map(path: &[u8]) -> Option<(*const u8, usize)> {
    const OTHERS_WRITE: u32 = 0o022;
    const MAX: usize = size_of::<Header>() + MAX_SITES as usize * size_of::<Record>();
    let fd = sys::open(
        path,
        sys::O_RDONLY | sys::O_CLOEXEC | sys::O_NOFOLLOW | sys::O_NONBLOCK,
    )?;
    let mapped = sys::fstat(fd).and_then(|stat| {
        let len = usize::try_from(stat.size).ok()?;
        let trusted = stat.uid == 0 || stat.uid == sys::geteuid();
        let fits = (size_of::<Header>()..=MAX).contains(&len);
        (stat.is_regular() && trusted && stat.mode & OTHERS_WRITE == 0 && fits)
            .then(|| sys::map_to_read(fd, len).map(|at| (at, len)))?
    });
    sys::close(fd);
    mapped
}
