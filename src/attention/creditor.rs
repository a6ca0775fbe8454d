//! The creditor's side of DistAttention: takes plans and queries from debtors,
//! attends over the rBlocks they placed here, answers with partials.
//!
//! One [`Creditor`] owns one transport and is one thread; a node that is
//! reached by shm and by tcp runs two. It shares nothing with the engine but
//! the rBlock table and the [`LentPool`], both read-only from here except for a
//! lent block's way from filling to live.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use distkv_fabric::{Access, Event, PeerId, RegionId, RemoteKey, Transport, Write, WriteGuard};

use super::landing::{LANDING_SLOTS, Landing};
use super::mailbox::{Geometry, Mailbox, SLOTS};
use super::wire::{Fetch, LaneHello, LaneMessage, SlotHeader, SlotNotify, StepPlan};
use crate::control::rmanager::LentPool;
use crate::device::{AttentionShape, AttnSeq, HolderKernel};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{BlockIndex, KvRun, LoanId};
use crate::kv::table::{RBlockTable, State};

/// Counters of a creditor, readable from any thread.
#[derive(Debug, Default)]
pub struct CreditorStats {
    /// Queries answered.
    pub answered: AtomicU64,
    /// Query rows answered.
    pub rows: AtomicU64,
    /// Nanoseconds spent in MicroAttention.
    pub attention_ns: AtomicU64,
    /// Plans and queries refused: unknown loan, old epoch, malformed.
    pub refused: AtomicU64,
    /// rBlocks taken in.
    pub placed: AtomicU64,
    /// rBlocks given back to their debtors.
    pub returned: AtomicU64,
}

/// Nanoseconds of this host's monotonic clock; comparable between processes of
/// one host.
pub(crate) fn monotonic_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Lets a debtor write only into blocks that are lent to it and not yet
/// complete.
struct LoanGuard {
    book: Arc<LentPool>,
    pool: Arc<KvPool>,
}

/// The loan whose debtor may still write the block.
fn fillable_loan(table: &RBlockTable, block: BlockIndex) -> Option<LoanId> {
    table.entry(block).filter(|e| matches!(e.state, State::Reserved | State::Filling))?.loan()
}

impl WriteGuard for LoanGuard {
    fn may_write(&self, hello: &[u8], offset: u64, len: u64) -> bool {
        let Ok(hello) = LaneHello::decode(hello) else { return false };
        let layer_bytes = self.pool.shape().layer_bytes() as u64;
        let in_layer = offset % self.pool.layer_stride() as u64;
        let (first, last) = (in_layer / layer_bytes, (in_layer + len.max(1) - 1) / layer_bytes);
        // A run of blocks must not reach from one layer's pool into the next.
        if last >= u64::from(self.pool.blocks())
            || offset / self.pool.layer_stride() as u64 >= u64::from(self.pool.shape().layers)
        {
            return false;
        }
        (first..=last).all(|block| {
            let Some(loan) = fillable_loan(self.pool.table(), block as u32) else { return false };
            self.book.loan(loan).is_some_and(|t| t.debtor == hello.debtor)
        })
    }
}

/// A plan with its blocks looked up and checked.
#[derive(Default)]
struct ReadyPlan {
    step: u64,
    rows: usize,
    seqs: Vec<AttnSeq>,
    runs: Vec<KvRun>,
    /// Loan, epoch, and which of `runs` lie under it.
    loans: Vec<(LoanId, u32, Range<usize>)>,
    revision: u64,
}

struct Lane {
    hello: LaneHello,
    shape: AttentionShape,
    pool: Arc<KvPool>,
    inbox: Mailbox,
    inbox_region: RegionId,
    outbox: Mailbox,
    outbox_region: RegionId,
    staging: Landing,
    staging_region: RegionId,
    placed: BTreeMap<LoanId, Vec<KvRun>>,
    plan: ReadyPlan,
}

