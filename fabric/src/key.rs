//! Remote keys: what their bytes are. One form serves every transport.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | version, 1 |
//! | 1 | transport: 1 loopback, 2 tcp, 3 shm, 4 verbs |
//! | 2..6 | region, u32 little-endian |
//! | 6..14 | region's size, u64 little-endian |
//! | 14..30 | random token |

use crate::{Error, RemoteKey, Result};

const VERSION: u8 = 1;

/// Bytes of a key.
pub(crate) const LEN: usize = 30;

/// Which transport made a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Maker {
    Loopback = 1,
    Tcp = 2,
    Shm = 3,
    Verbs = 4,
}

/// 128 random bits: who has them was given them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Token(pub [u8; 16]);

impl Token {
    /// Bits from the system's generator.
    pub fn random() -> Result<Self> {
        let mut bytes = [0u8; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            match rustix::rand::getrandom(&mut bytes[filled..], flags) {
                Ok(n) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::os("drawing a key's token", e)),
            }
        }
        Ok(Self(bytes))
    }

    /// The first 64 of the bits.
    pub fn low(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// Equality in time that does not depend on where the tokens differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
    }
}

/// A key's content.
#[derive(Clone, Copy)]
pub(crate) struct Key {
    pub region: u32,
    pub size: u64,
    pub token: Token,
}

impl Key {
    pub fn encode(&self, maker: Maker) -> RemoteKey {
        RemoteKey(self.bytes(maker).into())
    }

    /// As it travels.
    pub fn bytes(&self, maker: Maker) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&[VERSION, maker as u8]);
        bytes[2..6].copy_from_slice(&self.region.to_le_bytes());
        bytes[6..14].copy_from_slice(&self.size.to_le_bytes());
        bytes[14..].copy_from_slice(&self.token.0);
        bytes
    }

    pub fn decode(bytes: &[u8], maker: Maker) -> Result<Self> {
        let bytes: &[u8; LEN] = bytes.try_into().map_err(|_| Error::BadKey)?;
        if bytes[0] != VERSION || bytes[1] != maker as u8 {
            return Err(Error::BadKey);
        }
        let [_, _, a, b, c, d, ..] = *bytes;
        let mut size = [0; 8];
        size.copy_from_slice(&bytes[6..14]);
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[14..]);
        Ok(Self { region: u32::from_le_bytes([a, b, c, d]), size: u64::from_le_bytes(size), token: Token(token) })
    }

    /// Is `[offset, offset + len)` inside the region, as the key tells its size?
    pub fn check(&self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(Error::OutOfRange { offset, len, size: self.size });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_survives_its_encoding_and_fits_the_limit() {
        let token = Token::random().unwrap();
        let remote = Key { region: 7, size: 1 << 40, token }.encode(Maker::Tcp);
        assert!(remote.0.len() <= 64);
        let key = Key::decode(&remote.0, Maker::Tcp).unwrap();
        assert_eq!((key.region, key.size), (7, 1 << 40));
        assert!(key.token.matches(&token));
        assert!(Key::decode(&remote.0, Maker::Shm).is_err(), "a key of another transport");
    }

    proptest! {
        #[test]
        fn foreign_bytes_are_refused_or_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(key) = Key::decode(&bytes, Maker::Tcp) {
                prop_assert_eq!(key.encode(Maker::Tcp).0, bytes);
            }
        }
    }
}
