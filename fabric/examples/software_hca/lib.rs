//! A software HCA: a `libibverbs` whose devices exist in this process alone and
//! carry out reliable connections between its queue pairs, for tests on machines
//! without RDMA. Open it by path (`DISTKV_LIBIBVERBS`) in place of the real one.
//!
//! It is strict where real devices differ: a program that runs over it has not
//! relied on what only some of them do.
//!
//! - A slot of a send queue is free when a completion of it or of a later
//!   request has been *polled*; one of a receive queue when its own has (mlx5).
//! - Queues are exactly as deep as asked for. A full completion queue loses what
//!   comes and says `CQ_ERR`.
//! - Arming a completion queue tells of what comes afterwards, not of what is
//!   there.
//! - Destroying a queue pair takes its completions out of the queues unpolled, of
//!   receives too (mlx5).
//! - A peer that is not there is silence: the request fails when its retries are
//!   used up, in real time. A peer without a receive is waited for.
//! - Memory windows: a bind of a freed window, or of a freed region, ends the
//!   queue pair. A region with bound windows cannot be freed.
//! - Objects in use cannot be destroyed (`EBUSY`); destroying one waits until its
//!   events are acknowledged.
//!
//! Requests are carried out while they are posted, or with
//! `SOFTWARE_HCA_ASYNC=1` by a thread, one by one. Further variables, read when
//! the library is used first: `SOFTWARE_HCA_DEVICES` (2), `SOFTWARE_HCA_INLINE`
//! (220, bytes), `SOFTWARE_HCA_WINDOWS` (1; 0: no memory windows),
//! `SOFTWARE_HCA_KEEP_COMPLETIONS` (0; 1: completions outlive their queue pair,
//! as with rxe).
//!
//! What real devices do only when something breaks is done by the functions in
//! `knobs`.
//!
//! A panic in here ends the process with a message: no function of a C interface
//! unwinds.

mod completion;
mod device;
mod engine;
mod knobs;
mod mailbox;
mod memory;
mod queue_pair;
mod receive;
mod slab;
mod state;
mod text;
