//! Where a request runs: a pure function of the ledger and of this instance's
//! own figures.
//!
//! *Here*, as long as it neither has to wait nor to borrow here: nothing is
//! gained by a way over the network, and the prefix cache here may know the
//! prompt's beginning. Otherwise where there is room for it; of instances that
//! are about as busy the one to which its beginning belongs, so that a
//! conversation, or a prompt that many share, finds its cache again. Queues are
//! left only for much shorter ones, and an instance at work only for one that is
//! almost idle, so that requests do not chase figures that are a moment old.

use super::message::{Role, Service};
use super::view::{LedgerView, instance};
use crate::kv::rblock::InstanceId;

/// How many times as busy one instance must be as another before a request goes
/// there for that reason alone, and how many requests more: fewer cost a step
/// less than computing a known beginning anew would.
const BUSIER: (u32, u32) = (2, 8);
/// Instances whose requests differ by no more are about as busy.
const ABOUT: u32 = 2;
/// The same as [`BUSIER`] of queues, where nobody has room.
const LONGER: (u32, u32) = (2, 1);

/// What of a request decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Tokens for which it should find room.
    pub tokens: usize,
    /// Names its beginning: equal for prompts that begin alike.
    pub beginning: u64,
}

/// What of an instance decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Tokens an rBlock of its.
    pub block_tokens: u32,
    /// Its rBlocks.
    pub total: u32,
    /// Of these nobody's, or kept only for prefix reuse.
    pub free: u32,
    /// Requests in its batch.
    pub running: u32,
    /// Requests that found no room yet.
    pub waiting: u32,
    /// Requests on their way to it, which its figures do not show.
    pub queued: u32,
}

impl Load {
    /// Its own memory holds `tokens`, once it is free.
    fn holds(&self, tokens: usize) -> bool {
        self.blocks(tokens) <= u64::from(self.total)
    }

    /// A request of `tokens` begins at once, in its own memory. Those on their
    /// way are taken to be as large.
    fn has_room(&self, tokens: usize) -> bool {
        let wanted = self.blocks(tokens).saturating_mul(u64::from(self.queued) + 1);
        self.waiting == 0 && wanted <= u64::from(self.free)
    }

    /// Requests it is at, or will be.
    fn requests(&self) -> u32 {
        self.running.saturating_add(self.line())
    }

    /// Requests before one that comes now.
    fn line(&self) -> u32 {
        self.waiting.saturating_add(self.queued)
    }

    fn blocks(&self, tokens: usize) -> u64 {
        (tokens as u64).div_ceil(u64::from(self.block_tokens.max(1)))
    }
}

/// An instance that runs the same model and takes requests in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub instance: InstanceId,
    /// Where it takes them, `ip:port`.
    pub address: String,
    /// Its figures.
    pub load: Load,
}

/// The instances to which the one whose ledger this is can hand its requests:
/// up, serving, of the same model, within reach.
pub fn candidates(view: &LedgerView) -> Vec<Candidate> {
    let own = view.instances.iter().find(|i| i.me).and_then(|i| i.row.as_ref());
    let Some(model) = own.and_then(|row| row.model.as_ref()) else { return Vec::new() };
    let candidate = |entry: &super::view::InstanceEntry| {
        let row = entry.row.as_ref().filter(|_| !entry.me)?;
        let fits = row.role == Role::Engine && row.service == Service::Serving && row.model.as_ref() == Some(model);
        let load = Load {
            block_tokens: row.shape.filter(|_| fits)?.block_tokens,
            total: row.total,
            free: row.free,
            running: row.running,
            waiting: row.waiting,
            queued: 0,
        };
        Some(Candidate { instance: instance(&entry.id)?, address: row.peers.clone()?, load })
    };
    view.instances.iter().filter_map(candidate).collect()
}

/// Which of `others` a request goes to; `None`: it runs here.
pub fn place<'a>(demand: Demand, here: &Load, others: &'a [Candidate]) -> Option<&'a Candidate> {
    let tokens = demand.tokens;
    let much_less = |a: u32, b: u32, (times, more): (u32, u32)| a.saturating_mul(times).saturating_add(more) < b;
    let roomy = with_room(demand, others);
    if here.has_room(tokens) {
        return roomy.filter(|other| much_less(other.load.requests(), here.requests(), BUSIER));
    }
    let shorter = || {
        let holding = others.iter().filter(|other| other.load.holds(tokens));
        let shortest = holding.min_by_key(|other| (other.load.line(), other.load.running, other.instance))?;
        // What only borrowing makes room for here need not wait there.
        let line = if here.holds(tokens) { here.line() } else { here.line().saturating_add(1) };
        much_less(shortest.load.line(), line, LONGER).then_some(shortest)
    };
    roomy.or_else(shorter)
}

/// Of `others` one of the least busy at which a request begins at once.
pub fn with_room(demand: Demand, others: &[Candidate]) -> Option<&Candidate> {
    let roomy = || others.iter().filter(|other| other.load.has_room(demand.tokens));
    let least = roomy().map(|other| other.load.requests()).min()?;
    let about = roomy().filter(|other| other.load.requests() <= least.saturating_add(ABOUT));
    // The greatest of random figures that are the same wherever they are drawn:
    // when an instance goes or comes, only its own beginnings move.
    about.max_by_key(|other| (mix(demand.beginning ^ mix(other.instance.0)), other.instance))
}

