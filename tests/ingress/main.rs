//! Requests that run on another node than the one that took them in, and go on
//! when that node is lost: against peers that follow a script, and with real
//! processes that are killed, stopped and drained.

mod cluster;
mod deaths;
mod losses;
mod peers;
mod placing;
mod scripted;
