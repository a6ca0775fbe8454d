//! Which tokens are computed next, and where their KV goes: continuous
//! batching, chunked prefill mixed with decode, admission, borrowing and
//! preemption. Pure bookkeeping: no device, clock or thread.

pub mod batch;
pub mod scheduler;
pub mod sequence;
#[cfg(test)]
mod tests;
