//! `--stdio-records`: every stdio call that made libc write to a file flushes the
//! rest before it returns, so that the file always ends where a call ended.
//!
//! libc empties a full buffer in the middle of what a call prints; a program that
//! prints records and never flushes has half a record in its file nearly always. The
//! whole call, with its flush, is one call at the gate. Off unless the set asks for
//! it: it costs an `fstat` a call, and a write for each time a buffer runs over.

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::Relaxed;

use super::{name, on_stream};
use crate::guard::leave;
use crate::libc::{self, Stdio};
use crate::sys;

type Ptr = *mut c_void;
type Str = *const c_char;
type Wide = *const i32;

/// The set wants it.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Turns it on, or leaves it off.
pub(crate) fn want(wanted: bool) {
    WANTED.store(wanted, Relaxed);
}

/// What a call in progress has to know.
#[derive(Clone, Copy)]
struct Stream {
    at: Ptr,
    /// Whether the caller sees to it that nobody else uses the stream.
    unlocked: bool,
}

/// Makes `call`, which appends the bytes that `printed` says to what is buffered.
///
/// # Safety
/// `stream` is one of libc's.
unsafe fn record<R: Copy>(
    stream: Stream,
    call: impl FnOnce() -> R,
    printed: impl FnOnce(R) -> usize,
) -> R {
    const PTHREAD_CANCEL_DISABLE: c_int = 1;
    let (Some(stdio), errno) = (Stdio::find(), libc::errno()) else {
        return call();
    };
    let Stream { at, unlocked } = stream;
    if at.is_null() || errno.is_null() {
        return call();
    }
    // SAFETY: the caller's promise; locked, so that nobody else prints meanwhile, and not
    // to be cancelled, for nobody would unlock it. What the questions do to errno is undone.
    unsafe {
        let kept = *errno;
        let mut cancel = 0;
        (stdio.set_cancel_state)(PTHREAD_CANCEL_DISABLE, &raw mut cancel);
        if !unlocked {
            (stdio.lock)(at);
        }
        let fd = (stdio.descriptor)(at);
        let is_file = fd >= 0 && sys::fstat(fd).is_some_and(|s| s.is_regular());
        let result = if is_file {
            let frame = on_stream(fd);
            let before = (stdio.pending)(at);
            *errno = kept;
            let result = call();
            // Less than there should be: some of it has been written.
            let left = (stdio.pending)(at);
            if left > 0 && left < before.saturating_add(printed(result)) {
                let kept = *errno;
                // If it fails, the stream says so to whoever asks it.
                (stdio.flush)(at);
                *errno = kept;
            }
            leave(frame, 0);
            result
        } else {
            // Not ours: as it came, cancellable.
            if !unlocked {
                (stdio.unlock)(at);
            }
            (stdio.set_cancel_state)(cancel, core::ptr::null_mut());
            *errno = kept;
            return call();
        };
        let kept = *errno;
        if !unlocked {
            (stdio.unlock)(at);
        }
        (stdio.set_cancel_state)(cancel, core::ptr::null_mut());
        *errno = kept;
        result
    }
}

/// Bytes of a string.
fn length(text: Str) -> usize {
    // SAFETY: called only with what the program has just printed.
    unsafe { core::ffi::CStr::from_ptr(text) }.count_bytes()
}

/// What a function returned that returns how much it printed, or an error.
fn count(result: c_int) -> usize {
    usize::try_from(result).unwrap_or(0)
}

/// Wide streams convert in small pieces and count in characters: always flush.
fn unknown<R>(_: R) -> usize {
    usize::MAX
}

/// Whether a function leaves locking to its caller.
const fn is_unlocked(name: &str) -> bool {
    let name = name.as_bytes();
    // From the putc_unlocked that a compiler has put in its place.
    matches!(name, b"__overflow")
        || matches!(
            name,
            [.., b'_', b'u', b'n', b'l', b'o', b'c', b'k', b'e', b'd']
        )
}

