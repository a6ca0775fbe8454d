//! The debtor's side of the data path: lanes to creditors, one plan a step and
//! creditor, and KV written to where it is to lie. Every wait has a deadline; a
//! creditor that misses it, refuses or goes is lost, and its lane is closed, so
//! that nothing late can be merged (as `attention/debtor.rs` does).

use std::collections::BTreeMap;
use std::time::Duration;

use super::lender::{Entry, LaneMessage, Placed, Plan, Sabotage};
use super::network::Slot;
use super::toy::Partial;
use crate::kv::rblock::{BlockIndex, InstanceId, LoanId};

/// Lanes' asks are told from the controller's by this bit.
pub const LANE_ASK: u64 = 1 << 63;
/// Blocks of a lane that may be on their way home at once.
const LANDING_SLOTS: usize = 4;
/// A lane that is not open after this long is lost.
const OPENING: Duration = Duration::from_secs(2);

/// What a debtor wants of the network.
#[derive(Clone, Debug)]
pub enum LaneCall {
    /// A lane to a creditor's slot.
    Dial {
        /// Names it; has [`LANE_ASK`].
        ask: u64,
        /// Where to.
        to: Slot,
    },
    /// A message.
    Send {
        /// Over which connection.
        conn: u64,
        /// Of so many bytes.
        bytes: u64,
        /// Which began to leave then, if before now.
        since: Option<Duration>,
        /// What.
        message: LaneMessage,
    },
    /// A lane is over.
    Close {
        /// Which.
        conn: u64,
    },
}

/// How far a lane has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneState {
    /// There is none.
    Absent,
    /// Not open yet.
    Opening,
    /// In use.
    Open,
}

struct Lane {
    ask: u64,
    conn: Option<u64>,
    state: LaneState,
    opened: Duration,
    placements: Vec<Placed>,
    /// Batch items of the step's entries.
    items: Vec<usize>,
    awaiting: bool,
    to: Slot,
    /// What waits for the lane to be opened anew; only by a planted bug.
    held: Vec<LaneMessage>,
    /// The mailbox: the partials that came last.
    partials: Vec<Partial>,
    /// Tickets of blocks that are on their way home.
    fetches: Vec<u64>,
}

/// The debtor. See the module's page.
pub struct Debtor {
    instance: InstanceId,
    query_bytes: u64,
    sabotage: Sabotage,
    lanes: BTreeMap<InstanceId, Lane>,
    asks: u64,
    step: u64,
    lost: Vec<(InstanceId, String)>,
    landed: Vec<(u64, Option<Vec<u64>>)>,
    calls: Vec<LaneCall>,
    /// Answers that were not asked for.
    pub rejected: u64,
}

impl Debtor {
    /// A debtor without lanes.
    pub fn new(instance: InstanceId, life: u64, query_bytes: u64, sabotage: Sabotage) -> Self {
        let asks = LANE_ASK | life << 32;
        Self {
            instance,
            query_bytes,
            sabotage,
            lanes: BTreeMap::new(),
            asks,
            step: 0,
            lost: Vec::new(),
            landed: Vec::new(),
            calls: Vec::new(),
            rejected: 0,
        }
    }

    /// Begins to open a lane, where none is.
    pub fn open(&mut self, now: Duration, creditor: InstanceId, slot: Option<Slot>) {
        if self.lanes.contains_key(&creditor) {
            return;
        }
        let Some(to) = slot else {
            return self.lost.push((creditor, "nobody knows where it is".into()));
        };
        self.asks += 1;
        self.calls.push(LaneCall::Dial { ask: self.asks, to });
        let lane = Lane {
            ask: self.asks,
            conn: None,
            state: LaneState::Opening,
            opened: now,
            placements: Vec::new(),
            items: Vec::new(),
            awaiting: false,
            to,
            held: Vec::new(),
            partials: Vec::new(),
            fetches: Vec::new(),
        };
        self.lanes.insert(creditor, lane);
    }

    /// How far the lane to `creditor` has come.
    pub fn state(&self, creditor: InstanceId) -> LaneState {
        self.lanes.get(&creditor).map_or(LaneState::Absent, |lane| lane.state)
    }

    /// A lane's connection is there.
    pub fn connected(&mut self, ask: u64, conn: u64) {
        let hello = LaneMessage::Hello(self.instance);
        match self.lanes.values_mut().find(|lane| lane.ask == ask) {
            Some(lane) => {
                lane.conn = Some(conn);
                for message in std::iter::once(hello).chain(lane.held.drain(..)) {
                    self.calls.push(LaneCall::Send { conn, bytes: 64, since: None, message });
                }
            }
            None => self.calls.push(LaneCall::Close { conn }),
        }
    }

