//! Prefix reuse by content hash.
