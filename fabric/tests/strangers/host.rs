//! The host that strangers knock at, and a member of its cluster that speaks to
//! it byte by byte.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use distkv_fabric::secure::{Bootstrap, Greeting, Heard, Kind, Purpose, Sealer, Secret, Security};
use distkv_fabric::tcp::{TcpConfig, TcpTransport, handshake};
use distkv_fabric::{Error, Event, PeerId, Stats, Transport, frame};

/// A tcp transport and what became of its connections.
pub struct Host {
    pub transport: TcpTransport,
    pub accepted: usize,
    pub messages: usize,
    pub closed: Vec<Error>,
    /// Who was accepted last.
    pub peer: Option<PeerId>,
    /// Its secret, if it has one.
    pub sealed: Option<Secret>,
}

impl Host {
    pub fn new(config: TcpConfig) -> Self {
        let sealed = match &config.security {
            Security::Sealed(secret) => Some(secret.clone()),
            Security::Insecure => None,
        };
        let transport = TcpTransport::bind(([127, 0, 0, 1], 0).into(), config).unwrap();
        Self { transport, accepted: 0, messages: 0, closed: Vec::new(), peer: None, sealed }
    }

    pub fn knock(&self) -> TcpStream {
        let address = self.transport.address().0;
        TcpStream::connect(address.strip_prefix("tcp://").unwrap()).unwrap()
    }

    pub fn poll(&mut self) {
        let Self { transport, accepted, messages, closed, peer: last, .. } = self;
        transport
            .poll(&mut |event| match event {
                Event::Accepted { peer, .. } => {
                    *accepted += 1;
                    *last = Some(peer);
                }
                Event::Message { .. } => *messages += 1,
                Event::Closed { reason, .. } => closed.push(reason),
                other => panic!("{other:?}"),
            })
            .unwrap();
    }

    /// Polls, asleep in between, until the counts say so.
    pub fn until(&mut self, done: impl Fn(&Self, Stats) -> bool) {
        while !done(self, self.transport.stats()) {
            self.poll();
            self.transport.wait(Duration::from_millis(10)).unwrap();
        }
    }

    /// It still serves a peer.
    pub fn is_well(&mut self) {
        let messages = self.messages;
        let words = [&frame::message_header(2)[..], b"hi"].concat();
        let peer = if self.sealed.is_none() {
            let mut peer = self.knock();
            peer.write_all(&handshake::greeting(b"me")).unwrap();
            peer.write_all(&words).unwrap();
            self.until(|host, _| host.messages == messages + 1);
            let mut answer = [0; handshake::HEADER];
            peer.read_exact(&mut answer).unwrap();
            assert_eq!(answer[..], handshake::greeting(b"")[..]);
            peer
        } else {
            let mut member = Member::join(self);
            member.says(Kind::Data, &words);
            self.until(|host, _| host.messages == messages + 1);
            member.stream
        };
        self.until_gone(peer);
    }

    /// Says something to the peer that was accepted last.
    pub fn answer(&mut self, words: &[u8]) {
        self.transport.send(self.peer.expect("a peer"), words).unwrap();
    }

    /// `peer` hangs up; an accepted connection ends as closed.
    pub fn until_gone(&mut self, peer: TcpStream) {
        let closed = self.closed.len();
        drop(peer);
        self.until(|host, _| host.closed.len() == closed + 1);
        assert_eq!(self.closed[closed], Error::PeerGone);
    }
}

/// Reads to the end that the transport makes.
pub fn hung_up(mut stream: TcpStream) {
    // A reset is an end too: it has not read all that we sent.
    let _ = stream.read_to_end(&mut Vec::new());
}

/// A member of the cluster, made by hand.
pub struct Member {
    pub stream: TcpStream,
    pub sealer: Sealer,
}

impl Member {
    /// Through the bootstrap, while the host polls.
    pub fn join(host: &mut Host) -> Self {
        let secret = host.sealed.clone().expect("a sealed host");
        let mut stream = host.knock();
        stream.set_nonblocking(true).unwrap();
        let greeting = Greeting { incarnation: 1, hello: b"me".to_vec() };
        let mut bootstrap = Bootstrap::connect(&secret, Purpose::Tcp, greeting).unwrap();
        bootstrap.ready().unwrap();
        let mut answered = false;
        while !bootstrap.is_complete() {
            while !bootstrap.output().is_empty() {
                let sent = stream.write(bootstrap.output()).unwrap();
                bootstrap.sent(sent);
            }
            host.poll();
            // No byte too many: what follows are records.
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(0) => panic!("the host hung up"),
                Ok(_) => {
                    let (taken, heard) = bootstrap.feed(&byte).unwrap();
                    assert_eq!(taken, 1);
                    if let Some(Heard::Greeting(greeting)) = heard {
                        answered = true;
                        assert_eq!(greeting.hello, b"");
                    }
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        assert!(answered);
        stream.set_nonblocking(false).unwrap();
        let (sealer, _) = bootstrap.finish().unwrap();
        Self { stream, sealer }
    }

    /// A record.
    pub fn says(&mut self, kind: Kind, content: &[u8]) {
        let mut record = Vec::new();
        self.sealer.seal(kind, &[content], &mut record).unwrap();
        self.stream.write_all(&record).unwrap();
    }
}
