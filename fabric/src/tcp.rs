//! The tcp transport: any two hosts, no special hardware.
//!
//! Sockets never block. A post that nothing is queued before goes to the
//! socket in one system call, a write's bytes straight from its region; what
//! the socket does not take waits in the connection's outbox. A poll receives
//! with one system call a connection; the bulk of a write is received straight
//! into its region. Every header is checked (kind, lengths, region, range,
//! token, guard) before a byte lands; a peer that breaks the protocol loses
//! its connection, the transport goes on and counts it in [`Stats`].
//!
//! All of this is sealed by default: a connection begins with the bootstrap of
//! [`secure`](crate::secure), and its frames travel in records. A record has to
//! be opened before its bytes may land, so bulk takes the way over a buffer in
//! the cache: copied and sealed there, opened there and copied. An
//! [insecure](crate::secure::Security::Insecure) transport skips both.
//!
//! With few connections a poll receives from each, which is what a spinning
//! owner wants: nothing is faster than asking the socket itself. With more, it
//! asks epoll which have something, once, and attends to those only; with very
//! many ready at once, one io_uring submission receives for all of them.
//! Measured with `examples/crowd.rs` (µs until a hub has heard one 64-byte
//! message of each peer, two cores, dev profile):
//!
//! | peers | 8 | 16 | 64 | 256 |
//! |---|---|---|---|---|
//! | a call each | 3.0 | 5.9 | 23.6 | 105 |
//! | io_uring | 3.2 | 5.9 | 22.5 | 99 |
//!
//! A poll that finds nothing takes 0.14 µs however many peers there are. Sleep
//! is epoll's: it costs a spinning owner nothing per message, while an armed
//! io_uring poll interrupts it at each arrival.

mod batch;
mod config;
mod connection;
mod greeter;
#[doc(hidden)]
pub mod handshake;
mod inbox;
mod io;
mod outbox;
mod sealing;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use crate::door::{self, ADMITTED, CLOCK, Door, GRACE, LOOK, Visit};
use crate::frame::WriteFrame;
use crate::key::{Key, Maker, Token};
use crate::peers::Peers;
use crate::regions::Regions;
use crate::stats::{Incidents, Stats};
use crate::{Access, Address, Error, Event, MAX_SEND, Memory, PeerId, RegionId, RemoteKey, Result, Transport};
use crate::{Waker, Write};
use batch::Batch;
pub use config::TcpConfig;
use connection::{Connection, Phase};
use greeter::Greeter;

const SCHEME: &str = "tcp://";

/// What epoll tells of a connection: once when something new is there, so that
/// asking it costs nothing for those that have nothing new.
const ARRIVALS: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::RDHUP).union(epoll::EventFlags::ET);
/// Told when the connection ends.
const ENDS: epoll::EventFlags = epoll::EventFlags::RDHUP.union(epoll::EventFlags::HUP).union(epoll::EventFlags::ERR);

/// With up to this many connections a poll receives from each; with more it
/// asks epoll first which have something.
const FEW: usize = 4;

/// Does the system let many receives be made in one call (io_uring)? Where it
/// does not, each is a call of its own.
pub fn batches() -> bool {
    Batch::new().is_some()
}

/// A transport over tcp sockets.
pub struct TcpTransport {
    door: Door,
    config: TcpConfig,
    /// Names this transport's life to its peers.
    incarnation: u64,
    regions: Regions,
    peers: Peers<Box<Connection>>,
    polls: u32,
    looked: Instant,
    /// The next poll looks at handshakes' deadlines.
    late: bool,
    incidents: Incidents,
    /// Batched receives, where the kernel allows them.
    batch: Option<Batch>,
    /// Connections that a poll in a crowd has to attend to.
    active: Vec<PeerId>,
    /// Kept for their memory.
    work: Vec<(PeerId, Box<Connection>)>,
    received: Vec<std::io::Result<usize>>,
}

impl TcpTransport {
    /// Listens at `address`; port 0 takes any free one.
    pub fn bind(address: SocketAddr, config: TcpConfig) -> Result<Self> {
        let door = Door::open(SCHEME, address, config.advertise.as_deref())?;
        let batch = if config.io_uring { Batch::new() } else { None };
        Ok(Self {
            incarnation: Token::random()?.low(),
            door,
            config,
            regions: Regions::default(),
            peers: Peers::default(),
            polls: 0,
            looked: Instant::now(),
            late: false,
            incidents: Incidents::default(),
            batch,
            received: Vec::new(),
            active: Vec::new(),
            work: Vec::new(),
        })
    }

    /// Counts since the transport was made.
    pub fn stats(&self) -> Stats {
        self.incidents.stats
    }

