//! What an instance's scheduler is told of the memory of others: how much they
//! have free, whether they need it themselves, and how much of its own it is to
//! keep for a prompt elsewhere.

use super::controller::Controller;
use super::message::Service;

/// Memory elsewhere, by the ledger, in rBlocks of the instance's shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slack {
    /// Free, and may be lent.
    pub free: usize,
    /// Of that, with members that have no prompt waiting.
    pub spare: usize,
    /// Lent at most.
    pub cap: usize,
    /// To be kept free here for a prompt elsewhere that is too long for its
    /// instance.
    pub hold: usize,
}

impl Controller {
    /// What others have of memory, and what of it is wanted.
    pub fn slack(&self) -> Slack {
        let Some(shape) = self.config.shape else { return Slack::default() };
        let mut slack = Slack::default();
        for row in self.creditors() {
            let free = row.lendable(&shape);
            slack.free += free as usize;
            slack.spare += if row.waiting == 0 { free as usize } else { 0 };
            slack.cap += match (row.service, row.shape == Some(shape)) {
                (Service::Draining, _) => 0,
                (Service::Serving, true) => row.lend_cap() as usize,
                (Service::Serving, false) => free as usize,
            };
        }
        // One prompt at a time, so that two do not each gather a half: of those
        // that want memory the one whose instance has the least name is first.
        let own = (self.local.wanted > 0).then_some((self.config.instance, 0));
        let others = self.creditors().filter(|row| row.wanted > 0).map(|row| (row.instance, row.wanted));
        if let Some((_, wanted)) = others.chain(own).min() {
            // All lend to it but itself, whose cap is taken to be like ours.
            let (mine, lent) = (u64::from(self.rmanager.lend_cap()), self.rmanager.lent());
            let share = (u64::from(wanted) * mine).div_ceil((slack.cap as u64).max(1));
            slack.hold = (share.min(mine) as usize).saturating_sub(lent as usize);
        }
        slack
    }
}
