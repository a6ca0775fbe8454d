//! One connection: handshake, then frames out and frames in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::greeter::Greeter;
use super::inbox::Inbox;
use super::io::receive;
use super::outbox::{Outbox, Outgoing};
use super::sealing::{ALIGN, lead};
use crate::frame::{self, WRITE_HEADER, WriteFrame};
use crate::regions::Regions;
use crate::secure::record::HEADER;
use crate::secure::{Kind, Opener, Refused};
use crate::{Address, Error, Event, PeerId, QUEUE_LIMIT, Result, Write};

/// Bytes received in one call besides those that go straight to a region. Long
/// enough for a write of 64 KiB with its header: to move it from here costs less
/// than a second call for what would go straight.
const BUFFER: usize = (64 << 10) + 1024;

/// Where records come that are longer than [`LONG_RECORD`]: room for some of
/// them, since the start of the last has to be moved.
const LONG_BUFFER: usize = 256 << 10;
const LONG_RECORD: usize = 16 << 10;

/// Most bytes taken from one connection in one poll, so that it does not keep
/// the others waiting.
const BUDGET: usize = 4 << 20;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Greetings are under way until the instant.
    Greeting { until: Instant },
    /// Frames may flow.
    Open,
}

pub(super) struct Connection {
    pub socket: OwnedFd,
    pub phase: Phase,
    /// Where we connected to; none if the peer connected to us.
    pub target: Option<Address>,
    /// The outbox's state that the readiness source was told of.
    pub told_writable: bool,
    greeter: Greeter,
    /// Bytes of our greeting that the socket has not taken.
    greeting: Vec<u8>,
    pub outbox: Outbox,
    /// Why nothing more can be sent; the receiving side has the last word.
    broken: Option<Error>,
    buffer: Vec<u8>,
    /// Received and not consumed: `buffer[start..end]`.
    start: usize,
    end: usize,
    /// Where it begins after it was moved.
    lead: usize,
    /// Opens what is received, on a sealed connection.
    opener: Option<Opener>,
    inbox: Inbox,
    /// The socket may hold something: it said so, or was not emptied.
    pub ready: bool,
    /// The socket has told of its end: it is ready until that is read.
    pub ending: bool,
    /// On the list of those with something to do.
    listed: bool,
    /// The result of a receive into the [`window`](Self::window) that was made
    /// for it.
    pub received: Option<io::Result<usize>>,
}

impl Connection {
    /// A connection of which nothing is exchanged yet; `greeting` is to be sent
    /// first. A `target` if it is we who connect.
    pub fn new(socket: OwnedFd, target: Option<Address>, greeter: Greeter, greeting: Vec<u8>, until: Instant) -> Self {
        let buffer = vec![0; BUFFER + ALIGN];
        let lead = lead(&buffer, WRITE_HEADER);
        Self {
            socket,
            phase: Phase::Greeting { until },
            target,
            told_writable: false,
            greeter,
            greeting,
            outbox: Outbox::default(),
            broken: None,
            buffer,
            start: lead,
            end: lead,
            lead,
            opener: None,
            inbox: Inbox::default(),
            ready: false,
            ending: false,
            listed: true,
            received: None,
        }
    }

    /// May the owner of the transport know of it? Not of a stranger that has
    /// not greeted.
    pub fn is_known(&self) -> bool {
        self.target.is_some() || self.phase == Phase::Open
    }

    /// Is there something that the socket has not taken?
    pub fn has_output(&self) -> bool {
        self.broken.is_none() && (!self.greeting.is_empty() || (self.phase == Phase::Open && !self.outbox.is_empty()))
    }

    /// Did the last flush stop though the socket would take more?
    pub fn is_unfinished(&self) -> bool {
        self.broken.is_some() || self.outbox.is_unfinished()
    }

    /// Is there something to do even if nothing arrives?
    pub fn needs_attention(&self) -> bool {
        self.broken.is_some() || self.has_output()
    }

