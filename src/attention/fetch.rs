//! rBlocks that come home: the debtor asks for one, the creditor writes it into
//! a landing slot, the debtor takes it from there between two steps.

use std::time::Instant;

use super::debtor::{Debtor, LaneState};
use super::landing::LANDING_SLOTS;
use super::wire::{Fetch, LaneMessage};
use crate::kv::rblock::{BlockIndex, InstanceId, LoanId};

/// One landing slot of a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Slot {
    /// Nothing is under way to it.
    #[default]
    Free,
    /// Asked for, and when.
    Asked(u64, Instant),
    /// Its rBlock has come.
    Landed(u64),
}

/// What became of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// The rBlock is in a landing slot: [`Debtor::land`] it.
    Here(u64),
    /// It will not come.
    Refused(u64),
}

impl Debtor {
    /// How many more rBlocks may be asked of `creditor` now.
    pub fn landing_slots(&self, creditor: InstanceId) -> usize {
        let lane = self.lanes.get(&creditor).filter(|lane| lane.state == LaneState::Open);
        lane.map_or(0, |lane| lane.slots.iter().filter(|slot| **slot == Slot::Free).count())
    }

    /// Asks for an rBlock under a name of the caller's, to be heard of in
    /// [`take_landed`](Self::take_landed) unless the creditor is lost first.
    /// False: no slot is free.
    pub fn fetch(&mut self, ticket: u64, creditor: InstanceId, loan: LoanId, epoch: u32, block: BlockIndex) -> bool {
        let Some(lane) = self.lanes.get_mut(&creditor).filter(|lane| lane.state == LaneState::Open) else {
            return false;
        };
        let Some(slot) = lane.slots.iter().position(|slot| *slot == Slot::Free) else { return false };
        let mut bytes = Vec::new();
        LaneMessage::Fetch(Fetch { ticket, loan, epoch, block, slot: slot as u8 }).encode(&mut bytes);
        lane.slots[slot] = Slot::Asked(ticket, Instant::now());
        if let Err(error) = self.transports[lane.transport].0.send(lane.peer, &bytes) {
            self.lose(creditor, &error.to_string());
        }
        true
    }

    /// What has become of fetches since the last call. Slots stay taken until
    /// [`land`](Self::land).
    pub fn take_landed(&mut self) -> Vec<Landed> {
        std::mem::take(&mut self.landed)
    }

    /// Copies the rBlock that landed under `ticket` to the local block `to`, or
    /// lets it fall; its slot is free again. False where it is not there.
    pub fn land(&mut self, ticket: u64, to: Option<BlockIndex>) -> bool {
        let found = self.lanes.values_mut().find_map(|lane| {
            let slot = lane.slots.iter().position(|slot| *slot == Slot::Landed(ticket))?;
            Some((lane, slot))
        });
        let Some((lane, slot)) = found else { return false };
        lane.slots[slot] = Slot::Free;
        to.is_none_or(|block| lane.landing.copy_to(slot as u8, &self.pool, block).is_ok())
    }

    /// A creditor says that a landing slot is filled.
    pub(super) fn slot_filled(&mut self, creditor: InstanceId, slot: u8) {
        let Some(lane) = self.lanes.get_mut(&creditor) else { return };
        match (lane.slots.get(slot as usize), lane.landing.ticket(slot)) {
            (Some(Slot::Asked(ticket, _)), Ok(of)) if *ticket == of => {
                lane.slots[slot as usize] = Slot::Landed(of);
                self.landed.push(Landed::Here(of));
            }
            _ => {
                self.stats.reject();
                self.lose(creditor, "it sent an rBlock that was not asked for");
            }
        }
    }

    /// A creditor says that an rBlock will not come.
    pub(super) fn fetch_refused(&mut self, creditor: InstanceId, ticket: u64, reason: &str) {
        let Some(lane) = self.lanes.get_mut(&creditor) else { return };
        let asked = |slot: &&mut Slot| matches!(**slot, Slot::Asked(of, _) if of == ticket);
        match lane.slots.iter_mut().find(asked) {
            Some(slot) => {
                tracing::debug!(%creditor, reason, "an rBlock was not given back");
                *slot = Slot::Free;
                self.landed.push(Landed::Refused(ticket));
            }
            None => {
                self.stats.reject();
                self.lose(creditor, "it refused an rBlock that was not asked for");
            }
        }
    }

    /// Creditors that owe an rBlock for longer than they have to answer.
    pub(super) fn overdue_fetches(&self) -> Vec<InstanceId> {
        let late = |slot: &Slot| matches!(slot, Slot::Asked(_, since) if since.elapsed() > self.config.deadline);
        self.lanes.iter().filter(|(_, lane)| lane.slots.iter().any(late)).map(|(creditor, _)| *creditor).collect()
    }
}

/// A lane's slots, all free.
pub(super) fn slots() -> [Slot; LANDING_SLOTS] {
    [Slot::Free; LANDING_SLOTS]
}
