//! Little-endian wire encoding with a bounds-checked reader: the one place
//! where the engine's own messages meet untrusted bytes.

/// Why bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end before the message does.
    #[error("the message is cut short")]
    Truncated,
    /// Bytes are left over.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// A count is over its limit.
    #[error("{what}: {count} is over the limit of {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many were announced.
        count: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// A field has a value that no sender of ours writes.
    #[error("{0}")]
    Invalid(&'static str),
}

/// Result of decoding.
pub type Result<T> = std::result::Result<T, DecodeError>;

/// Reads a message from bytes; every read is checked.
pub struct Reader<'a> {
    bytes: &'a [u8],
}

macro_rules! read_int {
    ($($name:ident: $type:ty),*) => {$(
        /// Next little-endian integer.
        pub fn $name(&mut self) -> Result<$type> {
            let raw = self.take(size_of::<$type>())?;
            Ok(<$type>::from_le_bytes(raw.try_into().map_err(|_| DecodeError::Truncated)?))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    read_int!(u8: u8, u16: u16, u32: u32, u64: u64);

    /// Next f32.
    pub fn f32(&mut self) -> Result<f32> {
        self.u32().map(f32::from_bits)
    }

    /// Next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or(DecodeError::Truncated)?;
        self.bytes = rest;
        Ok(taken)
    }

    /// A u32 count of things that take at least `min_size` bytes each, checked
    /// against `limit` and against the bytes that are there, so that it is safe
    /// to allocate for.
    pub fn count(&mut self, what: &'static str, limit: usize, min_size: usize) -> Result<usize> {
        let count = self.u32()? as usize;
        if count > limit {
            return Err(DecodeError::TooMany { what, count, limit });
        }
        if count.saturating_mul(min_size) > self.bytes.len() {
            return Err(DecodeError::Truncated);
        }
        Ok(count)
    }

    /// A counted list.
    pub fn list<T>(
        &mut self,
        what: &'static str,
        limit: usize,
        min_size: usize,
        mut item: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.count(what, limit, min_size)?;
        (0..count).map(|_| item(self)).collect()
    }

    /// Counted bytes.
    pub fn bytes(&mut self, what: &'static str, limit: usize) -> Result<&'a [u8]> {
        let len = self.count(what, limit, 1)?;
        self.take(len)
    }

    /// Counted UTF-8 text.
    pub fn text(&mut self, what: &'static str, limit: usize) -> Result<String> {
        let raw = self.bytes(what, limit)?;
        String::from_utf8(raw.to_vec()).map_err(|_| DecodeError::Invalid("text that is not UTF-8"))
    }

    /// The message must end here.
    pub fn finish(self) -> Result<()> {
        if self.bytes.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.bytes.len())) }
    }
}

/// What a message is written with: a growing byte vector.
pub trait WriteExt {
    /// Appends raw bytes.
    fn put(&mut self, bytes: &[u8]);

    /// Appends one byte.
    fn put_u8(&mut self, v: u8) {
        self.put(&[v]);
    }
    /// Appends a little-endian u32.
    fn put_u32(&mut self, v: u32) {
        self.put(&v.to_le_bytes());
    }
    /// Appends a little-endian u64.
    fn put_u64(&mut self, v: u64) {
        self.put(&v.to_le_bytes());
    }
    /// Appends an f32's bits.
    fn put_f32(&mut self, v: f32) {
        self.put_u32(v.to_bits());
    }
    /// Appends a count; lists are far below 2³² entries by construction.
    fn put_count(&mut self, n: usize) {
        self.put_u32(n as u32);
    }
    /// Appends counted bytes.
    fn put_bytes(&mut self, bytes: &[u8]) {
        self.put_count(bytes.len());
        self.put(bytes);
    }
}

impl WriteExt for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
