//! The machine, in words.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::process;

fn first_line(program: &str, args: &[&str]) -> Option<String> {
    if !process::installed(program) {
        return None;
    }
    let mut command = Command::new(program);
    command.args(args);
    let ended = process::run(command, Duration::from_secs(10));
    ended.out().lines().next().map(|l| l.trim().to_owned())
}

/// One line for each thing that matters.
pub fn describe(buffered_loops: bool) -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let virtual_one = read("/proc/cpuinfo").contains(" hypervisor ");
    let memory: u64 = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|t| t.split(' ').next()?.parse().ok())
        .unwrap_or(0);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    let libc = first_line("getconf", &["GNU_LIBC_VERSION"]).unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel: String = kernel
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    let date = first_line("date", &["-u", "+%F"]).unwrap_or_default();
    let at = std::env::temp_dir();
    let disk = first_line("stat", &["-f", "-c", "%T", at.to_str().unwrap_or("/")]);
    let tools = [
        ("rsync", "--version"),
        ("restic", "version"),
        ("btrfs", "--version"),
        ("sqlite3", "--version"),
    ];
    let versions: Vec<String> = tools
        .iter()
        .filter_map(|(tool, flag)| {
            let line = first_line(tool, &[flag])?;
            let number = line.split_whitespace().find(|word| {
                let digits = word.trim_start_matches('v');
                digits.starts_with(|c: char| c.is_ascii_digit()) && digits.contains('.')
            })?;
            Some(format!("{tool} {}", number.trim_start_matches('v')))
        })
        .collect();
    vec![
        format!(
            "{date}: {cpus} CPUs of {cpu}{}, {} GiB of memory, Linux {kernel}, {libc}",
            if virtual_one {
                " (a virtual machine)"
            } else {
                ""
            },
            memory >> 20
        ),
        format!(
            "file systems (tmpfs aside) of loop devices {} on {}; load average at the start {load}",
            match buffered_loops {
                true => "through the page cache",
                false => "with direct I/O, of images that were written before,",
            },
            disk.unwrap_or_default().replace("ext2/ext3", "ext4")
        ),
        versions.join(", "),
    ]
}