/// SplitMix64's finaliser.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn load(free: u32, running: u32, waiting: u32) -> Load {
        Load { block_tokens: 16, total: 100, free, running, waiting, queued: 0 }
    }

    fn others(loads: &[Load]) -> Vec<Candidate> {
        let candidate = |(&load, i)| Candidate { instance: InstanceId(i), address: format!("10.0.0.{i}:80"), load };
        loads.iter().zip(1..).map(candidate).collect()
    }

    fn placed(tokens: usize, here: Load, loads: &[Load]) -> Option<u64> {
        place(Demand { tokens, beginning: 0 }, &here, &others(loads)).map(|c| c.instance.0)
    }

    #[test]
    fn what_fits_here_stays_here() {
        assert_eq!(placed(160, load(10, 3, 0), &[load(100, 0, 0)]), None);
        assert_eq!(placed(160, load(10, 3, 0), &[]), None);
    }

    #[test]
    fn who_would_have_to_wait_or_borrow_goes_where_there_is_room() {
        assert_eq!(placed(161, load(10, 0, 0), &[load(10, 0, 0), load(11, 5, 0), load(50, 10, 0)]), Some(2));
        assert_eq!(placed(16, load(50, 9, 1), &[load(50, 9, 1), load(1, 9, 0)]), Some(2));
        // Those that are on their way take room too.
        let burst = Load { queued: 4, ..load(10, 0, 0) };
        assert_eq!(placed(40, burst, &[load(10, 0, 0)]), Some(1));
    }

    #[test]
    fn where_nobody_has_room_a_queue_is_left_for_a_much_shorter_one_only() {
        assert_eq!(placed(160, load(0, 5, 3), &[load(0, 5, 2), load(0, 5, 1)]), None);
        assert_eq!(placed(160, load(0, 5, 4), &[load(0, 5, 2), load(0, 5, 1)]), Some(2));
        // To where it can never run by itself it does not go: here it may borrow.
        assert_eq!(placed(1601, load(0, 5, 40), &[load(0, 5, 0)]), None);
    }

    #[test]
    fn a_crowd_goes_to_who_is_almost_idle() {
        assert_eq!(placed(160, load(90, 8, 0), &[load(90, 0, 0)]), None);
        assert_eq!(placed(160, load(90, 9, 0), &[load(90, 0, 0)]), Some(1));
        assert_eq!(placed(160, load(90, 20, 0), &[load(90, 7, 0)]), None);
    }

    #[test]
    fn what_begins_alike_meets_again_and_the_rest_spreads() {
        let full = load(0, 0, 1);
        let count = |loads: &[Load]| {
            let mut counts = vec![0; loads.len()];
            let others = others(loads);
            for beginning in (0..4000).map(mix) {
                let at = place(Demand { tokens: 160, beginning }, &full, &others).unwrap();
                counts[at.instance.0 as usize - 1] += 1;
            }
            counts
        };
        let counts = count(&[load(90, 2, 0), load(90, 0, 0), load(90, 1, 0), load(90, 3, 0)]);
        assert!(counts[..3].iter().all(|n| (1200..1470).contains(n)) && counts[3] == 0, "{counts:?}");
        // One that goes takes along only what belonged to it.
        let all = others(&[load(90, 0, 0); 5]);
        for beginning in (0..200).map(mix) {
            let demand = Demand { tokens: 160, beginning };
            let at = place(demand, &full, &all).unwrap();
            assert_eq!(Some(at), place(demand, &full, &all));
            if at.instance != all[4].instance {
                assert_eq!(Some(at), place(demand, &full, &all[..4]));
            }
        }
    }

    fn any_load() -> impl Strategy<Value = Load> {
        (1u32..64, 0u32..200, 0u32..200, 0u32..40, 0u32..10, 0u32..10).prop_map(
            |(block_tokens, total, free, running, waiting, queued)| Load {
                block_tokens,
                total,
                free: free.min(total),
                running,
                waiting,
                queued,
            },
        )
    }

    proptest! {
        /// Nobody is sent where it is no better, nor back from there.
        #[test]
        fn a_move_is_a_gain_and_is_not_taken_back(
            tokens in 1usize..4000, beginning in any::<u64>(), here in any_load(), loads in vec(any_load(), 0..6)
        ) {
            let others = others(&loads);
            let demand = Demand { tokens, beginning };
            let Some(other) = place(demand, &here, &others) else { return Ok(()) };
            let gains = other.load.has_room(tokens) && !here.has_room(tokens)
                || other.load.requests() < here.requests()
                || other.load.line() < here.line()
                || other.load.holds(tokens) && !here.holds(tokens);
            prop_assert!(gains, "{here:?} -> {other:?}");
            let back = Candidate { instance: InstanceId(0), address: String::new(), load: here };
            let there = Load { queued: other.load.queued + 1, ..other.load };
            if other.load.has_room(tokens) && there.has_room(tokens) {
                prop_assert!(place(demand, &there, &[back]).is_none());
            }
        }
    }
}