enum Owned {
    Accepted(PeerId, Vec<u8>),
    Message(PeerId, Vec<u8>),
    Query(PeerId, u8),
    Foreign(PeerId),
    Closed(PeerId),
}

/// The creditor of one transport. See the module's page.
pub struct Creditor {
    transport: Box<dyn Transport>,
    book: Arc<LentPool>,
    kernel: Box<dyn HolderKernel>,
    lanes: BTreeMap<PeerId, Lane>,
    /// The pool as registered, and its key; renewed when a pure lender is given
    /// another shape.
    exported: Option<(Arc<KvPool>, RegionId, RemoteKey)>,
    stats: Arc<CreditorStats>,
    inbox: Vec<Owned>,
}

impl Creditor {
    /// A creditor that is not running yet.
    pub fn new(
        transport: Box<dyn Transport>,
        book: Arc<LentPool>,
        kernel: Box<dyn HolderKernel>,
        stats: Arc<CreditorStats>,
    ) -> Self {
        Self { transport, book, kernel, lanes: BTreeMap::new(), exported: None, stats, inbox: Vec::new() }
    }

    /// Serves until `stop` is set (and the transport's waker used). Spins for
    /// `spin` after the last exchange, then sleeps.
    pub fn run(mut self, stop: &AtomicBool, spin: Duration) {
        let mut last_work = Instant::now();
        while !stop.load(Ordering::Acquire) {
            let busy = match self.turn() {
                Ok(busy) => busy,
                Err(error) => {
                    tracing::error!(%error, "the creditor's transport failed; lent memory is out of reach");
                    return;
                }
            };
            if busy {
                last_work = Instant::now();
            } else if last_work.elapsed() < spin {
                std::thread::yield_now();
            } else if let Err(error) = self.transport.wait(Duration::from_millis(500)) {
                tracing::error!(%error, "the creditor's transport failed; lent memory is out of reach");
                return;
            }
        }
    }

    /// Handles what is there. True if anything was.
    fn turn(&mut self) -> distkv_fabric::Result<bool> {
        let inbox = &mut self.inbox;
        self.transport.poll(&mut |event| {
            inbox.push(match event {
                Event::Connected { peer } => Owned::Foreign(peer),
                Event::Accepted { peer, hello } => Owned::Accepted(peer, hello.to_vec()),
                Event::Message { peer, payload } => Owned::Message(peer, payload.to_vec()),
                Event::Notified { peer, notify } => match SlotNotify::decode(notify) {
                    Some(SlotNotify::Query(slot)) if (slot as usize) < SLOTS => Owned::Query(peer, slot),
                    _ => Owned::Foreign(peer),
                },
                Event::Closed { peer, .. } => Owned::Closed(peer),
            });
        })?;
        let mut inbox = std::mem::take(&mut self.inbox);
        let busy = !inbox.is_empty();
        for event in inbox.drain(..) {
            match event {
                Owned::Accepted(peer, hello) => self.accept(peer, &hello),
                Owned::Message(peer, payload) => self.message(peer, &payload),
                Owned::Query(peer, slot) => self.query(peer, slot),
                Owned::Foreign(peer) => self.expel(peer, "a message that does not belong on a lane"),
                Owned::Closed(peer) => self.forget(peer),
            }
        }
        self.inbox = inbox;
        Ok(busy)
    }

