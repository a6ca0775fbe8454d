//! The control plane, sans-IO: membership, the ledger, lending and borrowing.
//! No socket, clock, thread or unseeded chance is in here, so the same code
//! runs in a node and, thousands of seeds a night, in a simulator.
//!
//! [`controller`] joins the rest: [`swim`] (who is there), [`gossip`] and
//! [`ledger`] (what is known of all instances, a [`row`] each), [`rmanager`]
//! (what this instance lends), [`debts`] (what it borrows), [`message`] (what is
//! said), [`seal`] (who is heard), [`plan`] and [`perf`] (what should move, and
//! what that is judged by), [`placement`] (where a request runs), [`view`] (what
//! people see), [`slack`] (what the scheduler is told of the others).

mod borrowing;
mod codec;
mod config;
pub mod controller;
pub mod debts;
mod event;
pub mod gossip;
pub mod ledger;
mod links;
pub mod message;
pub mod perf;
pub mod placement;
pub mod plan;
mod planning;
pub mod rmanager;
pub mod row;
pub mod seal;
pub mod slack;
pub mod swim;
pub mod view;
mod wire;

#[cfg(test)]
mod tests;
