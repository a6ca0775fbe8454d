//! Tokens to text as they come.

use crate::model::error::Result;
use crate::model::tokenizer::Tokenizer;

/// Decodes tokens one at a time. What it yields, end to end, is the text of all
/// tokens; it never yields part of a character. Costs as much as the tokens'
/// text, however long the stream.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes of a character that has begun: at most 3 between calls.
    pending: Vec<u8>,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, pending: Vec::new() }
    }

    /// Takes in a token; text, if a character is complete.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.tokenizer.append_bytes(id, self.skip_special, &mut self.pending);
        let text = take_text(&mut self.pending, false);
        Ok((!text.is_empty()).then_some(text))
    }

    /// What is left when no token follows: U+FFFD for a broken-off character.
    pub fn finish(mut self) -> String {
        take_text(&mut self.pending, true)
    }
}

/// Takes the text that `bytes` begins with; what is not UTF-8 becomes U+FFFD.
/// A character that is only begun stays, unless this is the `end`.
fn take_text(bytes: &mut Vec<u8>, end: bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut kept = 0;
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let invalid = chunk.invalid();
        let only_begun = || std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        // Only what stands at the end can be a beginning.
        if !invalid.is_empty() && !end && chunks.peek().is_none() && only_begun() {
            kept = invalid.len();
        } else if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    let taken = bytes.len() - kept;
    bytes.drain(..taken);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_of_text_join_to_the_text(text in ".*", cuts in prop::collection::vec(0usize..64, 0..8)) {
            let (mut pending, mut joined) = (Vec::new(), String::new());
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                pending.extend_from_slice(head);
                joined.push_str(&take_text(&mut pending, false));
                prop_assert!(pending.len() < 4);
                rest = tail;
            }
            pending.extend_from_slice(rest);
            joined.push_str(&take_text(&mut pending, true));
            prop_assert_eq!(joined, text);
        }

        #[test]
        fn any_bytes_join_to_what_they_are_at_once(bytes in prop::collection::vec(any::<u8>(), 0..64), cut in 0usize..64) {
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            let mut pending = head.to_vec();
            let mut joined = take_text(&mut pending, false);
            pending.extend_from_slice(tail);
            joined.push_str(&take_text(&mut pending, true));
            prop_assert_eq!(joined, String::from_utf8_lossy(&bytes));
        }
    }
}
