//! The debtor's side of DistAttention: lanes to creditors, one plan a step, a
//! query and a partial a layer and creditor, and KV written to where it is to
//! lie.
//!
//! Owned by the engine thread, which posts and polls itself: no other thread
//! stands between a layer's queries and the wire. Every wait has a deadline; a
//! creditor that misses it, refuses, or goes is *lost*: its lane is closed, so
//! that nothing late can be merged, the step goes on without it, and
//! [`finish_step`](Debtor::finish_step) names it, so that the engine drops the
//! step of the sequences whose keys it held and has what was lost computed
//! again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use distkv_fabric::{Access, Address, Event, PeerId, RegionId, RemoteKey, Transport, Write};

use super::LayerHook;
use super::creditor::monotonic_ns;
use super::exchange::{ExchangeStats, Stage};
use super::fetch::{Landed, Slot, slots};
use super::landing::{LANDING_SLOTS, Landing};
use super::mailbox::{Geometry, Mailbox, SLOTS};
use super::paths::Paths;
use super::source::Source;
use super::wire::{LaneHello, LaneMessage, MAX_PLACEMENTS, Placement, PlanEntry, SlotHeader, SlotNotify, StepPlan};
use crate::device::{AttentionShape, Device};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{BlockIndex, InstanceId};

const OVER: &str = "its loans were not renewed in time";

/// What a debtor is set up with.
pub struct DebtorConfig {
    /// This instance.
    pub instance: InstanceId,
    /// Attention heads of the model.
    pub attention: AttentionShape,
    /// Sliding window by layer, 0 for none; empty where no layer has one.
    pub windows: Vec<u32>,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Longest wait for a creditor before it counts as lost.
    pub deadline: Duration,
    /// How long to spin before sleeping while an answer is awaited.
    pub spin: Duration,
}

/// How far a lane has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaneState {
    /// There is none.
    Absent,
    /// Connecting, or waiting for the creditor's word.
    Opening,
    /// In use.
    Open,
    /// Over, and why.
    Lost(String),
}

/// One rBlock on its way to a creditor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMove {
    /// Where it is to lie.
    pub creditor: InstanceId,
    /// Its local block, which must stay until [`Debtor::flush`].
    pub local: BlockIndex,
    /// What the creditor is told once it is complete.
    pub placement: Placement,
}

/// One sequence's keys at one creditor, for one step.
pub struct RemotePart {
    /// Who holds them.
    pub creditor: InstanceId,
    /// The sequence's rows in the step.
    pub rows: Range<u32>,
    /// What the creditor is told.
    pub entry: PlanEntry,
}

pub(super) struct Lane {
    pub(super) transport: usize,
    pub(super) peer: PeerId,
    pub(super) state: LaneState,
    opened: Instant,
    /// Where the creditor is reached.
    pub(super) addresses: Vec<Address>,
    pub(super) same_host: bool,
    query_key: RemoteKey,
    pool_key: RemoteKey,
    layer_stride: u64,
    blocks: u32,
    inbox: Mailbox,
    outbox: Mailbox,
    pub(super) landing: Landing,
    pub(super) slots: [Slot; LANDING_SLOTS],
    regions: [RegionId; 3],
    /// Complete at the creditor once the next plan says so.
    placements: Vec<Placement>,
    plan: StepPlan,
    rows: Vec<Range<u32>>,
    row_count: usize,
    slot: u8,
    /// Set by a query's post, cleared by its partial's arrival.
    awaiting: Option<Awaiting>,
    arrived_ns: u64,
}

#[derive(Clone, Copy)]
struct Awaiting {
    layer: u32,
    posted_ns: u64,
}

enum Owned {
    Connected(PeerId),
    Message(PeerId, Vec<u8>),
    Partial(PeerId, u8),
    Landed(PeerId, u8),
    Foreign(PeerId),
    Closed(PeerId, String),
}

