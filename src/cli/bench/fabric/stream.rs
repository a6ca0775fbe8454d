//! A stream: as many as a window of unacknowledged ones allows, to every peer
//! at once, for a time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::side::Side;
use super::subject::Verb;

/// Most that are posted to a peer and not acknowledged: so many, or so many
/// bytes. An acknowledgement covers an eighth of them.
const WINDOW: usize = 256;
const WINDOW_BYTES: usize = 64 << 20;

/// What a stream came to.
pub(super) struct Flow {
    /// Of each peer: how many had been acknowledged when the time was up.
    pub acknowledged: Vec<u64>,
    /// When that was, seconds from the beginning.
    pub measured: f64,
    /// All that were posted, each of which has arrived.
    pub posted: u64,
    /// Until the last had arrived, seconds.
    pub seconds: f64,
}

impl Flow {
    /// How many a second.
    pub fn rate(&self) -> f64 {
        self.posted as f64 / self.seconds
    }

    /// The slowest and the fastest peer's rate while all were posted to.
    pub fn extremes(&self) -> (f64, f64) {
        let of = |count: Option<&u64>| count.map_or(0.0, |count| *count as f64 / self.measured);
        (of(self.acknowledged.iter().min()), of(self.acknowledged.iter().max()))
    }
}

/// Posts to every peer of `side` for `budget`; writes rotate through `places`.
pub(super) fn stream(side: &mut Side, verb: Verb, size: usize, places: usize, budget: Duration) -> Result<Flow> {
    let peers = side.links.len();
    let window = (WINDOW_BYTES / size).clamp(1, WINDOW) as u64;
    let acknowledge = (window / 8).max(1);
    side.prepare(verb, size);
    let before: Vec<_> = side.links.iter().map(|link| link.arrived).collect();
    for link in 0..peers {
        side.tell(link, &format!("drain {acknowledge}"))?;
    }
    let (start, mut posted) = (Instant::now(), vec![0u64; peers]);
    let acknowledged = |side: &Side, link: usize| (side.links[link].arrived - before[link]) * acknowledge;
    for turn in 1u32.. {
        let mut busy = false;
        for link in 0..peers {
            if posted[link] < acknowledged(side, link) + window
                && side.try_post(link, verb, posted[link] as usize, places, size)?
            {
                posted[link] += 1;
                busy = true;
            }
        }
        if busy && !turn.is_multiple_of(16) {
            continue;
        }
        if start.elapsed() >= budget {
            break;
        }
        if busy {
            side.poll()?;
        } else {
            let seen: u64 = side.links.iter().map(|link| link.arrived).sum();
            // Not for ever: a queue that was full makes no event when it is not.
            let mut polls = 0;
            side.spin(|side| {
                polls += 1;
                polls > 1024 || side.links.iter().map(|link| link.arrived).sum::<u64>() > seen
            })?;
        }
    }
    let measured = start.elapsed().as_secs_f64();
    let acknowledged: Vec<_> = (0..peers).map(|link| acknowledged(side, link)).collect();
    for link in 0..peers {
        side.tell(link, "end")?;
    }
    for link in 0..peers {
        let came: u64 = side.hear(link)?.parse().context("no count of what has come")?;
        ensure!(came == posted[link], "{came} of {} have come", posted[link]);
        side.settle(link);
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Flow { acknowledged, measured, posted: posted.iter().sum(), seconds })
}