    /// It did not come about.
    pub fn failed(&mut self, ask: u64) {
        if self.redial(|lane| lane.ask == ask) {
            return;
        }
        if let Some(creditor) = self.lanes.iter().find(|(_, lane)| lane.ask == ask).map(|(c, _)| *c) {
            self.lose(creditor, "no connection");
        }
    }

    /// Is this the connection of one of its lanes?
    pub fn has(&self, conn: u64) -> bool {
        self.lanes.values().any(|lane| lane.conn == Some(conn))
    }

    /// A lane's connection is gone.
    pub fn closed(&mut self, conn: u64) {
        if self.redial(|lane| lane.conn == Some(conn) && !lane.awaiting) {
            return;
        }
        if let Some(creditor) = self.of(conn) {
            self.lose(creditor, "its lane closed");
        }
    }

    /// A planted bug: the lane is opened anew, whoever is there now.
    fn redial(&mut self, which: impl Fn(&Lane) -> bool) -> bool {
        if self.sabotage != Sabotage::Epoch {
            return false;
        }
        let Some(lane) = self.lanes.values_mut().find(|lane| lane.state == LaneState::Open && which(lane)) else {
            return false;
        };
        self.asks += 1;
        (lane.ask, lane.conn) = (self.asks, None);
        self.calls.push(LaneCall::Dial { ask: self.asks, to: lane.to });
        true
    }

    /// A creditor says something.
    pub fn message(&mut self, conn: u64, message: LaneMessage) {
        let Some(creditor) = self.of(conn) else { return };
        let step = self.step;
        let Some(lane) = self.lanes.get_mut(&creditor) else { return };
        match message {
            LaneMessage::Accept if lane.state == LaneState::Opening || self.sabotage == Sabotage::Epoch => {
                lane.state = LaneState::Open;
            }
            LaneMessage::Answer { step: of, partials }
                if lane.awaiting && of == step && partials.len() == lane.items.len() =>
            {
                lane.awaiting = false;
                lane.partials = partials;
            }
            LaneMessage::Answer { partials, .. } if self.sabotage == Sabotage::LatePartial => lane.partials = partials,
            LaneMessage::Landed { ticket, values } if lane.fetches.contains(&ticket) => {
                lane.fetches.retain(|of| *of != ticket);
                self.landed.push((ticket, values));
            }
            LaneMessage::StepRefused { step, reason } => {
                self.lose(creditor, &format!("it refused step {step}: {reason}"));
            }
            _ => {
                self.rejected += 1;
                self.lose(creditor, "it answered what was not asked");
            }
        }
    }

    /// Ends the lane to a creditor, if there is one.
    pub fn close(&mut self, creditor: InstanceId) {
        if let Some(conn) = self.lanes.remove(&creditor).and_then(|lane| lane.conn) {
            self.calls.push(LaneCall::Close { conn });
        }
    }

    fn of(&self, conn: u64) -> Option<InstanceId> {
        self.lanes.iter().find(|(_, lane)| lane.conn == Some(conn)).map(|(creditor, _)| *creditor)
    }

    fn lose(&mut self, creditor: InstanceId, reason: &str) {
        if self.lanes.contains_key(&creditor) {
            self.close(creditor);
            self.lost.push((creditor, reason.to_string()));
        }
    }

    /// Gives lanes up that did not open in time; when to look again.
    pub fn poll(&mut self, now: Duration) -> Option<Duration> {
        let opening = |lane: &Lane| lane.state == LaneState::Opening;
        let late: Vec<_> =
            self.lanes.iter().filter(|(_, l)| opening(l) && l.opened + OPENING <= now).map(|(c, _)| *c).collect();
        late.into_iter().for_each(|creditor| self.lose(creditor, "its lane did not open in time"));
        self.lanes.values().filter(|lane| opening(lane)).map(|lane| lane.opened + OPENING).min()
    }

    /// Writes a block's values to a creditor. `bytes` is what a real block would
    /// have; they leave from `since` on.
    pub fn write(&mut self, since: Duration, creditor: InstanceId, block: BlockIndex, values: Vec<u64>, bytes: u64) {
        let Some(lane) = self.lanes.get_mut(&creditor).filter(|lane| lane.state == LaneState::Open) else { return };
        let Some(conn) = lane.conn else { return };
        self.calls.push(LaneCall::Send {
            conn,
            bytes,
            since: Some(since),
            message: LaneMessage::Write { block, values },
        });
    }

