//! Ranges of a sequence's tokens whose KV was computed once and is lost.

use std::ops::Range;

/// Token ranges, ascending, none empty, none touching the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gaps(Vec<Range<usize>>);

impl Gaps {
    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first.
    pub fn first(&self) -> Option<Range<usize>> {
        self.0.first().cloned()
    }

    /// Tokens in all of them.
    pub fn tokens(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }

    /// Is one of `tokens` in a gap?
    pub fn touch(&self, tokens: Range<usize>) -> bool {
        self.0.iter().any(|gap| gap.start < tokens.end && tokens.start < gap.end)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Range<usize>> {
        self.0.iter()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds `lost`.
    pub(super) fn add(&mut self, lost: Range<usize>) {
        if lost.is_empty() {
            return;
        }
        let first = self.0.partition_point(|gap| gap.end < lost.start);
        let touching = self.0[first..].iter().take_while(|gap| gap.start <= lost.end).count();
        let mut joined = lost;
        for gap in self.0.drain(first..first + touching) {
            joined = joined.start.min(gap.start)..joined.end.max(gap.end);
        }
        self.0.insert(first, joined);
    }

    /// The first `tokens` tokens of the first gap are computed.
    pub(super) fn fill(&mut self, tokens: usize) {
        if let Some(first) = self.0.first_mut() {
            first.start += tokens;
            if first.start == first.end {
                self.0.remove(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_join_where_they_touch_and_fill_from_the_front() {
        let mut gaps = Gaps::default();
        assert!(gaps.is_empty() && gaps.first().is_none());
        for lost in [64..80, 16..32, 96..112, 32..48, 40..40] {
            gaps.add(lost);
        }
        assert_eq!(gaps.iter().cloned().collect::<Vec<_>>(), [16..48, 64..80, 96..112]);
        assert_eq!(gaps.tokens(), 64);
        assert!(gaps.touch(47..50) && !gaps.touch(48..64) && gaps.touch(0..200));
        gaps.fill(5);
        assert_eq!(gaps.first(), Some(21..48));
        gaps.fill(27);
        assert_eq!(gaps.first(), Some(64..80));
        // Over everything that is there.
        gaps.add(80..96);
        assert_eq!(gaps.iter().cloned().collect::<Vec<_>>(), std::slice::from_ref(&(64..112)));
        gaps.add(0..200);
        assert_eq!(gaps.first(), Some(0..200));
        gaps.clear();
        assert!(gaps.is_empty());
    }
}
