//! Shared pieces of the tests: file systems, programs, deadlines.
