//! Any bytes give a control message or an error, and likewise a datagram; each has
//! exactly one encoding.
#![no_main]

use distkv::control::message::{Message, Packet};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = Message::decode(bytes) {
        let mut again = Vec::with_capacity(bytes.len());
        message.encode(&mut again);
        assert_eq!(again, bytes);
    }
    if let Ok(packet) = Packet::decode(bytes) {
        let mut again = Vec::with_capacity(bytes.len());
        packet.encode(&mut again);
        assert_eq!(again, bytes);
    }
});
