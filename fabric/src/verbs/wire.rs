//! What two verbs transports say to each other: messages of the control channel
//! (Noise over tcp; the only place where addresses and rkeys travel) and the 32
//! bits that come with a SEND on the queue pair.
//!
//! Control messages, all little-endian; the first byte is the kind.
//!
//! | kind | who | what follows |
//! |---|---|---|
//! | 1 offer | connecting side | [`Endpoint`], attempt u32, the hello to the end |
//! | 2 answer | accepting side | [`Endpoint`]; its queue pair may receive and send |
//! | 3 ready | connecting side | nothing; its queue pair may receive and send |
//! | 4 ready-ack | accepting side | nothing; posts may follow |
//! | 5 open | a writer | region u32, token 16 |
//! | 6 opened | the region's owner | region u32, [`Target`] |
//! | 7 bye | who ends it | u64: how many receives its posts will have consumed |
//!
//! A write with notification is an RDMA WRITE WITH IMMEDIATE whose immediate is
//! the caller's [`Notify`](crate::Notify) ([`Noted`]); one that is too long for it
//! follows its bytes in a SEND. A SEND WITH IMMEDIATE says in its two top bits what
//! it carries ([`Said`]). In six bits of either ride receives that the peer may fill
//! again.
//!
//! | bits of an immediate | 31, 30 | 29 … 26 | 25, 24 | 23 … 12 | 11 … 0 |
//! |---|---|---|---|---|---|
//! | of a write | receives | receives | notify | notify | notify |
//! | piece of a message | 0 | receives | receives | what is to come | what is to come |
//! | credits | 1 | 0 | 0 | slots | receives |
//! | landed | 2 | receives | receives | 0 | 0 |
//! | notification | 3 | receives | receives | 0 | 0 |

/// Version of what is said here, in every offer and answer.
const VERSION: u8 = 2;

const OFFER: u8 = 1;
const ANSWER: u8 = 2;
const READY: u8 = 3;
const READY_ACK: u8 = 4;
const OPEN: u8 = 5;
const OPENED: u8 = 6;
const BYE: u8 = 7;

/// Bytes of an encoded endpoint.
const ENDPOINT: usize = 44;
/// Bytes of an encoded target.
const TARGET: usize = 37;

/// One end of a queue pair, as the other end has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The port speaks Ethernet (RoCE): peers are addressed by GID. Otherwise
    /// InfiniBand: by LID.
    pub ethernet: bool,
    /// The port's GID.
    pub gid: [u8; 16],
    /// The port's LID; 0 on Ethernet.
    pub lid: u16,
    /// Queue pair number, 24 bits.
    pub queue_pair: u32,
    /// Number of the first packet that it sends, 24 bits, random.
    pub first_psn: u32,
    /// The port's active MTU, bytes: a power of two from 256 to 4096.
    pub mtu: u16,
    /// Receives that wait for the peer's posts.
    pub credits: u16,
    /// Bytes of each of them.
    pub buffer: u32,
    /// One life of the transport that speaks, random.
    pub incarnation: u64,
}

/// Where a writer's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Straight into the region.
    Region {
        /// Address of the region's first byte.
        address: u64,
        /// Key of the window on it.
        rkey: u32,
        /// Bytes of the region.
        size: u64,
    },
    /// Into the writer's landing zone, since the region has a guard.
    Landing {
        /// Address of the zone's first byte.
        address: u64,
        /// Key of the window on it.
        rkey: u32,
        /// Bytes of a slot.
        slot: u32,
        /// How many slots.
        slots: u16,
    },
}

/// A message of the control channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// The connecting side's queue pair and hello.
    Offer {
        /// Its end.
        endpoint: Endpoint,
        /// How often this peer was tried before: the accepting side takes
        /// another rail then.
        attempt: u32,
        /// Untrusted.
        hello: Vec<u8>,
    },
    /// The accepting side's queue pair.
    Answer(Endpoint),
    /// The connecting side can receive.
    Ready,
    /// Both can.
    ReadyAck,
    /// A writer shows the key of a region.
    Open {
        /// Which.
        region: u32,
        /// The key's token.
        token: [u8; 16],
    },
    /// It may write.
    Opened {
        /// Which.
        region: u32,
        /// Where to.
        target: Target,
    },
    /// The connection ends when so many posts have arrived.
    Bye {
        /// SENDs and notifying writes since the beginning.
        posts: u64,
    },
}

/// Reads fields off the front of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or("a control message that is too short")?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, &'static str> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, &'static str> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        self.take().map(u64::from_le_bytes)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

