//! The global debt ledger: the newest row of every instance, as this node has
//! heard of them. There is no master copy; rows travel by gossip and the
//! newest wins (paper, section "gManager"; made decentral here).

use std::collections::BTreeMap;
use std::ops::Bound;

use super::row::Row;
use crate::kv::rblock::InstanceId;

/// The newest row known of every instance.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    rows: BTreeMap<InstanceId, Row>,
}

impl Ledger {
    /// Takes a row in. False: one as new was known already, nothing changed.
    pub fn merge(&mut self, row: Row) -> bool {
        match self.rows.get_mut(&row.instance) {
            Some(known) if known.stamp >= row.stamp => false,
            Some(known) => {
                *known = row;
                true
            }
            None => {
                self.rows.insert(row.instance, row);
                true
            }
        }
    }

    /// Forgets an instance that is gone.
    pub fn remove(&mut self, instance: InstanceId) -> Option<Row> {
        self.rows.remove(&instance)
    }

    /// An instance's row.
    pub fn get(&self, instance: InstanceId) -> Option<&Row> {
        self.rows.get(&instance)
    }

    /// As [`get`](Self::get), to correct what was learned since the row was
    /// written (a grant, a refusal). The stamp stays, so the next row of the
    /// instance itself replaces the correction.
    pub fn get_mut(&mut self, instance: InstanceId) -> Option<&mut Row> {
        self.rows.get_mut(&instance)
    }

    /// All rows, by instance.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }

    /// The rows of the instances from `from` on and before `until`, where
    /// given, by instance.
    pub fn range(&self, from: InstanceId, until: Option<InstanceId>) -> impl Iterator<Item = &Row> {
        let end = until.map_or(Bound::Unbounded, Bound::Excluded);
        // An empty range where the bounds cross: they may come from a peer.
        let start = until.map_or(from, |until| from.min(until));
        self.rows.range((Bound::Included(start), end)).map(|(_, row)| row)
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// No row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}
