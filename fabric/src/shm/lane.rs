//! The two ends of a lane: the sender that fills its rings and the receiver
//! that empties them. Neither makes a system call, takes a lock or allocates.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::entry::{self, Entry, INLINE, PART, Part};
use super::ring::{BYTES, ENTRIES, LinkMemory};
use crate::{Error, Result};

/// Entries a receiver consumes before it tells the sender.
const TELL: u32 = ENTRIES / 4;

/// The end that fills.
pub(super) struct Sender {
    link: LinkMemory,
    lane: usize,
    /// Entries published, and of those the ones known to be consumed.
    tail: u32,
    head: u32,
    /// Bytes ever reserved in the byte ring, and of those the ones freed.
    /// Modulo the ring's size they are places.
    bytes_tail: u64,
    bytes_head: u64,
    /// `bytes_tail` behind each published entry.
    ends: Box<[u64]>,
}

impl Sender {
    pub fn new(link: LinkMemory, lane: usize) -> Self {
        let ends = vec![0; ENTRIES as usize].into();
        Self { link, lane, tail: 0, head: 0, bytes_tail: 0, bytes_head: 0, ends }
    }

    /// Learns how far the receiver is.
    fn refresh(&mut self) -> Result<()> {
        let head = self.link.head(self.lane).load(Acquire) as u32;
        let consumed = head.wrapping_sub(self.head);
        if consumed > self.tail.wrapping_sub(self.head) {
            return Err(Error::Protocol("a ring's head is beyond its tail".into()));
        }
        if consumed > 0 {
            self.head = head;
            // An entry published before a jump to the start knows an older end.
            self.bytes_head = self.bytes_head.max(self.ends[(head.wrapping_sub(1) % ENTRIES) as usize]);
        }
        Ok(())
    }

    /// Has the receiver freed something since we last looked?
    pub fn is_freed(&self) -> bool {
        self.link.head(self.lane).load(Acquire) as u32 != self.head
    }

    /// Is there room for an entry?
    fn has_room(&mut self) -> Result<bool> {
        if self.tail.wrapping_sub(self.head) < ENTRIES {
            return Ok(true);
        }
        self.refresh()?;
        Ok(self.tail.wrapping_sub(self.head) < ENTRIES)
    }

    /// Publishes an entry that carries no payload. False: there is no room.
    pub fn push(&mut self, entry: &Entry) -> Result<bool> {
        if !self.has_room()? {
            return Ok(false);
        }
        self.publish(entry, &[]);
        Ok(true)
    }

    /// Publishes as much of a payload as there is room for, from `done` on.
    /// Returns how many of its bytes are published, or `None` if all of it
    /// (which for an empty one is more than 0 bytes).
    pub fn push_payload(&mut self, hello: bool, payload: &[u8], mut done: usize) -> Result<Option<usize>> {
        let wrap = if hello { Entry::Hello } else { Entry::Message };
        loop {
            if !self.has_room()? {
                return Ok(Some(done));
            }
            let rest = &payload[done..];
            if rest.len() <= INLINE {
                self.publish(&wrap(Part { last: true, len: rest.len(), at: None }), rest);
                return Ok(None);
            }
            let len = rest.len().min(PART);
            let Some(at) = self.reserve(len)? else { return Ok(Some(done)) };
            self.link.put(self.lane, at, &rest[..len])?;
            let last = len == rest.len();
            self.publish(&wrap(Part { last, len, at: Some(at) }), &[]);
            if last {
                return Ok(None);
            }
            done += len;
        }
    }

    /// A contiguous place in the byte ring.
    fn reserve(&mut self, len: usize) -> Result<Option<usize>> {
        const SIZE: u64 = BYTES as u64;
        let place = |tail: u64, head: u64| {
            let wraps = tail % SIZE + len as u64 > SIZE;
            // With nothing outstanding, back to the start: it is in the cache.
            let start = if wraps || tail == head { tail.next_multiple_of(SIZE) } else { tail };
            let head = if tail == head { start } else { head };
            (start + len as u64 - head <= SIZE).then_some((start, head))
        };
        if self.bytes_tail - self.bytes_head >= SIZE / 4 {
            self.refresh()?;
        }
        let mut found = place(self.bytes_tail, self.bytes_head);
        if found.is_none() {
            self.refresh()?;
            found = place(self.bytes_tail, self.bytes_head);
        }
        let Some((start, head)) = found else { return Ok(None) };
        self.bytes_head = head;
        self.bytes_tail = start + len as u64;
        Ok(Some((start % SIZE) as usize))
    }

    /// There is room.
    fn publish(&mut self, entry: &Entry, inline: &[u8]) {
        let (control, payload) = entry::encode(entry, inline);
        let used = match entry {
            Entry::Hello(Part { at: None, len, .. }) | Entry::Message(Part { at: None, len, .. }) => len.div_ceil(8),
            Entry::Ask(_) => 4,
            _ => 1,
        };
        for (i, word) in payload.as_chunks::<8>().0.iter().enumerate().take(used) {
            self.link.entry(self.lane, self.tail, i + 1).store(u64::from_le_bytes(*word), Relaxed);
        }
        let sequence = u64::from(self.tail.wrapping_add(1));
        // Release: whoever sees the sequence sees the payload, and every byte
        // copied to a region before.
        self.link.entry(self.lane, self.tail, 0).store(u64::from(control) << 32 | sequence, Release);
        self.ends[(self.tail % ENTRIES) as usize] = self.bytes_tail;
        self.tail = self.tail.wrapping_add(1);
    }
}

