//! How fast the KV of running requests may move: some rBlocks a step, fewer
//! once steps take longer for it.
//!
//! The paper moves 16 tokens a step without a loss that it could measure and
//! loses 8.6% with 32. What is right depends on the wire and the machine, so
//! the rate is found: it rises slowly while steps with moves take no longer
//! than steps without, and is halved when they do.

/// A step may take this much longer than expected before moves are to blame.
const TOLERANCE: f64 = 1.1;
/// Slowest rate, rBlocks a step: a plan is carried out in the end.
const SLOWEST: f64 = 0.5;

/// The rate of planned moves. See the module's page.
#[derive(Debug)]
pub struct Pace {
    most: f64,
    rate: f64,
    credit: f64,
}

impl Pace {
    /// At most `most` rBlocks a step; 0 for none.
    pub fn new(most: usize) -> Self {
        let most = most as f64;
        Self { most, rate: most.min(1.0), credit: 0.0 }
    }

    /// A step begins: how many rBlocks may move now. What is not
    /// [spent](Self::spend) is kept, up to one step's worth at full rate.
    pub fn begin_step(&mut self) -> usize {
        self.credit = (self.credit + self.rate).min(self.most);
        self.left()
    }

    /// rBlocks that may still move in this step.
    pub fn left(&self) -> usize {
        self.credit as usize
    }

    /// So many moved.
    pub fn spend(&mut self, blocks: usize) {
        self.credit -= blocks as f64;
    }

    /// A step in which rBlocks moved took `took` nanoseconds; without them
    /// `expected`.
    pub fn observe(&mut self, took: f64, expected: f64) {
        if took > expected * TOLERANCE {
            self.rate = (self.rate / 2.0).max(SLOWEST.min(self.most));
        } else {
            self.rate = (self.rate * 1.25).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_while_steps_stay_short_and_is_halved_when_they_do_not() {
        let mut pace = Pace::new(8);
        assert_eq!(pace.begin_step(), 1, "16 tokens at first");
        pace.spend(1);
        (0..20).for_each(|_| pace.observe(100.0, 100.0));
        assert_eq!(pace.begin_step(), 8);
        assert_eq!(pace.begin_step(), 8, "what was not used does not pile up");
        pace.spend(8);
        (0..20).for_each(|_| pace.observe(130.0, 100.0));
        let steps: usize = (0..64)
            .map(|_| {
                let moved = pace.begin_step();
                pace.spend(moved);
                moved
            })
            .sum();
        assert_eq!(steps, 32, "an rBlock every other step is the least");
    }

    #[test]
    fn none_move_at_a_rate_of_none() {
        let mut pace = Pace::new(0);
        assert_eq!((0..100).map(|_| pace.begin_step()).sum::<usize>(), 0);
        pace.observe(1.0, 100.0);
        assert_eq!(pace.begin_step(), 0);
    }
}
