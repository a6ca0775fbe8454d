//! Records: what is said once the handshake has given each direction its key.

use std::ops::Range;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

use super::Refused;

/// Most content of a record, bytes: 64 KiB and the header of a frame.
pub const MAX_PLAIN: usize = (64 << 10) + 64;
/// Bytes before the content.
pub const HEADER: usize = 4;
/// Bytes behind it.
pub const TAG: usize = 16;
/// Bytes by which a record is longer than its content.
pub const OVERHEAD: usize = HEADER + TAG;

/// Records under one key; then the key is changed. 2^32 blocks of AES at most:
/// far below where chance would begin to favour a forger.
pub const REKEY: u64 = 1 << 20;

/// The nonce that Noise keeps for changing the key.
const LAST: u64 = u64::MAX;

/// What a record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A piece of a greeting.
    Greeting = 1,
    /// The speaker can be sent data.
    Ready = 2,
    /// The transport's own bytes.
    Data = 3,
}

/// A direction's key and how far it is used.
struct Chain {
    key: LessSafeKey,
    /// Of the next record.
    nonce: u64,
    rekey: u64,
}

impl Chain {
    fn new(mut bytes: [u8; 32], rekey: u64) -> Result<Self, Refused> {
        let key = key(&bytes);
        bytes.zeroize();
        Ok(Self { key: key?, nonce: 0, rekey })
    }

    /// The nonce of the next record.
    fn next(&mut self) -> Result<Nonce, Refused> {
        let nonce = self.nonce;
        if nonce == LAST {
            return Err(Refused::Exhausted);
        }
        if nonce != 0 && nonce.is_multiple_of(self.rekey) {
            let mut bytes = [0; 32];
            let sealed = self.key.seal_in_place_separate_tag(wire(LAST), Aad::empty(), &mut bytes);
            sealed.map(drop).map_err(|_| Refused::Exhausted)?;
            let next = key(&bytes);
            bytes.zeroize();
            self.key = next?;
        }
        self.nonce += 1;
        Ok(wire(nonce))
    }
}

fn key(bytes: &[u8; 32]) -> Result<LessSafeKey, Refused> {
    // The length is the algorithm's: it does not fail.
    UnboundKey::new(&AES_256_GCM, bytes).map(LessSafeKey::new).map_err(|_| Refused::Exhausted)
}

/// A nonce as Noise has it for AES-GCM.
fn wire(nonce: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&nonce.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn header(kind: Kind, len: usize) -> [u8; HEADER] {
    let [a, b, c, ..] = len.to_le_bytes();
    [a, b, c, kind as u8]
}

/// What a header says: (kind, bytes of content).
fn read_header(bytes: [u8; HEADER]) -> Result<(Kind, usize), Refused> {
    let len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]) as usize;
    let kind = match bytes[3] {
        1 => Kind::Greeting,
        2 => Kind::Ready,
        3 => Kind::Data,
        _ => return Err(Refused::Tampered),
    };
    // Whoever sealed it kept to these: it was changed.
    if len > MAX_PLAIN || (len == 0) != (kind == Kind::Ready) {
        return Err(Refused::Tampered);
    }
    Ok((kind, len))
}

/// Seals what this side says.
pub struct Sealer(Chain);

impl Sealer {
    /// Under a key that this direction of this session alone has.
    pub fn new(key: [u8; 32]) -> Result<Self, Refused> {
        Self::with_rekey(key, REKEY)
    }

    pub(super) fn with_rekey(key: [u8; 32], rekey: u64) -> Result<Self, Refused> {
        Chain::new(key, rekey).map(Self)
    }

    /// Appends a record with the parts as its content, together at most
    /// [`MAX_PLAIN`] bytes, and none only in a ready record.
    pub fn seal(&mut self, kind: Kind, parts: &[&[u8]], out: &mut Vec<u8>) -> Result<(), Refused> {
        let at = out.len();
        let len: usize = parts.iter().map(|part| part.len()).sum();
        out.reserve(len + OVERHEAD);
        out.extend([0; HEADER]);
        parts.iter().for_each(|part| out.extend_from_slice(part));
        out.extend([0; TAG]);
        match self.seal_in_place(kind, len, &mut out[at..]) {
            Ok(_) => Ok(()),
            Err(refused) => {
                out.truncate(at);
                Err(refused)
            }
        }
    }

    /// Makes a record of the `len` bytes that lie at [`HEADER`] in `room`, which
    /// has [`TAG`] bytes more behind them. Returns the record's length.
    pub fn seal_in_place(&mut self, kind: Kind, len: usize, room: &mut [u8]) -> Result<usize, Refused> {
        let head = header(kind, len);
        if read_header(head) != Ok((kind, len)) || room.len() < len + OVERHEAD {
            return Err(Refused::Protocol("a record of no valid length"));
        }
        let nonce = self.0.next()?;
        room[..HEADER].copy_from_slice(&head);
        let content = &mut room[HEADER..HEADER + len];
        let tag = self.0.key.seal_in_place_separate_tag(nonce, Aad::from(head), content);
        let tag = tag.map_err(|_| Refused::Exhausted)?;
        room[HEADER + len..OVERHEAD + len].copy_from_slice(tag.as_ref());
        Ok(OVERHEAD + len)
    }

    #[cfg(test)]
    pub(super) fn skip_to(&mut self, nonce: u64) {
        self.0.nonce = nonce;
    }
}

/// A record that opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What it carries.
    pub kind: Kind,
    /// Where its content lies in the bytes that were given.
    pub content: Range<usize>,
    /// Bytes of the record.
    pub taken: usize,
}

/// Opens what the other side sealed.
pub struct Opener {
    chain: Chain,
    over: bool,
}

impl Opener {
    /// Under a key that this direction of this session alone has.
    pub fn new(key: [u8; 32]) -> Result<Self, Refused> {
        Self::with_rekey(key, REKEY)
    }

    pub(super) fn with_rekey(key: [u8; 32], rekey: u64) -> Result<Self, Refused> {
        Ok(Self { chain: Chain::new(key, rekey)?, over: false })
    }

    /// How long the record is that `bytes` begin with, if its header is there.
    /// The length is what somebody claims, and at most [`MAX_PLAIN`] +
    /// [`OVERHEAD`].
    pub fn length(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refused> {
        if self.over {
            return Err(Refused::Over);
        }
        let Some(head) = bytes.first_chunk() else { return Ok(None) };
        match read_header(*head) {
            Ok((_, len)) => Ok(Some(len + OVERHEAD)),
            Err(refused) => {
                self.over = true;
                Err(refused)
            }
        }
    }

    /// Opens the record at the front of `bytes` where it lies, if all of it is
    /// there. The first error is the last word.
    pub fn open(&mut self, bytes: &mut [u8]) -> Result<Option<Opened>, Refused> {
        let Some(taken) = self.length(bytes)? else { return Ok(None) };
        let Some(record) = bytes.get_mut(..taken) else { return Ok(None) };
        let opened = self.open_whole(record);
        self.over |= opened.is_err();
        opened.map(Some)
    }

    fn open_whole(&mut self, record: &mut [u8]) -> Result<Opened, Refused> {
        let taken = record.len();
        let Some((head, sealed)) = record.split_first_chunk_mut::<HEADER>() else { return Err(Refused::Tampered) };
        let (kind, len) = read_header(*head)?;
        let nonce = self.chain.next()?;
        let opened = self.chain.key.open_in_place(nonce, Aad::from(*head), sealed);
        opened.map_err(|_| Refused::Tampered)?;
        Ok(Opened { kind, content: HEADER..HEADER + len, taken })
    }
}
