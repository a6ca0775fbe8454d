//! The socket that gossip travels by: datagrams beside the control plane's tcp
//! port, at the same address.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use distkv_fabric::Waker;

/// Longest datagram taken in; what is longer is cut, and then its seal broken.
const LONGEST: usize = 2048;
/// Datagrams that may wait for the control loop; more are dropped, as a network
/// would.
const QUEUE: usize = 4096;
/// How often the receiving thread looks whether it is to end, should the word
/// of it be lost.
const LOOK: Duration = Duration::from_millis(500);

/// A datagram and where it came from.
pub(super) type Datagram = (SocketAddr, Vec<u8>);

/// The socket, and what arrived at it.
pub(super) struct Datagrams {
    socket: Arc<UdpSocket>,
    inbox: Receiver<Datagram>,
}

impl Datagrams {
    /// Receives at `socket` by a thread of its own, which wakes the control loop
    /// through `waker` and ends when `stop` is set.
    pub(super) fn start(
        socket: UdpSocket,
        waker: Waker,
        stop: Arc<AtomicBool>,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        socket.set_read_timeout(Some(LOOK))?;
        let socket = Arc::new(socket);
        let (sender, inbox) = sync_channel(QUEUE);
        let receiving = socket.clone();
        let thread = std::thread::Builder::new()
            .name("gossip".into())
            .spawn(move || receive(&receiving, &sender, &waker, &stop))?;
        Ok((Self { socket, inbox }, thread))
    }

    /// The next that arrived.
    pub(super) fn receive(&self) -> Option<Datagram> {
        self.inbox.try_recv().ok()
    }

    /// Sends one, or not: the network may lose it as well.
    pub(super) fn send(&self, to: SocketAddr, bytes: &[u8]) {
        if let Err(error) = self.socket.send_to(bytes, to) {
            tracing::debug!(%to, %error, "a datagram was not sent");
        }
    }
}

impl Drop for Datagrams {
    /// Nobody listens any more: wakes the receiving thread, which finds out.
    fn drop(&mut self) {
        if let Ok(own) = self.socket.local_addr() {
            self.send(own, &[]);
        }
    }
}

fn receive(socket: &UdpSocket, sender: &SyncSender<Datagram>, waker: &Waker, stop: &AtomicBool) {
    let mut buffer = [0; LONGEST];
    while !stop.load(Ordering::Acquire) {
        // An error here is a time-out, or an ICMP answer to something sent
        // before: in both cases there is just nothing to read.
        let Ok((bytes, from)) = socket.recv_from(&mut buffer) else { continue };
        match sender.try_send((from, buffer[..bytes].to_vec())) {
            Ok(()) => waker.wake(),
            Err(TrySendError::Full(_)) => {}
            Err(TrySendError::Disconnected(_)) => return,
        }
    }
}
