//! Routes by which a change could get around the gate. Each ends held, with no change
//! in any hold, or with a certificate that says it is not verified and why.
//!
//! The programs are those of the path suite, the checker is that of the coverage
//! table (`snapshim_tests::coverage`).

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use snapshim_tests::coverage::Bench;
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

#[track_caller]
fn route(names: &[&str]) {
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

macro_rules! routes {
    ($($test:ident: $($name:literal),+;)+) => {
        $(#[test]
        fn $test() {
            route(&[$($name),+]);
        })+
    };
}

routes! {
    inline_assembly: "C: asm";
    the_32_bit_system_call: "C: int80";
    code_made_at_run_time: "C: jit";
    the_syscall_function: "C: syscall";
    a_second_libc: "C: dlmopen";
    libc_found_by_dlsym: "C: dlsym_libc", "Python: ctypes";
    a_library_with_system_calls_of_its_own: "C: dlopen_plugin";
    a_static_program: "built as: static-glibc", "built as: static-musl", "Go static: write";
    a_set_user_id_program: "set-user-id: pwrite";
    an_empty_environment: "C: scrubbed_env";
    a_descriptor_passed_to_an_outsider: "C: passed_fd";
    stores_by_another_process: "C: process_vm_writev", "C: ptrace_poke";
    proc_self_mem: "C: proc_self_mem";
    stores_into_a_mapping: "C: map_store", "C: map_msync", "C: map_once", "C: map_mremap",
        "C: map_mprotect";
    reads_into_a_mapping: "C: map_read";
    io_uring: "C: uring_write", "C: uring_fixed", "C: uring_raw", "C: uring_rename";
    io_uring_polled_by_the_kernel: "C: uring_sqpoll";
    kernel_aio: "C: libaio";
    posix_aio: "C: aio_write", "C: lio_listio";
    the_flush_at_exit: "C: exit_main", "C: exit_exit", "C: exit_atexit", "C: exit_pthread";
    buffers_of_stdio: "C: fwrite", "C: fflush", "C: fseek_flush", "C: fgetc_flush",
        "C: input_flush", "C: full_buffer", "C: wide_stdio", "C: fclose";
    before_any_constructor: "C: preinit", "C: constructor", "C: destructor";
    musl: "built as: musl";
    programs_of_32_bits: "built as: 32-bit", "built as: static-32-bit";
    children_of_every_kind: "C: fork", "C: vfork", "C: clone_raw", "C: clone3",
        "C: posix_spawn", "C: system";
    a_thread_with_its_creators_thread_pointer: "C: clone_no_settls";
    in_a_sandbox: "C: seccomp";
    in_a_signal_handler: "C: signal_handler", "C: sigaltstack", "C: small_stack";
}
