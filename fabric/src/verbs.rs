//! The verbs transport: RDMA over InfiniBand and RoCE.
//!
//! A connection is one reliable queue pair, which keeps posts in order, and a
//! control channel over tcp (see [`link`]) on which queue pairs, keys and the
//! end are exchanged, sealed under the cluster's secret. A write with
//! notification is one RDMA WRITE WITH IMMEDIATE; a message is a SEND. Posting
//! and polling make no system call, take no lock of ours and allocate nothing
//! while there is room; what the library and the driver do is theirs.
//!
//! **Receives** lie in one shared receive queue a device port ([`receives`]).
//! They are the receiver's: a sender has credits for so many, and gets them back
//! when they are consumed ([`credit`]), so a sender within its credits never meets
//! an empty queue.
//!
//! **What a peer can write.** A region registered with [`Access::RemoteWrite`]
//! is opened to a peer that shows its key: it gets a memory window bound to its
//! queue pair alone (where the device has windows; otherwise the region's own
//! key, which serves any connected peer that guesses it). A region with a
//! [guard](crate::WriteGuard) is opened to nobody: what is for it comes down in
//! the writer's own landing zone ([`landing`]), is checked and copied.
//!
//! A source that is deregistered while a write from it is pending fails the
//! write, and with it the connection.
//!
//! **Failure.** A failed request, the port, the device, or the end of the
//! control channel closes the connection; the owner connects again, and the
//! next attempt goes over the next rail.

mod config;
mod connection;
mod credit;
pub mod device;
mod landing;
#[doc(hidden)]
pub mod link;
mod objects;
mod queue;
mod rail;
mod receiver;
mod receives;
mod request;
mod sender;
pub mod sys;
#[doc(hidden)]
pub mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rustix::event::epoll::EventFlags;

use crate::door::{self, ADMITTED, CLOCK, Door, GRACE, LOOK, Visit};
use crate::key::{Key, Maker};
use crate::peers::Peers;
use crate::regions::Regions;
use crate::secure::Secret;
use crate::stats::{Incidents, Stats};
use crate::{Access, Address, Error, Event, MAX_SEND, Memory, PeerId, RegionId, RemoteKey, Result, Transport};
use crate::{Waker, Write};
pub use config::Config;
use connection::{Connection, Phase, choose};
use link::Link;
use objects::Incident;
use rail::Rail;
use receives::BUFFER;
use sender::Outgoing;
use sys::{Lib, ibv_wc};

const SCHEME: &str = "verbs://";

/// What is told of a connection's socket.
const ARRIVALS: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

/// Tokens of a rail's completion channel and of its device's incidents; the low
/// bits are the rail.
const COMPLETIONS: u64 = 1 << 63;
const INCIDENTS: u64 = 3 << 62;
const RAIL_BITS: u64 = (1 << 16) - 1;

/// Completions taken with one call.
const TAKE: usize = 16;
/// Most completions of a rail in one poll.
const BUDGET: usize = 256;

/// How long the last posts of a connection that was ended may take.
const LINGER: Duration = Duration::from_secs(2);
/// As that, for all connections together, when the transport is dropped.
const LAST_LINGER: Duration = Duration::from_millis(500);

/// A transport over RDMA devices.
pub struct VerbsTransport {
    door: Door,
    config: Config,
    secret: Secret,
    rails: Vec<Rail>,
    regions: Regions,
    peers: Peers<Box<Connection>>,
    /// Connections that the owner ended and whose last posts are under way.
    leaving: Vec<(Connection, Instant)>,
    /// How often an address was tried in vain or lost, in which life of its
    /// transport: a new one begins with the first rail again.
    attempts: HashMap<Address, (Option<u64>, u32)>,
    polls: u32,
    looked: Instant,
    /// The next poll looks at deadlines.
    late: bool,
    /// Connections that have something to do.
    active: Vec<PeerId>,
    /// Kept for its memory.
    work: Vec<PeerId>,
    buffer: Box<[u8; BUFFER]>,
    incidents: Incidents,
}

impl VerbsTransport {
    /// Opens the devices that `config` names, or all that there are, and listens
    /// for control channels at `address`; port 0 takes any free one.
    pub fn bind(address: SocketAddr, secret: Secret, config: Config) -> Result<Self> {
        let lib = Lib::get().map_err(|because| config::unavailable(because.into()))?;
        Self::over(lib, address, secret, config)
    }

