//! The loopback transport: peers in one process, each owned by a thread of its
//! own.
//!
//! It behaves as a network would. Messages and headers are encoded and decoded
//! with the same [`frame`] codec as tcp's; the receiver checks
//! key, range and guard; and the bytes of a write are fetched from their source
//! only when the receiver polls, so that a caller who reuses a source too early
//! sees here what it would see on a NIC.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::frame::{self, Frame, WriteFrame};
use crate::key::{Key, Maker};
use crate::peers::Peers;
use crate::regions::Regions;
use crate::{
    Access, Address, Error, Event, MAX_SEND, Memory, PeerId, QUEUE_LIMIT, RegionId, RemoteKey, Result, Transport,
    Waker, Write,
};

const SCHEME: &str = "loopback://";

/// Every bound transport of the process, by name.
static NAMES: LazyLock<Mutex<HashMap<String, Arc<Inbox>>>> = LazyLock::new(Mutex::default);

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A transport whose peers are in the same process.
pub struct LoopbackTransport {
    name: String,
    inbox: Arc<Inbox>,
    regions: Regions,
    peers: Peers<Connection>,
    by_link: HashMap<u64, PeerId>,
}

/// Where packets for one transport arrive.
#[derive(Default)]
struct Inbox {
    state: Mutex<Arrived>,
    changed: Condvar,
}

#[derive(Default)]
struct Arrived {
    packets: VecDeque<Packet>,
    woken: bool,
}

/// What both ends of a connection know of it.
struct Link {
    id: u64,
    /// Bytes queued, and writes whose source is needed, from the connecting
    /// side to the accepting one (0) and back (1).
    queued: [AtomicUsize; 2],
    pending: [AtomicUsize; 2],
}

struct Connection {
    link: Arc<Link>,
    to: Arc<Inbox>,
    /// Index in the link's arrays of what we post.
    side: usize,
    hello: Vec<u8>,
}

struct Packet {
    link: u64,
    body: Body,
}

