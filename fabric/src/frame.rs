//! The frame: how a message or a write looks between two transports that carry
//! bytes (tcp, loopback). A header, then `len` bytes of payload.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | kind: 1 message, 2 write |
//! | 1 | flags: bit 0 of a write, it notifies; all others 0 |
//! | 2..4 | 0 |
//! | 4..8 | the notification, u32; 0 without one |
//! | 8..16 | `len`, u64 |
//! | *a write goes on:* | |
//! | 16..20 | region, u32 |
//! | 20..24 | 0 |
//! | 24..32 | first target byte, u64 |
//! | 32..48 | the region's token |
//!
//! All little-endian. What is said to be 0 must be: a stream that went out of
//! step is noticed at the next header.

use crate::key::Token;
use crate::{MAX_SEND, Notify};

const MESSAGE: u8 = 1;
const WRITE: u8 = 2;
const NOTIFIES: u8 = 1;

/// Bytes of a message's header.
pub const MESSAGE_HEADER: usize = 16;
/// Bytes of a write's header.
pub const WRITE_HEADER: usize = 48;

/// A decoded header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// A message of `len` bytes follows.
    Message {
        /// At most [`MAX_SEND`].
        len: usize,
    },
    /// `len` bytes for a region follow.
    Write(WriteFrame),
}

/// The header of a write. Nothing in it was checked against any region.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct WriteFrame {
    pub(crate) region: u32,
    pub(crate) token: Token,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) notify: Option<Notify>,
}

/// The header of a message.
pub fn message_header(len: usize) -> [u8; MESSAGE_HEADER] {
    let mut bytes = [0; MESSAGE_HEADER];
    bytes[0] = MESSAGE;
    bytes[8..16].copy_from_slice(&(len as u64).to_le_bytes());
    bytes
}

/// The header of a write.
pub fn write_header(write: &WriteFrame) -> [u8; WRITE_HEADER] {
    let mut bytes = [0; WRITE_HEADER];
    bytes[0] = WRITE;
    bytes[1] = if write.notify.is_some() { NOTIFIES } else { 0 };
    bytes[4..8].copy_from_slice(&write.notify.map_or(0, |n| n.0).to_le_bytes());
    bytes[8..16].copy_from_slice(&write.len.to_le_bytes());
    bytes[16..20].copy_from_slice(&write.region.to_le_bytes());
    bytes[24..32].copy_from_slice(&write.offset.to_le_bytes());
    bytes[32..48].copy_from_slice(&write.token.0);
    bytes
}

/// Reads the header at the start of `bytes`. `None`: it is not complete yet.
/// Otherwise the frame and the header's length; the error names what is wrong
/// with it.
pub fn decode(bytes: &[u8]) -> Result<Option<(Frame, usize)>, &'static str> {
    let Some(&kind) = bytes.first() else { return Ok(None) };
    let length = match kind {
        MESSAGE => MESSAGE_HEADER,
        WRITE => WRITE_HEADER,
        _ => return Err("unknown kind of frame"),
    };
    let Some(header) = bytes.get(..length) else { return Ok(None) };
    let (flags, notify, len) = (header[1], u32_at(header, 4), u64_at(header, 8));
    if header[2..4] != [0, 0] {
        return Err("reserved bytes of a frame are set");
    }
    if kind == MESSAGE {
        if flags != 0 || notify != 0 {
            return Err("a message with flags");
        }
        if len > MAX_SEND as u64 {
            return Err("a message over the limit");
        }
        return Ok(Some((Frame::Message { len: len as usize }, length)));
    }
    if flags & !NOTIFIES != 0 || (flags == 0 && notify != 0) || u32_at(header, 20) != 0 {
        return Err("reserved bits of a write are set");
    }
    let mut token = [0; 16];
    token.copy_from_slice(&header[32..48]);
    let write = WriteFrame {
        region: u32_at(header, 16),
        token: Token(token),
        offset: u64_at(header, 24),
        len,
        notify: (flags == NOTIFIES).then_some(Notify(notify)),
    };
    Ok(Some((Frame::Write(write), length)))
}

/// The four bytes at `at`, which the caller knows to be there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// The eight bytes at `at`, which the caller knows to be there.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_write_survives_its_encoding(region: u32, token: [u8; 16], offset: u64, len: u64, notify: Option<u32>) {
            let write = WriteFrame { region, token: Token(token), offset, len, notify: notify.map(Notify) };
            let bytes = write_header(&write);
            prop_assert!(decode(&bytes) == Ok(Some((Frame::Write(write), WRITE_HEADER))));
            prop_assert!(decode(&bytes[..WRITE_HEADER - 1]) == Ok(None), "an incomplete header is not yet an error");
        }

        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(0u8..4, 0..64)) {
            match decode(&bytes) {
                Ok(Some((Frame::Message { len }, n))) => prop_assert_eq!(&message_header(len)[..], &bytes[..n]),
                Ok(Some((Frame::Write(write), n))) => prop_assert_eq!(&write_header(&write)[..], &bytes[..n]),
                Ok(None) => prop_assert!(bytes.len() < WRITE_HEADER),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused() {
        assert!(decode(&message_header(MAX_SEND)).is_ok());
        assert_eq!(decode(&message_header(MAX_SEND + 1)).err(), Some("a message over the limit"));
        assert_eq!(decode(b"GET / HTTP/1.1\r\n").err(), Some("unknown kind of frame"));
    }
}
