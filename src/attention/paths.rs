//! Which transport a lane takes to a creditor.
//!
//! The first that both have, until a lane that was opened over it has failed
//! before it was open: then the next, and so round to the one that has failed
//! least. What failed is forgotten after a while, so that a port that was mended
//! is used again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use distkv_fabric::Address;

use super::debtor::{Debtor, LaneState};
use crate::kv::rblock::InstanceId;

/// How long a failure counts.
const MEMORY: Duration = Duration::from_secs(60);

/// How often a transport has failed to open a lane, and when it last did.
struct Failure {
    count: u32,
    last: Instant,
}

/// What has failed. Transports go by their place in the debtor's order.
#[derive(Default)]
pub(super) struct Paths {
    failures: BTreeMap<(InstanceId, usize), Failure>,
}

impl Paths {
    fn count(&self, creditor: InstanceId, transport: usize, now: Instant) -> u32 {
        let failure = self.failures.get(&(creditor, transport));
        failure.filter(|failure| now.duration_since(failure.last) < MEMORY).map_or(0, |failure| failure.count)
    }

    /// The transport to take, of those called `names`, and the creditor's address
    /// for it; none where they have none in common.
    pub fn choose<'a>(
        &self,
        creditor: InstanceId,
        names: impl Iterator<Item = &'static str>,
        addresses: &'a [Address],
        now: Instant,
    ) -> Option<(usize, &'a Address)> {
        common(names, addresses).min_by_key(|(transport, _)| self.count(creditor, *transport, now))
    }

    /// Is there one that has not failed?
    pub fn has_another(
        &self,
        creditor: InstanceId,
        names: impl Iterator<Item = &'static str>,
        addresses: &[Address],
        now: Instant,
    ) -> bool {
        common(names, addresses).any(|(transport, _)| self.count(creditor, transport, now) == 0)
    }

    /// A lane over `transport` could not be opened. True for the first time since
    /// the last was forgotten.
    pub fn failed(&mut self, creditor: InstanceId, transport: usize, now: Instant) -> bool {
        self.failures.retain(|_, failure| now.duration_since(failure.last) < MEMORY);
        let failure = self.failures.entry((creditor, transport)).or_insert(Failure { count: 0, last: now });
        failure.count += 1;
        failure.last = now;
        failure.count == 1
    }
}

/// The transports that both sides have, in the debtor's order.
fn common(names: impl Iterator<Item = &'static str>, addresses: &[Address]) -> impl Iterator<Item = (usize, &Address)> {
    names.enumerate().filter_map(|(transport, name)| {
        let fits = |address: &&Address| address.0.split_once("://").is_some_and(|(scheme, _)| scheme == name);
        Some((transport, addresses.iter().find(fits)?))
    })
}

impl Debtor {
    /// Starts to open a lane to a creditor reached at one of `addresses`; does
    /// nothing where one is open or opening. `same_host` says that its clock is
    /// ours.
    pub fn open(&mut self, creditor: InstanceId, addresses: &[Address], same_host: bool) {
        match self.state(creditor) {
            LaneState::Open | LaneState::Opening => return,
            LaneState::Lost(_) => self.close(creditor),
            LaneState::Absent => {}
        }
        loop {
            let names = self.transports.iter().map(|(transport, _)| transport.name());
            let Some((index, address)) = self.paths.choose(creditor, names, addresses, Instant::now()) else {
                return self.lost.push((creditor, "opening a lane: no transport in common".into()));
            };
            match self.connect(index, address, addresses, same_host) {
                Ok(lane) => {
                    self.lanes.insert(creditor, lane);
                    return;
                }
                Err(error) if self.may_try_another(creditor, index, addresses, &error.to_string()) => {}
                Err(error) => return self.lost.push((creditor, format!("opening a lane: {error}"))),
            }
        }
    }

    /// A lane over a transport could not be opened: is there another in common
    /// that has not failed?
    fn may_try_another(&mut self, creditor: InstanceId, index: usize, addresses: &[Address], reason: &str) -> bool {
        let (now, name) = (Instant::now(), self.transports[index].0.name());
        let first = self.paths.failed(creditor, index, now);
        let names = self.transports.iter().map(|(transport, _)| transport.name());
        let another = self.paths.has_another(creditor, names, addresses, now);
        if first && another {
            tracing::warn!(%creditor, reason, "no lane opens over {name}; trying the next transport in common");
        }
        another
    }

    /// A lane's transport has failed. One that was not open yet is tried over the
    /// next transport.
    pub(super) fn fail(&mut self, creditor: InstanceId, reason: &str) {
        if let Some(lane) = self.lanes.get_mut(&creditor).filter(|lane| lane.state == LaneState::Opening) {
            let (index, same_host, addresses) = (lane.transport, lane.same_host, std::mem::take(&mut lane.addresses));
            if self.may_try_another(creditor, index, &addresses, reason) {
                self.close(creditor);
                return self.open(creditor, &addresses, same_host);
            }
        }
        self.lose(creditor, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_failed_comes_after_those_that_did_not_until_it_is_forgotten() {
        let names = || ["shm", "verbs", "tcp"].into_iter();
        let addresses = ["tcp://a:1", "verbs://a:2"].map(|a| Address(a.into()));
        let (one, other) = (InstanceId(1), InstanceId(2));
        let mut paths = Paths::default();
        let start = Instant::now();
        let taken =
            |paths: &Paths, creditor, now| paths.choose(creditor, names(), &addresses, now).map(|found| found.0);
        assert_eq!(taken(&paths, one, start), Some(1), "verbs is preferred");
        assert!(paths.failed(one, 1, start));
        assert_eq!(taken(&paths, one, start), Some(2));
        assert_eq!(taken(&paths, other, start), Some(1), "another creditor's is not touched");
        assert!(paths.has_another(one, names(), &addresses, start));
        assert!(paths.failed(one, 2, start));
        assert!(!paths.has_another(one, names(), &addresses, start));
        assert_eq!(taken(&paths, one, start), Some(1), "both failed once");
        assert!(!paths.failed(one, 1, start), "said once");
        assert_eq!(taken(&paths, one, start), Some(2));
        assert_eq!(taken(&paths, one, start + MEMORY), Some(1), "forgotten");
        assert!(paths.failed(one, 1, start + MEMORY), "and said again");
        assert_eq!(paths.choose(one, ["shm"].into_iter(), &addresses, start), None);
    }
}
