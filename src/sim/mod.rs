//! The cluster under virtual time: the same controller, rManager, debts,
//! scheduler, prefix cache and rBlock table as in a node, joined by a network
//! that exists in memory, with faults, and with a toy attention by which every
//! token is checked.
//!
//! [`world`] runs it: one queue of events, one seed, so the same seed gives the
//! same log, byte for byte. [`instance`] is one simulated instance, with its
//! [`debtor`] and [`lender`] side of the data path; [`control`] is all it knows
//! of the controller's interface. [`network`] carries messages, [`fault`] breaks
//! things, [`workload`] brings requests, [`cost`] says how long things take,
//! [`toy`] what is computed, [`checker`] what must hold, [`report`] what was
//! seen. [`gossip`] runs membership and the ledger alone, at large sizes.

pub mod checker;
pub mod control;
pub mod cost;
pub mod debtor;
pub mod fault;
pub mod gossip;
pub mod instance;
pub mod lender;
mod moves;
pub mod network;
pub mod report;
pub mod toy;
pub mod workload;
pub mod world;

#[cfg(test)]
mod tests;
