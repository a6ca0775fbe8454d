//! The door of a transport over sockets: its listener, how many strangers may
//! stand in it, what tells of sockets that are ready, and the waker.

use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::{Address, Error, PeerId, Result, Waker};

/// Tokens of the readiness source that its users do not have.
const WAKER: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

/// Strangers taken in at one look: whoever plays a recorded handshake again
/// costs 0.1 ms, and shall not have all of the owner's time.
pub(crate) const ADMITTED: usize = 4;

/// The part of a handshake's time that is sure even when others wait.
pub(crate) const GRACE: f64 = 0.02;

/// How often a spinning owner looks at the clock, in polls, and at the door and
/// at deadlines once this time has passed.
pub(crate) const CLOCK: u32 = 16;
pub(crate) const LOOK: Duration = Duration::from_millis(1);

/// A listener and what goes with it.
pub(crate) struct Door {
    listener: TcpListener,
    /// Where others reach it.
    pub address: Address,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    /// What [`see_ready`](Self::see_ready) has found.
    pub ready: Vec<(u64, epoll::EventFlags)>,
    /// Somebody may be at the door.
    pub look: bool,
    /// Accepted connections in their handshake, oldest first.
    half_open: Vec<PeerId>,
    /// As many are in their handshake as may be: the listener is not watched.
    full: bool,
}

/// Who is at the door.
pub(crate) enum Visit {
    /// A new connection, not blocking.
    Stranger(OwnedFd),
    /// Somebody waits for the place of this one, which has had its time.
    Oldest(PeerId),
    /// Nobody who may come in now.
    Nobody,
}

impl Door {
    /// Listens at `address`; port 0 takes any free one. `advertise` is told to
    /// others, behind the scheme, where the bound address is not how they reach
    /// it.
    pub fn open(scheme: &str, address: SocketAddr, advertise: Option<&str>) -> Result<Self> {
        let os = |e| Error::os("listening for fabric peers", e);
        let listener = TcpListener::bind(address).map_err(os)?;
        listener.set_nonblocking(true).map_err(os)?;
        let told = match advertise {
            Some(name) => name.to_owned(),
            None => listener.local_addr().map_err(os)?.to_string(),
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::os("making an epoll", e))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|e| Error::os("making an eventfd", e))?);
        let (address, ready, half_open) = (Address(format!("{scheme}{told}")), Vec::new(), Vec::new());
        let door = Self { listener, address, epoll, wake, ready, look: true, half_open, full: false };
        door.watch(&door.wake, WAKER, epoll::EventFlags::IN)?;
        door.watch(&door.listener, LISTENER, epoll::EventFlags::IN)?;
        Ok(door)
    }

    /// Has a file told of by `token`.
    pub fn watch(&self, file: impl AsFd, token: u64, flags: epoll::EventFlags) -> Result<()> {
        epoll::add(&self.epoll, file, epoll::EventData::new_u64(token), flags)
            .map_err(|e| Error::os("watching a file", e))
    }

    /// Changes what a file is told of for.
    pub fn watch_for(&self, file: impl AsFd, token: u64, flags: epoll::EventFlags) -> Result<()> {
        epoll::modify(&self.epoll, file, epoll::EventData::new_u64(token), flags)
            .map_err(|e| Error::os("watching a file", e))
    }

    /// Finds which files are [`ready`](Self::ready); sleeps for at most `timeout`.
    pub fn see_ready(&mut self, timeout: Duration) -> Result<()> {
        self.ready.clear();
        let timeout = Timespec::try_from(timeout).map_err(|e| Error::os("waiting", e))?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 128];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(e) => return Err(Error::os("waiting for sockets", e)),
        };
        for event in &*events {
            match event.data.u64() {
                LISTENER => self.look = true,
                WAKER => {
                    let mut count = [0; 8];
                    let _ = rustix::io::read(&*self.wake, &mut count);
                }
                // A copy: the event is packed.
                token => self.ready.push((token, { event.flags })),
            }
        }
        Ok(())
    }

    /// Takes somebody in, if fewer than `limit` are in their handshake. Others
    /// wait in the kernel, but not for long: the slow must not keep them out.
    /// `until` says when the handshake of the oldest ends, of `time` in all.
    pub fn next(
        &mut self,
        limit: usize,
        time: Duration,
        until: impl FnOnce(PeerId) -> Option<Instant>,
    ) -> Result<Visit> {
        if self.half_open.len() >= limit.max(1) {
            if !self.somebody_waits()? {
                self.set_full(false)?;
                return Ok(Visit::Nobody);
            }
            let oldest = self.half_open[0];
            if until(oldest).is_some_and(|until| until > Instant::now() + time.mul_f64(1.0 - GRACE)) {
                self.look = true;
                self.set_full(true)?;
                return Ok(Visit::Nobody);
            }
            return Ok(Visit::Oldest(oldest));
        }
        self.set_full(false)?;
        match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                // A socket that is dead already says so when it is read.
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                Ok(Visit::Stranger(socket))
            }
            Err(_) => Ok(Visit::Nobody),
        }
    }

    /// Is there a connection to accept?
    fn somebody_waits(&self) -> Result<bool> {
        let mut listener = [PollFd::new(&self.listener, PollFlags::IN)];
        match poll(&mut listener, Some(&Timespec::default())) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(true),
            Err(e) => Err(Error::os("looking at the listener", e)),
        }
    }

    /// A stranger came in as `peer`.
    pub fn admitted(&mut self, peer: PeerId) {
        self.half_open.push(peer);
    }

    /// The handshake is over; was `peer` in one?
    pub fn passed(&mut self, peer: PeerId) -> bool {
        let at = self.half_open.iter().position(|p| *p == peer);
        at.map(|at| self.half_open.remove(at)).is_some()
    }

    /// Are there as many in their handshake as may be, and others wait?
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Lets new connections end a wait, or not.
    fn set_full(&mut self, full: bool) -> Result<()> {
        if self.full != full {
            self.full = full;
            let flags = if full { epoll::EventFlags::empty() } else { epoll::EventFlags::IN };
            self.watch_for(&self.listener, LISTENER, flags)?;
        }
        Ok(())
    }

    /// Ends a [`see_ready`](Self::see_ready) from any thread.
    pub fn waker(&self) -> Waker {
        let wake = Arc::clone(&self.wake);
        // A full counter has woken already.
        Waker::new(move || {
            let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        })
    }
}

/// The socket address behind `scheme` in an address; `form` says how it should
/// look.
pub(crate) fn resolve(address: &Address, scheme: &str, form: &'static str) -> Result<SocketAddr> {
    let name = address.0.strip_prefix(scheme).ok_or_else(|| Error::BadAddress(address.clone(), form))?;
    let found = name.to_socket_addrs().map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidInput => Error::BadAddress(address.clone(), form),
        _ => Error::Unreachable(address.clone(), e.to_string()),
    });
    found?.next().ok_or_else(|| Error::Unreachable(address.clone(), "the name has no address".into()))
}

/// A socket that is connecting to `to`, which is `address`.
pub(crate) fn dial(address: &Address, to: SocketAddr) -> Result<OwnedFd> {
    let os = |e| Error::os("making a socket", e);
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(os)?;
    sockopt::set_tcp_nodelay(&socket, true).map_err(os)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(e) => Err(Error::Unreachable(address.clone(), e.to_string())),
    }
}
