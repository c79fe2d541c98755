//! Whether a file's bytes are those that its manifest vouches for.

use std::os::fd::AsFd;

use rustix::io::Errno;

const CHUNK: usize = 256 << 10;

/// A digest as manifests have it: `blake3:` and 64 hexadecimal digits.
pub(super) fn parse(text: &str) -> Option<blake3::Hash> {
    blake3::Hash::from_hex(text.strip_prefix("blake3:")?).ok()
}

/// That of an open file. `None` if `go_on` said no.
///
/// # Errors
///
/// The file cannot be read.
pub(super) fn of(
    file: impl AsFd,
    buffer: &mut Vec<u8>,
    go_on: &mut dyn FnMut() -> bool,
) -> rustix::io::Result<Option<blake3::Hash>> {
    buffer.resize(CHUNK, 0);
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    loop {
        if !go_on() {
            return Ok(None);
        }
        match rustix::io::pread(&file, &mut buffer[..], at) {
            Ok(0) => return Ok(Some(hasher.finalize())),
            Ok(got) => {
                hasher.update(&buffer[..got]);
                at += got as u64;
            }
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause),
        }
    }
}
