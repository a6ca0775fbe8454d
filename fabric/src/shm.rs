//! The shm transport: peers on one host, through memory that both map.
//!
//! Two processes share one link: a lane of ring entries each way (see
//! [`entry`]) with a byte ring for messages. A write is a copy straight into
//! the peer's region, which the key's holder gets mapped at its first use, and
//! a ring entry if it notifies. Posting and polling make no system call, take
//! no lock and allocate nothing, unless the peer sleeps or its rings are full.
//!
//! Everything is shared with processes of the same user only: the listening
//! socket lies in a folder of mode 0700, both sides check the other's user, and
//! a region's file is handed only to a peer that shows its key. The receiver
//! believes nothing in a ring: entries are copied out, then checked. It cannot
//! be asked before a write lands, so an [`Access::Guarded`] region is, here,
//! open to every holder of its key.
//!
//! Nothing here is sealed under the cluster's secret, as tcp is: the kernel says
//! who the peer is, no other user can open the socket, and a process of the same
//! user could as well read the secret out of our memory. What seals records
//! would have nothing to protect: the data lies in memory that both map.

pub(crate) mod bell;
mod connection;
#[doc(hidden)]
pub mod entry;
mod lane;
mod place;
mod ring;
#[doc(hidden)]
pub mod socket;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use crate::key::{Key, Maker};
use crate::peers::Peers;
use crate::regions::Regions;
use crate::stats::{Incidents, Stats};
use crate::{Access, Address, Error, Event, MAX_SEND, Memory, PeerId, RegionId, RemoteKey, Result, Transport};
use crate::{Waker, Write};
use connection::{Connection, Phase};
use ring::{LINK, LinkMemory};
use socket::{Packet, Received};

const SCHEME: &str = "shm://";

/// Tokens of the epoll that are no connection.
const WAKER: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;
/// Set in the tokens of strangers.
const STRANGER: u64 = 1 << 63;

/// A spinning owner looks at the clock this often, in polls, and at the sockets
/// (a peer's death, new peers) once this time has passed.
const CLOCK: u32 = 16;
const LOOK: Duration = Duration::from_millis(1);

/// The part of a handshake's time that is sure even when others wait.
const GRACE: f64 = 0.02;

/// How an shm transport treats strangers.
#[derive(Clone, Debug)]
pub struct ShmConfig {
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How many accepted connections may be in their handshake; others wait,
    /// and push the oldest out when it has had a fiftieth of its time.
    pub max_half_open: usize,
}

impl Default for ShmConfig {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(5), max_half_open: 64 }
    }
}

/// A transport to processes of the same user on the same host.
pub struct ShmTransport {
    listener: OwnedFd,
    path: PathBuf,
    config: ShmConfig,
    regions: Regions,
    peers: Peers<Connection>,
    /// Accepted sockets that have not said which memory, oldest first.
    strangers: Vec<Stranger>,
    met: u64,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    /// Tokens that the epoll reported and no poll has looked at.
    ready: Vec<u64>,
    polls: u32,
    looked: Instant,
    /// The next poll looks at handshakes' deadlines.
    late: bool,
    incidents: Incidents,
}

struct Stranger {
    socket: OwnedFd,
    token: u64,
    until: Instant,
}

