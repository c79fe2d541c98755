//! What this command can see of the machine at all.

use std::path::Path;

use super::process;

/// Processes that this command does not even know of.
pub fn blind_spots() -> Vec<String> {
    /// include/uapi/linux/nsfs.h: PID_NS_INIT_INO, USER_NS_INIT_INO.
    const FIRST_PIDS: u64 = 0xEFFF_FFFC;
    const FIRST_USERS: u64 = 0xEFFF_FFFD;
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    let is_first = |name, first| {
        let meta = std::fs::metadata(format!("/proc/self/ns/{name}"));
        meta.is_ok_and(|m| std::os::unix::fs::MetadataExt::ino(&m) == first)
    };
    let mut found = Vec::new();
    if !is_first("pid", FIRST_PIDS) {
        found.push(
            "this command is in a pid namespace of its own (a container): processes outside it \
             that have a member open or mapped are not seen; where there may be any, run it in \
             the initial pid namespace (on the host)"
                .into(),
        );
    }
    let capabilities = process::capabilities(std::process::id()).unwrap_or(0);
    let sees_all = capabilities & CAP_SYS_PTRACE != 0 && is_first("user", FIRST_USERS);
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let options = mount_of(Path::new("/proc"), &mountinfo).map(|(_, options)| options);
    found.extend(hidden_by(&options.unwrap_or_default(), sees_all));
    found
}

/// What these options of the proc file system keep from us.
fn hidden_by(options: &str, sees_all: bool) -> Option<String> {
    let hides = |option: &&str| match option.split_once('=') {
        Some(("hidepid", how)) => !matches!(how, "0" | "off") && !sees_all,
        Some(("subset", _)) => true,
        _ => false,
    };
    let option = options.split(',').find(hides)?;
    Some(format!(
        "/proc is mounted with {option}: what it does not show, processes of others above all, is \
         not seen, whatever they have open or mapped; run this command as root, with a /proc that \
         is mounted without it"
    ))
}

/// Type and options of the file system `path` is on.
pub fn mount_of(path: &Path, mountinfo: &str) -> Option<(String, String)> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let stat = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID).ok()?;
    let id = stat.stx_mnt_id.to_string();
    let line = mountinfo
        .lines()
        .find(|l| l.split(' ').next() == Some(&id))?;
    // proc_pid_mountinfo(5): the type follows the lone hyphen.
    let (_, rest) = line.split_once(" - ")?;
    let mut fields = rest.split(' ').map(str::to_owned);
    Some((fields.next()?, fields.nth(1)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_hides() {
        assert_eq!(hidden_by("rw", false), None);
        assert_eq!(hidden_by("rw,hidepid=off", false), None);
        assert!(hidden_by("rw,gid=4,hidepid=invisible", false).is_some());
        assert_eq!(hidden_by("rw,hidepid=2", true), None);
        assert!(hidden_by("rw,subset=pid", true).is_some_and(|t| t.contains("subset=pid")));
    }
}
