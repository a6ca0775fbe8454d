//! A few values on the stack, whose room costs nothing until it is used: a post
//! of one request must not clear the room for thirty-two.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// Up to `N` values.
pub struct Few<T: Copy, const N: usize> {
    room: [MaybeUninit<T>; N],
    /// So many of the room, from the front, are values; `N` at most.
    len: usize,
}

impl<T: Copy, const N: usize> Few<T, N> {
    /// None yet.
    #[inline]
    pub fn new() -> Self {
        Self { room: [const { MaybeUninit::uninit() }; N], len: 0 }
    }

    /// How many there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds one; false if there is no room for it.
    #[inline]
    pub fn push(&mut self, value: T) -> bool {
        let Some(slot) = self.room.get_mut(self.len) else { return false };
        slot.write(value);
        self.len += 1;
        true
    }

    /// Those that there are.
    #[inline]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: the first `len` are values.
        unsafe { std::slice::from_raw_parts(self.room.as_ptr().cast(), self.len) }
    }

    /// As [`as_slice`](Self::as_slice), to be changed.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.room.as_mut_ptr().cast(), self.len) }
    }

    /// Has `fill` write values to the front of the room in place of those there
    /// were; it is given the room and says how many it wrote.
    ///
    /// # Safety
    /// So many it has written.
    #[inline]
    pub unsafe fn refill(&mut self, fill: impl FnOnce(*mut T, usize) -> usize) {
        self.len = 0;
        self.len = fill(self.room.as_mut_ptr().cast(), N).min(N);
    }
}