    /// As [`bind`](Self::bind), with a libibverbs of the caller's.
    #[doc(hidden)]
    pub fn over(lib: &'static Lib, address: SocketAddr, secret: Secret, config: Config) -> Result<Self> {
        let rails = config::open_rails(lib, &config)?;
        let door = Door::open(SCHEME, address, config.advertise.as_deref())?;
        for (i, rail) in rails.iter().enumerate() {
            door.watch(rail.channel.fd(), COMPLETIONS | i as u64, EventFlags::IN)?;
            door.watch(objects::unblock_incidents(&rail.context)?, INCIDENTS | i as u64, EventFlags::IN)?;
        }
        Ok(Self {
            door,
            config,
            secret,
            rails,
            regions: Regions::default(),
            peers: Peers::default(),
            leaving: Vec::new(),
            attempts: HashMap::new(),
            polls: 0,
            looked: Instant::now(),
            late: false,
            active: Vec::new(),
            work: Vec::new(),
            buffer: Box::new([0; BUFFER]),
            incidents: Incidents::default(),
        })
    }

    /// Counts since the transport was made.
    pub fn stats(&self) -> Stats {
        self.incidents.stats
    }

    /// The device ports in use, best first, as `device:port`.
    pub fn rails(&self) -> impl Iterator<Item = &str> {
        self.rails.iter().map(|rail| rail.name.as_str())
    }

    /// Takes the queue pair of a connection to its error state, as a device does
    /// when it gives a connection up. For tests of what follows.
    #[doc(hidden)]
    pub fn break_queue_pair(&mut self, peer: PeerId) -> Result<()> {
        let connection = self.peers.get_mut(peer)?;
        connection.sender(peer)?.queue.fail()
    }

    /// The number of a connection's queue pair. For tests that break it.
    #[doc(hidden)]
    pub fn queue_pair(&mut self, peer: PeerId) -> Result<u32> {
        Ok(self.peers.get_mut(peer)?.sender(peer)?.queue.number())
    }

    fn add(&mut self, connection: Connection) -> Result<PeerId> {
        let peer = self.peers.insert(Box::new(connection))?;
        let socket = self.peers.get_mut(peer)?.link.socket();
        if let Err(e) = self.door.watch(socket, peer.0, ARRIVALS) {
            self.peers.remove(peer);
            return Err(e);
        }
        self.active.push(peer);
        Ok(peer)
    }

    /// Puts a connection on the list of those with something to do.
    fn list(&mut self, peer: PeerId) {
        if let Ok(connection) = self.peers.get_mut(peer)
            && !std::mem::replace(&mut connection.listed, true)
        {
            self.active.push(peer);
        }
    }

    /// Asks epoll what is ready; sleeps for at most `timeout`.
    fn see_ready(&mut self, timeout: Duration) -> Result<()> {
        self.door.see_ready(timeout)?;
        for i in 0..self.door.ready.len() {
            match self.door.ready[i].0 {
                token if token & INCIDENTS == INCIDENTS => self.hear_incidents((token & RAIL_BITS) as usize),
                token if token & COMPLETIONS != 0 => {
                    if let Some(rail) = self.rails.get((token & RAIL_BITS) as usize) {
                        rail.channel.drain();
                    }
                }
                peer => {
                    if let Ok(connection) = self.peers.get_mut(PeerId(peer)) {
                        connection.ready = true;
                        self.list(PeerId(peer));
                    }
                }
            }
        }
        Ok(())
    }

    /// What a device says outside its queues.
    fn hear_incidents(&mut self, at: usize) {
        let Some(rail) = self.rails.get_mut(at) else { return };
        let mut broken = Vec::new();
        let (port, name) = (rail.port(), rail.name.clone());
        // A port that was down for a moment has lost its connections too.
        let mut ended = None;
        objects::incidents(&rail.context, |incident| match incident {
            Incident::QueuePair { number, by_peer } => {
                broken.extend(rail.peers.get(&number).map(|peer| match by_peer {
                    true => (*peer, Error::Protocol("a write that its key does not allow".into())),
                    false => (*peer, Error::Lost(format!("{name}: the device ended the queue pair"))),
                }))
            }
            Incident::PortDown(number) if number == port => {
                (rail.down, ended) = (true, ended.or(Some("the port is down")))
            }
            Incident::Device => (rail.dead, ended) = (true, Some("the device has failed")),
            Incident::PortUp(number) if number == port => rail.down = false,
            Incident::PortDown(_) | Incident::PortUp(_) => {}
        });
        if let Some(ended) = ended {
            tracing::warn!(rail = name, "{ended}; its connections are closed");
            broken.extend(rail.peers.values().map(|peer| (*peer, Error::Lost(format!("{name}: {ended}")))));
        }
        for (peer, reason) in broken {
            if let Ok(connection) = self.peers.get_mut(peer) {
                // A request that failed tells more than the queue pair's end.
                let failed = connection.move_posts(&self.rails[at]).err();
                connection.broken.get_or_insert(match reason {
                    Error::Lost(_) => failed.unwrap_or(reason),
                    reason => reason,
                });
                self.list(peer);
            }
        }
    }