    fn add(&mut self, connection: Connection) -> Result<PeerId> {
        let peer = self.peers.insert(Box::new(connection))?;
        let socket = &self.peers.get_mut(peer)?.socket;
        if let Err(e) = self.door.watch(socket, peer.0, ARRIVALS) {
            self.peers.remove(peer);
            return Err(e);
        }
        self.active.push(peer);
        Ok(peer)
    }

    /// Asks epoll which sockets have something; sleeps for at most `timeout`.
    fn see_ready(&mut self, timeout: Duration) -> Result<()> {
        self.door.see_ready(timeout)?;
        for (peer, flags) in &self.door.ready {
            if let Ok(connection) = self.peers.get_mut(PeerId(*peer)) {
                connection.ready = true;
                connection.ending |= flags.intersects(ENDS);
                if connection.must_list() {
                    self.active.push(PeerId(*peer));
                }
            }
        }
        Ok(())
    }

    /// Attends to those of many connections that have something to do. What is
    /// ready is received in one system call where io_uring allows it.
    fn attend(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        for peer in self.active.drain(..) {
            self.work.extend(self.peers.take(peer).map(|connection| (peer, connection)));
        }
        fn ready(work: &mut [(PeerId, Box<Connection>)]) -> impl Iterator<Item = &mut Box<Connection>> {
            work.iter_mut().map(|(_, connection)| connection).filter(|c| c.ready && c.takes_batch())
        }
        if let Some(batch) = &mut self.batch
            && ready(&mut self.work).nth(batch::WORTH - 1).is_some()
        {
            let outcome = batch.receive(ready(&mut self.work).map(|c| c.window()), &mut self.received);
            for (connection, result) in ready(&mut self.work).zip(self.received.drain(..)) {
                connection.received = Some(result);
            }
            if let Err(e) = outcome {
                tracing::warn!(error = %e, "io_uring failed; going on without it");
                self.batch = None;
            }
        }
        let mut work = std::mem::take(&mut self.work);
        for (peer, mut connection) in work.drain(..) {
            match advance(peer, &mut connection, &self.regions, &mut self.door, sink) {
                Ok(()) => {
                    if connection.stays_listed() {
                        self.active.push(peer);
                    }
                    self.peers.put(peer, connection);
                }
                Err(reason) => {
                    self.peers.release(peer);
                    self.end(peer, &connection, reason, sink);
                }
            }
        }
        self.work = work;
    }

    /// Takes in strangers.
    fn accept(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let (limit, time) = (self.config.max_half_open, self.config.handshake_timeout);
        for _ in 0..ADMITTED {
            let until = |peer| match self.peers.get(peer)?.phase {
                Phase::Greeting { until } => Some(until),
                Phase::Open => None,
            };
            match self.door.next(limit, time, until)? {
                Visit::Stranger(socket) => {
                    self.incidents.stats.accepted += 1;
                    let greeter = Greeter::accept(&self.config.security, self.incarnation);
                    let until = Instant::now() + time;
                    let peer = self.add(Connection::new(socket, None, greeter, Vec::new(), until))?;
                    self.door.admitted(peer);
                }
                Visit::Oldest(oldest) => {
                    self.close(oldest, Error::Protocol("too many handshakes at once".into()), sink);
                }
                Visit::Nobody => break,
            }
        }
        // The readiness source tells of the others at the next look.
        Ok(())
    }

    /// Drops those whose handshake's time is up.
    fn expire(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        let now = self.looked;
        self.active.retain(|peer| self.peers.get(*peer).is_some());
        for slot in 0..self.peers.slots() {
            if let Some((peer, connection)) = self.peers.at(slot)
                && let Phase::Greeting { until } = connection.phase
                && until <= now
            {
                self.incidents.stats.timeouts += 1;
                let reason = match &connection.target {
                    Some(address) => Error::Unreachable(address.clone(), "no answer in time".into()),
                    None => Error::PeerGone,
                };
                self.close(peer, reason, sink);
            }
        }
    }

