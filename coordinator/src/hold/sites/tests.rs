use std::fs;
use std::process::Command;

use iced_x86::{Decoder, DecoderOptions};
use snapshim_gate::calls::action;
use snapshim_gate::sites::{JUMP, MOVED, NUMBERED, SUFFIX, Table};

use super::*;

const LIBC: &str = "/lib/x86_64-linux-gnu/libc.so.6";
const LINKER: &str = "/lib64/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

fn of(path: &str) -> Sites {
    compute(&fs::read(path).unwrap()).unwrap()
}

/// How many system call instructions objdump finds, which decodes from symbols on.
fn counted(path: &str) -> usize {
    let output = Command::new("objdump").args(["-d", path]).output();
    let text = output.expect("objdump (package binutils)").stdout;
    let lines = text.split(|b| *b == b'\n');
    lines.filter(|l| l.ends_with(b"\tsyscall")).count()
}

#[test]
fn every_call_of_the_usual_libraries_is_found() {
    let uring = format!("{LIBRARIES}/liburing.so.2");
    for path in [LIBC, LINKER, &uring] {
        if !Path::new(path).exists() {
            assert_eq!(path, uring, "it must be there");
            continue;
        }
        let sites = of(path);
        assert_eq!(sites.calls, counted(path), "{path}");
        assert!(sites.missed.is_empty(), "{path}");
        assert_ne!(sites.flags & COMPLETE, 0);
        assert_eq!(sites.flags & super::LIBC != 0, path == LIBC);
    }
}

/// Debian 12's, which was taken apart by hand: how many sites each number has.
#[test]
fn the_libc_that_was_taken_apart_by_hand() {
    let build = fs::File::open(LIBC).ok().and_then(|f| cache::build_id(&f));
    if build.is_none_or(|id| !id.starts_with(&[0x93, 0xac, 0x61, 0xec])) {
        eprintln!("another libc: nothing to compare with");
        return;
    }
    let sites = of(LIBC);
    for (number, expected) in [
        (1, 3),   // write
        (18, 2),  // pwrite64
        (20, 10), // writev
        (296, 2), // pwritev
        (328, 2), // pwritev2
        (40, 1),  // sendfile
        (326, 2), // copy_file_range
        (275, 2), // splice
        (77, 1),  // ftruncate
        (76, 1),  // truncate
        (285, 4), // fallocate
        (9, 1),   // mmap
        (257, 6), // openat
        (85, 2),  // creat
        (3, 7),   // close
        (436, 2), // close_range
        (72, 6),  // fcntl
        (16, 7),  // ioctl
        (74, 2),  // fsync
        (264, 1), // renameat
        (56, 0),  // clone
        (435, 0), // clone3
        (58, 0),  // vfork
        (59, 0),  // execve
        (15, 0),  // rt_sigreturn
        (231, 0), // exit_group
    ] {
        let found = sites.records.iter().filter(|r| r.number == number);
        assert_eq!(found.count(), expected, "number {number}");
    }
    let numbered = sites.records.iter().filter(|r| r.shape == NUMBERED).count();
    let unknown = sites.records.iter().filter(|r| r.number < 0).count();
    assert_eq!((sites.calls, sites.records.len()), (526, 114));
    assert_eq!((numbered, unknown), (96, 4));
}

/// What every record must be, whatever file it is of.
fn check(path: &Path, bytes: &[u8], sites: &Sites) {
    let image = Image::parse(bytes).unwrap();
    let mut end = 0;
    for record in &sites.records {
        let window = record.window().expect("a sound record");
        let at = record.address;
        let name = path.display();
        assert!(at >= end, "{name}: windows overlap at {at:#x}");
        assert!(window.len() >= JUMP);
        end = at + window.len() as u64;
        assert_eq!(image.bytes_of(&(at..end)), Some(window), "{name}: {at:#x}");
        assert!(record.number < 0 || action(record.number as usize).is_some());
        let mut position = 0;
        for instruction in &mut Decoder::with_ip(64, window, at, DecoderOptions::NONE) {
            let is_site = position == usize::from(record.before);
            assert_eq!(sweep::is_syscall(&instruction), is_site, "{name}: {at:#x}");
            assert!(!instruction.is_invalid() && !instruction.is_ip_rel_memory_operand());
            position += instruction.len();
        }
        assert_eq!(position, window.len(), "{name}: {at:#x}");
        assert!(matches!(record.shape, NUMBERED | MOVED));
    }
    let file = sites.to_bytes();
    let mut words = vec![0_u64; file.len() / 8];
    for (word, chunk) in words.iter_mut().zip(file.chunks_exact(8)) {
        *word = u64::from_le_bytes(chunk.try_into().unwrap());
    }
    // SAFETY: the bytes of the words, as long as they are.
    let aligned = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), file.len()) };
    let table = Table::read(aligned).expect("a table the shim can read");
    assert_eq!(table.records.len(), sites.records.len());
    assert_eq!(table.header.flags, sites.flags);
}

