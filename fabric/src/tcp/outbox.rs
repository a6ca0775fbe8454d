//! What one connection has still to send.
//!
//! A post goes to the socket at once when nothing is queued before it: one
//! system call, no copy. What the socket does not take is queued: a message's
//! remaining bytes are copied, a write keeps a reference to its source.
//!
//! On a sealed connection frames become records, one at a time: a post that
//! nothing waits before is a record of its own and one system call, what is
//! queued is poured together, a long write cut into many. The header of a frame
//! is never cut, so that the other side can read it where its record opened.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::io::{MAX_PARTS, Part, send, send_run};
use super::sealing::Sealing;
use crate::Memory;
use crate::frame::{MESSAGE_HEADER, WRITE_HEADER, message_header};
use crate::secure::{MAX_PLAIN, Sealer};

/// Payloads up to this are copied behind their header and sent as one run: the
/// copy costs less than what the kernel spends on a list of two.
const SMALL: usize = 4 << 10;

/// Most bytes of a source offered to the socket in one call.
const SLICE: usize = 1 << 20;

/// About how much one flush sends, so that a reader as fast as we are does not
/// hold us for the whole of a long queue.
const FLUSH: usize = 8 << 20;

enum Item {
    Bytes(Vec<u8>),
    Write(Outgoing),
}

/// A write under way.
pub(super) struct Outgoing {
    pub header: [u8; WRITE_HEADER],
    pub memory: Arc<Memory>,
    pub offset: usize,
    pub len: usize,
}

struct Queued {
    item: Item,
    /// Bytes that are gone; a write's header counts.
    sent: usize,
}

impl Queued {
    /// Bytes of it on the wire.
    fn size(&self) -> usize {
        match &self.item {
            Item::Bytes(bytes) => bytes.len(),
            Item::Write(write) => WRITE_HEADER + write.len,
        }
    }
}

#[derive(Default)]
pub(super) struct Outbox {
    queue: VecDeque<Queued>,
    /// What the queue costs: payloads of messages, descriptors of writes.
    bytes: usize,
    writes: usize,
    /// The last flush ended before the socket was full.
    unfinished: bool,
    /// The record under way, on a sealed connection.
    sealing: Option<Box<Sealing>>,
    /// Where small payloads are copied behind their header.
    run: Vec<u8>,
}

impl Outbox {
    /// From now on everything is sealed.
    pub fn seal_with(&mut self, sealer: Sealer) {
        self.sealing = Some(Box::new(Sealing::new(sealer)));
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.sealing.as_ref().is_none_or(|sealing| sealing.is_empty())
    }

    pub fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn writes(&self) -> usize {
        self.writes
    }

    /// Forgets everything: the connection is broken.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Queues raw bytes.
    pub fn push_bytes(&mut self, bytes: Vec<u8>) {
        self.bytes += bytes.len();
        self.queue.push_back(Queued { item: Item::Bytes(bytes), sent: 0 });
    }

    /// Queues a message.
    pub fn push_message(&mut self, payload: &[u8]) {
        self.push_message_rest(payload, 0);
    }

    fn push_message_rest(&mut self, payload: &[u8], sent: usize) {
        let header = message_header(payload.len());
        let mut bytes = Vec::with_capacity(MESSAGE_HEADER + payload.len() - sent);
        bytes.extend(&header[sent.min(MESSAGE_HEADER)..]);
        bytes.extend(&payload[sent.saturating_sub(MESSAGE_HEADER)..]);
        self.push_bytes(bytes);
    }

    /// Queues a write of which `sent` bytes are gone.
    pub fn push_write(&mut self, write: Outgoing, sent: usize) {
        self.bytes += WRITE_HEADER;
        self.writes += 1;
        self.queue.push_back(Queued { item: Item::Write(write), sent });
    }

    /// `len` bytes of `run`, which is as long as the longest was: nothing is
    /// cleared before each use.
    fn room(run: &mut Vec<u8>, len: usize) -> &mut [u8] {
        if run.len() < len {
            run.resize(len, 0);
        }
        &mut run[..len]
    }

    /// Sends a message now; queues what the socket does not take. The queue is
    /// empty.
    pub fn send_message(&mut self, socket: BorrowedFd<'_>, payload: &[u8]) -> io::Result<()> {
        let header = message_header(payload.len());
        if let Some(sealing) = &mut self.sealing {
            let (total, mut sealed) = (MESSAGE_HEADER + payload.len(), 0);
            while sealed < total {
                sealing.begin(total - sealed);
                if sealed == 0 {
                    sealed += sealing.pour(&header);
                }
                sealed += sealing.pour(&payload[sealed - MESSAGE_HEADER..]);
                sealing.seal()?;
                if !sealing.send(socket)? {
                    break;
                }
            }
            if sealed < total {
                self.push_message_rest(payload, sealed);
            }
            return Ok(());
        }
        let sent = if payload.len() <= SMALL {
            let run = Self::room(&mut self.run, MESSAGE_HEADER + payload.len());
            run[..MESSAGE_HEADER].copy_from_slice(&header);
            run[MESSAGE_HEADER..].copy_from_slice(payload);
            taken(send_run(socket, run))?
        } else {
            taken(send(socket, &[Part::Bytes(&header), Part::Bytes(payload)]))?
        };
        if sent < MESSAGE_HEADER + payload.len() {
            self.push_message_rest(payload, sent);
        }
        Ok(())
    }