    /// Takes in strangers.
    fn accept(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let (limit, time) = (self.config.max_half_open, self.config.handshake_timeout);
        for _ in 0..ADMITTED {
            let until = |peer| match self.peers.get(peer)?.phase {
                Phase::Greeting { until } => Some(until),
                Phase::Open | Phase::Ending { .. } => None,
            };
            match self.door.next(limit, time, until)? {
                Visit::Stranger(socket) => {
                    self.incidents.stats.accepted += 1;
                    let link = Link::accept(socket, &self.secret);
                    let peer = self.add(Connection::new(link, None, 0, Instant::now() + time))?;
                    self.door.admitted(peer);
                }
                Visit::Oldest(oldest) => {
                    self.close(oldest, Error::Protocol("too many handshakes at once".into()), sink);
                }
                Visit::Nobody => break,
            }
        }
        Ok(())
    }

    /// Ends what has taken too long.
    fn expire(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        let now = self.looked;
        for slot in 0..self.peers.slots() {
            let Some((peer, connection)) = self.peers.at(slot) else { continue };
            match connection.phase {
                Phase::Greeting { until } if until <= now => {
                    self.incidents.stats.timeouts += 1;
                    let reason = match &connection.target {
                        Some(address) => Error::Unreachable(address.clone(), "no answer in time".into()),
                        None => Error::PeerGone,
                    };
                    self.close(peer, reason, sink);
                }
                Phase::Ending { until, .. } if until <= now => self.close(peer, Error::PeerGone, sink),
                _ => {}
            }
        }
    }

