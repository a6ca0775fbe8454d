//! The ring entry: 64 bytes, of which the first word publishes the others.
//!
//! | bits of word 0 | what |
//! |---|---|
//! | 0..32 | sequence: the entry's index + 1, so that a slot's old content is never taken for new |
//! | 32..40 | kind |
//! | 40..48 | flags: bit 0, the payload's last part; bit 1, the payload is in the byte ring |
//! | 48..56 | bytes of a payload that is in the entry itself |
//! | 56..64 | 0 |
//!
//! Words 1 to 7 hold the payload, or (offset u32, length u32) of it in the byte
//! ring, or a notification, region or key.

use crate::Notify;
use crate::key;

/// Payload bytes an entry holds itself.
pub const INLINE: usize = 56;
/// Most payload bytes of one entry; what is longer goes in several parts.
pub const PART: usize = super::ring::BYTES / 4;

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const MESSAGE: u8 = 3;
const NOTIFY: u8 = 4;
const ASK: u8 = 5;
const REVOKE: u8 = 6;

const LAST: u8 = 1;
const IN_RING: u8 = 2;

/// A decoded entry. Nothing in it was checked against any region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Part of the hello of the side that connected; comes first.
    Hello(Part),
    /// The answer of the side that accepted; comes first.
    Welcome,
    /// Part of a message.
    Message(Part),
    /// What was written before is in place.
    Notify(Notify),
    /// The peer holds this key and asks for the region's file.
    Ask([u8; key::LEN]),
    /// A region was deregistered.
    Revoke(u32),
}

/// Where a payload, or a part of it, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Nothing follows it.
    pub last: bool,
    /// Bytes.
    pub len: usize,
    /// First byte in the byte ring; none if the entry holds it.
    pub at: Option<usize>,
}

/// The upper half of word 0 and the payload words of an entry, from what the
/// writer of a ring puts in.
pub fn encode(entry: &Entry, inline: &[u8]) -> (u32, [u8; INLINE]) {
    let mut payload = [0; INLINE];
    let control = |kind: u8, flags: u8, len: usize| u32::from_le_bytes([kind, flags, len as u8, 0]);
    let control = match entry {
        Entry::Hello(part) | Entry::Message(part) => {
            let kind = if matches!(entry, Entry::Hello(_)) { HELLO } else { MESSAGE };
            let last = if part.last { LAST } else { 0 };
            match part.at {
                Some(at) => {
                    payload[..4].copy_from_slice(&(at as u32).to_le_bytes());
                    payload[4..8].copy_from_slice(&(part.len as u32).to_le_bytes());
                    control(kind, last | IN_RING, 0)
                }
                None => {
                    payload[..inline.len()].copy_from_slice(inline);
                    control(kind, last, part.len)
                }
            }
        }
        Entry::Welcome => control(WELCOME, 0, 0),
        Entry::Notify(notify) => {
            payload[..4].copy_from_slice(&notify.0.to_le_bytes());
            control(NOTIFY, 0, 0)
        }
        Entry::Ask(key) => {
            payload[..key::LEN].copy_from_slice(key);
            control(ASK, 0, 0)
        }
        Entry::Revoke(region) => {
            payload[..4].copy_from_slice(&region.to_le_bytes());
            control(REVOKE, 0, 0)
        }
    };
    (control, payload)
}

/// Reads an entry that was copied out of the ring: the upper half of word 0
/// and the payload words. The error names what is wrong with it.
pub fn decode(control: u32, payload: &[u8; INLINE]) -> Result<Entry, &'static str> {
    let [kind, flags, len, zero] = control.to_le_bytes();
    if zero != 0 {
        return Err("reserved bits of a ring entry are set");
    }
    let word = |at: usize| u32::from_le_bytes([payload[at], payload[at + 1], payload[at + 2], payload[at + 3]]);
    if kind == HELLO || kind == MESSAGE {
        let part = part(flags, len, word(0), word(4))?;
        return Ok(if kind == HELLO { Entry::Hello(part) } else { Entry::Message(part) });
    }
    if flags != 0 || len != 0 {
        return Err("a ring entry with flags that its kind does not have");
    }
    match kind {
        WELCOME => Ok(Entry::Welcome),
        NOTIFY => Ok(Entry::Notify(Notify(word(0)))),
        ASK => {
            let mut key = [0; key::LEN];
            key.copy_from_slice(&payload[..key::LEN]);
            Ok(Entry::Ask(key))
        }
        REVOKE => Ok(Entry::Revoke(word(0))),
        _ => Err("unknown kind of ring entry"),
    }
}

fn part(flags: u8, len: u8, at: u32, ring_len: u32) -> Result<Part, &'static str> {
    let last = flags & LAST != 0;
    match flags & !LAST {
        0 if usize::from(len) <= INLINE => Ok(Part { last, len: len.into(), at: None }),
        0 => Err("a payload longer than its ring entry"),
        IN_RING if len != 0 => Err("a ring entry with a payload in two places"),
        IN_RING => {
            let (at, len) = (at as usize, ring_len as usize);
            if len > PART || at > super::ring::BYTES - len {
                return Err("a payload outside the byte ring");
            }
            Ok(Part { last, len, at: Some(at) })
        }
        _ => Err("unknown flags of a ring entry"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_meaning(control: u32, small in 0u32..8, payload: [u8; 32]) {
            let mut words = [0; INLINE];
            words[..32].copy_from_slice(&payload);
            for control in [control, control & 0x0000_0307, small | (control & 0x003f_0100)] {
                let Ok(entry) = decode(control, &words) else { continue };
                let inline = match entry {
                    Entry::Hello(Part { at: None, len, .. }) | Entry::Message(Part { at: None, len, .. }) => &words[..len],
                    _ => &[][..],
                };
                if let Entry::Hello(part) | Entry::Message(part) = entry {
                    prop_assert!(part.at.is_none_or(|at| at + part.len <= super::super::ring::BYTES));
                }
                let (again, payload) = encode(&entry, inline);
                prop_assert_eq!(again, control);
                prop_assert_eq!(decode(again, &payload), Ok(entry));
            }
        }
    }

    #[test]
    fn a_payload_outside_the_byte_ring_is_refused() {
        let at = super::super::ring::BYTES - 100;
        let place = |len| encode(&Entry::Message(Part { last: true, len, at: Some(at) }), &[]);
        let (control, payload) = place(100);
        assert!(decode(control, &payload).is_ok());
        let (control, payload) = place(101);
        assert_eq!(decode(control, &payload), Err("a payload outside the byte ring"));
    }
}
