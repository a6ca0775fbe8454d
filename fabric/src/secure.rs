//! The bootstrap that the transports share: two nodes prove to each other that
//! they hold the cluster's secret, and whatever they say after is sealed.
//!
//! Nothing here owns a socket, a clock or a thread: bytes come in by `feed` and
//! leave by `output`. [`Session`] is the handshake and the records after it;
//! [`Bootstrap`] exchanges on top of them what a transport has to know of its
//! peer (an incarnation and a hello each), and ends when each side knows that
//! the other is ready.
//!
//! **The handshake** is Noise `NNpsk0` over X25519, AES-256-GCM and SHA-256
//! (crate `snow`). The secret goes into the *first* message, so that whoever
//! does not have it is turned away by one hash chain and one tag, before any
//! Diffie-Hellman and without an answer. The ephemeral keys of both sides go
//! into the second, so that a secret that leaks later opens no recorded
//! connection. Nodes have no keys of their own: the secret admits to the
//! cluster and does not tell its members apart, hence no pattern with static
//! keys.
//!
//! | bytes | first message (by the side that connects) | second (by the other) |
//! |---|---|---|
//! | 0..8 | `d1 6b 76 66 61 62 0d 0a`: no text protocol begins so | same |
//! | 8..10 | version, u16 little-endian | same |
//! | 10 | 1: sealed (0 is the plain greeting of an insecure transport) | same |
//! | 11 | [`Purpose`] | same |
//! | 12..44 | ephemeral key | ephemeral key |
//! | 44..60 | tag, under the secret | tag, under the secret and both keys |
//!
//! The first twelve bytes are the prologue of the handshake too: who changes
//! them on the way breaks it.
//!
//! **Records** follow, each under the next nonce of its direction (Noise's
//! transport keys, its AES-GCM nonces and its rekey, every
//! [2^20](record::REKEY) records):
//!
//! | bytes | what |
//! |---|---|
//! | 0..3 | `n`, u24 little-endian, 1 to [`MAX_PLAIN`]; 0 in a ready record |
//! | 3 | kind: 1 greeting, 2 ready, 3 data |
//! | 4..4+n | sealed content |
//! | 4+n..20+n | tag, over the first four bytes too |
//!
//! A record that was changed, left out, doubled or moved does not open, and a
//! session that has refused one opens no other.
//!
//! **The bootstrap** is, in each direction, one greeting in as many greeting
//! records as it takes, then one ready record. The side that accepts answers
//! the first handshake message with the second and says nothing more until the
//! peer's greeting has opened under the session's keys: a recorded handshake
//! that is played again gets that one answer, and its records do not open.
//!
//! | bytes of a greeting | what |
//! |---|---|
//! | 0..8 | incarnation, u64 little-endian: one life of the transport that speaks |
//! | 8..12 | length of the hello, u32, at most [`MAX_SEND`](crate::MAX_SEND) |
//! | 12.. | the hello |
//!
//! **Why ring, and in place.** Measured here (AMD EPYC with VAES, one core, the
//! best of 60 short runs): sealing 64 B takes 94 ns and 64 KiB 9.0 µs with
//! ring's AES-256-GCM in place, 145 ns and 16.4 µs with aws-lc-rs, 178 ns and
//! 26.7 µs with ring's ChaCha20-Poly1305, 109 ns and 15.8 µs through snow's own
//! transport over ring (it copies), 1.6 µs and 343 µs with snow's own AES. So
//! snow does the handshake and hands over its two keys (what it calls a risky
//! split: the keys go nowhere else), and [`record`] seals with ring.
//!
//! What a stranger costs the side that accepts, there: 0.05 µs if it speaks
//! something else, 5 µs with another secret, 113 µs with a recorded first
//! message (both sides' keys are agreed on before it can be known for one).

mod bootstrap;
#[doc(hidden)]
pub mod record;
mod session;
#[cfg(test)]
mod tests;

pub use bootstrap::{Bootstrap, Greeting, Heard};
pub use record::{Kind, MAX_PLAIN, OVERHEAD, Opened, Opener, Sealer};
pub use session::Session;

use zeroize::Zeroize;

/// What every greeting on a byte stream begins with, sealed or plain.
pub(crate) const MAGIC: [u8; 8] = [0xd1, b'k', b'v', b'f', b'a', b'b', b'\r', b'\n'];
/// Version of the fabric's protocol, sealed and plain.
pub(crate) const VERSION: u16 = 1;
/// Byte 10 of a greeting: sealed.
pub(crate) const SEALED: u8 = 1;

/// What the members of a cluster share and nobody else has. Wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// 32 bytes that are as hard to guess as they must be.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How a transport's connections are protected. Both sides must have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// Authenticated and encrypted under the secret.
    Sealed(Secret),
    /// Plain bytes, and whoever reaches the port is a peer: trusted networks
    /// only.
    Insecure,
}

impl Security {
    /// The secret of channels that are sealed in any case: insecure, one that
    /// everybody knows.
    pub fn secret(&self) -> Secret {
        match self {
            Self::Sealed(secret) => secret.clone(),
            Self::Insecure => Secret([0; 32]),
        }
    }
}

/// What a session is opened for. A handshake of one purpose is refused by the
/// others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// A connection of the tcp transport.
    Tcp = 2,
    /// The exchange of queue pairs before RDMA.
    Verbs = 4,
}

/// Why a peer was refused: what a transport counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// It speaks something else: a scanner, a browser, a mistaken address.
    #[error("not the DistKV fabric protocol")]
    Foreign,
    /// Another version of the protocol.
    #[error("another version of the fabric protocol")]
    Version,
    /// It speaks the protocol without encryption and we do not.
    #[error("its fabric is insecure and ours is sealed: start both sides in the same way")]
    Insecure,
    /// It speaks the protocol sealed and we do not.
    #[error("its fabric is sealed and ours is insecure: start both sides in the same way")]
    Sealed,
    /// It was meant for another transport.
    #[error("a handshake for another transport")]
    Purpose,
    /// It has another secret, or its handshake was changed on the way.
    #[error("another cluster key, or a handshake changed on the way")]
    Key,
    /// A record that does not open: changed, left out, doubled, moved, or
    /// played again from another connection.
    #[error("a record that does not open: tampered with or replayed")]
    Tampered,
    /// A peer with the secret that does not keep to the protocol.
    #[error("{0}")]
    Protocol(&'static str),
    /// Our own side: nonces are used up, long after any use.
    #[error("a session has sealed all it may")]
    Exhausted,
    /// Our own side: the system gives no random bytes.
    #[error("the system gave no random bytes")]
    Random,
    /// The session has refused its peer before.
    #[error("the session is over")]
    Over,
}