impl ShmTransport {
    /// Listens at a path of its own.
    pub fn bind(config: ShmConfig) -> Result<Self> {
        let path = place::choose()?;
        let listener = socket::listen(&path)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::os("making an epoll", e))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|e| Error::os("making an eventfd", e))?);
        watch(&epoll, &wake, WAKER)?;
        watch(&epoll, &listener, LISTENER)?;
        Ok(Self {
            listener,
            path,
            config,
            regions: Regions::default(),
            peers: Peers::default(),
            strangers: Vec::new(),
            met: 0,
            epoll,
            wake,
            ready: Vec::with_capacity(64),
            polls: 0,
            looked: Instant::now(),
            late: false,
            incidents: Incidents::default(),
        })
    }

    /// Counts since the transport was made.
    pub fn stats(&self) -> Stats {
        self.incidents.stats
    }

    /// Sees which sockets have something; sleeps for at most `timeout`.
    fn see_ready(&mut self, timeout: Duration) -> Result<()> {
        let timeout = Timespec::try_from(timeout).map_err(|e| Error::os("waiting", e))?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 128];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(Error::os("waiting for sockets", e)),
        };
        for token in events.iter().map(|event| event.data.u64()) {
            if token == WAKER {
                let mut count = [0; 8];
                let _ = rustix::io::read(&*self.wake, &mut count);
            } else if !self.ready.contains(&token) {
                self.ready.push(token);
            }
        }
        Ok(())
    }

    /// Attends to the sockets that are ready, and to handshakes that are late.
    fn attend(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        while let Some(token) = self.ready.pop() {
            if token == LISTENER {
                self.accept();
            } else if token & STRANGER != 0 {
                self.meet(token);
            } else {
                let peer = PeerId(token);
                if let Ok(connection) = self.peers.get_mut(peer)
                    && let Err(reason) = connection.exchange(&self.regions)
                {
                    self.close(peer, reason, sink);
                }
            }
        }
        self.looked = Instant::now();
        let now = self.looked;
        let strangers = self.strangers.len();
        self.strangers.retain(|s| s.until > now);
        self.incidents.stats.half_open_dropped += (strangers - self.strangers.len()) as u64;
        for slot in 0..self.peers.slots() {
            if let Some((peer, connection)) = self.peers.at(slot)
                && let Phase::Greeting { until } = connection.phase
                && until <= now
            {
                let reason = match &connection.target {
                    Some(address) => Error::Unreachable(address.clone(), "no answer in time".into()),
                    None => Error::PeerGone,
                };
                self.close(peer, reason, sink);
            }
        }
    }

    fn accept(&mut self) {
        let now = Instant::now();
        loop {
            // Those beyond the limit wait in the kernel, but not for long: the
            // slow must not keep the others out.
            if self.strangers.len() >= self.config.max_half_open.max(1) {
                if self.strangers[0].until > now + self.config.handshake_timeout.mul_f64(1.0 - GRACE) {
                    return;
                }
                self.strangers.remove(0);
                self.incidents.stats.half_open_dropped += 1;
                self.incidents.protocol("shm", "too many handshakes at once");
            }
            let Ok(socket) = socket::accept(&self.listener) else { return };
            self.incidents.stats.accepted += 1;
            let Some(socket) = socket else {
                self.incidents.protocol("shm", "a process of another user");
                continue;
            };
            self.met += 1;
            let token = STRANGER | self.met;
            if watch(&self.epoll, &socket, token).is_ok() {
                let until = now + self.config.handshake_timeout;
                self.strangers.push(Stranger { socket, token, until });
                // What it has to say is mostly there already.
                self.ready.push(token);
            }
        }
    }

    /// Hears which memory a stranger brings.
    fn meet(&mut self, token: u64) {
        let Some(at) = self.strangers.iter().position(|s| s.token == token) else { return };
        let made = match socket::receive(&self.strangers[at].socket) {
            Ok(Received::Nothing) => return,
            Ok(Received::End) => Err(Error::PeerGone),
            Ok(Received::Packet(Packet::Link { size }, Some(file))) => usize::try_from(size)
                .map_err(|_| Error::Protocol("a link's size".into()))
                .and_then(|size| Memory::from_peer(file, size))
                .and_then(|memory| LinkMemory::new(memory).ok_or(Error::Protocol("a link too small".into()))),
            Ok(Received::Packet(..)) => Err(Error::Protocol("an unexpected packet".into())),
            Err(e) => Err(e),
        };
        let Stranger { socket, until, .. } = self.strangers.remove(at);
        let added = made.and_then(|link| self.add(Connection::new(socket, link, None, until), true));
        if let Err(reason) = added {
            self.incidents.stats.half_open_dropped += 1;
            if let Error::Protocol(cause) = reason {
                self.incidents.protocol("shm", &cause);
            }
        }
    }

    fn add(&mut self, connection: Connection, watched: bool) -> Result<PeerId> {
        let peer = self.peers.insert(connection)?;
        let socket = &self.peers.get_mut(peer)?.socket;
        let (data, flags) = (epoll::EventData::new_u64(peer.0), epoll::EventFlags::IN);
        let result = if watched {
            epoll::modify(&self.epoll, socket, data, flags)
        } else {
            epoll::add(&self.epoll, socket, data, flags)
        };
        if let Err(e) = result {
            self.peers.remove(peer);
            return Err(Error::os("watching a socket", e));
        }
        Ok(peer)
    }

    /// Drops a connection and tells whoever may know of it.
    fn close(&mut self, peer: PeerId, reason: Error, sink: &mut dyn FnMut(Event<'_>)) {
        let Some(connection) = self.peers.remove(peer) else { return };
        if let Error::Protocol(cause) = &reason {
            self.incidents.protocol("shm", cause);
        }
        if connection.is_known() {
            sink(Event::Closed { peer, reason });
        } else {
            self.incidents.stats.half_open_dropped += 1;
        }
    }
}