    /// Sends a write now; queues what the socket does not take. The queue is
    /// empty.
    pub fn send_write(
        &mut self,
        socket: BorrowedFd<'_>,
        header: [u8; WRITE_HEADER],
        memory: &Arc<Memory>,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        if let Some(sealing) = &mut self.sealing {
            sealing.begin_write(WRITE_HEADER + len);
            let header_len = sealing.pour(&header);
            let sealed = header_len + sealing.pour_region(memory, offset, len)?;
            sealing.seal()?;
            let all = sealing.send(socket)?;
            if sealed < WRITE_HEADER + len {
                self.push_write(Outgoing { header, memory: Arc::clone(memory), offset, len }, sealed);
                if all {
                    self.flush(socket)?;
                }
            }
            return Ok(());
        }
        let sent = if len <= SMALL {
            let run = Self::room(&mut self.run, WRITE_HEADER + len);
            run[..WRITE_HEADER].copy_from_slice(&header);
            memory.read(offset, &mut run[WRITE_HEADER..]).map_err(io::Error::other)?;
            taken(send_run(socket, run))?
        } else {
            let parts = [Part::Bytes(&header), Part::Region(memory, offset, len.min(SLICE))];
            taken(send(socket, &parts))?
        };
        if sent < WRITE_HEADER + len {
            self.push_write(Outgoing { header, memory: Arc::clone(memory), offset, len }, sent);
            if len > SLICE {
                self.flush(socket)?;
            }
        }
        Ok(())
    }

    /// Hands the socket as much of the queue as it takes.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut flushed = 0;
        self.unfinished = false;
        if self.sealing.is_some() {
            return self.flush_sealed(socket);
        }
        while !self.queue.is_empty() && flushed < FLUSH {
            let (offered, sent) = self.offer(socket)?;
            self.advance(sent);
            if sent < offered {
                break;
            }
            flushed += sent;
        }
        self.unfinished = !self.queue.is_empty() && flushed >= FLUSH;
        Ok(())
    }

    fn flush_sealed(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut flushed = 0;
        while flushed < FLUSH {
            let Some(sealing) = &mut self.sealing else { return Ok(()) };
            flushed += sealing.len();
            if !sealing.send(socket)? || self.queue.is_empty() {
                return Ok(());
            }
            self.seal_front()?;
        }
        self.unfinished = true;
        Ok(())
    }

    /// Makes a record of the front of the queue.
    fn seal_front(&mut self) -> io::Result<()> {
        let Some(sealing) = &mut self.sealing else { return Ok(()) };
        let mut wanted = 0;
        for queued in &self.queue {
            wanted += queued.size() - queued.sent;
            if wanted >= MAX_PLAIN {
                break;
            }
        }
        match self.queue.front() {
            Some(Queued { item: Item::Write(_), .. }) => sealing.begin_write(wanted),
            _ => sealing.begin(wanted),
        }
        let mut sealed = 0;
        for queued in &self.queue {
            if sealing.left() < WRITE_HEADER && sealed > 0 {
                break;
            }
            let poured = match &queued.item {
                Item::Bytes(bytes) => sealing.pour(&bytes[queued.sent..]),
                Item::Write(write) => {
                    let header = sealing.pour(&write.header[queued.sent.min(WRITE_HEADER)..]);
                    let body = (queued.sent + header) - WRITE_HEADER;
                    header + sealing.pour_region(&write.memory, write.offset + body, write.len - body)?
                }
            };
            sealed += poured;
            if poured < queued.size() - queued.sent {
                break;
            }
        }
        sealing.seal()?;
        self.advance(sealed);
        Ok(())
    }

    /// One call with the front of the queue. Returns (bytes offered, taken).
    fn offer(&self, socket: BorrowedFd<'_>) -> io::Result<(usize, usize)> {
        let mut parts = [Part::Bytes(&[]); MAX_PARTS];
        let (mut count, mut offered) = (0, 0);
        for queued in &self.queue {
            if count + 2 > MAX_PARTS || offered >= SLICE {
                break;
            }
            match &queued.item {
                Item::Bytes(bytes) => {
                    parts[count] = Part::Bytes(&bytes[queued.sent..]);
                    offered += bytes.len() - queued.sent;
                    count += 1;
                }
                Item::Write(write) => {
                    let header = queued.sent.min(WRITE_HEADER);
                    let body = queued.sent - header;
                    let len = (write.len - body).min(SLICE);
                    parts[count] = Part::Bytes(&write.header[header..]);
                    parts[count + 1] = Part::Region(&write.memory, write.offset + body, len);
                    offered += WRITE_HEADER - header + len;
                    count += 2;
                    if len < write.len - body {
                        // What comes behind must not overtake the rest.
                        break;
                    }
                }
            }
        }
        Ok((offered, taken(send(socket, &parts[..count]))?))
    }

    /// Takes `sent` bytes off the front.
    fn advance(&mut self, mut sent: usize) {
        while let Some(front) = self.queue.front_mut() {
            let size = front.size();
            let (cost, writes) = match &front.item {
                Item::Bytes(bytes) => (bytes.len(), 0),
                Item::Write(_) => (WRITE_HEADER, 1),
            };
            let n = sent.min(size - front.sent);
            front.sent += n;
            sent -= n;
            if front.sent < size {
                return;
            }
            self.bytes -= cost;
            self.writes -= writes;
            self.queue.pop_front();
        }
    }
}

/// A socket that takes nothing now is no error.
pub(super) fn taken(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}
