//! Room for open files: how many this process may have, and the kernel's table of them.

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors left for everything else.
pub(super) const OTHERS: u64 = 700;
/// Entries of the table that are made ahead: 8 bytes each.
const TABLE: u64 = 1 << 16;

/// The limit of open files, raised for as long as this lives: programs that are started
/// later are to have the one they are used to.
#[derive(Debug)]
pub(super) struct Raised(Option<Rlimit>);

impl Raised {
    /// For so many files, two descriptors each.
    pub(super) fn for_files(count: usize) -> Raised {
        Raised::to((2 * count as u64).saturating_add(OTHERS))
    }

    fn to(needed: u64) -> Raised {
        let limit = getrlimit(Resource::Nofile);
        if limit.current.is_none_or(|current| current >= needed) {
            return Raised(None);
        }
        // Nothing here uses select(2), for which the soft limit is as low as it is.
        let raised = Rlimit {
            current: limit
                .maximum
                .map_or(Some(needed), |most| Some(needed.min(most))),
            maximum: limit.maximum,
        };
        Raised(setrlimit(Resource::Nofile, raised).is_ok().then_some(limit))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(limit) = self.0.take() {
            let _ = setrlimit(Resource::Nofile, limit);
        }
    }
}

/// Makes the kernel's table of open files large. It grows when it is full, and each time all
/// processors have to have been idle or in user space once (`expand_fdtable`, fs/file.c): 10 ms or
/// 20 that a hold must not take, and less if there are no threads yet.
pub(crate) fn make_table() {
    let _raised = Raised::to(TABLE);
    let most = getrlimit(Resource::Nofile).current.unwrap_or(TABLE);
    if let Ok(last) = i32::try_from(most.min(TABLE).saturating_sub(1)) {
        // Closed again; the table does not shrink.
        let _ = fcntl_dupfd_cloexec(std::io::stdin(), last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_large_as_may_be() {
        make_table();
        let most = getrlimit(Resource::Nofile).maximum.unwrap_or(TABLE);
        let own = std::process::id();
        let size = crate::hold::process::status_number(own, own, "FDSize:");
        assert!(u64::from(size.unwrap()) >= most.min(TABLE), "{size:?}");
    }
}