    /// Drops a connection and tells whoever may know of it.
    fn close(&mut self, peer: PeerId, reason: Error, sink: &mut dyn FnMut(Event<'_>)) {
        if let Some(connection) = self.peers.remove(peer) {
            self.end(peer, &connection, reason, sink);
        }
    }

    fn end(&mut self, peer: PeerId, connection: &Connection, reason: Error, sink: &mut dyn FnMut(Event<'_>)) {
        match &reason {
            Error::Protocol(cause) => self.incidents.protocol("tcp", cause),
            Error::Refused(refused) => self.incidents.refused("tcp", *refused),
            _ => {}
        }
        if self.door.passed(peer) {
            self.incidents.stats.half_open_dropped += 1;
        }
        if connection.is_known() {
            sink(Event::Closed { peer, reason });
        }
    }
}

/// Moves one connection along; the error is why it has to be closed.
fn advance(
    peer: PeerId,
    connection: &mut Connection,
    regions: &Regions,
    door: &mut Door,
    sink: &mut dyn FnMut(Event<'_>),
) -> Result<()> {
    if connection.has_output() {
        connection.flush();
    }
    let was = connection.phase;
    let received = connection.receive(peer, regions, sink);
    if was != connection.phase {
        door.passed(peer);
    }
    received
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn address(&self) -> Address {
        self.door.address.clone()
    }

    fn register(&mut self, memory: &Arc<Memory>, access: Access) -> Result<RegionId> {
        self.regions.register(memory, access)
    }

    fn deregister(&mut self, region: RegionId) -> Result<()> {
        self.regions.deregister(region)
    }

    fn remote_key(&self, region: RegionId) -> Result<RemoteKey> {
        self.regions.key(region, Maker::Tcp)
    }

    fn connect(&mut self, address: &Address, hello: &[u8]) -> Result<PeerId> {
        if hello.len() > MAX_SEND {
            return Err(Error::TooLong(hello.len()));
        }
        let to = door::resolve(address, SCHEME, "not tcp://host:port")?;
        let mut greeting = Vec::new();
        let greeter = Greeter::connect(&self.config.security, self.incarnation, hello, &mut greeting);
        let greeter = greeter.map_err(Error::Refused)?;
        let socket = door::dial(address, to)?;
        let until = Instant::now() + self.config.handshake_timeout;
        self.add(Connection::new(socket, Some(address.clone()), greeter, greeting, until))
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.peers.remove(peer);
    }

    fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        if payload.len() > MAX_SEND {
            return Err(Error::TooLong(payload.len()));
        }
        let connection = self.peers.get_mut(peer)?;
        connection.send(peer, payload)?;
        if connection.needs_attention() && connection.must_list() {
            self.active.push(peer);
        }
        Ok(())
    }

    fn write(&mut self, peer: PeerId, write: Write<'_>) -> Result<()> {
        let connection = self.peers.get_mut(peer)?;
        let key = Key::decode(&write.remote.0, Maker::Tcp)?;
        key.check(write.remote_offset, write.len)?;
        let frame = WriteFrame {
            region: key.region,
            token: key.token,
            offset: write.remote_offset,
            len: write.len,
            notify: write.notify,
        };
        connection.write(peer, &self.regions, &write, &frame)?;
        if connection.needs_attention() && connection.must_list() {
            self.active.push(peer);
        }
        Ok(())
    }

    fn pending(&self, peer: PeerId) -> usize {
        self.peers.get(peer).map_or(0, |c| c.outbox.writes())
    }

    fn poll(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<usize> {
        let mut events = 0;
        let mut sink = |event: Event<'_>| {
            events += 1;
            sink(event);
        };
        self.polls = self.polls.wrapping_add(1);
        let due = self.polls.is_multiple_of(CLOCK) && self.looked.elapsed() >= LOOK;
        let few = self.peers.len() <= FEW;
        if due || !few {
            self.see_ready(Duration::ZERO)?;
        }
        if due || self.late {
            self.late = false;
            self.looked = Instant::now();
            self.expire(&mut sink);
        }
        if std::mem::take(&mut self.door.look) {
            self.accept(&mut sink)?;
        }
        if !few {
            self.attend(&mut sink);
            return Ok(events);
        }
        for slot in 0..self.peers.slots() {
            let Some((peer, connection)) = self.peers.at(slot) else { continue };
            if let Err(reason) = advance(peer, connection, &self.regions, &mut self.door, &mut sink) {
                self.close(peer, reason, &mut sink);
            }
        }
        Ok(events)
    }

    fn wait(&mut self, mut timeout: Duration) -> Result<()> {
        let mut greeting = false;
        for (peer, connection) in self.peers.iter_mut() {
            if connection.ready || connection.is_unfinished() {
                return Ok(());
            }
            greeting |= connection.phase != Phase::Open;
            let writable = connection.has_output();
            if writable != connection.told_writable {
                let flags = if writable { ARRIVALS | epoll::EventFlags::OUT } else { ARRIVALS };
                self.door.watch_for(&connection.socket, peer.0, flags)?;
                connection.told_writable = writable;
            }
        }
        if greeting {
            timeout = timeout.min(self.config.handshake_timeout.mul_f64(if self.door.is_full() { GRACE } else { 1.0 }));
            self.late = true;
        }
        self.see_ready(timeout)
    }

    fn waker(&self) -> Waker {
        self.door.waker()
    }
}
