//! Whoever sits in the middle of the wire.

use std::io::{ErrorKind, Read, Write as _};
use std::net::{TcpListener, TcpStream};

use distkv_fabric::Address;

/// Whoever sits in the middle of the wire: hands on what it hears, keeps it,
/// and turns one bit of it.
pub struct Wire {
    listener: TcpListener,
    /// `scheme://host:port`.
    to: String,
    ends: Option<[TcpStream; 2]>,
    /// What each side has said, the one that connects first.
    pub heard: [Vec<u8>; 2],
    /// Turn the lowest bit of that byte of that side.
    pub turn: Option<(usize, usize)>,
    /// Bytes handed on in one go.
    pub piece: usize,
}

impl Wire {
    pub fn to(to: &Address) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { listener, to: to.0.clone(), ends: None, heard: [Vec::new(), Vec::new()], turn: None, piece: 1 << 16 }
    }

    pub fn address(&self) -> Address {
        let (scheme, _) = self.to.split_once("://").unwrap();
        Address(format!("{scheme}://{}", self.listener.local_addr().unwrap()))
    }

    pub fn hand_on(&mut self) {
        if self.ends.is_none() {
            let Ok((near, _)) = self.listener.accept() else { return };
            let far = TcpStream::connect(self.to.split_once("://").unwrap().1).unwrap();
            for end in [&near, &far] {
                end.set_nonblocking(true).unwrap();
                end.set_nodelay(true).unwrap();
            }
            self.ends = Some([near, far]);
        }
        let Some(ends) = &mut self.ends else { return };
        for side in 0..2 {
            let mut bytes = vec![0; self.piece];
            let got = match ends[side].read(&mut bytes) {
                Ok(0) => {
                    let _ = ends[1 - side].shutdown(std::net::Shutdown::Both);
                    continue;
                }
                Ok(got) => got,
                Err(_) => continue,
            };
            let bytes = &mut bytes[..got];
            let start = self.heard[side].len();
            self.heard[side].extend_from_slice(bytes);
            if let Some((turned, at)) = self.turn
                && turned == side
                && (start..start + got).contains(&at)
            {
                bytes[at - start] ^= 1;
            }
            let mut sent = 0;
            while sent < got {
                match ends[1 - side].write(&bytes[sent..]) {
                    Ok(n) => sent += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        }
    }
}
