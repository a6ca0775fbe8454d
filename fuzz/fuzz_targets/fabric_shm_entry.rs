//! A shared-memory ring entry: never a panic, no place outside the ring, and
//! whatever decodes encodes to an entry of the same meaning.
#![no_main]

use distkv_fabric::shm::entry::{Entry, INLINE, PART, Part, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u32, [u8; INLINE])| {
    let (control, payload) = input;
    let Ok(entry) = decode(control, &payload) else { return };
    let inline = match entry {
        Entry::Hello(Part { at: None, len, .. }) | Entry::Message(Part { at: None, len, .. }) => &payload[..len],
        Entry::Hello(part) | Entry::Message(part) => {
            assert!(part.len <= PART && part.at.is_some_and(|at| at + part.len <= 4 * PART));
            &[]
        }
        _ => &[],
    };
    let (again, words) = encode(&entry, inline);
    assert_eq!(again, control);
    assert_eq!(decode(again, &words), Ok(entry));
});
