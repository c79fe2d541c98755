//! An audit of `libsnapshim.so` as a file: it hooks every name under which this
//! machine's libc offers a call that changes files, and it loads nearly anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use snapshim_tests::process::tool;
use snapshim_tests::product;

/// The calls that change files, by their plain names.
const CALLS: &[&str] = &[
    // Bytes.
    "write",
    "pwrite",
    "writev",
    "pwritev",
    "pwritev2",
    "sendfile",
    "copy_file_range",
    "splice",
    "vmsplice",
    "tee",
    // Sizes.
    "truncate",
    "ftruncate",
    "fallocate",
    "posix_fallocate",
    // Descriptors.
    "open",
    "openat",
    "creat",
    "close",
    "dup2",
    "dup3",
    "close_range",
    "closefrom",
    // Names.
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "mknod",
    "mknodat",
    "mkfifo",
    "mkfifoat",
    "remove",
    // Metadata.
    "chmod",
    "fchmod",
    "fchmodat",
    "lchmod",
    "chown",
    "fchown",
    "lchown",
    "fchownat",
    "utime",
    "utimes",
    "futimes",
    "lutimes",
    "futimesat",
    "utimensat",
    "futimens",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
    "removexattr",
    "lremovexattr",
    "fremovexattr",
    // Mappings.
    "mmap",
    "mremap",
    "munmap",
    "mprotect",
    "msync",
    // Durability.
    "fsync",
    "fdatasync",
    "sync",
    "syncfs",
    "sync_file_range",
    // Locks and the rest.
    "fcntl",
    "flock",
    "lockf",
    "syscall",
    "ioctl",
    "prctl",
    // Streams and temporary files that libc opens by itself.
    "fopen",
    "freopen",
    "mkstemp",
    "mkostemp",
    "mkstemps",
    "mkostemps",
    "mkdtemp",
    "tmpfile",
    // POSIX AIO: threads of libc's own.
    "aio_write",
    "aio_fsync",
    "lio_listio",
];

/// Calls of other libraries that hand writes to the kernel. (Setting up a context
/// or a ring is harmless by itself, and found in `/proc` at the cut.) Not liburing's
/// own functions, only the system call's wrapper: see the hook table for why.
const OTHER_LIBRARIES: &[&str] = &["io_submit", "io_uring_enter"];

/// Names libc exports that need no hook, and why.
const WITHOUT_HOOK: &[(&str, &str)] = &[
    ("aio_fsync", "durability only"),
    ("aio_fsync64", "see aio_fsync"),
    ("tee", "from pipe to pipe: it changes no file"),
    ("vmsplice", "into a pipe: it changes no file"),
    (
        "_IO_fopen",
        "no header declares it; what it opens is written by hooked calls or found at the cut",
    ),
];

fn libc() -> PathBuf {
    let text = tool("ldd", &["/bin/true"]).out();
    let path = text
        .lines()
        .find(|l| l.trim_start().starts_with("libc.so"))
        .and_then(|l| l.split_whitespace().nth(2))
        .expect("libc in the output of ldd");
    path.into()
}

/// Exported functions: name and version.
fn exports(library: &Path) -> BTreeMap<String, String> {
    let path = library.to_str().unwrap();
    tool("nm", &["-D", "--defined-only", path])
        .out()
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (kind, name) = (words.next()?, words.next()?);
            if !"TWi".contains(kind) {
                return None;
            }
            let (name, version) = name.split_once('@').unwrap_or((name, ""));
            Some((name.to_owned(), version.trim_start_matches('@').to_owned()))
        })
        .collect()
}

/// Whether libc's `name` is `call` under another name: with underscores, 64,
/// fortified, versioned, for 64-bit times.
fn is_twin(name: &str, call: &str) -> bool {
    let stem = name
        .strip_prefix("__libc_")
        .or_else(|| name.strip_prefix("_IO_"))
        .unwrap_or_else(|| name.trim_start_matches('_'));
    let Some(rest) = stem.strip_prefix(call) else {
        return false;
    };
    let mut rest = rest;
    for suffix in ["64", "v2", "_time64", "_2", "_chk", "_nocancel"] {
        rest = rest.strip_prefix(suffix).unwrap_or(rest);
    }
    rest.is_empty()
}

