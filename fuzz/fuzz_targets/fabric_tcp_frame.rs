//! A stream of frames: never a panic, and whatever decodes encodes to the same
//! bytes.
#![no_main]

use distkv_fabric::frame::{Frame, decode, message_header, write_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(Some((frame, header))) = decode(rest) {
        let (head, behind) = rest.split_at(header);
        match frame {
            Frame::Message { len } => {
                assert!(len <= distkv_fabric::MAX_SEND);
                assert_eq!(message_header(len), head);
                rest = &behind[len.min(behind.len())..];
            }
            Frame::Write(write) => {
                assert_eq!(write_header(&write), head);
                rest = behind;
            }
        }
    }
});