    /// Drops a connection and tells whoever may know of it.
    fn close(&mut self, peer: PeerId, reason: Error, sink: &mut dyn FnMut(Event<'_>)) {
        if let Some(mut connection) = self.peers.remove(peer) {
            self.end(peer, &mut connection, reason, sink);
        }
    }

    fn end(&mut self, peer: PeerId, connection: &mut Connection, reason: Error, sink: &mut dyn FnMut(Event<'_>)) {
        match &reason {
            Error::Protocol(cause) => self.incidents.protocol("verbs", cause),
            Error::Refused(refused) => self.incidents.refused("verbs", *refused),
            _ => {}
        }
        if self.door.passed(peer) {
            self.incidents.stats.half_open_dropped += 1;
        }
        // The next attempt takes another rail.
        if let Some(target) = &connection.target
            && matches!(reason, Error::Lost(_) | Error::Unreachable(..))
        {
            let (life, attempts) = self.attempts.entry(target.clone()).or_default();
            if connection.incarnation.is_some() && connection.incarnation != *life {
                (*life, *attempts) = (connection.incarnation, 0);
            }
            *attempts += 1;
        }
        if let Some(rail) = self.rails.get_mut(connection.rail) {
            connection.leave(rail);
        }
        if connection.is_known() {
            sink(Event::Closed { peer, reason });
        }
    }

    /// A receive of a rail has completed.
    fn receive(&mut self, at: usize, completion: &ibv_wc, sink: &mut dyn FnMut(Event<'_>)) {
        let rail = &mut self.rails[at];
        let peer = rail.from(completion.qp_num);
        let handled = match peer.and_then(|peer| self.peers.get_mut(peer).ok().map(|connection| (peer, connection))) {
            Some((peer, connection)) => {
                // After what broke it nothing of it is believed.
                if connection.broken.is_none()
                    && let Err(reason) =
                        connection.receive(peer, completion, rail, &self.regions, &mut self.buffer, sink)
                {
                    connection.broken = Some(reason);
                }
                connection.needs_attention().then_some(peer)
            }
            // Of a connection that is no more.
            None => None,
        };
        rail.receives.give_back(completion.wr_id);
        if let Some(peer) = handled {
            self.list(peer);
        }
    }

    /// What nobody waits for may have failed all the same.
    fn list_busy(&mut self) {
        for slot in 0..self.peers.slots() {
            if let Some((peer, connection)) = self.peers.at(slot)
                && connection.sender.as_ref().is_some_and(|sender| sender.queue.busy())
            {
                self.list(peer);
            }
        }
    }

    /// Takes completed receives of all rails.
    fn receive_all(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        for at in 0..self.rails.len() {
            let mut completions = ArrayVec::<ibv_wc, TAKE>::new();
            let mut taken = 0;
            loop {
                self.rails[at].poll(&mut completions)?;
                let got = completions.len();
                for completion in &completions {
                    self.receive(at, completion, sink);
                }
                taken += got;
                self.rails[at].receives.follow(got > 0)?;
                if got < TAKE || taken >= BUDGET {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Attends to the connections that have something to do.
    fn attend(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        let mut work = std::mem::take(&mut self.work);
        std::mem::swap(&mut work, &mut self.active);
        for peer in work.drain(..) {
            let Some(mut connection) = self.peers.take(peer) else { continue };
            match connection.advance(peer, &mut self.rails, &self.regions, sink) {
                Ok(()) => {
                    if !matches!(connection.phase, Phase::Greeting { .. }) {
                        self.door.passed(peer);
                    }
                    connection.listed = connection.needs_attention();
                    if connection.listed {
                        self.active.push(peer);
                    }
                    self.peers.put(peer, connection);
                }
                Err(reason) => {
                    self.peers.release(peer);
                    let reason = connection.gone(reason);
                    self.end(peer, &mut connection, reason, sink);
                }
            }
        }
        self.work = work;
    }

    /// Drops ended connections whose last posts are done.
    fn see_off(&mut self, now: Instant) {
        let rails = &mut self.rails;
        self.leaving.retain_mut(|(connection, until)| {
            let stays = *until > now && connection.is_leaving();
            if !stays {
                connection.leave(&mut rails[connection.rail]);
            }
            stays
        });
    }
}

impl Drop for VerbsTransport {
    fn drop(&mut self) {
        for slot in 0..self.peers.slots() {
            if let Some((peer, _)) = self.peers.at(slot) {
                self.disconnect(peer);
            }
        }
        let until = Instant::now() + LAST_LINGER;
        loop {
            // None stays beyond the deadline: what keeps a queue pair from its end
            // is let go first.
            let now = Instant::now();
            self.leaving.iter_mut().for_each(|(_, deadline)| *deadline = until.min(*deadline));
            self.see_off(now);
            if self.leaving.is_empty() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

impl Transport for VerbsTransport {
    fn name(&self) -> &'static str {
        "verbs"
    }

    fn address(&self) -> Address {
        self.door.address.clone()
    }

    fn register(&mut self, memory: &Arc<Memory>, access: Access) -> Result<RegionId> {
        let region = self.regions.register(memory, access.clone())?;
        for rail in &mut self.rails {
            if let Err(e) = rail.register(region, memory, &access) {
                let _ = self.deregister(region);
                return Err(e);
            }
        }
        Ok(region)
    }

    fn deregister(&mut self, region: RegionId) -> Result<()> {
        self.regions.deregister(region)?;
        for (_, connection) in self.peers.iter_mut() {
            connection.receiver.revoke(region.0);
        }
        for (connection, _) in &mut self.leaving {
            connection.receiver.revoke(region.0);
        }
        for rail in &mut self.rails {
            rail.deregister(region);
        }
        Ok(())
    }

    fn remote_key(&self, region: RegionId) -> Result<RemoteKey> {
        self.regions.key(region, Maker::Verbs)
    }

    fn connect(&mut self, address: &Address, hello: &[u8]) -> Result<PeerId> {
        if hello.len() > MAX_SEND {
            return Err(Error::TooLong(hello.len()));
        }
        let to = door::resolve(address, SCHEME, "not verbs://host:port")?;
        let attempt = self.attempts.get(address).map_or(0, |(_, attempts)| *attempts);
        let down = || Error::os("connecting", "every RDMA port is down or its device has failed");
        let rail = choose(&self.rails, attempt).ok_or_else(down)?;
        let socket = door::dial(address, to)?;
        let until = Instant::now() + self.config.handshake_timeout;
        let link = Link::connect(socket, address.clone(), &self.secret)?;
        let peer = self.add(Connection::new(link, Some(address.clone()), rail, until))?;
        let offered = self.peers.get_mut(peer)?.offer(peer, &mut self.rails[rail], attempt, hello);
        if let Err(e) = offered {
            if let Some(mut connection) = self.peers.remove(peer) {
                connection.leave(&mut self.rails[rail]);
            }
            return Err(e);
        }
        Ok(peer)
    }

    fn disconnect(&mut self, peer: PeerId) {
        let Some(mut connection) = self.peers.remove(peer) else { return };
        self.door.passed(peer);
        if connection.phase == Phase::Open && connection.broken.is_none() {
            connection.say_bye();
            self.leaving.push((*connection, Instant::now() + LINGER));
        } else if let Some(rail) = self.rails.get_mut(connection.rail) {
            connection.leave(rail);
        }
    }

    fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        if payload.len() > MAX_SEND {
            return Err(Error::TooLong(payload.len()));
        }
        let Self { peers, active, .. } = self;
        let connection = peers.get_mut(peer)?;
        let posted = connection.sender(peer)?.send(peer, payload);
        connection.posted(peer, posted, active)
    }

    fn write(&mut self, peer: PeerId, write: Write<'_>) -> Result<()> {
        let Self { peers, rails, active, .. } = self;
        let connection = peers.get_mut(peer)?;
        let source = rails[connection.rail].source(write.local, write.local_offset, write.len)?;
        match connection.sender(peer)?.write_at_once(source, &write) {
            Ok(true) => return connection.posted(peer, Ok(()), active),
            Ok(false) => {}
            Err(error) => return connection.posted(peer, Err(error), active),
        }
        let key = Key::decode(&write.remote.0, Maker::Verbs)?;
        key.check(write.remote_offset, write.len)?;
        let to = Outgoing {
            offset: write.local_offset,
            len: write.len,
            region: key.region,
            token: key.token,
            region_size: key.size,
            remote_offset: write.remote_offset,
            notify: write.notify,
        };
        let posted = connection.sender(peer)?.write(peer, source, to);
        connection.posted(peer, posted, active)
    }

    fn pending(&self, peer: PeerId) -> usize {
        self.peers.get(peer).and_then(|c| c.sender.as_ref()).map_or(0, |sender| sender.pending())
    }

    fn poll(&mut self, sink: &mut dyn FnMut(Event<'_>)) -> Result<usize> {
        let mut events = 0;
        let mut sink = |event: Event<'_>| {
            events += 1;
            sink(event);
        };
        self.polls = self.polls.wrapping_add(1);
        let due = self.polls.is_multiple_of(CLOCK) && self.looked.elapsed() >= LOOK;
        // What is told on a control channel comes after the posts before it.
        if due || self.late {
            self.late = false;
            self.looked = Instant::now();
            self.see_ready(Duration::ZERO)?;
            self.expire(&mut sink);
            self.list_busy();
            if !self.leaving.is_empty() {
                self.see_off(self.looked);
            }
        }
        self.receive_all(&mut sink)?;
        if std::mem::take(&mut self.door.look) {
            self.accept(&mut sink)?;
        }
        if !self.active.is_empty() {
            self.attend(&mut sink);
        }
        Ok(events)
    }

    fn wait(&mut self, mut timeout: Duration) -> Result<()> {
        if self.rails.iter().any(Rail::has_taken) {
            return Ok(());
        }
        for rail in &self.rails {
            rail.arm()?;
        }
        // What came before the arming ends no wait.
        for rail in &mut self.rails {
            if rail.take_all()? {
                return Ok(());
            }
        }
        for slot in 0..self.peers.slots() {
            let Some((peer, connection)) = self.peers.at(slot) else { continue };
            if connection.ready || connection.broken.is_some() || connection.has_moves() {
                return Ok(());
            }
            if !matches!(connection.phase, Phase::Open) {
                let part = if self.door.is_full() { GRACE } else { 1.0 };
                timeout = timeout.min(self.config.handshake_timeout.mul_f64(part));
                self.late = true;
            }
            let writable = connection.link.has_output();
            if writable != connection.told_writable {
                let flags = if writable { ARRIVALS | EventFlags::OUT } else { ARRIVALS };
                self.door.watch_for(connection.link.socket(), peer.0, flags)?;
                connection.told_writable = writable;
            }
            if connection.arm_completions()? {
                return Ok(());
            }
        }
        if !self.leaving.is_empty() {
            timeout = timeout.min(LOOK);
            self.late = true;
        }
        self.see_ready(timeout)
    }

    fn waker(&self) -> Waker {
        self.door.waker()
    }
}
