//! What a side owes its peer: receives of its own and slots of its landing zone
//! that the peer has filled and that are free again.
//!
//! They ride on the next post that goes the peer's way, which costs nothing: where
//! posts are answered no message ever tells of receives. Only where none goes the
//! other way, and so many are owed that the peer could run short, a message of its
//! own returns them.

use super::landing::{SLOTS, SLOTS_DUE};
use super::receives::{CREDITS, LATE, SPARE};

/// So many receives are worth a message.
const RECEIVES_DUE: u16 = CREDITS / 2;

/// Of one connection.
#[derive(Debug, Default)]
pub struct Owed {
    receives: u16,
    slots: u16,
    /// Something was handed over since credits were last looked at.
    handed: bool,
    /// A message is due, and waits for the next look.
    holds: bool,
}

impl Owed {
    /// One of the peer's receives is used up.
    #[inline]
    pub fn receive(&mut self) -> Result<(), &'static str> {
        self.receives += 1;
        self.handed = true;
        // What is owed was filled and not yet returned: no more can be filled.
        if self.receives > CREDITS { Err("more posts than there were credits for") } else { Ok(()) }
    }

    /// One slot of its landing zone is copied.
    pub fn slot(&mut self) {
        self.slots += 1;
    }

    /// Receives that surely lie in the device's queue again: of all that were taken
    /// at most [`LATE`] do not.
    #[inline]
    fn free(&self) -> u16 {
        self.receives.saturating_sub(LATE as u16)
    }

    /// Receives that go back with a post that is being made.
    #[inline]
    pub fn ride(&mut self) -> u16 {
        let free = self.free();
        self.receives -= free;
        free
    }

    /// Is what the peer may use again worth a message?
    #[inline]
    pub fn is_due(&self) -> bool {
        self.free() >= RECEIVES_DUE || self.slots >= SLOTS_DUE
    }

    /// Is a message due that the next poll sends?
    pub fn holds(&self) -> bool {
        self.holds
    }

    /// The receives and slots that a message should return now. Behind what was just
    /// handed over an answer may follow, for which somebody waits and on which
    /// receives ride: it goes first, and the message with the next poll.
    pub fn message(&mut self) -> Option<(u16, u16)> {
        let handed = std::mem::take(&mut self.handed);
        let due = self.is_due();
        self.holds = due && handed && !self.holds;
        (due && !self.holds).then(|| (self.free(), self.slots))
    }

    /// That message has gone out.
    pub fn returned(&mut self, (receives, slots): (u16, u16)) {
        self.receives -= receives;
        self.slots -= slots;
    }
}

const _: () = assert!(SLOTS_DUE <= SLOTS / 2, "slots have to come back before the last is taken");
const _: () = assert!(RECEIVES_DUE + LATE as u16 <= CREDITS * 3 / 4, "receives have to come back before the last");
// Messages with credits that can be under way before the peer has taken one:
// each answers so many receives or slots, and no more can be filled meanwhile. Of
// those that were taken LATE may not be posted again.
const _: () = assert!(CREDITS / RECEIVES_DUE + SLOTS / SLOTS_DUE + LATE as u16 <= SPARE);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn where_posts_are_answered_no_message_is_due() {
        let mut owed = Owed::default();
        let mut returned = 0;
        for round in 1..1000 {
            owed.receive().unwrap();
            assert_eq!((owed.message(), owed.is_due(), owed.holds()), (None, false, false));
            returned += owed.ride();
            assert!(returned + LATE as u16 >= round);
        }
    }

    #[test]
    fn a_message_waits_for_an_answer_once() {
        let mut owed = Owed::default();
        (0..RECEIVES_DUE + LATE as u16).for_each(|_| owed.receive().unwrap());
        assert_eq!((owed.message(), owed.holds()), (None, true));
        // The answer takes them all along.
        assert_eq!(owed.ride(), RECEIVES_DUE);
        assert_eq!((owed.message(), owed.holds()), (None, false));
        (0..RECEIVES_DUE).for_each(|_| owed.receive().unwrap());
        assert_eq!((owed.message(), owed.holds()), (None, true));
        // None comes, and more is handed over.
        owed.receive().unwrap();
        assert_eq!((owed.message(), owed.holds()), (Some((RECEIVES_DUE + 1, 0)), false));
    }

    proptest! {
        /// A peer within its credits is never found out to be beyond them, is never
        /// left without any, and never gets one back that may not lie in the queue.
        #[test]
        fn a_peer_within_its_credits_always_gets_on(acts in prop::collection::vec(0u8..4, 0..400)) {
            let (mut owed, mut credits, mut slots) = (Owed::default(), CREDITS, SLOTS);
            for act in acts {
                match act {
                    0 | 1 if credits > 0 => {
                        credits -= 1;
                        prop_assert!(owed.receive().is_ok());
                        if act == 1 && slots > 0 {
                            slots -= 1;
                            owed.slot();
                        }
                    }
                    2 => credits += owed.ride(),
                    // Two looks: the first may wait for an answer.
                    3 => for _ in 0..2 {
                        if let Some(message) = owed.message() {
                            prop_assert!(message != (0, 0));
                            owed.returned(message);
                            (credits, slots) = (credits + message.0, slots + message.1);
                        }
                        prop_assert!(!owed.holds() || owed.is_due());
                    },
                    _ => {}
                }
                prop_assert_eq!(credits + owed.receives, CREDITS);
                prop_assert_eq!(slots + owed.slots, SLOTS);
                prop_assert!(owed.is_due() || (credits > 0 && slots > 0));
            }
        }

        #[test]
        fn whoever_overdraws_is_found_out(rides in prop::collection::vec(any::<bool>(), 200)) {
            let (mut owed, mut credits) = (Owed::default(), i32::from(CREDITS));
            for ride in rides {
                if ride {
                    credits += i32::from(owed.ride());
                }
                credits -= 1;
                prop_assert_eq!(owed.receive().is_ok(), credits >= 0);
                if credits < 0 {
                    return Ok(());
                }
            }
        }
    }
}
