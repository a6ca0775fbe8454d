//! Stop strings over text that arrives in pieces.

/// Finds the first stop string in a text that arrives in pieces, and holds
/// back whatever could still become one. What is found does not depend on how
/// the text was cut.
pub(super) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, PartialEq)]
pub(super) struct Passed {
    /// Text that no stop string can reach any more.
    pub text: String,
    /// A stop string ended; `text` ends where it began.
    pub stopped: bool,
}

impl StopMatcher {
    /// None of `stops` is empty.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// The next piece. After `stopped` there must be no other.
    pub(super) fn push(&mut self, piece: &str) -> Passed {
        if self.stops.is_empty() {
            return Passed { text: piece.to_owned(), stopped: false };
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        // The one that ends first wins; of those the one that began first.
        let found = self.stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at))).min();
        if let Some((_, start)) = found {
            text.truncate(start);
            return Passed { text, stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&text, stop)).max().unwrap_or(0);
        self.held = text.split_off(text.len() - keep);
        Passed { text, stopped: false }
    }

    /// The text has ended: what was held back is text.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that is a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = Vec::new();
        for piece in pieces {
            let passed = matcher.push(piece);
            out.push(passed.text);
            if passed.stopped {
                return (out, true);
            }
        }
        out.push(matcher.finish());
        (out, false)
    }

    #[test]
    fn a_possible_beginning_is_held_back_until_it_is_decided() {
        assert_eq!(run(&["END"], &["a E", "N", "x"]), (vec!["a ".into(), "".into(), "ENx".into(), "".into()], false));
        assert_eq!(run(&["END"], &["a E", "ND b"]), (vec!["a ".into(), "".into()], true));
        assert_eq!(run(&["END"], &["a EN"]), (vec!["a ".into(), "EN".into()], false));
        assert_eq!(run(&["é!"], &["caf", "é", "!"]), (vec!["caf".into(), "".into(), "".into()], true));
    }

    #[test]
    fn the_stop_that_ends_first_wins() {
        assert_eq!(run(&["bcd", "c"], &["abcd"]), (vec!["ab".into()], true));
        assert_eq!(run(&["c", "bc"], &["abcd"]), (vec!["a".into()], true));
    }

    proptest! {
        #[test]
        fn how_the_text_is_cut_does_not_matter(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<bool>(), 24),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let whole = run(&stops, &[&text]);
            let mut pieces = vec![String::new()];
            for (c, cut) in text.chars().zip(cuts) {
                if cut { pieces.push(String::new()); }
                pieces.last_mut().unwrap().push(c);
            }
            let cut = run(&stops, &pieces.iter().map(String::as_str).collect::<Vec<_>>());
            prop_assert_eq!(cut.0.concat(), whole.0.concat());
            prop_assert_eq!(cut.1, whole.1);
            prop_assert_eq!(whole.1, stops.iter().any(|s| text.contains(s)));
        }
    }
}
