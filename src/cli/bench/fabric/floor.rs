//! The floor beside tcp, the least that a socket can do: `send` and spinning
//! `recv` of as many bytes, nothing else, with as much patience.

use std::io::{ErrorKind, Read, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags};

use super::patience::Patience;
use super::{Lap, slots};

/// A socket of one side.
pub(super) struct Floor {
    stream: TcpStream,
    /// As much memory as the transport's slots: the cache helps both alike.
    source: Vec<u8>,
    target: Vec<u8>,
}

impl Floor {
    /// Where the other side is to connect, who is told the port by `tell`.
    pub fn open(tell: impl FnOnce(u16) -> Result<()>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        tell(listener.local_addr()?.port())?;
        Self::new(listener.accept()?.0)
    }

    /// The other side's.
    pub fn connect(port: u16) -> Result<Self> {
        Self::new(TcpStream::connect((Ipv4Addr::LOCALHOST, port))?)
    }

    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, source: Vec::new(), target: Vec::new() })
    }

    fn make_room(&mut self, size: usize) {
        for memory in [&mut self.source, &mut self.target] {
            memory.resize(memory.len().max(size * slots(size)), 1);
        }
    }

    /// Round trips, the first of which waits for the order to arrive and is not
    /// counted.
    pub fn ping(&mut self, size: usize, rounds: u32, into: &mut Histogram<u64>) -> Result<()> {
        self.make_room(size);
        let mut lap = Lap::new();
        for i in 0..=rounds {
            let at = i as usize % slots(size) * size;
            self.send(at, size)?;
            lap.note(into);
            self.receive(at, size)?;
            if i == 0 {
                lap = Lap::new();
            } else {
                lap.end();
            }
        }
        lap.note(into);
        Ok(())
    }

    /// The other side of [`ping`](Self::ping).
    pub fn pong(&mut self, size: usize, rounds: u32) -> Result<()> {
        self.make_room(size);
        for i in 0..=rounds {
            let at = i as usize % slots(size) * size;
            self.receive(at, size)?;
            self.send(at, size)?;
        }
        Ok(())
    }

    fn send(&mut self, at: usize, size: usize) -> Result<()> {
        let mut bytes = &self.source[at..at + size];
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn receive(&mut self, at: usize, size: usize) -> Result<()> {
        let mut patience = Patience::new();
        let mut bytes = &mut self.target[at..at + size];
        while !bytes.is_empty() {
            match self.stream.read(bytes) {
                Ok(0) => bail!("the other side is gone"),
                Ok(got) => bytes = &mut bytes[got..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let stream = &self.stream;
                    patience.after_poll(|nap| {
                        let limit = rustix::event::Timespec::try_from(nap)?;
                        rustix::event::poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&limit))?;
                        Ok(())
                    })?;
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}