    fn accept(&mut self, peer: PeerId, hello: &[u8]) {
        let opened = LaneHello::decode(hello).map_err(|e| e.to_string()).and_then(|h| self.open(h));
        let reply = match opened {
            Ok((lane, reply)) => {
                // A debtor has one lane. What an earlier one of its has under way
                // must not land in blocks that were repaid and lent to it again.
                let debtor = lane.hello.debtor;
                let earlier: Vec<_> =
                    self.lanes.iter().filter(|(_, l)| l.hello.debtor == debtor).map(|(&peer, _)| peer).collect();
                for peer in earlier {
                    self.transport.disconnect(peer);
                    self.forget(peer);
                }
                self.lanes.insert(peer, lane);
                reply
            }
            Err(reason) => {
                self.stats.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%reason, "refused a lane");
                LaneMessage::Refuse { reason }
            }
        };
        self.reply(peer, &reply);
    }

    fn open(&mut self, hello: LaneHello) -> Result<(Lane, LaneMessage), String> {
        let pool = self.book.current().ok_or("this lender has not granted a loan yet")?;
        if pool.on_host().is_none() {
            return Err("this instance lends nothing: its KV lies in a GPU's memory".into());
        }
        if *pool.shape() != hello.shape {
            return Err(format!("KV shapes differ: the debtor's {:?}, the creditor's {:?}", hello.shape, pool.shape()));
        }
        let pool_key = self.export_pool(&pool).map_err(|e| e.to_string())?;
        let geometry = Geometry {
            heads: hello.heads as usize,
            head_dim: hello.shape.head_dim as usize,
            max_rows: hello.max_rows as usize,
        };
        let inbox = Mailbox::new(geometry).map_err(|e| e.to_string())?;
        let outbox = Mailbox::new(geometry).map_err(|e| e.to_string())?;
        let inbox_region = self.transport.register(inbox.memory(), Access::RemoteWrite).map_err(|e| e.to_string())?;
        let outbox_region = self.transport.register(outbox.memory(), Access::LocalOnly).map_err(|e| e.to_string())?;
        let staging = Landing::new(pool.shape()).map_err(|e| e.to_string())?;
        let staging_region = self.transport.register(staging.memory(), Access::LocalOnly).map_err(|e| e.to_string())?;
        let query_key = self.transport.remote_key(inbox_region).map_err(|e| e.to_string())?;
        let shape = AttentionShape {
            heads: geometry.heads,
            kv_heads: hello.shape.kv_heads as usize,
            head_dim: geometry.head_dim,
            scale: hello.scale,
        };
        let reply = LaneMessage::Accept { query_key, pool_key, blocks: pool.blocks() };
        let lane = Lane {
            hello,
            shape,
            pool,
            inbox,
            inbox_region,
            outbox,
            outbox_region,
            staging,
            staging_region,
            placed: BTreeMap::new(),
            plan: ReadyPlan::default(),
        };
        Ok((lane, reply))
    }

    fn export_pool(&mut self, pool: &Arc<KvPool>) -> distkv_fabric::Result<RemoteKey> {
        if let Some((exported, region, key)) = &self.exported {
            if Arc::ptr_eq(exported, pool) {
                return Ok(key.clone());
            }
            self.transport.deregister(*region)?;
            self.exported = None;
        }
        let guard = LoanGuard { book: self.book.clone(), pool: pool.clone() };
        let region = self.transport.register(pool.memory(), Access::Guarded(Arc::new(guard)))?;
        let key = self.transport.remote_key(region)?;
        self.exported = Some((pool.clone(), region, key.clone()));
        Ok(key)
    }

    fn message(&mut self, peer: PeerId, payload: &[u8]) {
        let Some(lane) = self.lanes.get_mut(&peer) else {
            return self.expel(peer, "a message before the lane was opened");
        };
        let plan = match LaneMessage::decode(payload) {
            Ok(LaneMessage::Plan(plan)) => plan,
            Ok(LaneMessage::Fetch(fetch)) => return self.give_back(peer, fetch),
            Ok(_) => return self.expel(peer, "a message that only a creditor sends"),
            Err(error) => return self.expel(peer, &error.to_string()),
        };
        let step = plan.step;
        match lane.take_plan(&plan, &self.book) {
            Ok(placed) => {
                self.stats.placed.fetch_add(placed, Ordering::Relaxed);
            }
            Err(reason) => {
                lane.plan = ReadyPlan::default();
                self.refuse(peer, step, reason);
            }
        }
    }

    /// Sends an rBlock home. One whose loan is over is refused: the debtor will
    /// hear of that from the control plane, or knows it.
    fn give_back(&mut self, peer: PeerId, fetch: Fetch) {
        let Some(lane) = self.lanes.get_mut(&peer) else { return };
        if fetch.slot as usize >= LANDING_SLOTS {
            return self.expel(peer, "a landing slot that does not exist");
        }
        if let Err(reason) = lane.stage(&fetch, &self.book) {
            self.stats.refused.fetch_add(1, Ordering::Relaxed);
            return self.reply(peer, &LaneMessage::FetchRefused { ticket: fetch.ticket, reason });
        }
        let write = Write {
            local: lane.staging_region,
            local_offset: lane.staging.offset(fetch.slot) as u64,
            len: lane.staging.bytes() as u64,
            remote: &lane.hello.landing_key,
            remote_offset: lane.staging.offset(fetch.slot) as u64,
            notify: Some(SlotNotify::Landed(fetch.slot).encode()),
        };
        if let Err(error) = self.transport.write(peer, write) {
            return self.expel(peer, &error.to_string());
        }
        self.stats.returned.fetch_add(1, Ordering::Relaxed);
    }

    fn query(&mut self, peer: PeerId, slot: u8) {
        let taken_ns = monotonic_ns();
        let Some(lane) = self.lanes.get_mut(&peer) else {
            return self.expel(peer, "a query before the lane was opened");
        };
        let header = match lane.inbox.header(slot) {
            Ok(header) => header,
            Err(error) => return self.expel(peer, &error.to_string()),
        };
        let plan = &lane.plan;
        let layer = header.layer as usize;
        if header.step != plan.step || header.rows as usize != plan.rows || layer >= lane.hello.shape.layers as usize {
            return self.refuse(peer, header.step, "a query that does not fit its step's plan".into());
        }
        let window = lane.hello.windows.get(layer).copied().filter(|&w| w > 0);
        let (width, heads) = (lane.shape.heads * lane.shape.head_dim, lane.shape.heads);
        let (o, lse) = lane.outbox.floats_mut(slot, plan.rows * (width + heads)).split_at_mut(plan.rows * width);
        let q = lane.inbox.floats(slot, plan.rows * width);
        self.kernel.micro_attention(&lane.shape, window, layer, &lane.pool, q, &plan.seqs, &plan.runs, o, lse);

        // A loan that ended while we computed may have had its blocks granted
        // to another: what was read is then worthless. Still in force now means
        // it was all along.
        if self.book.ended() != plan.revision
            && let Some((loan, ..)) = plan.loans.iter().find(|of| !lane.in_force(of, &self.book))
        {
            let reason = format!("loan {} ended during the step", loan.0);
            return self.refuse(peer, header.step, reason);
        }
        let answered_ns = monotonic_ns();
        lane.outbox.set_header(slot, &SlotHeader { taken_ns, answered_ns, ..header });
        let geometry = lane.outbox.geometry();
        let write = Write {
            local: lane.outbox_region,
            local_offset: geometry.offset(slot) as u64,
            len: geometry.partial_bytes(plan.rows) as u64,
            remote: &lane.hello.partial_key,
            remote_offset: geometry.offset(slot) as u64,
            notify: Some(SlotNotify::Partial(slot).encode()),
        };
        let rows = plan.rows as u64;
        if let Err(error) = self.transport.write(peer, write) {
            return self.expel(peer, &error.to_string());
        }
        self.stats.answered.fetch_add(1, Ordering::Relaxed);
        self.stats.rows.fetch_add(rows, Ordering::Relaxed);
        self.stats.attention_ns.fetch_add(answered_ns - taken_ns, Ordering::Relaxed);
    }

    fn refuse(&mut self, peer: PeerId, step: u64, reason: String) {
        self.stats.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(step, %reason, "refused a step");
        self.reply(peer, &LaneMessage::StepRefused { step, reason });
    }

    fn reply(&mut self, peer: PeerId, message: &LaneMessage) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        if let Err(error) = self.transport.send(peer, &bytes) {
            self.expel(peer, &error.to_string());
        }
    }

    fn expel(&mut self, peer: PeerId, reason: &str) {
        self.stats.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(?peer, reason, "closed a lane");
        self.transport.disconnect(peer);
        self.forget(peer);
    }

    fn forget(&mut self, peer: PeerId) {
        if let Some(lane) = self.lanes.remove(&peer) {
            for region in [lane.inbox_region, lane.outbox_region, lane.staging_region] {
                // Only fails if it is not registered, which is what we want.
                let _ = self.transport.deregister(region);
            }
        }
    }
}

