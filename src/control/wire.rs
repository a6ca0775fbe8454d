//! The parts that control messages are made of: fields in order, little
//! endian; a list is its length (u16) and its elements; an option one byte and
//! the value. Hand-written, so that every bound is in sight.

use super::message::VERSION;
use super::row::MAX_ADDRESS;
use crate::kv::rblock::{KvDtype, KvShape};

/// What is wrong with a message's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They end in the middle of `field`.
    #[error("the message ends inside {0}")]
    Truncated(&'static str),
    /// They go on after the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// The peer speaks another version.
    #[error(
        "the peer speaks version {0} of the control protocol, this node speaks {VERSION}: run the same release everywhere"
    )]
    Version(u8),
    /// No such kind of message.
    #[error("unknown kind of message {0}")]
    Kind(u8),
    /// A value that `field` cannot have.
    #[error("invalid value of {0}")]
    Value(&'static str),
    /// A list longer than its limit.
    #[error("{field}: {len} elements, at most {limit}")]
    TooMany {
        /// Which list.
        field: &'static str,
        /// Said length.
        len: usize,
        /// Limit.
        limit: usize,
    },
}

pub(super) type Result<T> = std::result::Result<T, DecodeError>;

/// Reads fields off the front of untrusted bytes.
pub(super) struct Reader<'a> {
    pub rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// The version byte, which must be ours.
    pub fn version(&mut self) -> Result<()> {
        match self.u8("version")? {
            VERSION => Ok(()),
            other => Err(DecodeError::Version(other)),
        }
    }

    /// `whole`, if nothing is left.
    pub fn end<T>(&self, whole: T) -> Result<T> {
        match self.rest.len() {
            0 => Ok(whole),
            n => Err(DecodeError::Trailing(n)),
        }
    }

    pub fn bytes(&mut self, n: usize, field: &'static str) -> Result<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(DecodeError::Truncated(field))?;
        self.rest = rest;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated(field))?;
        self.rest = rest;
        Ok(*head)
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub fn u16(&mut self, field: &'static str) -> Result<u16> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub fn option<T>(&mut self, field: &'static str, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        match self.u8(field)? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(DecodeError::Value(field)),
        }
    }

    /// Elements are at least one byte, so a length beyond the bytes at hand is
    /// refused before anything is allocated for it.
    pub fn list<T>(
        &mut self,
        field: &'static str,
        limit: usize,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let len = self.u16(field)? as usize;
        if len > limit {
            return Err(DecodeError::TooMany { field, len, limit });
        }
        if len > self.rest.len() {
            return Err(DecodeError::Truncated(field));
        }
        (0..len).map(|_| read(self)).collect()
    }

    pub fn string(&mut self, field: &'static str) -> Result<String> {
        let len = self.u16(field)? as usize;
        if len > MAX_ADDRESS {
            return Err(DecodeError::TooMany { field, len, limit: MAX_ADDRESS });
        }
        let bytes = self.bytes(len, field)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Value(field))
    }

    pub fn shape(&mut self) -> Result<KvShape> {
        const FIELD: &str = "kv shape";
        let shape = KvShape {
            layers: self.u32(FIELD)?,
            kv_heads: self.u32(FIELD)?,
            head_dim: self.u32(FIELD)?,
            block_tokens: self.u32(FIELD)?,
            dtype: match self.u8(FIELD)? {
                0 => KvDtype::Bf16,
                1 => KvDtype::F16,
                2 => KvDtype::F32,
                3 => KvDtype::Fp8,
                _ => return Err(DecodeError::Value(FIELD)),
            },
        };
        // Bounds under which no size computed from a shape can overflow.
        let sane = |value: u32, most: u32| (1..=most).contains(&value);
        if sane(shape.layers, 4096)
            && sane(shape.kv_heads, 4096)
            && sane(shape.head_dim, 4096)
            && sane(shape.block_tokens, 4096)
        {
            Ok(shape)
        } else {
            Err(DecodeError::Value(FIELD))
        }
    }
}

/// Appends fields.
pub(super) struct Writer<'a>(pub &'a mut Vec<u8>);

impl Writer<'_> {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn option<T>(&mut self, value: &Option<T>, write: impl FnOnce(&mut Self, &T)) {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            write(self, value);
        }
    }

    pub fn list<T>(&mut self, values: &[T], limit: usize, mut write: impl FnMut(&mut Self, &T)) {
        debug_assert!(values.len() <= limit);
        self.u16(values.len() as u16);
        values.iter().for_each(|value| write(self, value));
    }

    pub fn string(&mut self, value: &str) {
        debug_assert!(value.len() <= MAX_ADDRESS);
        self.u16(value.len() as u16);
        self.0.extend_from_slice(value.as_bytes());
    }

    pub fn shape(&mut self, shape: &KvShape) {
        for value in [shape.layers, shape.kv_heads, shape.head_dim, shape.block_tokens] {
            self.u32(value);
        }
        self.u8(match shape.dtype {
            KvDtype::Bf16 => 0,
            KvDtype::F16 => 1,
            KvDtype::F32 => 2,
            KvDtype::Fp8 => 3,
        });
    }
}
