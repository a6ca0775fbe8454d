//! Two transports over the software HCA, connected, and one round of a post.
#![allow(unsafe_code)]

use distkv_fabric::secure::Secret;
use distkv_fabric::verbs::device::VerbsConfig;
use distkv_fabric::verbs::sys::Lib;
use distkv_fabric::verbs::{Config, VerbsTransport};
use distkv_fabric::{Access, Event, Memory, Notify, PeerId, RegionId, RemoteKey, Transport, Write};

use crate::place;

/// Bytes of the regions.
const LEN: usize = 64 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Case {
    Write(u64),
    Send64,
    Nothing,
}

pub const CASES: [Case; 4] = [Case::Write(64), Case::Write(LEN as u64), Case::Send64, Case::Nothing];

impl Case {
    pub fn name(self) -> &'static str {
        match self {
            Self::Write(64) => "write-64-notify",
            Self::Write(_) => "write-64KiB-notify",
            Self::Send64 => "send-64",
            Self::Nothing => "empty-poll",
        }
    }
}

pub struct Rig {
    a: VerbsTransport,
    b: VerbsTransport,
    to_b: PeerId,
    local: RegionId,
    key: RemoteKey,
}

fn bind() -> VerbsTransport {
    let lib = Box::leak(Box::new(Lib::open(&place::path()).unwrap()));
    let ports = VerbsConfig { devices: vec!["soft0".into()], ..Default::default() };
    let config = Config { ports, ..Default::default() };
    VerbsTransport::over(lib, ([127, 0, 0, 1], 0).into(), Secret::new([7; 32]), config).unwrap()
}

impl Rig {
    pub fn new() -> Self {
        let (mut a, mut b) = (bind(), bind());
        let to_b = a.connect(&b.address(), b"a").unwrap();
        let mut connected = false;
        while !connected {
            b.poll(&mut |_| {}).unwrap();
            a.poll(&mut |event| connected |= matches!(event, Event::Connected { .. })).unwrap();
        }
        let (source, target) = (Memory::new(LEN).unwrap(), Memory::new(LEN).unwrap());
        let local = a.register(&source, Access::LocalOnly).unwrap();
        let region = b.register(&target, Access::RemoteWrite).unwrap();
        let key = b.remote_key(region).unwrap();
        let mut rig = Self { a, b, to_b, local, key };
        // The region is opened by the first write to it.
        rig.post(Case::Write(64));
        let mut heard = 0;
        while heard == 0 {
            rig.a.poll(&mut |_| {}).unwrap();
            heard += rig.b.poll(&mut |_| {}).unwrap();
        }
        rig
    }

    #[inline]
    pub fn post(&mut self, case: Case) {
        match case {
            Case::Write(len) => {
                let notify = Some(Notify(7));
                let write =
                    Write { local: self.local, local_offset: 0, len, remote: &self.key, remote_offset: 0, notify };
                self.a.write(self.to_b, write).unwrap();
            }
            Case::Send64 => self.a.send(self.to_b, &[7; 64]).unwrap(),
            Case::Nothing => {}
        }
    }

    /// The receiver's poll, which finds what was posted.
    #[inline]
    pub fn deliver(&mut self, case: Case) {
        let mut right = 0;
        let heard = self
            .b
            .poll(&mut |event| {
                right += match (event, case) {
                    (Event::Notified { notify: Notify(7), .. }, Case::Write(_)) => 1,
                    (Event::Message { payload, .. }, Case::Send64) if payload == [7; 64] => 1,
                    _ => 0,
                };
            })
            .unwrap();
        let expected = usize::from(case != Case::Nothing);
        assert!(heard == expected && right == expected);
    }

    /// The sender's poll, which takes completions and credits.
    #[inline]
    pub fn reap(&mut self) {
        assert!(self.a.poll(&mut |_| {}).unwrap() == 0);
    }

    pub fn run(&mut self, case: Case, rounds: usize) {
        for _ in 0..rounds {
            self.post(case);
            self.deliver(case);
            self.reap();
        }
    }
}

/// As [`Rig::post`], where callgrind finds it.
#[unsafe(no_mangle)]
#[inline(never)]
pub fn measured_post(rig: &mut Rig, case: Case) {
    rig.post(case);
}

/// As [`Rig::deliver`].
#[unsafe(no_mangle)]
#[inline(never)]
pub fn measured_deliver(rig: &mut Rig, case: Case) {
    rig.deliver(case);
}

/// As [`Rig::reap`].
#[unsafe(no_mangle)]
#[inline(never)]
pub fn measured_reap(rig: &mut Rig) {
    rig.reap();
}
