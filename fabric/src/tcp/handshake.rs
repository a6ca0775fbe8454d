//! The plain greeting: what each side of an insecure transport says before the
//! first frame. The sealed one is in [`secure`](crate::secure).
//!
//! The side that connects sends a greeting with its hello, the side that
//! accepts answers with an empty one. Nothing else is exchanged until both have
//! been read, so that neither messages nor keys reach a stranger's socket.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `d1 6b 76 66 61 62 0d 0a`: no text protocol begins so |
//! | 8..10 | version, u16 little-endian |
//! | 10 | 0: plain |
//! | 11 | 0 |
//! | 12..16 | length of the hello, u32 little-endian |
//! | 16.. | the hello |

use crate::MAX_SEND;
use crate::secure::{MAGIC, Refused, SEALED, VERSION};

/// Bytes before the hello.
pub const HEADER: usize = 16;

/// A greeting that carries `hello`.
pub fn greeting(hello: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + hello.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend((hello.len() as u32).to_le_bytes());
    bytes.extend(hello);
    bytes
}

/// Collects the peer's greeting as its bytes come in.
#[derive(Default)]
pub struct Reader {
    got: Vec<u8>,
}

impl Reader {
    /// Takes from the front of `bytes` what belongs to the greeting. Returns
    /// how many bytes that were, and the hello once the greeting is complete.
    /// The error names what is wrong, as soon as one byte shows it.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(usize, Option<Vec<u8>>), Refused> {
        let head = HEADER.saturating_sub(self.got.len()).min(bytes.len());
        self.got.extend(&bytes[..head]);
        let known = self.got.len().min(MAGIC.len());
        if self.got[..known] != MAGIC[..known] {
            return Err(Refused::Foreign);
        }
        // Told at once: a sealed peer waits for an answer with its first 60 bytes.
        if self.got.get(10) == Some(&SEALED) && self.got[8..10] == VERSION.to_le_bytes() {
            return Err(Refused::Sealed);
        }
        let Some(header) = self.got.get(..HEADER) else { return Ok((head, None)) };
        if header[8..10] != VERSION.to_le_bytes() {
            return Err(Refused::Version);
        }
        if header[10..12] != [0, 0] {
            return Err(Refused::Protocol("reserved bytes of the greeting are set"));
        }
        let hello = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
        if hello > MAX_SEND {
            return Err(Refused::Protocol("a hello over the limit"));
        }
        let body = (HEADER + hello - self.got.len()).min(bytes.len() - head);
        self.got.extend(&bytes[head..head + body]);
        if self.got.len() < HEADER + hello {
            return Ok((head + body, None));
        }
        Ok((head + body, Some(self.got.split_off(HEADER))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_greeting_is_read_however_it_is_cut(hello in prop::collection::vec(any::<u8>(), 0..200), cut in 1usize..40) {
            let mut bytes = greeting(&hello);
            bytes.extend(b"first frame");
            let (mut reader, mut at, mut got) = (Reader::default(), 0, None);
            while got.is_none() {
                let end = (at + cut).min(bytes.len());
                let (taken, complete) = reader.feed(&bytes[at..end]).unwrap();
                at += taken;
                got = complete;
            }
            prop_assert_eq!(got.unwrap(), hello);
            prop_assert_eq!(&bytes[at..], b"first frame");
        }

        #[test]
        fn a_changed_header_is_refused_or_only_lengthens_the_hello(at in 0usize..HEADER, to: u8) {
            let mut bytes = greeting(b"hello");
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            let mut reader = Reader::default();
            match reader.feed(&bytes) {
                Err(_) => {}
                Ok((_, hello)) => prop_assert!(at >= 12 && hello.as_deref() != Some(b"hello")),
            }
        }
    }

    #[test]
    fn a_foreign_protocol_is_refused_at_its_first_byte() {
        assert_eq!(Reader::default().feed(b"G"), Err(Refused::Foreign));
    }

    #[test]
    fn a_sealed_peer_is_told_from_a_foreign_one() {
        let secret = crate::secure::Secret::new([1; 32]);
        let session = crate::secure::Session::connect(&secret, crate::secure::Purpose::Tcp).unwrap();
        assert_eq!(Reader::default().feed(session.output()), Err(Refused::Sealed));
    }
}