enum Body {
    Connect {
        link: Arc<Link>,
        reply_to: Arc<Inbox>,
        hello: Vec<u8>,
    },
    Accepted,
    /// A message's header and payload.
    Message(Vec<u8>),
    /// A write's header and where its bytes are.
    Write {
        header: [u8; frame::WRITE_HEADER],
        memory: Arc<Memory>,
        offset: usize,
    },
    Closed(Error),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds these locks halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inbox {
    fn push(&self, link: u64, body: Body) {
        locked(&self.state).packets.push_back(Packet { link, body });
        self.changed.notify_one();
    }
}

impl LoopbackTransport {
    /// A transport with a name of its own.
    pub fn bind() -> Self {
        let name = format!("{SCHEME}{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let inbox = Arc::new(Inbox::default());
        locked(&NAMES).insert(name.clone(), Arc::clone(&inbox));
        Self { name, inbox, regions: Regions::default(), peers: Peers::default(), by_link: HashMap::new() }
    }

    /// Takes one packet in. True: an event went to `sink`.
    fn handle(&mut self, packet: Packet, sink: &mut dyn FnMut(Event<'_>)) -> Result<bool> {
        if let Body::Connect { link, reply_to, hello } = packet.body {
            reply_to.push(link.id, Body::Accepted);
            let connection = Connection { link, to: reply_to, side: 1, hello: hello.clone() };
            let peer = self.peers.insert(connection)?;
            self.by_link.insert(packet.link, peer);
            sink(Event::Accepted { peer, hello: &hello });
            return Ok(true);
        }
        // A link that we closed may still bring what was under way.
        let Some(&peer) = self.by_link.get(&packet.link) else { return Ok(false) };
        let refused = match packet.body {
            Body::Connect { .. } => return Ok(false),
            Body::Accepted => {
                sink(Event::Connected { peer });
                return Ok(true);
            }
            Body::Message(bytes) => match self.message(peer, &bytes, sink) {
                Ok(()) => return Ok(true),
                Err(e) => e,
            },
            Body::Write { header, memory, offset } => match self.land(peer, &header, &memory, offset, sink) {
                Ok(event) => return Ok(event),
                Err(e) => e,
            },
            Body::Closed(reason) => {
                self.forget(peer);
                sink(Event::Closed { peer, reason });
                return Ok(true);
            }
        };
        tracing::warn!(?peer, error = %refused, "closing a loopback connection");
        if let Some(connection) = self.forget(peer) {
            connection.to.push(packet.link, Body::Closed(Error::PeerGone));
        }
        sink(Event::Closed { peer, reason: refused });
        Ok(true)
    }

    fn message(&mut self, peer: PeerId, bytes: &[u8], sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let connection = self.peers.get_mut(peer)?;
        connection.link.queued[1 - connection.side].fetch_sub(bytes.len(), Ordering::AcqRel);
        match frame::decode(bytes) {
            Ok(Some((Frame::Message { len }, header))) if bytes.len() == header + len => {
                sink(Event::Message { peer, payload: &bytes[header..] });
                Ok(())
            }
            Ok(_) => Err(Error::Protocol("a packet that is not one message".into())),
            Err(what) => Err(Error::Protocol(what.into())),
        }
    }

    /// Lands a write. True: it notified.
    fn land(
        &mut self,
        peer: PeerId,
        header: &[u8],
        from: &Memory,
        offset: usize,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool> {
        let connection = self.peers.get_mut(peer)?;
        let write = match frame::decode(header) {
            Ok(Some((Frame::Write(write), _))) => write,
            Ok(_) => return Err(Error::Protocol("a packet that is not one write".into())),
            Err(what) => return Err(Error::Protocol(what.into())),
        };
        let target = self.regions.target(write.region, &write.token, write.offset, write.len, &connection.hello)?;
        from.copy_to(offset, target, write.offset as usize, write.len as usize)?;
        connection.link.queued[1 - connection.side].fetch_sub(header.len(), Ordering::AcqRel);
        connection.link.pending[1 - connection.side].fetch_sub(1, Ordering::AcqRel);
        if let Some(notify) = write.notify {
            sink(Event::Notified { peer, notify });
        }
        Ok(write.notify.is_some())
    }

    fn forget(&mut self, peer: PeerId) -> Option<Connection> {
        let connection = self.peers.remove(peer)?;
        self.by_link.remove(&connection.link.id);
        Some(connection)
    }
}

impl Connection {
    fn post(&self, peer: PeerId, cost: usize, body: Body) -> Result<()> {
        let queued = self.link.queued[self.side].load(Ordering::Acquire);
        if queued > 0 && queued + cost > QUEUE_LIMIT {
            return Err(Error::Full { peer, queued });
        }
        self.link.queued[self.side].fetch_add(cost, Ordering::AcqRel);
        self.to.push(self.link.id, body);
        Ok(())
    }
}

impl Transport for LoopbackTransport {
    fn name(&self) -> &'static str {
        "loopback"
    }

    fn address(&self) -> Address {
        Address(self.name.clone())
    }

    fn register(&mut self, memory: &Arc<Memory>, access: Access) -> Result<RegionId> {
        self.regions.register(memory, access)
    }

    fn deregister(&mut self, region: RegionId) -> Result<()> {
        self.regions.deregister(region)
    }

    fn remote_key(&self, region: RegionId) -> Result<RemoteKey> {
        self.regions.key(region, Maker::Loopback)
    }

    fn connect(&mut self, address: &Address, hello: &[u8]) -> Result<PeerId> {
        if hello.len() > MAX_SEND {
            return Err(Error::TooLong(hello.len()));
        }
        if !address.0.starts_with(SCHEME) {
            return Err(Error::BadAddress(address.clone(), "not loopback://name"));
        }
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let link = Arc::new(Link { id, queued: Default::default(), pending: Default::default() });
        // Held until the request is in: a transport that is being dropped
        // either refuses it or is not found.
        let names = locked(&NAMES);
        let target = names.get(&address.0).cloned();
        let to = target.clone().unwrap_or_default();
        let peer = self.peers.insert(Connection { link: Arc::clone(&link), to, side: 0, hello: Vec::new() })?;
        self.by_link.insert(id, peer);
        match target {
            Some(to) => {
                let reply_to = Arc::clone(&self.inbox);
                to.push(id, Body::Connect { link, reply_to, hello: hello.to_vec() });
            }
            None => {
                let reason = Error::Unreachable(address.clone(), "no transport of this name in the process".into());
                self.inbox.push(id, Body::Closed(reason));
            }
        }
        Ok(peer)
    }

    fn disconnect(&mut self, peer: PeerId) {
        if let Some(connection) = self.forget(peer) {
            connection.to.push(connection.link.id, Body::Closed(Error::PeerGone));
        }
    }

    fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        if payload.len() > MAX_SEND {
            return Err(Error::TooLong(payload.len()));
        }
        let connection = self.peers.get_mut(peer)?;
        let mut bytes = Vec::with_capacity(frame::MESSAGE_HEADER + payload.len());
        bytes.extend(frame::message_header(payload.len()));
        bytes.extend(payload);
        connection.post(peer, bytes.len(), Body::Message(bytes))
    }

    fn write(&mut self, peer: PeerId, write: Write<'_>) -> Result<()> {
        let connection = self.peers.get_mut(peer)?;
        let memory = self.regions.source(write.local, write.local_offset, write.len)?;
        let key = Key::decode(&write.remote.0, Maker::Loopback)?;
        key.check(write.remote_offset, write.len)?;
        let header = frame::write_header(&WriteFrame {
            region: key.region,
            token: key.token,
            offset: write.remote_offset,
            len: write.len,
            notify: write.notify,
        });
        let pending = &connection.link.pending[connection.side];
        pending.fetch_add(1, Ordering::AcqRel);
        let body = Body::Write { header, memory: Arc::clone(memory), offset: write.local_offset as usize };
        connection.post(peer, header.len(), body).inspect_err(|_| {
            pending.fetch_sub(1, Ordering::AcqRel);
        })
    }

    fn pending(&self, peer: PeerId) -> usize {
        self.peers.get(peer).map_or(0, |c| c.link.pending[c.side].load(Ordering::Acquire))
    }

    fn poll(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<usize> {
        let packets = std::mem::take(&mut locked(&self.inbox.state).packets);
        let mut events = 0;
        for packet in packets {
            events += usize::from(self.handle(packet, sink)?);
        }
        Ok(events)
    }

    fn wait(&mut self, timeout: Duration) -> Result<()> {
        let state = locked(&self.inbox.state);
        let idle = |state: &mut Arrived| state.packets.is_empty() && !state.woken;
        let (mut state, _) =
            self.inbox.changed.wait_timeout_while(state, timeout, idle).unwrap_or_else(PoisonError::into_inner);
        state.woken = false;
        Ok(())
    }

    fn waker(&self) -> Waker {
        let inbox = Arc::clone(&self.inbox);
        Waker::new(move || {
            locked(&inbox.state).woken = true;
            inbox.changed.notify_one();
        })
    }
}

impl Drop for LoopbackTransport {
    fn drop(&mut self) {
        locked(&NAMES).remove(&self.name);
        for (_, connection) in self.peers.iter_mut() {
            connection.to.push(connection.link.id, Body::Closed(Error::PeerGone));
        }
        // Those whose request to connect we have not looked at yet.
        for packet in std::mem::take(&mut locked(&self.inbox.state).packets) {
            if let Body::Connect { reply_to, .. } = packet.body {
                reply_to.push(packet.link, Body::Closed(Error::PeerGone));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_transport_is_unreachable_even_to_those_it_had_not_answered() {
        let (mut a, b) = (LoopbackTransport::bind(), LoopbackTransport::bind());
        let peer = a.connect(&b.address(), b"").unwrap();
        drop(b);
        let mut closed = Vec::new();
        a.poll(&mut |event| closed.push(format!("{event:?}"))).unwrap();
        assert_eq!(closed, [format!("{:?}", Event::Closed { peer, reason: Error::PeerGone })]);
        assert_eq!(a.send(peer, b""), Err(Error::UnknownPeer(peer)));
    }
}
