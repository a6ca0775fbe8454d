//! A packet of the unix socket beside a shared-memory link.
#![no_main]

use distkv_fabric::shm::socket::{decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(packet) = decode(bytes) {
        assert_eq!(encode(&packet), bytes);
    }
});