    /// Does it have to be put on the list of those with something to do?
    pub fn must_list(&mut self) -> bool {
        !std::mem::replace(&mut self.listed, true)
    }

    /// Attended to: is there still something to do?
    pub fn stays_listed(&mut self) -> bool {
        self.listed = self.ready || self.needs_attention();
        self.listed
    }

    fn direct(&self) -> bool {
        self.phase == Phase::Open && self.greeting.is_empty() && self.outbox.is_empty() && self.broken.is_none()
    }

    /// Is there room for `cost` bytes more?
    fn reserve(&mut self, peer: PeerId, cost: usize) -> Result<()> {
        if self.outbox.is_empty() || self.outbox.bytes() + cost <= QUEUE_LIMIT {
            return Ok(());
        }
        self.flush();
        match self.outbox.bytes() {
            queued if queued > 0 && queued + cost > QUEUE_LIMIT => Err(Error::Full { peer, queued }),
            _ => Ok(()),
        }
    }

    pub fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        if self.direct() {
            let sent = self.outbox.send_message(self.socket.as_fd(), payload);
            self.note(sent);
            return Ok(());
        }
        self.reserve(peer, frame::MESSAGE_HEADER + payload.len())?;
        if self.broken.is_none() {
            self.outbox.push_message(payload);
        }
        Ok(())
    }

    /// Posts a write whose source range and key were checked.
    pub fn write(&mut self, peer: PeerId, regions: &Regions, write: &Write<'_>, to: &WriteFrame) -> Result<()> {
        let memory = regions.source(write.local, write.local_offset, write.len)?;
        let (header, offset, len) = (frame::write_header(to), write.local_offset as usize, write.len as usize);
        if self.direct() {
            let sent = self.outbox.send_write(self.socket.as_fd(), header, memory, offset, len);
            self.note(sent);
            return Ok(());
        }
        self.reserve(peer, frame::WRITE_HEADER)?;
        if self.broken.is_none() {
            self.outbox.push_write(Outgoing { header, memory: memory.clone(), offset, len }, 0);
        }
        Ok(())
    }

    /// Hands the socket what is queued.
    pub fn flush(&mut self) {
        let sent = self.try_flush();
        self.note(sent);
    }

    fn try_flush(&mut self) -> io::Result<()> {
        if !self.greeting.is_empty() {
            match super::io::send(self.socket.as_fd(), &[super::io::Part::Bytes(&self.greeting)]) {
                Ok(sent) => drop(self.greeting.drain(..sent)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        if self.greeting.is_empty() && self.phase == Phase::Open {
            self.outbox.flush(self.socket.as_fd())?;
        }
        Ok(())
    }

    fn note(&mut self, sent: io::Result<()>) {
        if let Err(e) = sent {
            self.outbox.clear();
            self.greeting.clear();
            self.broken = Some(self.gone(&e));
        }
    }

    /// What a socket error means here.
    fn gone(&self, error: &dyn std::fmt::Display) -> Error {
        match (&self.target, self.phase) {
            (Some(address), Phase::Greeting { .. }) => Error::Unreachable(address.clone(), error.to_string()),
            _ => Error::PeerGone,
        }
    }

    /// Can the next receive be done for it, into [`window`](Self::window)? Not
    /// in the midst of a write whose bytes go straight to their region.
    pub fn takes_batch(&self) -> bool {
        self.straight().is_none()
    }

    /// Where the next bytes are to land without a stop in the buffer: never
    /// those of a record, which have to be opened first.
    fn straight(&self) -> Option<(u32, u64, u64)> {
        if self.opener.is_some() { None } else { self.inbox.target() }
    }

    /// The socket, and the free part of the buffer.
    pub fn window(&mut self) -> (BorrowedFd<'_>, &mut [u8]) {
        self.compact();
        (self.socket.as_fd(), &mut self.buffer[self.end..])
    }

    /// At most an incomplete header is left over, or an incomplete record.
    fn compact(&mut self) {
        self.buffer.copy_within(self.start..self.end, self.lead);
        (self.start, self.end) = (self.lead, self.lead + self.end - self.start);
    }

    /// Takes in what has arrived. Events go to `sink`; the error is why the
    /// connection has to be closed.
    pub fn receive(&mut self, peer: PeerId, regions: &Regions, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let mut budget = BUDGET;
        self.ready = true;
        loop {
            // What is received for a region beyond this call's buffer goes
            // straight there.
            let target = match self.straight() {
                Some((region, at, left)) if self.start == self.end => {
                    let len = left.min(BUDGET as u64) as usize;
                    Some((regions.still(region)?, at as usize, len))
                }
                _ => None,
            };
            let straight = target.map_or(0, |(_, _, len)| len);
            self.compact();
            let room = straight + self.buffer.len() - self.end;
            let memory = target.map(|(memory, at, len)| (&**memory, at, len));
            let received = match self.received.take() {
                Some(received) => received,
                None => receive(self.socket.as_fd(), memory, &mut self.buffer[self.end..]),
            };
            let got = match received {
                Ok(0) => return Err(self.gone(&self.greeter.cut_off())),
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.ready = false;
                    return self.broken.clone().map_or(Ok(()), Err);
                }
                Err(e) => return Err(self.broken.take().unwrap_or_else(|| self.gone(&e))),
            };
            self.end += got - got.min(straight);
            if straight > 0 {
                self.inbox.landed(got.min(straight));
            }
            self.consume(peer, regions, sink)?;
            budget = budget.saturating_sub(got);
            // A short read emptied the socket: asking again would only tell so.
            // Except of its end.
            self.ready = got >= room || self.ending;
            if got < room || budget == 0 {
                return Ok(());
            }
        }
    }

    /// Works through the received bytes until what is left is incomplete.
    fn consume(&mut self, peer: PeerId, regions: &Regions, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        if let Phase::Greeting { .. } = self.phase {
            self.greet(peer, sink)?;
        }
        if self.phase != Phase::Open {
            return Ok(());
        }
        let Some(opener) = &mut self.opener else {
            self.start += self.inbox.take(peer, regions, &self.buffer[self.start..self.end], sink)?;
            return Ok(());
        };
        loop {
            let record = &mut self.buffer[self.start..self.end];
            let Some(opened) = opener.open(record).map_err(Error::Refused)? else { break };
            if opened.kind != Kind::Data {
                return Err(Error::Refused(Refused::Protocol("a greeting among the data")));
            }
            let content = &record[opened.content];
            if self.inbox.take(peer, regions, content, sink)? < content.len() {
                return Err(Error::Refused(Refused::Protocol("a header cut by its record")));
            }
            self.start += opened.taken;
        }
        let wanted = opener.length(&self.buffer[self.start..self.end]).map_err(Error::Refused)?;
        if wanted.is_some_and(|wanted| wanted > LONG_RECORD) && self.buffer.len() < LONG_BUFFER {
            self.buffer.resize(LONG_BUFFER, 0);
            self.lead = lead(&self.buffer, HEADER + WRITE_HEADER);
        }
        Ok(())
    }

    fn greet(&mut self, peer: PeerId, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let fed = self.greeter.feed(&self.buffer[self.start..self.end], &mut self.greeting);
        let (taken, greeted) = match fed {
            Ok(fed) => fed,
            Err(refused) => {
                self.flush();
                return Err(Error::Refused(refused));
            }
        };
        self.start += taken;
        if let Some(greeted) = greeted {
            self.phase = Phase::Open;
            if let Some((sealer, opener)) = greeted.keys {
                self.outbox.seal_with(sealer);
                self.opener = Some(opener);
                self.lead = lead(&self.buffer, HEADER + WRITE_HEADER);
            }
            if self.target.is_some() {
                sink(Event::Connected { peer });
            } else {
                sink(Event::Accepted { peer, hello: &greeted.hello });
                self.inbox.hello = greeted.hello;
            }
        }
        self.flush();
        Ok(())
    }
}
