//! The engine: the handle through which requests reach it, and the step loop
//! that owns the device and the batch.

mod doubts;
pub mod handle;
mod lost;
mod remote;
mod requests;
mod step_loop;

pub use handle::{EngineHandle, EngineStats, FinishReason, Output, Rejected, Request, Stream, Submit};
pub use lost::Lost;
pub use requests::LogitTap;
pub use step_loop::{Command, Engine, EngineConfig, GrantedLoan, Parts, Running, Treasury};
