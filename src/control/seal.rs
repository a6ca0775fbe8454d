//! The seal on everything that travels as a datagram: authenticated encryption
//! under the cluster's key, so that whoever does not have it can neither read
//! nor say anything.
//!
//! XChaCha20-Poly1305. The nonce is random, 24 bytes, and travels in front; at
//! that length chance does not repeat within any cluster's life. A sealed
//! datagram can be recorded and sent again: what is inside must bear that (SWIM
//! counts probes and incarnations, rows have stamps).

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

/// Bytes of a cluster key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 24;
/// Bytes by which sealing lengthens what is sealed.
pub const OVERHEAD: usize = 1 + NONCE_BYTES + 16;
/// Version of the datagrams' format.
const VERSION: u8 = 1;

/// Seals and opens datagrams of one cluster.
pub struct Seal {
    cipher: XChaCha20Poly1305,
    cluster: [u8; 16],
}

impl Seal {
    /// For the cluster of that name and key.
    pub fn new(key: &[u8; KEY_BYTES], cluster: [u8; 16]) -> Self {
        Self { cipher: XChaCha20Poly1305::new(key.into()), cluster }
    }

    /// `[version, nonce, ciphertext, tag]`. Never seal twice with one nonce.
    pub fn seal(&self, nonce: [u8; NONCE_BYTES], plain: &[u8]) -> Vec<u8> {
        let payload = Payload { msg: plain, aad: &self.cluster };
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), payload);
        // Only fails for messages of gigabytes.
        let sealed = sealed.unwrap_or_default();
        let mut out = Vec::with_capacity(plain.len() + OVERHEAD);
        out.push(VERSION);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&sealed);
        out
    }

    /// What was sealed; `None` for anything that was not sealed with this key
    /// for this cluster.
    pub fn open(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (&version, rest) = bytes.split_first()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_BYTES>()?;
        if version != VERSION {
            return None;
        }
        let payload = Payload { msg: sealed, aad: &self.cluster };
        self.cipher.decrypt(&XNonce::from(*nonce), payload).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_and_cluster_open_and_no_bit_may_change() {
        let seal = Seal::new(&[7; 32], [1; 16]);
        let sealed = seal.seal([9; 24], b"rows");
        assert_eq!(sealed.len(), 4 + OVERHEAD);
        assert_eq!(seal.open(&sealed).as_deref(), Some(&b"rows"[..]));
        assert_eq!(Seal::new(&[8; 32], [1; 16]).open(&sealed), None, "another key");
        assert_eq!(Seal::new(&[7; 32], [2; 16]).open(&sealed), None, "another cluster");
        for byte in 0..sealed.len() {
            for bit in 0..8 {
                let mut bent = sealed.clone();
                bent[byte] ^= 1 << bit;
                assert_eq!(seal.open(&bent), None, "byte {byte}, bit {bit}");
            }
            assert_eq!(seal.open(&sealed[..byte]), None);
        }
    }
}