/// The debtor. See the module's page.
pub struct Debtor {
    pub(super) config: DebtorConfig,
    pub(super) pool: Arc<KvPool>,
    source: Source,
    pub(super) transports: Vec<(Box<dyn Transport>, RegionId)>,
    pub(super) lanes: BTreeMap<InstanceId, Lane>,
    pub(super) paths: Paths,
    step: u64,
    /// Moves whose layers are written as the step computes them.
    streaming: Vec<BlockMove>,
    pub(super) lost: Vec<(InstanceId, String)>,
    pub(super) landed: Vec<Landed>,
    /// Until when the loans of each creditor are certainly in force.
    leases: BTreeMap<InstanceId, Instant>,
    pub(super) stats: Arc<ExchangeStats>,
    events: Vec<Owned>,
    scratch: Vec<u8>,
}

impl Debtor {
    /// A debtor over `transports` (the first whose scheme fits an address is
    /// used, and where no lane opens over it the next), borrowing for sequences whose local KV is in `pool`.
    pub fn new(
        config: DebtorConfig,
        pool: Arc<KvPool>,
        transports: Vec<Box<dyn Transport>>,
        stats: Arc<ExchangeStats>,
    ) -> distkv_fabric::Result<Self> {
        let source = Source::new(&pool)?;
        let transports = transports
            .into_iter()
            .map(|mut t| {
                let region = t.register(source.memory(), Access::LocalOnly)?;
                Ok((t, region))
            })
            .collect::<distkv_fabric::Result<Vec<_>>>()?;
        Ok(Self {
            config,
            pool,
            source,
            transports,
            lanes: BTreeMap::new(),
            paths: Paths::default(),
            step: 0,
            streaming: Vec::new(),
            lost: Vec::new(),
            landed: Vec::new(),
            leases: BTreeMap::new(),
            stats,
            events: Vec::new(),
            scratch: Vec::new(),
        })
    }

    pub(super) fn connect(
        &mut self,
        index: usize,
        address: &Address,
        addresses: &[Address],
        same_host: bool,
    ) -> distkv_fabric::Result<Lane> {
        let geometry = Geometry {
            heads: self.config.attention.heads,
            head_dim: self.config.attention.head_dim,
            max_rows: self.config.max_rows,
        };
        let (inbox, outbox) = (Mailbox::new(geometry)?, Mailbox::new(geometry)?);
        let landing = Landing::new(self.pool.shape())?;
        let transport = &mut self.transports[index].0;
        let inbox_region = transport.register(inbox.memory(), Access::RemoteWrite)?;
        let outbox_region = transport.register(outbox.memory(), Access::LocalOnly)?;
        let landing_region = transport.register(landing.memory(), Access::RemoteWrite)?;
        let mut hello = Vec::new();
        LaneHello {
            debtor: self.config.instance,
            shape: *self.pool.shape(),
            heads: geometry.heads as u32,
            scale: self.config.attention.scale,
            windows: self.config.windows.clone(),
            max_rows: geometry.max_rows as u32,
            partial_key: transport.remote_key(inbox_region)?,
            landing_key: transport.remote_key(landing_region)?,
        }
        .encode(&mut hello);
        let regions = [inbox_region, outbox_region, landing_region];
        let peer = transport.connect(address, &hello).inspect_err(|_| {
            // Registered just now.
            regions.iter().for_each(|region| drop(transport.deregister(*region)));
        })?;
        Ok(Lane {
            transport: index,
            peer,
            state: LaneState::Opening,
            opened: Instant::now(),
            addresses: addresses.to_vec(),
            same_host,
            query_key: RemoteKey(Vec::new()),
            pool_key: RemoteKey(Vec::new()),
            layer_stride: 0,
            blocks: 0,
            inbox,
            outbox,
            landing,
            slots: slots(),
            regions,
            placements: Vec::new(),
            plan: StepPlan::default(),
            rows: Vec::new(),
            row_count: 0,
            slot: 0,
            awaiting: None,
            arrived_ns: 0,
        })
    }

    /// How far the lane to `creditor` has come.
    pub fn state(&self, creditor: InstanceId) -> LaneState {
        self.lanes.get(&creditor).map_or(LaneState::Absent, |l| l.state.clone())
    }

