//! A connection to whoever runs a request: the order goes out, frames come in.
//!
//! One connection a request: when the client goes it is closed, which is how the
//! other side hears of it, and when that side dies the system closes it.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::seal::{Answer, Keys};
use super::wire::{MAX_FRAME, Order, Said};
use crate::engine::Rejected;

/// Where a node takes orders over HTTP.
pub const PATH: &str = "/peer/requests";
/// Whoever runs a request says something at least this often.
pub const BEAT: Duration = Duration::from_millis(250);
/// Whoever was silent for this long is taken for dead.
pub const SILENCE: Duration = Duration::from_millis(1500);
/// Longest head of an HTTP answer, bytes.
const MAX_HEAD: usize = 8 << 10;
/// Slowest link on which a long order need not be taken for a dead node.
const BYTES_A_SECOND: f64 = 4e6;

/// Why a request does not run any more, or never did, where it was placed.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Loss {
    /// It was not taken: by the engine, with its word for it.
    Rejected(Rejected),
    /// It was not taken: no connection, or an HTTP error.
    Unreachable(String),
    /// The connection ended.
    Closed(String),
    /// Nothing was heard for [`SILENCE`].
    Silent,
    /// Gossip says that the instance is gone.
    Down,
    /// It said what none of its kind says.
    Garbage(&'static str),
    /// It is about to leave.
    Leaving,
    /// It could not go on.
    Failed(String),
}

impl Loss {
    /// For figures.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Rejected(_) => "rejected",
            Self::Unreachable(_) => "unreachable",
            Self::Closed(_) => "closed",
            Self::Silent => "silent",
            Self::Down => "down",
            Self::Garbage(_) => "garbage",
            Self::Leaving => "leaving",
            Self::Failed(_) => "failed",
        }
    }
}

/// See the module's page.
pub(super) struct Connection {
    socket: TcpStream,
    answer: Answer,
    /// Bytes of which no frame was made yet.
    arrived: Vec<u8>,
    heard: Instant,
}

impl Connection {
    /// Sends an order; returns once the request is in the other engine's queue.
    pub(super) async fn open(address: &str, order: &Order, keys: &Keys) -> Result<Self, Loss> {
        let sealed = keys.seal_order(order);
        let patience = SILENCE + Duration::from_secs_f64(sealed.len() as f64 / BYTES_A_SECOND);
        let asked = async {
            let unreachable = |error: std::io::Error| Loss::Unreachable(error.to_string());
            let mut socket = TcpStream::connect(address).await.map_err(unreachable)?;
            socket.set_nodelay(true).map_err(unreachable)?;
            // Of HTTP's versions the one whose answers have no frames of their
            // own: ours know where they end, and a cut shows.
            let head = format!(
                "POST {PATH} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n\
                 Content-Length: {}\r\n\r\n",
                sealed.len()
            );
            socket.write_all(head.as_bytes()).await.map_err(unreachable)?;
            socket.write_all(&sealed).await.map_err(unreachable)?;
            let arrived = Self::read_head(&mut socket).await?;
            let mut connection = Self { socket, answer: keys.answer(&order.id), arrived, heard: Instant::now() };
            match connection.next().await? {
                Said::Taken => Ok(connection),
                Said::Refused(rejected) => Err(Loss::Rejected(rejected)),
                _ => Err(Loss::Garbage("neither taken nor refused")),
            }
        };
        timeout(patience, asked).await.unwrap_or(Err(Loss::Silent))
    }

    /// Reads the head of an answer that must be a good one; the bytes after it.
    async fn read_head(socket: &mut TcpStream) -> Result<Vec<u8>, Loss> {
        let mut bytes = Vec::with_capacity(1024);
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if bytes.len() > MAX_HEAD {
                return Err(Loss::Unreachable("what answers there speaks no HTTP".into()));
            }
            read(socket, &mut bytes).await?;
        };
        let body = bytes.split_off(end);
        let line = String::from_utf8_lossy(&bytes);
        let line = line.lines().next().unwrap_or_default();
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("HTTP/1.0" | "HTTP/1.1"), Some("200")) => Ok(body),
            _ => Err(Loss::Unreachable(format!("it answered {line:?}"))),
        }
    }

    /// What is said next. May be dropped while it waits, and called again.
    pub(super) async fn next(&mut self) -> Result<Said, Loss> {
        loop {
            if let Some(said) = self.answer.hear(&mut self.arrived).map_err(Loss::Garbage)? {
                self.heard = Instant::now();
                return Ok(said);
            }
            read(&mut self.socket, &mut self.arrived).await?;
        }
    }

    /// Nothing was heard for so long that nobody lives there.
    pub(super) fn is_silent(&self) -> bool {
        self.heard.elapsed() > SILENCE
    }
}

/// Appends what arrives next, some of it at least.
async fn read(socket: &mut TcpStream, into: &mut Vec<u8>) -> Result<(), Loss> {
    // A frame's length is checked as soon as it is there, so this bounds what a
    // peer can make us hold.
    into.reserve((16 << 10).min(MAX_FRAME));
    match socket.read_buf(into).await {
        Ok(0) => Err(Loss::Closed("the connection ended".into())),
        Ok(_) => Ok(()),
        Err(error) => Err(Loss::Closed(error.to_string())),
    }
}