impl Lane {
    /// Copies an rBlock of this debtor's to its staging slot, whole.
    fn stage(&mut self, fetch: &Fetch, book: &LentPool) -> Result<(), String> {
        let terms = book.loan(fetch.loan).filter(|t| t.debtor == self.hello.debtor && t.epoch == fetch.epoch);
        let Some(terms) = terms else {
            return Err(format!("loan {} is not this debtor's, or is over", fetch.loan.0));
        };
        let table = self.pool.table();
        if !Arc::ptr_eq(&terms.pool, &self.pool) || !table.visible(fetch.block, fetch.loan) {
            return Err(format!("rBlock {} was not placed under loan {}", fetch.block, fetch.loan.0));
        }
        self.staging.fill(fetch.slot, fetch.ticket, &self.pool, fetch.block).map_err(|error| error.to_string())?;
        if !table.was_visible(fetch.block, fetch.loan) {
            return Err(format!("loan {} ended meanwhile", fetch.loan.0));
        }
        Ok(())
    }

    /// Is a plan's loan in force, and all that the plan attends to still under
    /// it? The rest of it may have been given back.
    fn in_force(&self, (loan, epoch, runs): &(LoanId, u32, Range<usize>), book: &LentPool) -> bool {
        let table = self.pool.table();
        book.loan(*loan).is_some_and(|t| t.debtor == self.hello.debtor && t.epoch == *epoch)
            && self.plan.runs[runs.clone()].iter().all(|run| table.was_visible(run.block, *loan))
    }