    /// Ends the lane to `creditor`, if there is one.
    pub fn close(&mut self, creditor: InstanceId) {
        if let Some(lane) = self.lanes.remove(&creditor) {
            let transport = &mut self.transports[lane.transport].0;
            transport.disconnect(lane.peer);
            for region in lane.regions {
                // Registered when the lane was made; nothing else removes it.
                let _ = transport.deregister(region);
            }
        }
    }

    /// Moves lanes along and notices those that were lost. Called once a step
    /// and whenever the engine is idle.
    pub fn poll(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        for index in 0..self.transports.len() {
            let polled = self.transports[index].0.poll(&mut |event| {
                events.push(match event {
                    Event::Connected { peer } => Owned::Connected(peer),
                    Event::Accepted { peer, .. } => Owned::Foreign(peer),
                    Event::Message { peer, payload } => Owned::Message(peer, payload.to_vec()),
                    Event::Notified { peer, notify } => match SlotNotify::decode(notify) {
                        Some(SlotNotify::Partial(slot)) if (slot as usize) < SLOTS => Owned::Partial(peer, slot),
                        Some(SlotNotify::Landed(slot)) => Owned::Landed(peer, slot),
                        _ => Owned::Foreign(peer),
                    },
                    Event::Closed { peer, reason } => Owned::Closed(peer, reason.to_string()),
                });
            });
            for event in events.drain(..) {
                self.take(index, event);
            }
            if let Err(error) = polled {
                let reason = error.to_string();
                let here: Vec<_> = self.lanes.iter().filter(|(_, l)| l.transport == index).map(|(&c, _)| c).collect();
                here.into_iter().for_each(|creditor| self.fail(creditor, &reason));
            }
        }
        self.events = events;
        let late: Vec<_> = self
            .lanes
            .iter()
            .filter(|(_, l)| l.state == LaneState::Opening && l.opened.elapsed() > self.config.deadline)
            .map(|(&c, _)| c)
            .collect();
        late.into_iter().for_each(|creditor| self.fail(creditor, "the lane did not open in time"));
        let late = self.overdue_fetches();
        late.into_iter().for_each(|creditor| self.lose(creditor, "it did not give an rBlock back in time"));
    }

    fn take(&mut self, transport: usize, event: Owned) {
        let (Owned::Connected(peer)
        | Owned::Message(peer, _)
        | Owned::Partial(peer, _)
        | Owned::Landed(peer, _)
        | Owned::Foreign(peer)
        | Owned::Closed(peer, _)) = &event;
        let peer = *peer;
        let lane = self.lanes.iter_mut().find(|(_, l)| l.transport == transport && l.peer == peer);
        let Some((&creditor, lane)) = lane else {
            // Nobody has a reason to connect to a debtor.
            if matches!(event, Owned::Foreign(_)) {
                self.transports[transport].0.disconnect(peer);
            }
            return;
        };
        match event {
            Owned::Connected(_) => {}
            Owned::Landed(_, slot) => self.slot_filled(creditor, slot),
            Owned::Foreign(_) => self.lose(creditor, "it sent what does not belong on a lane"),
            Owned::Closed(_, reason) => self.fail(creditor, &reason),
            Owned::Message(_, payload) => match LaneMessage::decode(&payload) {
                Ok(LaneMessage::Accept { query_key, pool_key, blocks }) if lane.state == LaneState::Opening => {
                    lane.layer_stride = self.pool.shape().layer_bytes() as u64 * u64::from(blocks);
                    (lane.query_key, lane.pool_key, lane.blocks) = (query_key, pool_key, blocks);
                    lane.state = LaneState::Open;
                }
                Ok(LaneMessage::Refuse { reason }) => self.lose(creditor, &reason),
                Ok(LaneMessage::StepRefused { step, reason }) => {
                    self.lose(creditor, &format!("it refused step {step}: {reason}"));
                }
                Ok(LaneMessage::FetchRefused { ticket, reason }) => self.fetch_refused(creditor, ticket, &reason),
                Ok(_) => self.lose(creditor, "it sent a message that only a debtor sends"),
                Err(error) => self.lose(creditor, &error.to_string()),
            },
            Owned::Partial(_, slot) => {
                let arrived_ns = monotonic_ns();
                let fits = lane.awaiting.is_some_and(|awaiting| {
                    slot == lane.slot
                        && lane.inbox.header(slot).is_ok_and(|h| {
                            h.step == self.step && h.layer == awaiting.layer && h.rows as usize == lane.row_count
                        })
                });
                if fits {
                    let header = lane.inbox.header(slot).ok();
                    if let (Some(awaiting), Some(header)) = (lane.awaiting.take(), header) {
                        lane.arrived_ns = arrived_ns;
                        self.stats.round_trip(awaiting.posted_ns, &header, arrived_ns, lane.same_host);
                    }
                } else {
                    self.stats.reject();
                    self.lose(creditor, "it answered what was not asked");
                }
            }
        }
    }

