//! What is held where, and what should be elsewhere: the terms in which the
//! scheduler and the gManager's plan speak of a request's rBlocks.

use std::collections::BTreeMap;

use super::rblock::InstanceId;

/// One running request's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its name here.
    pub request: u64,
    /// Tokens whose KV exists.
    pub tokens: u32,
    /// Complete rBlocks here that could move: what frees memory.
    pub local: u32,
    /// rBlocks with creditors, by creditor; none is 0.
    pub remote: BTreeMap<InstanceId, u32>,
}

/// rBlocks of one request that should be elsewhere; `None` is with the instance
/// that runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errand {
    /// Whose.
    pub request: u64,
    /// How many.
    pub blocks: u32,
    /// Where they are.
    pub from: Option<InstanceId>,
    /// Where they should be.
    pub to: Option<InstanceId>,
}