    /// How many more blocks may be asked of a creditor now.
    pub fn landing_slots(&self, creditor: InstanceId) -> usize {
        let lane = self.lanes.get(&creditor).filter(|lane| lane.state == LaneState::Open);
        lane.map_or(0, |lane| LANDING_SLOTS - lane.fetches.len())
    }

    /// Asks for a block. False: it cannot be asked for.
    pub fn fetch(&mut self, ticket: u64, creditor: InstanceId, loan: (LoanId, u32), block: BlockIndex) -> bool {
        if self.landing_slots(creditor) == 0 {
            return false;
        }
        let Some(lane) = self.lanes.get_mut(&creditor) else { return false };
        let Some(conn) = lane.conn else { return false };
        lane.fetches.push(ticket);
        let message = LaneMessage::Fetch { ticket, loan, block };
        self.calls.push(LaneCall::Send { conn, bytes: 64, since: None, message });
        true
    }

    /// Blocks that have come home since the last call; `None`: it will not come.
    pub fn take_landed(&mut self) -> Vec<(u64, Option<Vec<u64>>)> {
        std::mem::take(&mut self.landed)
    }

    /// Tells a creditor of a block that was written, with the next plan.
    pub fn place(&mut self, creditor: InstanceId, placed: Placed) {
        if let Some(lane) = self.lanes.get_mut(&creditor) {
            lane.placements.push(placed);
        }
    }

    /// Begins a step whose `parts` lie with creditors: by creditor, the batch
    /// item and what the creditor is told. Returns the step's number.
    pub fn begin_step(&mut self, parts: Vec<(InstanceId, usize, Entry)>) -> u64 {
        self.step += 1;
        let mut plans: BTreeMap<InstanceId, Vec<(usize, Entry)>> = BTreeMap::new();
        for (creditor, item, entry) in parts {
            match self.state(creditor) {
                LaneState::Open => plans.entry(creditor).or_default().push((item, entry)),
                _ => self.lost.push((creditor, "no lane is open".into())),
            }
        }
        for (creditor, lane) in &mut self.lanes {
            lane.items.clear();
            lane.awaiting = false;
            let entries = plans.remove(creditor).unwrap_or_default();
            if (lane.conn.is_none() && lane.state != LaneState::Open)
                || (entries.is_empty() && lane.placements.is_empty())
            {
                continue;
            }
            lane.awaiting = !entries.is_empty();
            let (items, entries): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
            lane.items = items;
            let plan = Plan { step: self.step, placements: std::mem::take(&mut lane.placements), entries };
            let queries = plan.rows() * self.query_bytes;
            let bytes = 64 + plan.placements.len() as u64 * 16 + plan.entries.len() as u64 * 64 + queries;
            let message = LaneMessage::Plan(plan);
            match lane.conn {
                Some(conn) => self.calls.push(LaneCall::Send { conn, bytes, since: None, message }),
                None => lane.held.push(message),
            }
        }
        self.step
    }

    /// The step's number.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Is an answer outstanding?
    pub fn awaits(&self) -> bool {
        self.lanes.values().any(|lane| lane.awaiting)
    }

    /// The wait is over: whoever has not answered is lost.
    pub fn deadline(&mut self) {
        let late: Vec<_> = self.lanes.iter().filter(|(_, lane)| lane.awaiting).map(|(c, _)| *c).collect();
        for creditor in late {
            if self.sabotage == Sabotage::LatePartial {
                self.lanes.values_mut().for_each(|lane| lane.awaiting = false);
                continue;
            }
            self.rejected += 1;
            self.lose(creditor, "it did not answer in time");
        }
    }

    /// The partials of the step's batch item.
    pub fn partials(&self, item: usize) -> impl Iterator<Item = &Partial> {
        self.lanes.values().filter_map(move |lane| {
            let at = lane.items.iter().position(|of| *of == item)?;
            lane.partials.get(at)
        })
    }

    /// Who was lost since the last call, and why.
    pub fn take_lost(&mut self) -> Vec<(InstanceId, String)> {
        std::mem::take(&mut self.lost)
    }

    /// What is to be done since the last call.
    pub fn take_calls(&mut self) -> Vec<LaneCall> {
        std::mem::take(&mut self.calls)
    }
}
