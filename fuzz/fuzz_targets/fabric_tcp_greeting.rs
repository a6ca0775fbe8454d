//! The handshake's reader, fed in pieces of any length: never a panic, never
//! more consumed than given, and a complete greeting encodes to what was read.
#![no_main]

use distkv_fabric::tcp::handshake::{Reader, greeting};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = (usize::from(input.0) + 1, input.1);
    let (mut reader, mut at) = (Reader::default(), 0);
    while at < bytes.len() {
        let piece = &bytes[at..(at + cut).min(bytes.len())];
        let Ok((taken, hello)) = reader.feed(piece) else { return };
        assert!(taken <= piece.len());
        at += taken;
        if let Some(hello) = hello {
            assert_eq!(greeting(&hello), bytes[..at]);
            return;
        }
        assert_eq!(taken, piece.len(), "an incomplete greeting takes all there is");
    }
});
