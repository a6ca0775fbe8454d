//! Who knocks at the tcp port and is no peer: garbage, foreign protocols, the
//! slow, the many; here at an insecure transport, in `sealed` at a sealed one.
//! Each loses its connection; the transport goes on.

#[path = "strangers/host.rs"]
mod host;
#[path = "suite/node.rs"]
#[expect(dead_code, reason = "the suite uses the rest")]
mod node;
#[path = "strangers/sealed.rs"]
mod sealed;
#[path = "strangers/wire.rs"]
mod wire;

use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

use distkv_fabric::secure::Security;
use distkv_fabric::tcp::{TcpConfig, handshake};
use distkv_fabric::{Error, MAX_SEND, Memory, Stats, Transport, frame};

use host::{Host, hung_up};

fn plain() -> TcpConfig {
    TcpConfig::new(Security::Insecure)
}

#[test]
fn a_foreign_protocol_is_turned_away() {
    let mut host = Host::new(plain());
    for (i, words) in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"\x16\x03\x01\x02\0\x01", &[0; 4096], b"\xd1kvfab\n\n"]
            .into_iter()
            .enumerate()
    {
        let mut stream = host.knock();
        stream.write_all(words).unwrap();
        host.until(|_, stats| stats.protocol_errors == i as u64 + 1);
        hung_up(stream);
    }
    assert_eq!((host.accepted, host.closed.len()), (0, 0), "the owner hears nothing of strangers");
    host.is_well();
}

#[test]
fn a_greeting_of_another_version_or_length_is_turned_away() {
    let mut host = Host::new(plain());
    let mut version = handshake::greeting(b"x");
    version[8] ^= 3;
    let mut length = handshake::greeting(b"x");
    length[12..16].copy_from_slice(&(MAX_SEND as u32 + 1).to_le_bytes());
    for (i, words) in [version, length].into_iter().enumerate() {
        let mut stream = host.knock();
        stream.write_all(&words).unwrap();
        host.until(|_, stats| stats.protocol_errors == i as u64 + 1);
        hung_up(stream);
    }
    host.is_well();
}

#[test]
fn a_port_scanner_is_forgotten() {
    let mut host = Host::new(plain());
    for _ in 0..20 {
        drop(host.knock());
    }
    host.until(|_, stats| stats.half_open_dropped == 20);
    assert_eq!(host.transport.stats(), Stats { accepted: 20, half_open_dropped: 20, ..Stats::default() });
    host.is_well();
}

#[test]
fn a_handshake_that_stops_halfway_has_bounded_time() {
    let mut host = Host::new(TcpConfig { handshake_timeout: Duration::from_millis(20), ..plain() });
    let mut slow = host.knock();
    slow.write_all(&handshake::greeting(b"a long hello")[..20]).unwrap();
    let silent = host.knock();
    host.until(|_, stats| stats.half_open_dropped == 2);
    hung_up(slow);
    hung_up(silent);
    let mut half = host.knock();
    half.write_all(&handshake::greeting(b"bye")[..5]).unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    host.until(|_, stats| stats.half_open_dropped == 3);
    assert_eq!(host.accepted, 0);
    let mut host = Host { transport: Host::new(plain()).transport, ..host };
    host.is_well();
}

#[test]
fn handshakes_are_bounded_in_number() {
    let mut host = Host::new(TcpConfig { max_half_open: 4, handshake_timeout: Duration::from_secs(1), ..plain() });
    let crowd: Vec<_> = (0..20).map(|_| host.knock()).collect();
    host.until(|_, stats| stats.half_open_dropped == 16);
    // The newcomer is served all the same.
    host.is_well();
    for stream in crowd.into_iter().take(16) {
        hung_up(stream);
    }
}

/// What a peer with a proper handshake must not say.
#[test]
fn a_peer_that_breaks_the_protocol_loses_its_connection() {
    let mut host = Host::new(plain());
    let memory = Memory::new(4096).unwrap();
    let local = host.transport.register(&memory, distkv_fabric::Access::LocalOnly).unwrap();
    let mut over = frame::message_header(1);
    over[8..16].copy_from_slice(&(MAX_SEND as u64 + 1).to_le_bytes());
    let mut huge = frame::message_header(1);
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut kind = frame::message_header(1);
    kind[0] = 9;
    // A write to a region that is not exported, with a token guessed.
    let mut write = vec![0; frame::WRITE_HEADER];
    write[0] = 2;
    write[8] = 64;
    write[16..20].copy_from_slice(&local.0.to_le_bytes());
    for (i, words) in [over.to_vec(), huge.to_vec(), kind.to_vec(), write].into_iter().enumerate() {
        let mut stream = host.knock();
        stream.write_all(&handshake::greeting(b"peer")).unwrap();
        stream.write_all(&words).unwrap();
        stream.write_all(&[1; 64]).unwrap();
        host.until(|host, _| host.closed.len() == i + 1);
        assert!(matches!(host.closed[i], Error::Protocol(_)), "{:?}", host.closed[i]);
        assert_eq!((host.accepted, host.transport.stats().protocol_errors), (i + 1, i as u64 + 1));
        hung_up(stream);
    }
    let mut bytes = [9; 64];
    memory.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64]);
    let mut host = Host { accepted: 0, ..host };
    host.is_well();
}

/// Whatever the cuts between them, bytes are read the same.
#[test]
fn frames_may_come_byte_by_byte() {
    let mut host = Host::new(plain());
    let mut peer = host.knock();
    peer.set_nodelay(true).unwrap();
    let mut words = handshake::greeting(b"drip");
    for i in 0..5u8 {
        words.extend(frame::message_header(i.into()));
        words.extend(vec![i; i.into()]);
    }
    for byte in words {
        peer.write_all(&[byte]).unwrap();
        host.poll();
    }
    host.until(|host, _| host.messages == 5);
    host.until_gone(peer);
}
