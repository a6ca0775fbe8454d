//! The seals on what nodes say to each other about requests: under keys derived
//! from the cluster's, so that whoever does not have it is told nothing and has
//! nothing computed for him.
//!
//! Each answer has a key of its own, made of its order's id, and its frames are
//! numbered: none can be left out, doubled, moved or taken from another answer.

use super::wire::{Frame, MAX_FRAME, Order, Said};
use crate::codec::{DecodeError, WriteExt};
use crate::control::seal::{KEY_BYTES, OVERHEAD, Seal};

const ORDERS: [u8; 16] = *b"distkv/orders/v1";
const ANSWERS: [u8; 16] = *b"distkv/answer/v1";

/// The keys of one cluster.
pub struct Keys {
    key: [u8; KEY_BYTES],
    orders: Seal,
}

impl Keys {
    /// Out of a key that the whole cluster shares and that serves no other
    /// purpose.
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        Self { orders: Seal::new(&blake3::derive_key("distkv orders v1", &key), ORDERS), key }
    }

    /// An order's bytes, sealed.
    pub fn seal_order(&self, order: &Order) -> Vec<u8> {
        let mut plain = Vec::with_capacity(4 * order.request.prompt.len() + 256);
        order.encode(&mut plain);
        self.orders.seal(rand::random(), &plain)
    }

    /// `None`: whoever sealed it, if anybody did, has another key.
    pub fn open_order(&self, sealed: &[u8]) -> Option<Result<Order, DecodeError>> {
        self.orders.open(sealed).map(|plain| Order::decode(&plain))
    }

    /// For one side of the answer to the order of that id.
    pub fn answer(&self, id: &[u8; 16]) -> Answer {
        let mut hasher = blake3::Hasher::new_derive_key("distkv answer v1");
        hasher.update(&self.key).update(id);
        Answer { seal: Seal::new(hasher.finalize().as_bytes(), ANSWERS), number: 0 }
    }
}

/// The frames of one answer, as they are said or as they are heard.
pub struct Answer {
    seal: Seal,
    /// Of the next frame.
    number: u32,
}

impl Answer {
    /// The next frame, sealed, with its length before it.
    pub fn say(&mut self, said: Said) -> Vec<u8> {
        let mut plain = Vec::with_capacity(64);
        Frame { number: self.number, said }.encode(&mut plain);
        self.number = self.number.wrapping_add(1);
        let sealed = self.seal.seal(rand::random(), &plain);
        let mut bytes = Vec::with_capacity(4 + sealed.len());
        bytes.put_bytes(&sealed);
        bytes
    }

    /// Takes the next frame off the front of what has arrived; `None`: it is not
    /// all there yet.
    pub fn hear(&mut self, arrived: &mut Vec<u8>) -> Result<Option<Said>, &'static str> {
        let Some(&prefix) = arrived.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_le_bytes(prefix) as usize;
        if !(OVERHEAD..=MAX_FRAME).contains(&len) {
            return Err("a frame of an impossible length");
        }
        let Some(sealed) = arrived.get(4..4 + len) else { return Ok(None) };
        let plain = self.seal.open(sealed).ok_or("a frame that was not sealed for this answer")?;
        let frame = Frame::decode(&plain).map_err(|_| "a frame that is none")?;
        if frame.number != self.number {
            return Err("a frame out of order");
        }
        self.number = self.number.wrapping_add(1);
        arrived.drain(..4 + len);
        Ok(Some(frame.said))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(by: &mut Answer, bytes: &[u8]) -> Result<Option<Said>, &'static str> {
        by.hear(&mut bytes.to_vec())
    }

    #[test]
    fn frames_are_heard_once_in_order_and_in_their_own_answer_only() {
        let keys = Keys::new([7; 32]);
        let mut says = keys.answer(&[1; 16]);
        let token = |index| Said::Token { index, id: 5, logprobs: None };
        let frames: Vec<Vec<u8>> = (0..3).map(|index| says.say(token(index))).collect();
        let mut hears = keys.answer(&[1; 16]);
        let mut arrived = frames[..2].concat();
        assert_eq!(hears.hear(&mut arrived), Ok(Some(token(0))));
        assert_eq!(hears.hear(&mut arrived), Ok(Some(token(1))));
        assert_eq!(hears.hear(&mut arrived), Ok(None));
        assert!(heard(&mut hears, &frames[1]).is_err(), "doubled");
        assert_eq!(heard(&mut keys.answer(&[1; 16]), &frames[0]), Ok(Some(token(0))));
        assert!(heard(&mut keys.answer(&[1; 16]), &frames[1]).is_err(), "one left out");
        assert!(heard(&mut keys.answer(&[2; 16]), &frames[0]).is_err(), "of another answer");
        assert!(heard(&mut Keys::new([8; 32]).answer(&[1; 16]), &frames[0]).is_err(), "another key");
        for end in 0..frames[2].len() {
            assert_eq!(heard(&mut hears, &frames[2][..end]), Ok(None));
        }
        for byte in 4..frames[2].len() {
            let mut bent = frames[2].clone();
            bent[byte] ^= 1;
            assert!(heard(&mut hears, &bent).is_err(), "byte {byte}");
        }
        assert!(heard(&mut hears, &u32::MAX.to_le_bytes()).is_err(), "a length is checked before it is awaited");
        assert_eq!(heard(&mut hears, &frames[2]), Ok(Some(token(2))));
    }
}