#[test]
fn twins_are_recognised() {
    for twin in [
        "write",
        "__write",
        "pwrite64",
        "__pwrite64_chk",
        "__open_2",
        "__open64_2",
        "pwritev64v2",
        "__libc_pwrite",
        "__write_nocancel",
        "fcntl64",
    ] {
        assert!(CALLS.iter().any(|c| is_twin(twin, c)), "{twin}");
    }
    for other in [
        "fwrite",
        "opendir",
        "writer",
        "process_vm_writev",
        "linkx",
        "aio_write64x",
    ] {
        assert!(!CALLS.iter().any(|c| is_twin(other, c)), "{other}");
    }
}

#[test]
fn every_name_of_every_call_is_hooked() {
    let (shim, libc) = (exports(&product::shim()), exports(&libc()));
    let mut unhooked = BTreeSet::new();
    let mut hooked = 0;
    for (name, version) in &libc {
        if version == "GLIBC_PRIVATE" || !CALLS.iter().any(|call| is_twin(name, call)) {
            continue;
        }
        if shim.contains_key(name) {
            hooked += 1;
        } else if !WITHOUT_HOOK.iter().any(|(n, _)| n == name) {
            unhooked.insert(format!("{name}@{version}"));
        }
    }
    println!(
        "{hooked} names of libc are hooked; {} exports in all",
        shim.len()
    );
    assert!(
        unhooked.is_empty(),
        "libc exports these and the shim does not: {unhooked:?}"
    );
    let missing: Vec<_> = OTHER_LIBRARIES
        .iter()
        .filter(|n| !shim.contains_key(**n))
        .collect();
    assert!(missing.is_empty(), "not hooked: {missing:?}");
    for (name, _) in WITHOUT_HOOK {
        assert!(
            !shim.contains_key(*name),
            "{name} is hooked: take it off the list"
        );
    }
}

#[test]
fn it_exports_hooks_only() {
    let (shim, libc) = (exports(&product::shim()), exports(&libc()));
    let others: Vec<_> = shim
        .keys()
        .filter(|n| !libc.contains_key(*n) && !n.starts_with("io_"))
        .collect();
    // Names newer or other libcs have (musl, glibc 2.41, …) are fine; ours are not.
    println!("exports that this libc does not have: {others:?}");
    // For programs that call them: include/snapshim.h.
    let for_programs = ["snapshim_begin", "snapshim_end"];
    for name in others
        .iter()
        .filter(|n| !for_programs.contains(&n.as_str()))
    {
        for ours in ["rust", "snapshim", "_ZN", "_R", "panic", "memcpy", "memset"] {
            assert!(!name.contains(ours), "{name} is exported");
        }
    }
}

#[test]
fn it_loads_on_glibc_2_17_and_later_and_on_musl() {
    let shim = product::shim();
    let path = shim.to_str().unwrap();
    let symbols = tool("nm", &["-D", "--undefined-only", path]).out();
    for line in symbols.lines() {
        let symbol = line.split_whitespace().last().unwrap_or_default();
        let Some((name, version)) = symbol.split_once('@') else {
            continue;
        };
        let version = version.trim_start_matches('@');
        let numbers: Vec<u32> = version
            .trim_start_matches("GLIBC_")
            .split('.')
            .filter_map(|n| n.parse().ok())
            .collect();
        assert!(numbers <= vec![2, 17], "{name} needs {version}");
    }
    println!(
        "undefined: {}",
        symbols
            .split_whitespace()
            .filter(|w| w.len() > 1)
            .collect::<Vec<_>>()
            .join(" ")
    );
    let versions = tool("readelf", &["-VW", path]).out();
    for word in versions
        .split_whitespace()
        .filter(|w| w.starts_with("GLIBC_2."))
    {
        let minor: u32 = word[8..].split('.').next().unwrap().parse().unwrap();
        assert!(minor <= 17, "needs {word}");
    }
}