fn watch(epoll: &OwnedFd, fd: &OwnedFd, token: u64) -> Result<()> {
    epoll::add(epoll, fd.as_fd(), epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        .map_err(|e| Error::os("watching a socket", e))
}

impl Transport for ShmTransport {
    fn name(&self) -> &'static str {
        "shm"
    }

    fn address(&self) -> Address {
        Address(format!("{SCHEME}{}", self.path.display()))
    }

    fn register(&mut self, memory: &Arc<Memory>, access: Access) -> Result<RegionId> {
        self.regions.register(memory, access)
    }

    fn deregister(&mut self, region: RegionId) -> Result<()> {
        self.regions.deregister(region)?;
        for (_, connection) in self.peers.iter_mut() {
            connection.revoke(region);
        }
        Ok(())
    }

    fn remote_key(&self, region: RegionId) -> Result<RemoteKey> {
        self.regions.key(region, Maker::Shm)
    }

    fn connect(&mut self, address: &Address, hello: &[u8]) -> Result<PeerId> {
        if hello.len() > MAX_SEND {
            return Err(Error::TooLong(hello.len()));
        }
        let path = match address.0.strip_prefix(SCHEME) {
            Some(path) if path.starts_with('/') => Path::new(path),
            _ => return Err(Error::BadAddress(address.clone(), "not shm:///path/of/socket")),
        };
        let memory = Memory::new(LINK)?;
        let packet = Packet::Link { size: memory.len() as u64 };
        let connected = socket::connect(path)
            .and_then(|socket| socket::send(&socket, &packet, Some(memory.file())).map(|()| socket));
        let (socket, failed) = match connected {
            Ok(socket) => (socket, None),
            Err(e) => {
                let socket = socket::plain().map_err(|e| Error::os("making a socket", e))?;
                (socket, Some(Error::Unreachable(address.clone(), e.to_string())))
            }
        };
        let link = LinkMemory::new(memory).ok_or_else(|| Error::os("making a link", "its memory is too small"))?;
        let until = Instant::now() + self.config.handshake_timeout;
        let mut connection = Connection::new(socket, link, Some(address.clone()), until);
        match failed {
            Some(reason) => connection.ended = Some(reason),
            None => connection.greet(hello),
        }
        self.add(connection, false)
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.peers.remove(peer);
    }

    fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        if payload.len() > MAX_SEND {
            return Err(Error::TooLong(payload.len()));
        }
        self.peers.get_mut(peer)?.send(peer, payload)
    }

    fn write(&mut self, peer: PeerId, write: Write<'_>) -> Result<()> {
        let connection = self.peers.get_mut(peer)?;
        let source = self.regions.source(write.local, write.local_offset, write.len)?;
        let key = Key::decode(&write.remote.0, Maker::Shm)?;
        key.check(write.remote_offset, write.len)?;
        let copy = connection::Copy {
            key,
            source: Arc::clone(source),
            at: write.local_offset as usize,
            to: write.remote_offset as usize,
            len: write.len as usize,
            notify: write.notify,
        };
        connection.write(peer, copy)
    }

    fn pending(&self, peer: PeerId) -> usize {
        self.peers.get(peer).map_or(0, Connection::pending)
    }

    fn poll(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<usize> {
        let mut events = 0;
        let mut sink = |event: Event<'_>| {
            events += 1;
            sink(event);
        };
        self.polls = self.polls.wrapping_add(1);
        let due = self.polls.is_multiple_of(CLOCK) && self.looked.elapsed() >= LOOK;
        if due {
            self.see_ready(Duration::ZERO)?;
        }
        if due || self.late || !self.ready.is_empty() {
            self.late = false;
            self.attend(&mut sink);
        }
        for slot in 0..self.peers.slots() {
            let Some((peer, connection)) = self.peers.at(slot) else { continue };
            let result = if connection.expects_packets() { connection.exchange(&self.regions) } else { Ok(()) };
            connection.flush();
            let result = result.and_then(|()| connection.receive(peer, &self.regions, &mut sink));
            if let Err(reason) = result {
                self.close(peer, reason, &mut sink);
            }
        }
        Ok(events)
    }

    fn wait(&mut self, mut timeout: Duration) -> Result<()> {
        let mut greeting = !self.strangers.is_empty();
        bell::lie_down(self.peers.iter_mut().map(|(_, connection)| &*connection).map(Connection::bell));
        let mut ready = !self.ready.is_empty();
        for (_, connection) in self.peers.iter_mut() {
            ready |= connection.is_ready();
            greeting |= connection.is_greeting();
        }
        let result = if ready {
            Ok(())
        } else {
            if greeting {
                timeout = timeout.min(self.config.handshake_timeout);
                self.late = true;
            }
            self.see_ready(timeout)
        };
        for (_, connection) in self.peers.iter_mut() {
            bell::get_up(&connection.bell().0);
        }
        result
    }

    fn waker(&self) -> Waker {
        let wake = Arc::clone(&self.wake);
        Waker::new(move || {
            // A full counter has woken already.
            let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        })
    }
}

impl Drop for ShmTransport {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
#[path = "shm/hostile.rs"]
mod hostile;
