//! Routes by which a change could get around the gate. Most are held, by the layer that
//! is named here, and must stay so; the rest end with a certificate that says it is not
//! verified and why, or held.
//!
//! The programs are those of the path suite, the checker is that of the coverage
//! table (`snapshim_tests::coverage`).

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use snapshim_tests::coverage::{Bench, Stop};
use snapshim_tests::{paths, rounds};

/// One after the other, in the same surroundings.
fn bench() -> MutexGuard<'static, Option<Bench>> {
    static BENCH: Mutex<Option<Bench>> = Mutex::new(None);
    let mut bench = BENCH.lock().unwrap_or_else(|e| e.into_inner());
    if bench.is_none() {
        *bench = Bench::new("bypass", Duration::from_secs(3600));
    }
    bench
}

/// Measures these ways. Unless `layer` is "any", they have to be held, and by it.
#[track_caller]
fn route(layer: &str, names: &[&str]) {
    let mut bench = bench();
    let Some(bench) = bench.as_mut() else {
        return;
    };
    for name in names {
        let row = bench.measure(&paths::way(name), rounds(20, 5), false);
        assert_eq!(row.needs, None, "{name}: this test needs it");
        println!(
            "{name}: {} of {} verified, {} changes in them all; {:?}; {:?}",
            row.verified, row.holds, row.changes, row.layers, row.reasons
        );
        assert!(row.faults.is_empty(), "{name}: {:?}", row.faults);
        assert!(row.usual > 0.0, "{name}: nothing was to be seen");
        // Either it was held, or a reason with a code that is a word says why not.
        let is_code = |code: &String| {
            !code.is_empty() && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
        };
        let has_reason = !row.reasons.is_empty() && row.reasons.keys().all(is_code);
        assert!(
            row.is_held() || has_reason || row.unpublished.0 > 0,
            "{name}: neither held nor a reason: {row:?}"
        );
        let is_by = match layer {
            "any" => true,
            // By whichever: before its code is known, a library's writer is stopped.
            "held" => row.is_held(),
            _ => row.is_held() && row.layers.contains(layer),
        };
        assert!(is_by, "{name}: not held by {layer}: {row:?}");
    }
}

#[test]
fn the_checker_finds_what_is_not_held() {
    let mut bench = bench();
    let Some(bench) = bench.as_mut() else {
        return;
    };
    let row = bench.control(3);
    println!(
        "the control: {} of {} verified, {:?}",
        row.verified, row.holds, row.faults
    );
    assert!(
        row.verified > 0 && row.changes > row.holds && !row.is_honest() && !row.is_held(),
        "{row:?}"
    );
}

/// What is said to be held from outside is judged from when it is stopped, and only if
/// it stays so.
#[test]
fn the_checker_finds_who_is_not_stopped() {
    let mut bench = bench();
    let Some(bench) = bench.as_mut() else {
        return;
    };
    for stop in [Stop::Never, Stop::LetGoEarly, Stop::Throughout] {
        let row = bench.forged(stop, 3);
        println!(
            "{stop:?}: {} of {} verified, {} changes, {:?}",
            row.verified, row.holds, row.changes, row.faults
        );
        assert_eq!(row.verified, 3, "{row:?}");
        let ran_on = row.faults.iter().filter(|f| f.contains("went on")).count();
        match stop {
            Stop::Never => assert!(row.changes > row.holds && !row.is_honest(), "{row:?}"),
            Stop::LetGoEarly => assert!(row.changes > row.holds && ran_on == 3, "{row:?}"),
            Stop::Throughout => assert!(row.is_held() && row.is_honest(), "{row:?}"),
        }
    }
}

macro_rules! routes {
    ($($test:ident: $($layer:literal [$($name:literal),+])+;)+) => {
        $(#[test]
        fn $test() {
            $(route($layer, &[$($name),+]);)+
        })+
    };
}

routes! {
    inline_assembly: "sites" ["C: asm"] "any" ["C: asm_number"];
    the_32_bit_system_call: "held" ["C: int80"];
    code_made_at_run_time: "any" ["C: jit"];
    the_syscall_function: "sites" ["C: syscall"];
    a_second_libc: "sites" ["C: dlmopen"];
    libc_found_by_dlsym: "sites" ["C: dlsym_libc", "Python: ctypes", "Python: ctypes-stdio"];
    a_library_with_system_calls_of_its_own: "held" ["C: dlopen_plugin"];
    a_static_program: "ptrace" ["built as: static-glibc", "built as: static-musl",
        "Go static: write"];
    a_set_user_id_program: "ptrace" ["set-user-id: pwrite"];
    an_empty_environment: "ptrace" ["C: scrubbed_env"];
    a_descriptor_passed_to_an_outsider: "ptrace" ["C: passed_fd"];
    stores_by_process_vm_writev: "held" ["C: process_vm_writev"];
    stores_by_a_debugger: "any" ["C: ptrace_poke"];
    proc_self_mem: "ptrace" ["C: proc_self_mem"];
    stores_into_a_mapping: "ptrace" ["C: map_store", "C: map_msync", "C: map_mremap",
        "C: map_mprotect"] "any" ["C: map_once"];
    reads_into_a_mapping: "ptrace" ["C: map_read"];
    io_uring: "sites" ["C: uring_write", "C: uring_fixed", "C: uring_raw", "C: uring_rename"];
    io_uring_polled_by_the_kernel: "any" ["C: uring_sqpoll"];
    kernel_aio: "any" ["C: libaio"];
    posix_aio: "sites" ["C: aio_write", "C: lio_listio"];
    the_flush_at_exit: "sites" ["C: exit_main", "C: exit_exit", "C: exit_atexit",
        "C: exit_pthread"];
    buffers_of_stdio: "sites" ["C: fwrite", "C: fflush", "C: fseek_flush", "C: fgetc_flush",
        "C: input_flush", "C: full_buffer", "C: wide_stdio", "C: fclose"];
    before_any_constructor: "sites" ["C: preinit", "C: constructor", "C: destructor"];
    musl: "any" ["built as: musl"];
    programs_of_32_bits: "ptrace" ["built as: 32-bit", "built as: static-32-bit"];
    children_of_every_kind: "sites" ["C: fork", "C: vfork", "C: clone_raw", "C: clone3",
        "C: posix_spawn", "C: system"];
    a_thread_with_its_creators_thread_pointer: "sites" ["C: clone_no_settls"];
    in_a_sandbox: "sites" ["C: seccomp"];
    in_a_signal_handler: "sites" ["C: signal_handler", "C: sigaltstack", "C: small_stack"];
}
