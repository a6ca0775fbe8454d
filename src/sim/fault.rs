//! What goes wrong in a simulated world, and when: by chance from a seed, or
//! from a list that a file brings.

use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::network::Slot;

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// The process is killed; another starts at its address after a while.
    Crash {
        /// Which.
        node: Slot,
        /// Milliseconds until the restart.
        back_ms: u64,
    },
    /// The process stands still; what reaches it meanwhile waits.
    Pause {
        /// Which.
        node: Slot,
        /// Milliseconds.
        ms: u64,
    },
    /// Two instances do not reach each other.
    Cut {
        /// One.
        a: Slot,
        /// The other.
        b: Slot,
        /// Milliseconds.
        ms: u64,
    },
    /// One instance reaches nobody.
    Isolate {
        /// Which.
        node: Slot,
        /// Milliseconds.
        ms: u64,
    },
}

/// A fault and its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timed {
    /// Milliseconds from the start.
    pub at_ms: u64,
    /// What.
    pub fault: Fault,
}

impl Timed {
    /// When its last effect is over.
    pub fn heals(&self) -> Duration {
        let (Fault::Crash { back_ms: ms, .. }
        | Fault::Pause { ms, .. }
        | Fault::Cut { ms, .. }
        | Fault::Isolate { ms, .. }) = self.fault;
        Duration::from_millis(self.at_ms.saturating_add(ms))
    }

    /// Instances it names.
    pub fn nodes(&self) -> Vec<Slot> {
        match self.fault {
            Fault::Crash { node, .. } | Fault::Pause { node, .. } | Fault::Isolate { node, .. } => vec![node],
            Fault::Cut { a, b, .. } => vec![a, b],
        }
    }
}

/// Reads a list of faults: `[{"at_ms": 5000, "fault": {"crash": {"node": 1,
/// "back_ms": 3000}}}, …]`.
pub fn read(text: &str, instances: usize) -> Result<Vec<Timed>, String> {
    let faults: Vec<Timed> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    for timed in &faults {
        if let Some(node) = timed.nodes().into_iter().find(|node| *node >= instances) {
            return Err(format!("node {node} of {instances} instances (they count from 0)"));
        }
    }
    Ok(faults)
}

/// Faults by chance within `span`: about one every four seconds and at least
/// two. Some are shorter than what the others wait for, some longer.
pub fn chance(rng: &mut ChaCha8Rng, instances: usize, span: Duration) -> Vec<Timed> {
    let count = 2 + span.as_secs() / 4;
    let mut faults: Vec<_> = (0..count).map(|_| one(rng, instances, span)).collect();
    faults.sort_by_key(|timed| timed.at_ms);
    faults
}

fn one(rng: &mut ChaCha8Rng, instances: usize, span: Duration) -> Timed {
    let at_ms = rng.random_range(0..=span.as_millis() as u64);
    let node = rng.random_range(0..instances);
    let ms = match rng.random_range(0..3) {
        0 => rng.random_range(5..300),
        1 => rng.random_range(300..3000),
        _ => rng.random_range(3000..15_000),
    };
    let fault = match rng.random_range(0..10) {
        0..3 => Fault::Crash { node, back_ms: ms },
        3..6 => Fault::Pause { node, ms },
        6..9 if instances > 1 => Fault::Cut { a: node, b: (node + rng.random_range(1..instances)) % instances, ms },
        _ => Fault::Isolate { node, ms },
    };
    Timed { at_ms, fault }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn a_list_reads_back_and_errors_are_named() {
        let faults = chance(&mut ChaCha8Rng::seed_from_u64(3), 4, Duration::from_secs(60));
        let text = serde_json::to_string(&faults).unwrap();
        assert_eq!(read(&text, 4).unwrap(), faults);
        assert!(read(&text, 1).unwrap_err().contains("of 1 instances"));
        assert!(read(r#"[{"at_ms": 1, "fault": {"flood": {}}}]"#, 4).unwrap_err().contains("flood"));
    }
}