impl Endpoint {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        out.push(u8::from(self.ethernet));
        out.extend(self.gid);
        out.extend(self.lid.to_le_bytes());
        out.extend(self.queue_pair.to_le_bytes());
        out.extend(self.first_psn.to_le_bytes());
        out.extend(self.mtu.to_le_bytes());
        out.extend(self.credits.to_le_bytes());
        out.extend(self.buffer.to_le_bytes());
        out.extend(self.incarnation.to_le_bytes());
    }

    fn read(fields: &mut Fields<'_>) -> Result<Self, &'static str> {
        let (version, ethernet) = (fields.u8()?, fields.u8()?);
        if version != VERSION {
            return Err("another version of the verbs transport");
        }
        if ethernet > 1 {
            return Err("an endpoint with unknown flags");
        }
        let endpoint = Self {
            ethernet: ethernet == 1,
            gid: fields.take()?,
            lid: fields.u16()?,
            queue_pair: fields.u32()?,
            first_psn: fields.u32()?,
            mtu: fields.u16()?,
            credits: fields.u16()?,
            buffer: fields.u32()?,
            incarnation: fields.u64()?,
        };
        if endpoint.queue_pair >= 1 << 24 || endpoint.first_psn >= 1 << 24 {
            return Err("an endpoint with a number of more than 24 bits");
        }
        if !endpoint.mtu.is_power_of_two() || !(256..=4096).contains(&endpoint.mtu) {
            return Err("an endpoint with an MTU that there is not");
        }
        if endpoint.credits == 0 || !(256..=1 << 20).contains(&endpoint.buffer) {
            return Err("an endpoint that can receive nothing");
        }
        Ok(endpoint)
    }
}

impl Target {
    fn put(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Region { address, rkey, size } => {
                out.push(0);
                out.extend(address.to_le_bytes());
                out.extend(rkey.to_le_bytes());
                out.extend(size.to_le_bytes());
            }
            Self::Landing { address, rkey, slot, slots } => {
                out.push(1);
                out.extend(address.to_le_bytes());
                out.extend(rkey.to_le_bytes());
                out.extend(slot.to_le_bytes());
                out.extend(u32::from(slots).to_le_bytes());
            }
        }
    }

    fn read(fields: &mut Fields<'_>) -> Result<Self, &'static str> {
        let kind = fields.u8()?;
        let (address, rkey) = (fields.u64()?, fields.u32()?);
        let target = match kind {
            0 => Self::Region { address, rkey, size: fields.u64()? },
            1 => {
                let (slot, slots) = (fields.u32()?, fields.u32()?);
                let slots = u16::try_from(slots).map_err(|_| "a landing zone with too many slots")?;
                Self::Landing { address, rkey, slot, slots }
            }
            _ => return Err("an unknown kind of target"),
        };
        match target {
            Self::Region { address, size, .. } if address.checked_add(size).is_none() => Err("a region past the end"),
            Self::Landing { slot: 0, .. } | Self::Landing { slots: 0, .. } => Err("a landing zone without room"),
            // A piece's length has to fit its header.
            Self::Landing { slot, .. } if slot > 1 << 30 => Err("a landing zone with too long slots"),
            Self::Landing { address, slot, slots, .. }
                if address.checked_add(u64::from(slot) * u64::from(slots)).is_none() =>
            {
                Err("a landing zone past the end")
            }
            target => Ok(target),
        }
    }
}

impl Control {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + ENDPOINT.max(TARGET) + 4);
        match self {
            Self::Offer { endpoint, attempt, hello } => {
                out.push(OFFER);
                endpoint.put(&mut out);
                out.extend(attempt.to_le_bytes());
                out.extend(hello);
            }
            Self::Answer(endpoint) => {
                out.push(ANSWER);
                endpoint.put(&mut out);
            }
            Self::Ready => out.push(READY),
            Self::ReadyAck => out.push(READY_ACK),
            Self::Open { region, token } => {
                out.push(OPEN);
                out.extend(region.to_le_bytes());
                out.extend(token);
            }
            Self::Opened { region, target } => {
                out.push(OPENED);
                out.extend(region.to_le_bytes());
                target.put(&mut out);
            }
            Self::Bye { posts } => {
                out.push(BYE);
                out.extend(posts.to_le_bytes());
            }
        }
        out
    }

    /// Reads a message; the error names what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(bytes);
        let message = match fields.u8()? {
            OFFER => {
                let endpoint = Endpoint::read(&mut fields)?;
                let attempt = fields.u32()?;
                if fields.0.len() > crate::MAX_SEND {
                    return Err("a hello over the limit");
                }
                Self::Offer { endpoint, attempt, hello: fields.rest().to_vec() }
            }
            ANSWER => Self::Answer(Endpoint::read(&mut fields)?),
            READY => Self::Ready,
            READY_ACK => Self::ReadyAck,
            OPEN => Self::Open { region: fields.u32()?, token: fields.take()? },
            OPENED => Self::Opened { region: fields.u32()?, target: Target::read(&mut fields)? },
            BYE => Self::Bye { posts: fields.u64()? },
            _ => return Err("an unknown kind of control message"),
        };
        if !fields.rest().is_empty() {
            return Err("a control message that is too long");
        }
        Ok(message)
    }
}

