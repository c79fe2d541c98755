//! What the bytes of a snapshot's files were: a BLAKE3 digest of each.
//!
//! BLAKE3 is a tree over the bytes. Of a file larger than 1 MiB, the values of the
//! subtrees of 1 MiB (*chunks*) are kept beside the manifest, in the snapshot's file
//! `digests`; the digest follows from them. A file of the next snapshot that shares
//! extents with its predecessor is then read only where it does not: what shares its place
//! on the disk with a file that nobody has written to since it was digested has the same
//! bytes.
//!
//! | module | what it does |
//! |---|---|
//! | `tree` | digests of files, holes not read, chunks left out whose value is known |
//! | `sidecar` | the file `digests` |
//! | `in_memory` | values of what is captured while it is in memory |
//! | `compute` | the digests of a snapshot in the making |

mod compute;
mod in_memory;
mod sidecar;
mod tree;

use blake3::Hash;

pub use compute::{Digested, digest};
pub use in_memory::InMemory;
pub(crate) use in_memory::Pieces;
pub(crate) use tree::hash_file;

/// How a digest begins in the manifest.
const ALGORITHM: &str = "blake3:";

/// The manifest's form of a digest.
pub fn form(digest: &Hash) -> String {
    format!("{ALGORITHM}{}", digest.to_hex())
}

/// What a digest in a manifest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// One that can be compared.
    Blake3(Hash),
    /// Of an algorithm that this program does not know.
    Foreign,
    /// Not a digest.
    Damaged,
}

/// Reads the manifest's form of a digest.
pub fn parse(text: &str) -> Parsed {
    if let Some(digits) = text.strip_prefix(ALGORITHM) {
        return match Hash::from_hex(digits) {
            Ok(hash) => Parsed::Blake3(hash),
            Err(_) => Parsed::Damaged,
        };
    }
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match text.split_once(':') {
        Some((name, digits))
            if !name.is_empty()
                && name.chars().all(word)
                && !digits.is_empty()
                && digits.bytes().all(|b| b.is_ascii_hexdigit()) =>
        {
            Parsed::Foreign
        }
        _ => Parsed::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let hash = blake3::hash(b"x");
        let text = form(&hash);
        assert_eq!(text.len(), 7 + 64);
        assert_eq!(parse(&text), Parsed::Blake3(hash));
        assert_eq!(parse("sha256:00ff"), Parsed::Foreign);
        for bad in [
            "",
            ":",
            "blake3:",
            "blake3:00",
            "BLAKE3:00",
            "x",
            "a b:00",
            "sha256:xy",
        ] {
            assert_eq!(parse(bad), Parsed::Damaged, "{bad}");
        }
        assert_eq!(parse(&text[..text.len() - 1]), Parsed::Damaged);
    }
}
