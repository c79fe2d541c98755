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
            let found = Joined::new(dir, id.as_bytes())
                .and_then(|path| open(path.as_bytes()))
                .is_some_and(|(fd, len)| {
                    let found = read(fd, len, &mut each);
                    sys::close(fd);
                    found
                });
            if found {
                return;
            }
        }
    }
}

/// Calls `each` with the table in a file of `len` bytes. Most are small, and a mapping
/// costs more than a copy.
fn read(fd: i32, len: usize, each: &mut impl FnMut(&Table<'_>)) -> bool {
    let mut small = [0u64; 96];
    // SAFETY: integers, for which any bits are a value.
    let bytes = unsafe {
        core::slice::from_raw_parts_mut(small.as_mut_ptr().cast::<u8>(), size_of_val(&small))
    };
    if let Some(bytes) = bytes.get_mut(..len) {
        let whole = sys::read_at(fd, bytes, 0) == len;
        let table = Table::read(bytes).filter(|_| whole);
        if let Some(table) = table {
            each(&table);
        }
        return table.is_some();
    }
    let Some(at) = sys::map_to_read(fd, len) else {
        return false;
    };
    // SAFETY: just mapped for `len` bytes, read only, private, unmapped below.
    // The file is never changed once it has its name.
    let table = Table::read(unsafe { core::slice::from_raw_parts(at, len) });
    if let Some(table) = table {
        each(&table);
    }
    let found = table.is_some();
    sys::unmap(at.cast_mut(), len);
    found
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

/// Opens a file that says what code to change: only one that nobody but root or
/// this user can have written. Its length as well.
fn open(path: &[u8]) -> Option<(i32, usize)> {
    const OTHERS_WRITE: u32 = 0o022;
    const MAX: usize = size_of::<Header>() + MAX_SITES as usize * size_of::<Record>();
    let fd = sys::open(
        path,
        sys::O_RDONLY | sys::O_CLOEXEC | sys::O_NOFOLLOW | sys::O_NONBLOCK,
    )?;
    let len = sys::fstat(fd).and_then(|stat| {
        let len = usize::try_from(stat.size).ok()?;
        let trusted = stat.uid == 0 || stat.uid == sys::geteuid();
        let fits = (size_of::<Header>()..=MAX).contains(&len);
        (stat.is_regular() && trusted && stat.mode & OTHERS_WRITE == 0 && fits).then_some(len)
    });
    if len.is_none() {
        sys::close(fd);
    }
    Some((fd, len?))
}