#[test]
fn all_libraries_of_this_machine() {
    const LARGE: u64 = 8 << 20;
    let is_full = std::env::var_os("SNAPSHIM_TEST_FULL").is_some();
    let mut seen = std::collections::HashSet::new();
    let (mut tables, mut records) = (0, 0);
    for entry in fs::read_dir(LIBRARIES).unwrap().flatten() {
        let Ok(path) = entry.path().canonicalize() else {
            continue;
        };
        let is_library = path.to_string_lossy().contains(".so");
        let Ok(meta) = path.metadata() else { continue };
        if !is_library || !meta.is_file() || !seen.insert(path.clone()) {
            continue;
        }
        if meta.len() > LARGE && !is_full {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        if let Ok(sites) = compute(&bytes) {
            check(&path, &bytes, &sites);
            tables += 1;
            records += sites.records.len();
        }
    }
    assert!(
        tables > 10 && records > 100,
        "{tables} tables, {records} records"
    );
}

/// Assembles a library; each function gets unwind information.
fn assembled(name: &str, functions: &[(&str, &str)], rest: &str) -> Vec<u8> {
    linked(name, functions, rest, &[])
}

/// The same, with more arguments for the linker.
fn linked(name: &str, functions: &[(&str, &str)], rest: &str, args: &[&str]) -> Vec<u8> {
    let dir = std::env::temp_dir().join(format!("snapshim-sites-{}-{name}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let mut source = String::from(".text\n");
    for (name, body) in functions {
        source += &format!(
            ".globl {name}\n.hidden {name}\n.type {name},@function\n.balign 16\n{name}:\n.cfi_startproc\n{body}\n\
             .cfi_endproc\n.size {name},.-{name}\n"
        );
    }
    source += rest;
    source += "\n.section .note.GNU-stack,\"\",@progbits\n";
    let (input, output) = (dir.join("a.s"), dir.join("a.so"));
    fs::write(&input, source).unwrap();
    let status = Command::new("cc")
        .args(["-shared", "-nostdlib", "-Wl,-s,--build-id=none", "-o"])
        .args([&output, &input])
        .args(args)
        .status()
        .expect("cc");
    assert!(status.success());
    let bytes = fs::read(&output).unwrap();
    let _ = fs::remove_dir_all(&dir);
    bytes
}

const COMPARE: &str = "cmp $0xfffffffffffff000,%rax";

#[test]
fn shapes_and_numbers() {
    let into = format!("mov $1,%eax\n1: syscall\n{COMPARE}\nja 1b\nret");
    let table = format!(
        "lea table(%rip),%rdx\nmovslq (%rdx,%rdi,4),%rcx\nadd %rdx,%rcx\njmp *%rcx\n\
         mov $1,%eax\ncase: syscall\n{COMPARE}\nret"
    );
    let bytes = assembled(
        "shapes",
        &[
            ("f0", "mov $1,%eax\nsyscall\nret"),
            ("f1", &into),
            ("f2", &table),
            // No instruction begins at these bytes.
            ("f3", "mov $0x050f0000,%ecx\nmov $0x1050f,%edx\nret"),
            ("f4", "mov $39,%eax\nsyscall\nret"),
            (
                "f5",
                "mov %rcx,%r10\nmov %rdi,%rsi\nxor %edx,%edx\nmov $77,%r8d\nmov %r8d,%eax\nsyscall\nret",
            ),
            // Two ways, one number.
            (
                "f6",
                "mov $1,%eax\ntest %edi,%edi\nje 1f\nmov $2,%esi\n1: mov %rsi,%rdx\nmov %rdx,%r9\nsyscall\nret",
            ),
            // Two ways, two numbers.
            (
                "f7",
                "mov $1,%eax\ntest %edi,%edi\nje 1f\nmov $2,%eax\n1: mov %rsi,%rdx\nmov %rdx,%r9\nsyscall\nret",
            ),
            ("f8", "mov %rdi,%rax\nmov %rsi,%rdi\nsyscall\nret"),
        ],
        ".section .rodata\n.balign 4\ntable: .long case-table, f0-table\n",
    );
    let sites = compute(&bytes).unwrap();
    check(Path::new("shapes"), &bytes, &sites);
    let found: Vec<(i32, u8, u8, u8)> = sites
        .records
        .iter()
        .map(|r| (r.number, r.shape, r.before, r.after))
        .collect();
    let expected = [
        (1, NUMBERED, 5, 0),
        (-1, MOVED, 0, 6), // something jumps to the call itself
        (-1, MOVED, 0, 6), // a jump table does
        (77, MOVED, 3, 0),
        (1, MOVED, 3, 0),
        (-1, MOVED, 3, 0),
        (-1, MOVED, 3, 0),
    ];
    assert_eq!(found, expected);
    assert_eq!((sites.calls, sites.flags), (8, COMPLETE));
}

#[test]
fn what_cannot_be_patched_makes_a_table_incomplete() {
    for (name, body) in [
        ("alone", "syscall\nret"),
        (
            "stack",
            "push %rbx\nmov %edi,%eax\npop %rbx\nsyscall\npop %rbx\nret",
        ),
        ("relative", "mov %edi,%eax\nlea f(%rip),%rsi\nsyscall\nret"),
        (
            "entered",
            "mov %edi,%eax\n1: mov %edi,%edi\nsyscall\njmp 1b",
        ),
        ("old", "mov $4,%eax\nint $0x80\nret"),
    ] {
        let bytes = assembled(name, &[("f", body)], "");
        let sites = compute(&bytes).unwrap();
        assert_eq!(sites.flags & COMPLETE, 0, "{name}: {sites:?}");
        assert_eq!((sites.records.len(), sites.missed.len()), (0, 1), "{name}");
    }
}

#[test]
fn what_nothing_describes_is_code_only_if_code_leads_there() {
    // Hand-written code without a symbol or unwind information, called from code.
    let called = ".balign 16\nhidden: mov $1,%eax\nsyscall\nret\n";
    let sites = compute(&assembled("called", &[("f", "call hidden\nret")], called)).unwrap();
    assert_eq!((sites.records.len(), sites.flags), (1, COMPLETE));
    // The same, called by nobody that can be seen: it may be code.
    let sites = compute(&assembled("uncalled", &[("f", "ret")], called)).unwrap();
    assert_eq!((sites.records.len(), sites.flags), (0, 0));
    // A 32-bit call as well.
    for entry in ["int $0x80", "sysenter"] {
        let old = format!(".balign 16\nhidden: mov $93,%eax\n{entry}\nret\n");
        let sites = compute(&assembled("old-uncalled", &[("f", "ret")], &old)).unwrap();
        assert_eq!((sites.records.len(), sites.flags), (0, 0), "{entry}");
    }
    // That of libgcrypt is none.
    let table = ".balign 16\n.byte 0xe0,0xba,0xca,0,0x4d,0x7c,0x31,0x7d,0x30,1,0x4c,0x81,0xcc,0xfd\n\
                 .byte 0xb0,0xfc,0xb1,0x80,0xcd,0x80,1,8,0xd,0xf,6,5,0xe,2,0xc,0xb,0xa,9,3,7,4,0x80\n";
    let sites = compute(&assembled("old-table", &[("f", "ret")], table)).unwrap();
    assert_eq!((sites.records.len(), sites.flags), (0, COMPLETE));
    // A table among code.
    let table =
        ".balign 16\n.byte 0x06,0x0e,0xcc,0x1e,0x6c,0xf4,0x62,0x07,0x0f,0x05,0x9a,0x41,0x0e\n";
    let sites = compute(&assembled("table", &[("f", "ret")], table)).unwrap();
    assert_eq!((sites.records.len(), sites.flags), (0, COMPLETE));
}

const WRITE: (&str, &str) = ("f", "mov $1,%eax\nsyscall\nret");

#[test]
fn what_go_has_made_is_left_alone() {
    let made = |what: &str, rest: &str, is_stripped: bool| {
        let mut bytes = assembled(what, &[WRITE], rest);
        if is_stripped {
            // No sections.
            bytes[40..48].fill(0);
            bytes[60..64].fill(0);
        }
        let sites = compute(&bytes).unwrap();
        (sites.records.len(), sites.flags)
    };
    let info = ".ascii \"\\377 Go buildinf:\"\n.byte 8,2\n";
    let section = format!(".section .go.buildinfo,\"aw\"\n.balign 16\n{info}");
    let data = format!(".data\n.balign 16\n.quad 1,2\n{info}");
    let note = ".section .note.x,\"a\",@note\n.balign 4\n.long 4,4,4\n.ascii \"Go\\0\\0abcd\"\n";
    let lines = ".section .gopclntab,\"a\"\n.quad 1\n";
    assert_eq!(made("go-section", &section, false), (0, 0));
    assert_eq!(made("go-stripped", &section, true), (0, 0));
    assert_eq!(made("go-data", &data, true), (0, 0));
    assert_eq!(made("go-note", note, true), (0, 0));
    assert_eq!(made("go-lines", lines, false), (0, 0));
    assert_eq!(
        made("no-go", ".data\n.ascii \" Go buildinf:\"\n", true),
        (1, COMPLETE)
    );
    assert_eq!(
        made("no-go", &note.replace("Go", "Gx"), true),
        (1, COMPLETE)
    );
}

#[test]
fn code_that_is_relocated_is_left_alone() {
    let relocated = ".hidden there\n.data\nthere: .quad 0\n.text\n.quad there\n";
    let bytes = linked("textrel", &[WRITE], relocated, &["-Wl,-z,notext"]);
    assert!(Image::parse(&bytes).unwrap().has_text_relocations());
    let sites = compute(&bytes).unwrap();
    assert_eq!((sites.records.len(), sites.flags), (0, 0));
    let plain = assembled("no-textrel", &[WRITE], "");
    assert!(!Image::parse(&plain).unwrap().has_text_relocations());
}

#[test]
fn code_that_can_be_written_is_left_alone() {
    // With all in one segment.
    let all = linked("omagic", &[WRITE], "", &["-Wl,--omagic"]);
    let image = Image::parse(&all).unwrap();
    assert!(image.has_writable_code());
    let sites = compute(&all).unwrap();
    assert_eq!(
        (sites.records.len(), sites.missed.len(), sites.flags),
        (0, 1, 0)
    );
    // With a segment of its own, and another for the rest.
    let mut bytes = assembled("writable", &[WRITE], "");
    let headers = image::u64_at(&bytes, 32).unwrap() as usize;
    for index in 0..usize::from(image::u16_at(&bytes, 56).unwrap()) {
        let at = headers + index * 56;
        let (kind, flags) = (image::u32_at(&bytes, at), image::u32_at(&bytes, at + 4));
        if (kind, flags) == (Some(1), Some(5)) {
            bytes[at + 4] = 7;
        }
    }
    let sites = compute(&bytes).unwrap();
    assert_eq!(
        (sites.records.len(), sites.missed.len(), sites.flags),
        (0, 1, 0)
    );
}

#[test]
fn tables_are_named_by_what_nobody_else_can_forge() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let dir = std::env::temp_dir().join(format!("snapshim-names-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let file = dir.join("a.so");
    let with_id = |id: &str| {
        let id = format!("-Wl,--build-id=0x{id}");
        fs::write(&file, linked("names", &[WRITE], "", &[&id])).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let name = || {
        let name = cache::identity(&fs::File::open(&file).unwrap()).unwrap();
        name.strip_suffix(SUFFIX).unwrap().to_owned()
    };
    let by_stat = || {
        let m = file.metadata().unwrap();
        let ctime = m.ctime() * 1_000_000_000 + m.ctime_nsec();
        format!("f-{}-{}-{}-{ctime}", m.dev(), m.ino(), m.size())
    };
    with_id("0123456789abcdEF");
    if !rustix::process::geteuid().is_root() {
        assert_eq!(name(), by_stat());
        fs::remove_dir_all(&dir).unwrap();
        return;
    }
    assert_eq!(name(), "0123456789abcdef");
    for mode in [0o775, 0o757] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(name(), by_stat(), "{mode:o}");
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    chown(&file, Some(12345), None).unwrap();
    let before = name();
    assert_eq!(before, by_stat());
    // Its owner can set the mtime, not the ctime.
    let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_times(times)
        .unwrap();
    assert_ne!(name(), before);
    chown(&file, Some(0), None).unwrap();
    assert_eq!(name(), "0123456789abcdef");
    // Too short to tell files apart.
    with_id("01234567");
    assert_eq!(name(), by_stat());
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn hostile_files_are_refused_or_read() {
    assert_eq!(compute(b"").unwrap_err(), Refused::NotElf);
    assert_eq!(
        compute(b"\x7fELF").unwrap_err(),
        Refused::Damaged("ELF headers")
    );
    let mut seed = 88_172_645_463_325_252_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as usize
    };
    let small = assembled("hostile", &[("f", "mov $1,%eax\nsyscall\nret")], "");
    let original = fs::read(LINKER).unwrap();
    for round in 0..3000 {
        let mut bytes = if round % 20 == 0 {
            original.clone()
        } else {
            small.clone()
        };
        // Headers at either end, dynamic section, symbols: anywhere, often near the start.
        for _ in 0..1 + next() % 12 {
            let reach = if next() % 2 == 0 { 1024 } else { bytes.len() };
            let at = 4 + next() % (reach.min(bytes.len()) - 4);
            bytes[at] = [0, 1, 0x7f, 0x80, 0xff, next() as u8][next() % 6];
        }
        if next() % 4 == 0 {
            bytes.truncate(next() % bytes.len());
        }
        if let Ok(sites) = compute(&bytes) {
            check(Path::new("hostile"), &bytes, &sites);
        }
    }
    for len in 0..small.len().min(4096) {
        let _ = compute(&small[..len]);
    }
}

#[test]
fn libraries_that_cancel_by_address_are_left_alone() {
    assert!(!Library::Glibc { minor: 36 }.cancels_by_address());
    assert!(!Library::Glibc { minor: 40 }.cancels_by_address());
    assert!(Library::Glibc { minor: 41 }.cancels_by_address());
    assert!(Library::Musl.cancels_by_address() && !Library::Other.cancels_by_address());
    let musl = Path::new("/lib/ld-musl-x86_64.so.1");
    if let Ok(bytes) = fs::read(musl) {
        let sites = compute(&bytes).unwrap();
        assert_eq!(sites.flags, UNPATCHABLE | super::LIBC);
        assert!(sites.records.is_empty());
    }
}

#[test]
fn tables_are_kept() {
    let dir = std::env::temp_dir().join(format!("snapshim-tables-{}", std::process::id()));
    let tables = dir.join("sites");
    let cache = Cache::open_at(&tables).unwrap();
    let first = cache.table(Path::new(LIBC)).unwrap();
    let again = cache.table(Path::new(LIBC)).unwrap();
    assert!(!first.was_there && again.was_there && again.is_complete() && again.is_libc());
    assert_eq!(first.records.len(), again.records.len());
    // What is no table, or another version's, is computed again.
    let file = tables.join(&first.name);
    fs::write(&file, "nonsense").unwrap();
    assert!(!cache.table(Path::new(LIBC)).unwrap().was_there);
    // Without a build id.
    let bytes = assembled("kept", &[("f", "ret")], "");
    let plain = dir.join("plain.so");
    fs::write(&plain, &bytes).unwrap();
    let name = cache.table(&plain).unwrap().name;
    assert!(
        name.starts_with("f-") && name.split('-').count() == 5,
        "{name}"
    );
    assert!(cache.table(Path::new("/proc")).is_err());
    assert!(cache.table(Path::new("/etc/passwd")).is_err());
    use std::os::unix::fs::PermissionsExt;
    let mode = |p: &Path| p.metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&tables), mode(&file)), (0o755, 0o644));
    assert_eq!(
        fs::read_dir(&tables).unwrap().count(),
        2,
        "nothing is left behind"
    );
    fs::set_permissions(&tables, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(Cache::open_at(&tables).is_err());
    assert!(Cache::open_at(Path::new("relative")).is_err());
    fs::remove_dir_all(&dir).unwrap();
}