    /// The loans of `creditor` are in force until then, at least.
    pub fn lease_until(&mut self, creditor: InstanceId, until: Instant) {
        self.leases.insert(creditor, until);
    }

    /// Are a creditor's loans in force for certain? A process that was stopped for
    /// longer than a lease would else attend to, and write into, memory that is
    /// another's by now. Where no transport asks the creditor before the bytes
    /// land (shared memory), this look before each write is what keeps it from
    /// that.
    fn in_force(&self, creditor: InstanceId) -> bool {
        self.leases.get(&creditor).is_none_or(|until| Instant::now() < *until)
    }

    pub(super) fn lose(&mut self, creditor: InstanceId, reason: &str) {
        if !self.lanes.contains_key(&creditor) {
            return;
        }
        tracing::warn!(%creditor, reason, "lost a creditor");
        self.close(creditor);
        self.lost.push((creditor, reason.to_string()));
    }

    /// Sends the step's plans. `parts` name only creditors whose lane is open
    /// (others are reported lost); `streaming` are rBlocks that this step
    /// fills and that are written out layer by layer.
    pub fn begin_step(
        &mut self,
        parts: impl IntoIterator<Item = RemotePart>,
        streaming: impl IntoIterator<Item = BlockMove>,
    ) {
        self.step += 1;
        for lane in self.lanes.values_mut() {
            lane.plan.entries.clear();
            lane.rows.clear();
            lane.row_count = 0;
        }
        for part in parts {
            match self.lanes.get_mut(&part.creditor) {
                Some(lane) if lane.state == LaneState::Open => {
                    lane.row_count += part.entry.rows as usize;
                    lane.rows.push(part.rows);
                    lane.plan.entries.push(part.entry);
                }
                _ => self.lost.push((part.creditor, "no lane is open".into())),
            }
        }
        self.streaming.clear();
        self.streaming.extend(streaming);
        let over = |(creditor, lane): (&InstanceId, &Lane)| {
            (lane.row_count > 0 && !self.in_force(*creditor)).then_some(*creditor)
        };
        let over: Vec<_> = self.lanes.iter().filter_map(over).collect();
        over.into_iter().for_each(|creditor| self.lose(creditor, OVER));
        self.send_plans();
    }

    /// One plan a lane, the step's own. Where a lane has more placements than a
    /// plan carries, plans that only place go before it.
    fn send_plans(&mut self) {
        let most = self.lanes.values().map(|l| l.placements.len()).max().unwrap_or(0);
        let extra = (most.saturating_sub(1) / MAX_PLACEMENTS) as u64;
        self.step += extra;
        let mut failed = Vec::new();
        for (&creditor, lane) in &mut self.lanes {
            let transport = &mut self.transports[lane.transport].0;
            for step in self.step - extra..=self.step {
                let last = step == self.step;
                if lane.placements.is_empty() && (!last || lane.plan.entries.is_empty()) {
                    continue;
                }
                let entries = std::mem::take(&mut lane.plan.entries);
                lane.plan.step = step;
                lane.plan.placements.clear();
                let count = lane.placements.len().min(MAX_PLACEMENTS);
                lane.plan.placements.extend(lane.placements.drain(..count));
                let mut entries = Some(entries);
                if last {
                    lane.plan.entries = entries.take().unwrap_or_default();
                }
                self.scratch.clear();
                lane.plan.encode(&mut self.scratch);
                if let Some(entries) = entries {
                    lane.plan.entries = entries;
                }
                if let Err(error) = transport.send(lane.peer, &self.scratch) {
                    failed.push((creditor, error.to_string()));
                    break;
                }
            }
        }
        for (creditor, reason) in failed {
            self.lose(creditor, &reason);
        }
    }

