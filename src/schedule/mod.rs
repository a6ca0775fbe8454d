//! Which tokens are computed next, and where their KV goes: continuous
//! batching, chunked prefill mixed with decode, admission, borrowing and
//! preemption, recovery of lost KV. Pure bookkeeping: no device, clock or
//! thread.

pub mod batch;
mod borrowing;
pub mod errands;
pub mod gaps;
mod memory;
pub mod pace;
mod recovery;
#[cfg(test)]
mod recovery_tests;
pub mod scheduler;
pub mod sequence;
#[cfg(test)]
mod tests;
