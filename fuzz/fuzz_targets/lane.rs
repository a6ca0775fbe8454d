//! What a debtor and a creditor say on a lane: any bytes are a message that
//! encodes back to the same bytes, or an error.
#![no_main]

use distkv::attention::wire::{LaneHello, LaneMessage, SlotHeader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut again = Vec::new();
    if let Ok(hello) = LaneHello::decode(bytes) {
        hello.encode(&mut again);
        assert_eq!(again, bytes);
    }
    again.clear();
    if let Ok(message) = LaneMessage::decode(bytes) {
        message.encode(&mut again);
        assert_eq!(again, bytes);
    }
    if let Some(header) = bytes.first_chunk() {
        let _ = SlotHeader::decode(header);
    }
});