    /// Writes all layers of rBlocks that are complete already: a move between
    /// two steps.
    pub fn write_blocks(&mut self, moves: &[BlockMove]) {
        for layer in 0..self.pool.shape().layers as usize {
            self.write_layer(moves, layer);
        }
    }

    fn write_layer(&mut self, moves: &[BlockMove], layer: usize) {
        for m in moves {
            if !self.in_force(m.creditor) {
                self.lose(m.creditor, OVER);
            }
            if self.state(m.creditor) != LaneState::Open {
                continue;
            }
            let at = match self.stage(moves, layer, m.local) {
                Ok(at) => at,
                Err(error) => {
                    self.lose(m.creditor, &error.to_string());
                    continue;
                }
            };
            let Some(lane) = self.lanes.get_mut(&m.creditor).filter(|l| l.state == LaneState::Open) else { continue };
            let (transport, region) = &mut self.transports[lane.transport];
            let layer_bytes = self.pool.shape().layer_bytes() as u64;
            let write = Write {
                local: *region,
                local_offset: at,
                len: layer_bytes,
                remote: &lane.pool_key,
                remote_offset: layer as u64 * lane.layer_stride + u64::from(m.placement.block) * layer_bytes,
                notify: None,
            };
            let posted = if m.placement.block < lane.blocks {
                transport.write(lane.peer, write).map_err(|e| e.to_string())
            } else {
                Err(format!("it lent rBlock {} of a pool of {}", m.placement.block, lane.blocks))
            };
            if let Err(reason) = posted {
                self.lose(m.creditor, &reason);
            }
        }
    }

    /// Where one layer of a block is to be written from. Where that needs room,
    /// the writes of `moves` are waited for, which are all that is under way.
    fn stage(&mut self, moves: &[BlockMove], layer: usize, block: BlockIndex) -> distkv_fabric::Result<u64> {
        loop {
            match self.source.stage(layer, block)? {
                Some(at) => return Ok(at),
                None => self.flush(moves),
            }
        }
    }

    /// Waits until the source bytes of the writes of `moves` may be overwritten.
    pub fn flush(&mut self, moves: &[BlockMove]) {
        let deadline = Instant::now() + self.config.deadline;
        let involved: Vec<InstanceId> = {
            let mut all: Vec<_> = moves.iter().map(|m| m.creditor).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        for &creditor in &involved {
            let mut spin = Instant::now() + self.config.spin;
            while let Some(lane) = self.lanes.get(&creditor) {
                if self.transports[lane.transport].0.pending(lane.peer) == 0 {
                    break;
                }
                if Instant::now() > deadline {
                    self.lose(creditor, "KV could not be written in time");
                    break;
                }
                let transport = lane.transport;
                self.relax(transport, &mut spin);
            }
        }
        self.source.release();
    }

    /// Queues the placements of `moves`, whose bytes were written and are right,
    /// for the next plan: the creditors' copies may be attended to from the next
    /// step on. Moves to a creditor that was lost are not placed.
    pub fn place(&mut self, moves: impl IntoIterator<Item = BlockMove>) {
        for m in moves {
            if let Some(lane) = self.lanes.get_mut(&m.creditor) {
                lane.placements.push(m.placement);
            }
        }
    }

    /// Ends the step. The creditors that were lost since the last call, and
    /// why: every sequence that keeps KV at one of them has no valid result.
    pub fn finish_step(&mut self) -> Vec<(InstanceId, String)> {
        self.streaming.clear();
        std::mem::take(&mut self.lost)
    }

    /// Whether a creditor was lost since the last [`finish_step`](Self::finish_step).
    pub fn has_losses(&self) -> bool {
        !self.lost.is_empty()
    }

    /// Gives the others a moment, sleeping once `spin` is past, then polls: last,
    /// so that the caller looks at what has arrived before it sleeps again.
    fn relax(&mut self, transport: usize, spin: &mut Instant) {
        if Instant::now() < *spin {
            std::thread::yield_now();
        } else {
            // With several transports any of them may be the next to have news,
            // so the sleep on one is short.
            let nap = if self.transports.len() == 1 { Duration::from_millis(20) } else { Duration::from_micros(200) };
            if let Err(error) = self.transports[transport].0.wait(nap) {
                tracing::warn!(%error, "waiting on a transport failed");
            }
        }
        self.poll();
    }
}

impl<D: Device> LayerHook<D> for Debtor {
    fn is_idle(&self) -> bool {
        self.streaming.is_empty() && self.lanes.values().all(|lane| lane.row_count == 0)
    }

