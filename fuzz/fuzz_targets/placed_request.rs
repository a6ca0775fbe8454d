//! What an ingress and a runner say to each other, once it is unsealed: any bytes
//! are an order or a frame that encodes back to the same bytes, or an error.
#![no_main]

use distkv::ingress::Keys;
use distkv::ingress::wire::{Frame, Order};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut again = Vec::new();
    if let Ok(order) = Order::decode(bytes) {
        order.encode(&mut again);
        assert_eq!(again, bytes);
    }
    again.clear();
    if let Ok(frame) = Frame::decode(bytes) {
        frame.encode(&mut again);
        assert_eq!(again, bytes);
    }
    // As they arrive: what was not sealed is never heard.
    let keys = Keys::new([0; 32]);
    assert!(keys.open_order(bytes).is_none());
    assert!(!matches!(keys.answer(&[0; 16]).hear(&mut bytes.to_vec()), Ok(Some(_))));
});
