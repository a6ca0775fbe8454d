//! What a verbs peer says, on the control channel and with a SEND or a write: never a
//! panic, and whatever decodes encodes to the same bytes.
#![no_main]

use distkv_fabric::verbs::wire::{Control, Landed, Noted, Said};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = Control::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
    if let Ok(landed) = Landed::decode(bytes) {
        assert_eq!(landed.encode(), bytes);
    }
    if let Some(immediate) = bytes.first_chunk().map(|word| u32::from_le_bytes(*word)) {
        assert_eq!(Noted::decode(immediate).encode(), immediate);
        if let Ok(said) = Said::decode(immediate) {
            assert_eq!(said.encode(), immediate);
        }
    }
});