    fn queries_ready(&mut self, layer: usize, device: &mut D, qkv: &D::Buffer) {
        let mut failed = Vec::new();
        for (&creditor, lane) in self.lanes.iter_mut().filter(|(_, l)| l.row_count > 0) {
            let posted_ns = monotonic_ns();
            lane.slot = (lane.slot + 1) % SLOTS as u8;
            let geometry = *lane.outbox.geometry();
            let queries = lane.outbox.floats_mut(lane.slot, lane.row_count * geometry.width());
            device.export_queries(&self.config.attention, qkv, &lane.rows, queries);
            let header = SlotHeader {
                step: self.step,
                layer: layer as u32,
                rows: lane.row_count as u32,
                taken_ns: 0,
                answered_ns: 0,
            };
            lane.outbox.set_header(lane.slot, &header);
            let write = Write {
                local: lane.regions[1],
                local_offset: geometry.offset(lane.slot) as u64,
                len: geometry.query_bytes(lane.row_count) as u64,
                remote: &lane.query_key,
                remote_offset: geometry.offset(lane.slot) as u64,
                notify: Some(SlotNotify::Query(lane.slot).encode()),
            };
            lane.awaiting = Some(Awaiting { layer: layer as u32, posted_ns });
            if let Err(error) = self.transports[lane.transport].0.write(lane.peer, write) {
                failed.push((creditor, error.to_string()));
            }
            self.stats.record(Stage::Post, monotonic_ns() - posted_ns);
        }
        for (creditor, reason) in failed {
            self.lose(creditor, &reason);
        }
        let streaming = std::mem::take(&mut self.streaming);
        self.write_layer(&streaming, layer);
        self.streaming = streaming;
    }

    fn local_done(&mut self, _layer: usize, device: &mut D, o: &mut D::Buffer, lse: &mut D::Buffer) {
        let started = Instant::now();
        let mut spin = started + self.config.spin;
        let mut waited = false;
        while let Some((&creditor, lane)) = self.lanes.iter().find(|(_, l)| l.awaiting.is_some()) {
            if started.elapsed() > self.config.deadline {
                self.stats.reject();
                self.lose(creditor, "it did not answer in time");
                continue;
            }
            let transport = lane.transport;
            waited = true;
            self.relax(transport, &mut spin);
        }
        let merging = Instant::now();
        let mut merged = false;
        for lane in self.lanes.values_mut().filter(|l| l.row_count > 0) {
            let geometry = *lane.inbox.geometry();
            let width = geometry.width();
            let floats = lane.inbox.floats(lane.slot, lane.row_count * (width + geometry.heads));
            let (remote_o, remote_lse) = floats.split_at(lane.row_count * width);
            device.merge(&self.config.attention, &lane.rows, remote_o, remote_lse, o, lse);
            merged = true;
        }
        if merged {
            self.stats.record(Stage::Wait, if waited { (merging - started).as_nanos() as u64 } else { 0 });
            self.stats.record(Stage::Merge, merging.elapsed().as_nanos() as u64);
        }
    }
}