/// What a write tells with its immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    /// At most [`MAX_NOTED`].
    pub notify: u32,
    /// Receives that the peer may fill again, at most [`MAX_RIDING`].
    pub receives: u16,
}

const RIDING: u32 = 6;
const NOTED: u32 = 32 - RIDING;

/// Most receives that ride on a post.
pub const MAX_RIDING: u16 = (1 << RIDING) - 1;

/// The largest notification that an immediate has room for.
pub const MAX_NOTED: u32 = (1 << NOTED) - 1;

impl Noted {
    /// As an immediate.
    #[inline]
    pub fn encode(self) -> u32 {
        debug_assert!(self.notify <= MAX_NOTED && self.receives <= MAX_RIDING);
        u32::from(self.receives) << NOTED | self.notify
    }

    /// From an immediate; each says something.
    #[inline]
    pub fn decode(immediate: u32) -> Self {
        Self { notify: immediate & MAX_NOTED, receives: (immediate >> NOTED) as u16 }
    }
}

/// What a SEND carries, told by its immediate. `receives` may be filled again by
/// whom it is for; they ride on it, [`MAX_RIDING`] at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// A piece of a message, after which `rest` bytes of it are to come.
    Piece {
        /// At most [`MAX_SEND`](crate::MAX_SEND).
        rest: u32,
        /// Receives.
        receives: u16,
    },
    /// Nothing but what was consumed and may be used again.
    Credits {
        /// Receives.
        receives: u16,
        /// Slots of the landing zone.
        slots: u16,
    },
    /// A [`Landed`]: bytes lie in the next slot of the landing zone.
    Landed {
        /// Receives.
        receives: u16,
    },
    /// The notification of the write before it, u32 little-endian.
    Notified {
        /// Receives.
        receives: u16,
    },
}

const SAID: u32 = 30;
const REST: u32 = 24;
const COUNT: u32 = 12;

/// Most receives or slots that one message can return.
pub const MAX_CREDITS: u16 = (1 << COUNT) - 1;

impl Said {
    /// As an immediate.
    pub fn encode(self) -> u32 {
        let of = |kind: u32, receives: u16| kind << SAID | u32::from(receives) << REST;
        match self {
            Self::Piece { rest, receives } => of(0, receives) | rest,
            Self::Credits { receives, slots } => of(1, 0) | u32::from(slots) << COUNT | u32::from(receives),
            Self::Landed { receives } => of(2, receives),
            Self::Notified { receives } => of(3, receives),
        }
    }

    /// From an immediate.
    pub fn decode(immediate: u32) -> Result<Self, &'static str> {
        let value = immediate & ((1 << REST) - 1);
        let receives = (immediate >> REST) as u16 & MAX_RIDING;
        match immediate >> SAID {
            0 if value as usize <= crate::MAX_SEND => Ok(Self::Piece { rest: value, receives }),
            1 if receives == 0 => {
                let mask = u32::from(MAX_CREDITS);
                Ok(Self::Credits { receives: (value & mask) as u16, slots: (value >> COUNT) as u16 })
            }
            2 if value == 0 => Ok(Self::Landed { receives }),
            3 if value == 0 => Ok(Self::Notified { receives }),
            _ => Err("an immediate that says nothing known"),
        }
    }
}

const _: () = assert!(REST + RIDING == SAID && 2 * COUNT == REST);

/// Bytes of an encoded [`Landed`].
pub const LANDED: usize = 24;

/// A piece of a write that lies in the landing zone: the payload of the SEND
/// that tells of it. The slot is the next in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landed {
    /// The region it is for.
    pub region: u32,
    /// First target byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Told to the owner, with the last piece of a write.
    pub notify: Option<u32>,
}

