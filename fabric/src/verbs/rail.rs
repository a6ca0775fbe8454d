//! A rail: one port of one device, with what all connections over it share.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::Config;
use super::device::{self, Context, Link, Mr, MrAccess, Pd};
use super::landing::writable;
use super::objects::{CHAIN, Channel, Cq, Path, Srq};
use super::queue::SendQueue;
use super::receives::{PER_CONNECTION, Receives};
use super::sender::Sender;
use super::sys::{self, Lib, ibv_wc};
use super::wire::Endpoint;
use crate::{Access, Error, Memory, PeerId, RegionId, Result};

/// Requests of a connection's send queue.
const SEND_DEPTH: u32 = 128;

/// Things by numbers that we or our device gave them: no peer can choose them to
/// collide, so they need no hash that withstands it.
pub type ByNumber<T> = HashMap<u32, T, BuildHasherDefault<Spread>>;

/// Spreads numbers over all bits.
#[derive(Clone, Copy, Default)]
pub struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32((*byte).into()));
    }

    #[inline]
    fn write_u32(&mut self, number: u32) {
        // 2^64 over the golden ratio.
        self.0 = (self.0.rotate_left(5) ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// A port that is open.
pub struct Rail {
    pub name: String,
    pub context: Arc<Context>,
    pub pd: Arc<Pd>,
    pub channel: Arc<Channel>,
    pub receives: Receives,
    srq: Arc<Srq>,
    recv_cq: Arc<Cq>,
    port: device::Rail,
    max_message: u64,
    path: Path,
    /// Keys can be bound to one queue pair.
    pub windows: bool,
    /// Registrations of the transport's regions, by their numbers.
    regions: Vec<Option<Arc<Mr>>>,
    /// The connections by their queue pairs' numbers; see [`enter`](Self::enter).
    pub peers: ByNumber<PeerId>,
    /// On whose queue pair something came last: often it is the next one too.
    last: Option<(u32, PeerId)>,
    /// Nothing goes over it until the port is up again.
    pub down: bool,
    /// Nothing will ever go over it: the device has failed. It may work again
    /// for a transport that opens it anew.
    pub dead: bool,
    /// Completed receives that were taken and are not handled yet.
    taken: Vec<ibv_wc>,
    incarnation: u64,
}

impl Rail {
    /// Opens a port.
    pub fn open(lib: &'static Lib, port: device::Rail, config: &Config, incarnation: u64) -> Result<Self> {
        let context = Context::open(lib, &port.device)?;
        let limits = context.attributes()?;
        let max_message = context.max_message(port.port)?;
        let pd = Pd::new(&context)?;
        let channel = Arc::new(Channel::new(&context)?);
        let (max_srq_wr, max_cqe) = (limits.max_srq_wr.max(0) as usize, limits.max_cqe.max(1) as usize);
        // Every receive that is out has room for its completion.
        let most = (max_srq_wr.min(max_cqe - 1) / PER_CONNECTION).max(1);
        let connections = config.peers.clamp(1, most);
        let depth = (connections * PER_CONNECTION) as u32;
        let srq = Arc::new(Srq::new(&pd, depth)?);
        let recv_cq = Arc::new(Cq::new(&channel, depth + 1)?);
        recv_cq.arm()?;
        let path = Path {
            port: port.port,
            gid_index: port.gid.index,
            mtu: port.mtu,
            global: port.global,
            traffic_class: config.ports.traffic_class,
            service_level: config.ports.service_level,
            retries: config.ports.retry_count,
            timeout: config.ports.timeout,
        };
        Ok(Self {
            name: format!("{}:{}", port.device, port.port),
            windows: limits.device_cap_flags & sys::IBV_DEVICE_MEM_WINDOW_TYPE_2B != 0,
            max_message,
            receives: Receives::new(&srq, connections),
            context,
            pd,
            channel,
            srq,
            recv_cq,
            port,
            path,
            regions: Vec::new(),
            peers: ByNumber::default(),
            last: None,
            down: false,
            dead: false,
            taken: Vec::new(),
            incarnation,
        })
    }

    /// A queue pair is a connection's.
    pub fn enter(&mut self, number: u32, peer: PeerId) {
        self.last = None;
        self.peers.insert(number, peer);
    }

    /// Whose the queue pair is on which something has come.
    #[inline]
    pub fn from(&mut self, number: u32) -> Option<PeerId> {
        match self.last {
            Some((last, peer)) if last == number => Some(peer),
            _ => {
                let peer = *self.peers.get(&number)?;
                self.last = Some((number, peer));
                Some(peer)
            }
        }
    }

    /// Makes a region known to the device.
    pub fn register(&mut self, region: RegionId, memory: &Arc<Memory>, access: &Access) -> Result<()> {
        let flags = match access {
            Access::RemoteWrite => writable(self.windows),
            // The landing zone stands before a guarded region.
            Access::LocalOnly | Access::Guarded(_) => MrAccess::Local,
        };
        let registered = Arc::new(Mr::register(&self.pd, memory, flags)?);
        let at = region.0 as usize;
        self.regions.resize_with(self.regions.len().max(at + 1), || None);
        self.regions[at] = Some(registered);
        Ok(())
    }

    /// Forgets a region.
    pub fn deregister(&mut self, region: RegionId) {
        if let Some(registered) = self.regions.get_mut(region.0 as usize) {
            *registered = None;
        }
    }

    /// A region's registration, if there is such a region.
    #[inline]
    pub fn registered(&self, region: RegionId) -> Option<&Arc<Mr>> {
        self.regions.get(region.0 as usize)?.as_ref()
    }

    /// The registration of a source range, if there is such a range.
    #[inline]
    pub fn source(&self, region: RegionId, offset: u64, len: u64) -> Result<&Arc<Mr>> {
        let Some(registered) = self.registered(region) else { return Err(Error::UnknownRegion(region)) };
        let size = registered.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfRange { offset, len, size });
        }
        Ok(registered)
    }

    /// A queue pair for a new connection, and our end of it.
    pub fn sender(&mut self, first_psn: u32) -> Result<(Sender, Endpoint)> {
        let queue = SendQueue::new(&self.pd, &self.channel, &self.srq, &self.recv_cq, SEND_DEPTH)?;
        queue.initialise(self.port.port)?;
        let endpoint = Endpoint {
            ethernet: self.port.link == Link::Ethernet,
            gid: self.port.gid.raw.raw,
            lid: self.port.lid,
            queue_pair: queue.number(),
            first_psn,
            mtu: self.path.mtu as u16,
            credits: super::receives::CREDITS,
            buffer: super::receives::BUFFER as u32,
            incarnation: self.incarnation,
        };
        let sender = Sender::new(queue, &self.pd, self.max_message)?;
        self.receives.join(&self.pd)?;
        Ok((sender, endpoint))
    }

    /// Connects a queue pair to the peer's.
    pub fn join(&self, sender: &mut Sender, peer: &Endpoint, first_psn: u32) -> Result<()> {
        if peer.ethernet != (self.port.link == Link::Ethernet) {
            return Err(Error::Protocol("the peer's port is of another link layer".into()));
        }
        sender.queue.join(&self.path, peer, first_psn)?;
        sender.grant(peer.credits, peer.buffer);
        Ok(())
    }

    /// Ends a connection's queue pair. What it has received is not lost with it:
    /// a device takes back its completions, and would keep the receives.
    pub fn leave(&mut self, mut sender: Sender) {
        let number = sender.queue.number();
        self.peers.remove(&number);
        self.last = None;
        // Only a device that is broken refuses.
        let _ = sender.queue.fail();
        let _ = self.take_all();
        drop(sender);
        let receives = &mut self.receives;
        // None of these may be taken for those of a later queue pair that gets
        // the same number.
        self.taken.retain(|completion| {
            let other = completion.qp_num != number;
            if !other {
                receives.give_back(completion.wr_id);
            }
            other
        });
        // A queue that takes them no more will tell of itself.
        let _ = self.receives.leave();
    }

    /// Takes completed receives off the device, to be handed out by
    /// [`poll`](Self::poll); true if there are some.
    pub fn take_all(&mut self) -> Result<bool> {
        let mut completions = ArrayVec::<ibv_wc, CHAIN>::new();
        loop {
            self.recv_cq.poll(&mut completions)?;
            self.taken.extend_from_slice(&completions);
            if completions.len() < CHAIN {
                return Ok(!self.taken.is_empty());
            }
        }
    }

    /// Hands out completed receives, oldest first, in place of what is in `into`.
    #[inline]
    pub fn poll<const N: usize>(&mut self, into: &mut ArrayVec<ibv_wc, N>) -> Result<()> {
        if self.taken.is_empty() {
            return self.recv_cq.poll(into);
        }
        into.clear();
        let got = N.min(self.taken.len());
        into.extend(self.taken.drain(..got));
        Ok(())
    }

    /// Were some taken and not handed out?
    pub fn has_taken(&self) -> bool {
        !self.taken.is_empty()
    }

    /// The next completed receive ends a wait.
    pub fn arm(&self) -> Result<()> {
        self.recv_cq.arm()
    }

    /// Port number.
    pub fn port(&self) -> u8 {
        self.port.port
    }
}