/// Makes one exported function of each row:
///
/// ```text
/// name(arguments) -> result: the stream, what the call printed given its result;
/// ```
macro_rules! records {
    ($( $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty: $stream:expr, $printed:expr; )*) => {
        pub(super) mod behind {
            use crate::next::Next;
            $( #[allow(non_upper_case_globals)] pub(super) static $name: Next = Next::new(); )*
        }

        /// Finds the functions behind those hooks that have no frame.
        pub(super) fn resolve() {
            variadic::resolve();
        }

        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
                let Some(at) = behind::$name.get(name!($name)) else {
                    return -1i32 as $ret;
                };
                let call = || {
                    // SAFETY: the next definition of the name has the row's
                    // signature; the call is the program's own, handed on.
                    unsafe {
                        let call: unsafe extern "C" fn($($ty),*) -> $ret =
                            core::mem::transmute(at);
                        call($($arg),*)
                    }
                };
                if !WANTED.load(Relaxed) {
                    return call();
                }
                let stream = Stream {
                    at: $stream,
                    unlocked: is_unlocked(stringify!($name)),
                };
                // SAFETY: the program's stream, and its strings.
                unsafe { record(stream, call, $printed) }
            }
        )*
    };
}

records! {
    fwrite(buffer: Ptr, size: usize, items: usize, stream: Ptr) -> usize: stream, |n| n * size;
    fwrite_unlocked(buffer: Ptr, size: usize, items: usize, stream: Ptr) -> usize: stream, |n| n * size;
    fputs(text: Str, stream: Ptr) -> c_int: stream, |_| length(text);
    fputs_unlocked(text: Str, stream: Ptr) -> c_int: stream, |_| length(text);
    puts(text: Str) -> c_int: libc::stdout(), |_| length(text) + 1;
    fputc(byte: c_int, stream: Ptr) -> c_int: stream, |_| 1;
    fputc_unlocked(byte: c_int, stream: Ptr) -> c_int: stream, |_| 1;
    putc(byte: c_int, stream: Ptr) -> c_int: stream, |_| 1;
    _IO_putc(byte: c_int, stream: Ptr) -> c_int: stream, |_| 1;
    putc_unlocked(byte: c_int, stream: Ptr) -> c_int: stream, |_| 1;
    putchar(byte: c_int) -> c_int: libc::stdout(), |_| 1;
    putchar_unlocked(byte: c_int) -> c_int: libc::stdout(), |_| 1;
    __overflow(stream: Ptr, byte: c_int) -> c_int: stream, |_| 1;
    putw(word: c_int, stream: Ptr) -> c_int: stream, |_| 4;
    vfprintf(stream: Ptr, format: Str, args: Ptr) -> c_int: stream, count;
    __vfprintf_chk(stream: Ptr, flag: c_int, format: Str, args: Ptr) -> c_int: stream, count;
    vprintf(format: Str, args: Ptr) -> c_int: libc::stdout(), count;
    __vprintf_chk(flag: c_int, format: Str, args: Ptr) -> c_int: libc::stdout(), count;
    fputwc(character: i32, stream: Ptr) -> i32: stream, unknown;
    fputwc_unlocked(character: i32, stream: Ptr) -> i32: stream, unknown;
    putwc(character: i32, stream: Ptr) -> i32: stream, unknown;
    putwc_unlocked(character: i32, stream: Ptr) -> i32: stream, unknown;
    putwchar(character: i32) -> i32: libc::stdout(), unknown;
    fputws(text: Wide, stream: Ptr) -> c_int: stream, unknown;
    fputws_unlocked(text: Wide, stream: Ptr) -> c_int: stream, unknown;
    vfwprintf(stream: Ptr, format: Wide, args: Ptr) -> c_int: stream, unknown;
    __vfwprintf_chk(stream: Ptr, flag: c_int, format: Wide, args: Ptr) -> c_int: stream, unknown;
    vwprintf(format: Wide, args: Ptr) -> c_int: libc::stdout(), unknown;
    __vwprintf_chk(flag: c_int, format: Wide, args: Ptr) -> c_int: libc::stdout(), unknown;
}

