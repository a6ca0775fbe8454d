//! What one connection has still to send.
//!
//! A post goes to the socket at once when nothing is queued before it: one
//! system call, no copy. What the socket does not take is queued: a message's
//! remaining bytes are copied, a write keeps a reference to its source.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::io::{MAX_PARTS, Part, send, send_run};
use crate::Memory;
use crate::frame::{MESSAGE_HEADER, WRITE_HEADER, message_header};

/// Payloads up to this are copied behind their header and sent as one run: the
/// copy costs less than what the kernel spends on a list of two.
const SMALL: usize = 1024;

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

#[derive(Default)]
pub(super) struct Outbox {
    queue: VecDeque<Queued>,
    /// What the queue costs: payloads of messages, descriptors of writes.
    bytes: usize,
    writes: usize,
    /// The last flush ended before the socket was full.
    unfinished: bool,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
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

    /// Sends a message now; queues what the socket does not take. The queue is
    /// empty.
    pub fn send_message(&mut self, socket: BorrowedFd<'_>, payload: &[u8]) -> io::Result<()> {
        let header = message_header(payload.len());
        let sent = if payload.len() <= SMALL {
            let mut run = [0; MESSAGE_HEADER + SMALL];
            run[..MESSAGE_HEADER].copy_from_slice(&header);
            run[MESSAGE_HEADER..MESSAGE_HEADER + payload.len()].copy_from_slice(payload);
            taken(send_run(socket, &run[..MESSAGE_HEADER + payload.len()]))?
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
        let sent = if len <= SMALL {
            let mut run = [0; WRITE_HEADER + SMALL];
            run[..WRITE_HEADER].copy_from_slice(&header);
            memory.read(offset, &mut run[WRITE_HEADER..WRITE_HEADER + len]).map_err(io::Error::other)?;
            taken(send_run(socket, &run[..WRITE_HEADER + len]))?
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
            let (size, cost, writes) = match &front.item {
                Item::Bytes(bytes) => (bytes.len(), bytes.len(), 0),
                Item::Write(write) => (WRITE_HEADER + write.len, WRITE_HEADER, 1),
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
fn taken(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}