/// The end that empties.
pub(super) struct Receiver {
    link: LinkMemory,
    lane: usize,
    /// Entries consumed, and how many of them the sender was told of.
    head: u32,
    told: u32,
}

impl Receiver {
    pub fn new(link: LinkMemory, lane: usize) -> Self {
        Self { link, lane, head: 0, told: 0 }
    }

    /// Is there an entry?
    pub fn is_ready(&self) -> bool {
        let word = self.link.entry(self.lane, self.head, 0).load(Acquire);
        word as u32 == self.head.wrapping_add(1)
    }

    /// Takes the next entry: a checked copy of it and of its words.
    pub fn next(&mut self) -> Result<Option<(Entry, [u8; INLINE])>> {
        let word = self.link.entry(self.lane, self.head, 0).load(Acquire);
        if word as u32 != self.head.wrapping_add(1) {
            return Ok(None);
        }
        let mut payload = [0; INLINE];
        for (i, chunk) in payload.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *chunk = self.link.entry(self.lane, self.head, i + 1).load(Relaxed).to_le_bytes();
        }
        let entry = entry::decode((word >> 32) as u32, &payload).map_err(|what| Error::Protocol(what.into()))?;
        self.head = self.head.wrapping_add(1);
        Ok(Some((entry, payload)))
    }

    /// Copies a part's bytes out of the byte ring.
    pub fn take(&self, at: usize, into: &mut [u8]) -> Result<()> {
        self.link.take(self.lane, at, into)
    }

    /// Tells the sender what was consumed, if it is worth it or `now`.
    /// True: it was told.
    pub fn tell(&mut self, now: bool) -> bool {
        let untold = self.head.wrapping_sub(self.told);
        if untold == 0 || (!now && untold < TELL) {
            return false;
        }
        self.link.head(self.lane).store(u64::from(self.head), Release);
        self.told = self.head;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::LINK;
    use super::*;
    use crate::Memory;
    use proptest::prelude::*;

    fn lane() -> (Sender, Receiver, LinkMemory) {
        let link = LinkMemory::new(Memory::new(LINK).unwrap()).unwrap();
        (Sender::new(link.clone(), 0), Receiver::new(link.clone(), 0), link)
    }

    fn receive(receiver: &mut Receiver, got: &mut Vec<Vec<u8>>, partial: &mut Vec<u8>) -> bool {
        let Some((entry, words)) = receiver.next().unwrap() else { return false };
        let Entry::Message(part) = entry else { panic!("{entry:?}") };
        let mut bytes = vec![0; part.len];
        match part.at {
            Some(at) => receiver.take(at, &mut bytes).unwrap(),
            None => bytes.copy_from_slice(&words[..part.len]),
        }
        partial.extend(bytes);
        if part.last {
            got.push(std::mem::take(partial));
        }
        true
    }

    proptest! {
        #[test]
        fn payloads_come_out_as_they_went_in(steps in prop::collection::vec((0usize..100_000, 0usize..4), 1..400)) {
            let (mut sender, mut receiver, _) = lane();
            let (mut sent, mut got, mut partial) = (Vec::new(), Vec::new(), Vec::new());
            for (i, (len, reads)) in steps.into_iter().enumerate() {
                // Small ones mostly, or the ring would wrap by bytes only.
                let payload: Vec<u8> = (0..if i % 3 == 0 { len } else { len % 300 }).map(|b| (b ^ i) as u8).collect();
                let mut done = Some(0);
                while let Some(at) = done {
                    done = sender.push_payload(false, &payload, at).unwrap();
                    if done.is_some() {
                        // Full: then there is something to read or to tell.
                        let read = receive(&mut receiver, &mut got, &mut partial);
                        prop_assert!(receiver.tell(true) || read);
                    }
                }
                sent.push(payload);
                for _ in 0..reads {
                    receive(&mut receiver, &mut got, &mut partial);
                    receiver.tell(false);
                }
            }
            while receive(&mut receiver, &mut got, &mut partial) {}
            prop_assert!(sent == got);
        }
    }

    #[test]
    fn a_head_beyond_the_tail_is_noticed() {
        let (mut sender, _, link) = lane();
        for _ in 0..ENTRIES {
            assert!(sender.push(&Entry::Revoke(1)).unwrap());
        }
        assert!(!sender.push(&Entry::Revoke(1)).unwrap());
        link.head(0).store(u64::from(ENTRIES) + 1, Release);
        assert!(sender.push(&Entry::Revoke(1)).is_err());
    }

    #[test]
    fn indices_wrap() {
        let (mut sender, mut receiver, link) = lane();
        let near = u32::MAX - 2 * ENTRIES;
        (sender.tail, sender.head, receiver.head, receiver.told) = (near, near, near, near);
        link.head(0).store(u64::from(near), Release);
        for i in 0..4 * ENTRIES {
            assert!(!receiver.is_ready());
            assert!(sender.push(&Entry::Revoke(i)).unwrap());
            assert!(receiver.is_ready());
            assert_eq!(receiver.next().unwrap().unwrap().0, Entry::Revoke(i));
            receiver.tell(true);
        }
    }
}