#[test]
fn it_is_linked_as_a_guest_should_be() {
    let shim = product::shim();
    let path = shim.to_str().unwrap();
    let dynamic = tool("readelf", &["-dW", path]).out();
    assert!(
        !dynamic.contains("(NEEDED)"),
        "it needs other libraries:\n{dynamic}"
    );
    assert!(
        dynamic.contains("BIND_NOW") || dynamic.contains("Flags: NOW"),
        "it is bound lazily, on whatever stack a hook runs:\n{dynamic}"
    );
    assert!(
        !dynamic.contains("(TEXTREL)")
            && !dynamic.contains("(RPATH)")
            && !dynamic.contains("(RUNPATH)"),
        "{dynamic}"
    );
    let segments = tool("readelf", &["-lW", path]).out();
    let tls: Vec<_> = segments
        .lines()
        .filter(|l| l.trim_start().starts_with("TLS"))
        .collect();
    // Initial-exec TLS takes from what every program has to spare at start: little.
    for line in &tls {
        let size = line
            .split_whitespace()
            .nth(5)
            .unwrap()
            .trim_start_matches("0x");
        assert!(u64::from_str_radix(size, 16).unwrap() <= 64, "{line}");
        assert!(
            dynamic.contains("STATIC_TLS"),
            "TLS that calls into the loader:\n{dynamic}"
        );
    }
    assert!(
        !segments.contains("RWE"),
        "a segment is writable and executable:\n{segments}"
    );
    let size = std::fs::metadata(&shim).unwrap().len();
    println!("{size} bytes, TLS {tls:?}");
}

#[test]
fn it_can_neither_panic_nor_allocate() {
    let shim = product::shim();
    let symbols = tool("nm", &["-a", shim.to_str().unwrap()]).out();
    let has_symbols = symbols.contains("write");
    assert!(has_symbols, "the library is stripped: nothing to look at");
    for word in [
        "core9panicking",
        "core::panicking",
        "panic_fmt",
        "panic_bounds_check",
        "rust_begin_unwind",
        "unwrap_failed",
        "expect_failed",
        "_Unwind_",
        "__rust_alloc",
    ] {
        let found: Vec<_> = symbols.lines().filter(|l| l.contains(word)).collect();
        assert!(found.is_empty(), "{found:?}");
    }
    for word in [
        "malloc",
        "calloc",
        "realloc",
        "free",
        "__tls_get_addr",
        "pthread_mutex_lock",
    ] {
        let found: Vec<_> = symbols
            .lines()
            .filter(|l| {
                l.split_whitespace()
                    .last()
                    .and_then(|n| n.split('@').next())
                    == Some(word)
            })
            .collect();
        assert!(found.is_empty(), "{found:?}");
    }
}

/// The instructions of every function, by name, as objdump shows them.
fn functions() -> BTreeMap<String, Vec<String>> {
    let shim = product::shim();
    let args = ["-d", "--no-show-raw-insn", "-M", "intel"];
    let shown = tool("objdump", &[&args[..], &[shim.to_str().unwrap()]].concat());
    let mut functions = BTreeMap::new();
    let mut name = String::new();
    for line in shown.out().lines() {
        if let Some((_, rest)) = line.strip_suffix(">:").and_then(|l| l.split_once(" <")) {
            name = rest.to_owned();
            functions.insert(name.clone(), Vec::new());
        } else if line.contains(":\t") {
            let lines = functions.get_mut(&name).expect("code in a function");
            lines.push(line.to_owned());
        }
    }
    functions
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_patched_instruction_leaves_the_vector_registers_alone() {
    let functions = functions();
    let mut seen = BTreeSet::new();
    let mut to_do = vec!["snapshim_enter".to_owned(), "snapshim_leave".to_owned()];
    let mut preserved = false;
    while let Some(name) = to_do.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        // This one saves them and puts them back; whatever it calls may use them.
        if name.contains("call_preserving") {
            preserved = true;
            continue;
        }
        let lines = functions
            .get(&name)
            .unwrap_or_else(|| panic!("{name} is not in the disassembly"));
        for line in lines {
            let uses = ["xmm", "ymm", "zmm"].iter().any(|r| line.contains(r));
            assert!(!uses, "{name} uses a vector register: {line}");
            let target = line.rsplit_once(" <").map(|(_, t)| t.trim_end_matches('>'));
            let jumps = line.contains("\tcall ") || line.contains("\tj");
            if let Some(target) = target.filter(|_| jumps) {
                to_do.push(target.split("+0x").next().unwrap_or(target).to_owned());
            }
        }
    }
    assert!(preserved && seen.len() > 4, "the way was lost: {seen:?}");
}
