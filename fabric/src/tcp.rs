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

use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

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

/// Tokens of the readiness source that are no connection.
const WAKER: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

/// What epoll tells of a connection: once when something new is there, so that
/// asking it costs nothing for those that have nothing new.
const ARRIVALS: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::RDHUP).union(epoll::EventFlags::ET);
/// Told when the connection ends.
const ENDS: epoll::EventFlags = epoll::EventFlags::RDHUP.union(epoll::EventFlags::HUP).union(epoll::EventFlags::ERR);

/// A spinning owner looks at the clock this often, in polls, and at the listener
/// and the handshakes' deadlines once this time has passed.
const CLOCK: u32 = 16;
const LOOK: Duration = Duration::from_millis(1);

/// With up to this many connections a poll receives from each; with more it
/// asks epoll first which have something.
const FEW: usize = 4;

/// Strangers taken in at one look: whoever plays a recorded handshake again
/// costs 0.1 ms, and shall not have all of the owner's time.
const ADMITTED: usize = 4;

/// The part of a handshake's time that is sure even when others wait.
const GRACE: f64 = 0.02;

/// Does the system let many receives be made in one call (io_uring)? Where it
/// does not, each is a call of its own.
pub fn batches() -> bool {
    Batch::new().is_some()
}

/// A transport over tcp sockets.
pub struct TcpTransport {
    listener: TcpListener,
    address: Address,
    config: TcpConfig,
    /// Names this transport's life to its peers.
    incarnation: u64,
    regions: Regions,
    peers: Peers<Box<Connection>>,
    /// Accepted connections in their handshake, oldest first.
    half_open: Vec<PeerId>,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    polls: u32,
    looked: Instant,
    /// The next poll looks at the listener, and at handshakes' deadlines.
    look: bool,
    late: bool,
    /// As many are in their handshake as may be: the listener is not watched.
    full: bool,
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
        let os = |e| Error::os("listening for fabric peers", e);
        let listener = TcpListener::bind(address).map_err(os)?;
        listener.set_nonblocking(true).map_err(os)?;
        let told = match &config.advertise {
            Some(name) => name.clone(),
            None => listener.local_addr().map_err(os)?.to_string(),
        };
        let batch = if config.io_uring { Batch::new() } else { None };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::os("making an epoll", e))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|e| Error::os("making an eventfd", e))?);
        for (fd, token) in [(wake.as_fd(), WAKER), (listener.as_fd(), LISTENER)] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
                .map_err(|e| Error::os("watching a socket", e))?;
        }
        let Token([a, b, c, d, e, f, g, h, ..]) = Token::random()?;
        Ok(Self {
            incarnation: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            listener,
            address: Address(format!("{SCHEME}{told}")),
            config,
            regions: Regions::default(),
            peers: Peers::default(),
            half_open: Vec::new(),
            epoll,
            wake,
            polls: 0,
            looked: Instant::now(),
            look: true,
            late: false,
            incidents: Incidents::default(),
            full: false,
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
        let watched = epoll::add(&self.epoll, socket, epoll::EventData::new_u64(peer.0), ARRIVALS);
        if let Err(e) = watched {
            self.peers.remove(peer);
            return Err(Error::os("watching a socket", e));
        }
        self.active.push(peer);
        Ok(peer)
    }

    /// Asks epoll which sockets have something; sleeps for at most `timeout`.
    fn see_ready(&mut self, timeout: Duration) -> Result<()> {
        let timeout = Timespec::try_from(timeout).map_err(|e| Error::os("waiting", e))?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 128];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(Error::os("waiting for sockets", e)),
        };
        for event in &*events {
            match event.data.u64() {
                LISTENER => self.look = true,
                WAKER => {
                    let mut count = [0; 8];
                    let _ = rustix::io::read(&*self.wake, &mut count);
                }
                peer => {
                    if let Ok(connection) = self.peers.get_mut(PeerId(peer)) {
                        connection.ready = true;
                        let flags = event.flags;
                        connection.ending |= flags.intersects(ENDS);
                        if connection.must_list() {
                            self.active.push(PeerId(peer));
                        }
                    }
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
            match advance(peer, &mut connection, &self.regions, &mut self.half_open, sink) {
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
        let now = Instant::now();
        for _ in 0..ADMITTED {
            // Those beyond the limit wait in the kernel, but not for long: the
            // slow must not keep the others out.
            if self.half_open.len() >= self.config.max_half_open.max(1) {
                let oldest = self.half_open[0];
                let patience = self.config.handshake_timeout.mul_f64(1.0 - GRACE);
                if matches!(self.peers.get_mut(oldest)?.phase, Phase::Greeting { until } if until > now + patience) {
                    self.look = true;
                    return self.watch_listener(false);
                }
                self.close(oldest, Error::Protocol("too many handshakes at once".into()), sink);
            }
            let Ok((stream, _)) = self.listener.accept() else { return self.watch_listener(true) };
            self.incidents.stats.accepted += 1;
            let ready = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
            if ready.is_ok() {
                let until = now + self.config.handshake_timeout;
                let greeter = Greeter::accept(&self.config.security, self.incarnation);
                let peer = self.add(Connection::new(stream.into(), None, greeter, Vec::new(), until))?;
                self.half_open.push(peer);
            }
        }
        // The readiness source tells of the others at the next look.
        self.watch_listener(true)
    }

    /// Lets new connections end a wait, or not.
    fn watch_listener(&mut self, watch: bool) -> Result<()> {
        if self.full == watch {
            self.full = !watch;
            let flags = if watch { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
            epoll::modify(&self.epoll, &self.listener, epoll::EventData::new_u64(LISTENER), flags)
                .map_err(|e| Error::os("watching a socket", e))?;
        }
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
        if let Some(at) = self.half_open.iter().position(|p| *p == peer) {
            self.half_open.remove(at);
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
    half_open: &mut Vec<PeerId>,
    sink: &mut dyn FnMut(Event<'_>),
) -> Result<()> {
    if connection.has_output() {
        connection.flush();
    }
    let was = connection.phase;
    let received = connection.receive(peer, regions, sink);
    if was != connection.phase {
        half_open.retain(|p| *p != peer);
    }
    received
}

fn resolve(address: &Address) -> Result<SocketAddr> {
    let Some(name) = address.0.strip_prefix(SCHEME) else {
        return Err(Error::BadAddress(address.clone(), "not tcp://host:port"));
    };
    let found = name.to_socket_addrs().map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidInput => Error::BadAddress(address.clone(), "not tcp://host:port"),
        _ => Error::Unreachable(address.clone(), e.to_string()),
    });
    found?.next().ok_or_else(|| Error::Unreachable(address.clone(), "the name has no address".into()))
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn address(&self) -> Address {
        self.address.clone()
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
        let to = resolve(address)?;
        let mut greeting = Vec::new();
        let greeter = Greeter::connect(&self.config.security, self.incarnation, hello, &mut greeting);
        let greeter = greeter.map_err(Error::Refused)?;
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)
            .map_err(|e| Error::os("making a socket", e))?;
        sockopt::set_tcp_nodelay(&socket, true).map_err(|e| Error::os("making a socket", e))?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(e) => return Err(Error::Unreachable(address.clone(), e.to_string())),
        }
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
        if self.look {
            self.look = false;
            self.accept(&mut sink)?;
        }
        if !few {
            self.attend(&mut sink);
            return Ok(events);
        }
        for slot in 0..self.peers.slots() {
            let Some((peer, connection)) = self.peers.at(slot) else { continue };
            if let Err(reason) = advance(peer, connection, &self.regions, &mut self.half_open, &mut sink) {
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
                epoll::modify(&self.epoll, &connection.socket, epoll::EventData::new_u64(peer.0), flags)
                    .map_err(|e| Error::os("watching a socket", e))?;
                connection.told_writable = writable;
            }
        }
        if greeting {
            timeout = timeout.min(self.config.handshake_timeout.mul_f64(if self.full { GRACE } else { 1.0 }));
            self.late = true;
        }
        self.see_ready(timeout)
    }

    fn waker(&self) -> Waker {
        let wake = Arc::clone(&self.wake);
        // A full counter has woken already.
        Waker::new(move || {
            let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        })
    }
}