/// Functions with `...`: handed on as they came while nobody wants records, and
/// else made calls of the function that takes a `va_list`.
///
/// On other machines they are not hooked yet.
#[cfg(target_arch = "x86_64")]
mod variadic {
    use core::arch::naked_asm;

    use super::super::name;
    use super::WANTED;
    use crate::next::Next;

    // The x86-64 ABI (3.5.7): `struct { u32 gp_offset, fp_offset; void *overflow_arg_area,
    // *reg_save_area; }`; the area holds six general and eight vector registers.
    macro_rules! variadic {
        ($( $name:ident($fixed:literal), $last:literal => $with_list:path; )*) => {
            mod behind {
                use super::Next;
                $( #[allow(non_upper_case_globals)] pub(super) static $name: Next = Next::new(); )*
            }

            pub(super) fn resolve() {
                $( behind::$name.resolve(name!($name)); )*
            }

            $(
                #[unsafe(naked)]
                #[unsafe(no_mangle)]
                pub unsafe extern "C" fn $name() -> i32 {
                    naked_asm!(
                        ".cfi_startproc",
                        "cmp byte ptr [rip + {wanted}], 0",
                        "jne 2f",
                        "mov r11, [rip + {behind}]",
                        "cmp r11, 1",
                        "jbe 2f",
                        "jmp r11",
                        "2:",
                        "push rbp",
                        ".cfi_def_cfa_offset 16",
                        ".cfi_offset rbp, -16",
                        "mov rbp, rsp",
                        ".cfi_def_cfa_register rbp",
                        "sub rsp, 208",
                        "mov [rsp + 32], rdi",
                        "mov [rsp + 40], rsi",
                        "mov [rsp + 48], rdx",
                        "mov [rsp + 56], rcx",
                        "mov [rsp + 64], r8",
                        "mov [rsp + 72], r9",
                        "test al, al",
                        "je 3f",
                        "movaps [rsp + 80], xmm0",
                        "movaps [rsp + 96], xmm1",
                        "movaps [rsp + 112], xmm2",
                        "movaps [rsp + 128], xmm3",
                        "movaps [rsp + 144], xmm4",
                        "movaps [rsp + 160], xmm5",
                        "movaps [rsp + 176], xmm6",
                        "movaps [rsp + 192], xmm7",
                        "3:",
                        "mov dword ptr [rsp], 8 * {fixed}",
                        "mov dword ptr [rsp + 4], 48",
                        "lea rax, [rbp + 16]",
                        "mov [rsp + 8], rax",
                        "lea rax, [rsp + 32]",
                        "mov [rsp + 16], rax",
                        concat!("mov ", $last, ", rsp"),
                        "call {with_list}",
                        "leave",
                        ".cfi_def_cfa rsp, 8",
                        ".cfi_restore rbp",
                        "ret",
                        ".cfi_endproc",
                        wanted = sym WANTED,
                        behind = sym behind::$name,
                        fixed = const $fixed,
                        with_list = sym $with_list,
                    )
                }
            )*
        };
    }

    variadic! {
        fprintf(2), "rdx" => super::vfprintf;
        __fprintf_chk(3), "rcx" => super::__vfprintf_chk;
        printf(1), "rsi" => super::vprintf;
        __printf_chk(2), "rdx" => super::__vprintf_chk;
        fwprintf(2), "rdx" => super::vfwprintf;
        __fwprintf_chk(3), "rcx" => super::__vfwprintf_chk;
        wprintf(1), "rsi" => super::vwprintf;
        __wprintf_chk(2), "rdx" => super::__vwprintf_chk;
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod variadic {
    pub(super) fn resolve() {}
}