impl Landed {
    /// region u32, len u32, offset u64, notifies u32 (0 or 1), notify u32.
    pub fn encode(&self) -> [u8; LANDED] {
        let mut out = [0; LANDED];
        out[..4].copy_from_slice(&self.region.to_le_bytes());
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..20].copy_from_slice(&u32::from(self.notify.is_some()).to_le_bytes());
        out[20..].copy_from_slice(&self.notify.unwrap_or(0).to_le_bytes());
        out
    }

    /// Nothing in it is checked against any region.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(bytes);
        let (region, len, offset) = (fields.u32()?, fields.u32()?, fields.u64()?);
        let (notifies, notify) = (fields.u32()?, fields.u32()?);
        if !fields.rest().is_empty() || notifies > 1 || (notifies == 0 && notify != 0) {
            return Err("a malformed note of what landed");
        }
        Ok(Self { region, offset, len, notify: (notifies == 1).then_some(notify) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn endpoint() -> impl Strategy<Value = Endpoint> {
        let numbers = (0u32..1 << 24, 0u32..1 << 24, 8u32..13, 1u16.., 256u32..1 << 20, any::<u64>());
        (any::<bool>(), any::<[u8; 16]>(), any::<u16>(), numbers).prop_map(|(ethernet, gid, lid, n)| Endpoint {
            ethernet,
            gid,
            lid,
            queue_pair: n.0,
            first_psn: n.1,
            mtu: 1 << n.2,
            credits: n.3,
            buffer: n.4,
            incarnation: n.5,
        })
    }

    fn control() -> impl Strategy<Value = Control> {
        let target = prop_oneof![
            (0..1u64 << 63, any::<u32>(), 0..1u64 << 62).prop_map(|(address, rkey, size)| Target::Region {
                address,
                rkey,
                size
            }),
            (0..1u64 << 63, any::<u32>(), 1u32..=1 << 30, 1u16..)
                .prop_map(|(address, rkey, slot, slots)| Target::Landing { address, rkey, slot, slots }),
        ];
        prop_oneof![
            (endpoint(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..100))
                .prop_map(|(endpoint, attempt, hello)| Control::Offer { endpoint, attempt, hello }),
            endpoint().prop_map(Control::Answer),
            Just(Control::Ready),
            Just(Control::ReadyAck),
            (any::<u32>(), any::<[u8; 16]>()).prop_map(|(region, token)| Control::Open { region, token }),
            (any::<u32>(), target).prop_map(|(region, target)| Control::Opened { region, target }),
            any::<u64>().prop_map(|posts| Control::Bye { posts }),
        ]
    }

    proptest! {
        #[test]
        fn a_control_message_survives_its_encoding(message in control()) {
            let bytes = message.encode();
            prop_assert_eq!(Control::decode(&bytes), Ok(message.clone()));
            let hello_may_be_shorter = matches!(message, Control::Offer { .. });
            prop_assert!(hello_may_be_shorter || Control::decode(&bytes[..bytes.len() - 1]).is_err());
        }

        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(0u8..8, 0..64)) {
            if let Ok(message) = Control::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn an_immediate_says_one_thing(immediate: u32) {
            if let Ok(said) = Said::decode(immediate) {
                prop_assert_eq!(said.encode(), immediate);
            }
        }

        #[test]
        fn what_is_said_survives_its_immediate(
            rest in 0..=crate::MAX_SEND as u32,
            receives in 0..=MAX_RIDING,
            slots in 0..=MAX_CREDITS,
        ) {
            let credits = Said::Credits { receives, slots };
            for said in [Said::Piece { rest, receives }, credits, Said::Landed { receives }, Said::Notified { receives }] {
                prop_assert_eq!(Said::decode(said.encode()), Ok(said));
            }
        }

        #[test]
        fn what_is_noted_survives_its_immediate(notify in 0..=MAX_NOTED, receives in 0..=MAX_RIDING, immediate: u32) {
            let noted = Noted { notify, receives };
            prop_assert_eq!(Noted::decode(noted.encode()), noted);
            prop_assert_eq!(Noted::decode(immediate).encode(), immediate);
        }

        #[test]
        fn what_landed_survives_its_encoding(region: u32, offset: u64, len: u32, notify: Option<u32>) {
            let landed = Landed { region, offset, len, notify };
            prop_assert_eq!(Landed::decode(&landed.encode()), Ok(landed));
            prop_assert!(Landed::decode(&landed.encode()[1..]).is_err());
        }
    }
}
