//! Decode steps that were recorded, each to be replayed as one graph.

use std::collections::BTreeMap;

use super::driver::{Graph, Stream};
use super::short::Shares;
use crate::device::{DeviceError, Result};

/// Decode steps of up to so many rows are recorded.
pub const MAX_RECORDED: usize = 512;

/// What tells recorded steps apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// Its rows, as [`padded`] has them.
    pub rows: usize,
    /// How positions are shared out where the contexts are short.
    pub shares: Option<Shares>,
}

/// What is known of a kind.
enum Known {
    /// One was run: what is chosen at first use is chosen.
    Warm,
    Graph(Graph),
}

/// The steps, and which of them is being recorded.
#[derive(Default)]
pub struct Recorded {
    known: BTreeMap<Kind, Known>,
    recording: Option<Kind>,
}

/// Rows that a recorded decode step of `rows` rows has.
pub fn padded(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=256 => rows.next_multiple_of(32),
        _ => rows.next_multiple_of(64),
    }
}

impl Recorded {
    /// None of them is of use any more.
    pub fn clear(&mut self) {
        self.known.clear();
    }

    /// Begins a step: true where it was replayed. Else its kernels are to be called;
    /// from the second time on they are recorded.
    pub fn begin(&mut self, stream: &Stream, kind: Kind) -> Result<bool> {
        match self.known.get(&kind) {
            Some(Known::Graph(graph)) => {
                stream.launch(graph)?;
                return Ok(true);
            }
            Some(Known::Warm) => {
                stream.begin_capture()?;
                self.recording = Some(kind);
            }
            None => drop(self.known.insert(kind, Known::Warm)),
        }
        Ok(false)
    }

    /// Rows of the step that is being recorded.
    pub fn rows(&self) -> Option<usize> {
        self.recording.map(|kind| kind.rows)
    }

    /// All kernels of the step were called, or one was `refused`: what was recorded is
    /// given to the GPU, and kept.
    pub fn end(&mut self, stream: &Stream, refused: Option<DeviceError>) -> Result<()> {
        let Some(kind) = self.recording.take() else { return refused.map_or(Ok(()), Err) };
        let graph = stream.end_capture();
        if let Some(error) = refused {
            return Err(error);
        }
        let graph = graph?;
        stream.launch(&graph)?;
        self.known.insert(kind, Known::Graph(graph));
        Ok(())
    }
}