    /// Takes placements in and looks the step's blocks up. Returns how many
    /// rBlocks were placed; on an error nothing of the step may be answered.
    fn take_plan(&mut self, plan: &StepPlan, book: &LentPool) -> Result<u64, String> {
        if plan.step <= self.plan.step {
            return Err(format!("step {} after step {}", plan.step, self.plan.step));
        }
        if plan.rows() > self.hello.max_rows as usize {
            return Err(format!("{} query rows on a lane of {}", plan.rows(), self.hello.max_rows));
        }
        if let Some(e) = plan.entries.iter().find(|e| e.rows == 0 || e.position.checked_add(e.rows).is_none()) {
            return Err(format!("{} query rows at position {}", e.rows, e.position));
        }
        let revision = book.ended();
        if revision != self.plan.revision {
            let table = self.pool.table();
            self.placed.retain(|loan, runs| {
                // A part that was given back is at the end.
                let kept = runs.iter().take_while(|run| table.visible(run.block, *loan)).count();
                runs.truncate(kept);
                book.loan(*loan).is_some()
            });
        }
        let in_force = |loan: LoanId| match book.loan(loan) {
            Some(terms) if terms.debtor == self.hello.debtor => Ok(terms),
            _ => Err(format!("loan {} is not this debtor's, or is over", loan.0)),
        };
        let mut taken = 0;
        for p in &plan.placements {
            // A debtor that repaid the loan meanwhile, or is yet to learn that it
            // ended, means no harm. Nobody will attend to the block.
            if in_force(p.loan).is_err() {
                continue;
            }
            if p.tokens == 0 || p.tokens > self.hello.shape.block_tokens || p.position.checked_add(p.tokens).is_none() {
                return Err(format!("rBlock {} placed with {} tokens at {}", p.block, p.tokens, p.position));
            }
            if let Err(error) = self.pool.table().publish(p.block, p.loan) {
                if in_force(p.loan).is_err() {
                    continue;
                }
                return Err(format!("rBlock {} under loan {}: {error}", p.block, p.loan.0));
            }
            let run = KvRun { block: p.block, position: p.position, tokens: p.tokens };
            self.placed.entry(p.loan).or_default().push(run);
            taken += 1;
        }
        let ready = &mut self.plan;
        ready.seqs.clear();
        ready.runs.clear();
        ready.loans.clear();
        let mut row = 0;
        for entry in &plan.entries {
            let first_run = ready.runs.len();
            for view in &entry.loans {
                let terms = in_force(view.loan)?;
                if terms.epoch != view.epoch {
                    return Err(format!("loan {} is in epoch {}, not {}", view.loan.0, terms.epoch, view.epoch));
                }
                let placed = self.placed.get(&view.loan).map_or(&[][..], Vec::as_slice);
                let visible = placed.get(..view.visible as usize).ok_or_else(|| {
                    format!("{} rBlocks asked of loan {}, {} placed", view.visible, view.loan.0, placed.len())
                })?;
                let from = ready.runs.len();
                ready.runs.extend_from_slice(visible);
                ready.loans.push((view.loan, view.epoch, from..ready.runs.len()));
            }
            ready.seqs.push(AttnSeq {
                row,
                rows: entry.rows,
                position: entry.position,
                run: first_run as u32,
                runs: (ready.runs.len() - first_run) as u32,
            });
            row += entry.rows;
        }
        ready.rows = row as usize;
        ready.step = plan.step;
        ready.revision = revision;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use distkv_fabric::loopback::LoopbackTransport;

    use super::*;
    use crate::control::rmanager::{PoolSource, RManager};
    use crate::device::cpu::{CpuHolder, CpuOptions};
    use crate::kv::pool::DeviceMemory;
    use crate::kv::rblock::{InstanceId, KvDtype, KvShape};

    struct Elsewhere(usize);

    impl DeviceMemory for Elsewhere {
        fn address(&self) -> u64 {
            4096
        }

        fn len(&self) -> usize {
            self.0
        }

        fn read(&self, _: usize, _: &mut [u8]) -> Result<(), String> {
            Err("out of the host's reach".into())
        }

        fn write(&self, _: usize, _: &[u8]) -> Result<(), String> {
            Err("out of the host's reach".into())
        }
    }

    #[test]
    fn memory_out_of_the_hosts_reach_is_no_lane() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16, block_tokens: 16, dtype: KvDtype::Bf16 };
        let pool = Arc::new(KvPool::on_device(shape, Arc::new(Elsewhere(4 * shape.block_bytes()))));
        let manager = RManager::new(PoolSource::Pool { pool, prefix: None }, 1.0, Duration::from_secs(1));
        let kernel = CpuHolder::new(CpuOptions { threads: 1, pin: false, ..CpuOptions::default() }).unwrap();
        let transport = Box::new(LoopbackTransport::bind());
        let mut creditor = Creditor::new(transport, manager.lent_pool().clone(), Box::new(kernel), Arc::default());
        let hello = LaneHello {
            debtor: InstanceId(7),
            shape,
            heads: 2,
            scale: 0.25,
            windows: Vec::new(),
            max_rows: 4,
            partial_key: RemoteKey(vec![1]),
            landing_key: RemoteKey(vec![2]),
        };
        let refusal = creditor.open(hello).err().unwrap();
        assert!(refusal.contains("GPU"), "{refusal}");
    }
}
