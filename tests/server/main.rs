//! The HTTP server over real sockets, with a toy model and a scripted engine.

mod chat;
mod completions;
mod errors;
mod http;
mod life;
mod python;
mod toy;
