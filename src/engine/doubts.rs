//! Creditors whose lane failed a moment ago. The control plane may still hear of
//! such a one, and it has much to lend, having just been paid back: it must not
//! be asked first while others could lend, and must not be ruled out where it is
//! the only one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::kv::rblock::InstanceId;
use crate::schedule::sequence::SeqId;

/// How long a failed lane speaks against its creditor.
const DOUBT: Duration = Duration::from_secs(10);

/// The doubtful, and the borrowings that are first tried without them.
#[derive(Default)]
pub(super) struct Doubts {
    failed: BTreeMap<InstanceId, Instant>,
    /// Blocks and creditors to avoid in any case, to ask again if refused.
    without: BTreeMap<SeqId, (usize, Vec<InstanceId>)>,
}

impl Doubts {
    /// The lane to `creditor` failed.
    pub(super) fn lane_failed(&mut self, now: Instant, creditor: InstanceId) {
        self.failed.insert(creditor, now);
    }

    /// Whom to avoid in a borrowing that is to avoid `avoid` in any case.
    pub(super) fn ask(&mut self, now: Instant, seq: SeqId, blocks: usize, avoid: Vec<InstanceId>) -> Vec<InstanceId> {
        self.failed.retain(|_, since| now.duration_since(*since) < DOUBT);
        self.without.remove(&seq);
        if self.failed.is_empty() {
            return avoid;
        }
        let all = avoid.iter().chain(self.failed.keys()).copied().collect();
        self.without.insert(seq, (blocks, avoid));
        all
    }

    /// A borrowing was granted.
    pub(super) fn granted(&mut self, seq: SeqId) {
        self.without.remove(&seq);
    }

    /// A borrowing was refused: what to ask for now, of the doubtful too.
    pub(super) fn refused(&mut self, seq: SeqId) -> Option<(usize, Vec<InstanceId>)> {
        self.without.remove(&seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_failed_is_asked_last_for_a_while() {
        let (now, [a, b]) = (Instant::now(), [1, 2].map(InstanceId));
        let mut doubts = Doubts::default();
        assert_eq!(doubts.ask(now, 7, 5, vec![b]), [b]);
        assert_eq!(doubts.refused(7), None);
        doubts.lane_failed(now, a);
        assert_eq!(doubts.ask(now, 7, 5, vec![b]), [b, a]);
        assert_eq!(doubts.refused(7), Some((5, vec![b])));
        assert_eq!(doubts.refused(7), None);
        assert_eq!(doubts.ask(now, 8, 5, vec![]), [a]);
        doubts.granted(8);
        assert_eq!(doubts.refused(8), None);
        assert!(doubts.ask(now + DOUBT, 9, 5, vec![]).is_empty());
    }
}
