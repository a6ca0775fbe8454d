//! The server's text side over a model's own tokenizer and chat template.

use serde_json::Value;

use super::state::{TextModel, TextStream};
use crate::model::chat::ChatTemplate;
use crate::model::tokenizer::{DecodeStream, Tokenizer};

/// A model's tokenizer and, where it has one, its chat template.
pub struct ModelText {
    tokenizer: Tokenizer,
    chat: Option<ChatTemplate>,
}

impl ModelText {
    /// Text for a model.
    pub fn new(tokenizer: Tokenizer, chat: Option<ChatTemplate>) -> Self {
        Self { tokenizer, chat }
    }
}

impl TextModel for ModelText {
    fn encode(&self, text: &str, add_special: bool) -> anyhow::Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, add_special)?)
    }

    fn decode(&self, tokens: &[u32], skip_special: bool) -> anyhow::Result<String> {
        Ok(self.tokenizer.decode(tokens, skip_special)?)
    }

    fn stream(&self) -> Box<dyn TextStream + '_> {
        Box::new(Decoding(Some(self.tokenizer.stream())))
    }

    fn token_text(&self, id: u32) -> String {
        self.tokenizer.token_text(id)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer.token_bytes(id)
    }

    fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> anyhow::Result<String> {
        let Some(chat) = &self.chat else {
            anyhow::bail!("this model has no chat template, and a chat needs one; use /v1/completions");
        };
        Ok(chat.render(messages, tools, add_generation_prompt)?)
    }
}

/// Empty once finished.
struct Decoding(Option<DecodeStream>);

impl TextStream for Decoding {
    fn push(&mut self, id: u32) -> anyhow::Result<Option<String>> {
        Ok(match &mut self.0 {
            Some(stream) => stream.push(id)?,
            None => None,
        })
    }

    fn finish(&mut self) -> String {
        self.0.take().map(DecodeStream::finish).unwrap_or_default()
    }
}
