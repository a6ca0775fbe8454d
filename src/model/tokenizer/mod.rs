//! Text to tokens and back, by `tokenizer.json` or by a GGUF's metadata.

mod gguf;
mod stream;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer as Inner;

use crate::model::error::{ModelError, Result};
use crate::model::gguf::Gguf;

pub use stream::DecodeStream;

/// A model's tokenizer. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Inner,
    spelling: Spelling,
    /// Put before a text that is encoded with special tokens, where the inner
    /// tokenizer has no post-processor of its own to do it.
    prefix: Option<u32>,
    /// Put after it.
    suffix: Option<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
}

/// How tokens spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0xAB>` is a byte; `strip` spaces at
    /// the beginning of a text are the encoder's and not the text's.
    Pieces {
        /// Spaces that the encoder put there.
        strip: usize,
    },
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and from `tokenizer_config.json` beside it which
    /// tokens begin and end a text; `None` where there is no `tokenizer.json`.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(ModelError::io(&path, e)),
        };
        let config = crate::model::load::read_json(&dir.join("tokenizer_config.json"))?;
        Self::from_json(&path.display().to_string(), &text, config.as_ref()).map(Some)
    }

    /// From the contents of `tokenizer.json` and `tokenizer_config.json`;
    /// `file` is for messages.
    pub fn from_json(file: &str, text: &[u8], config: Option<&Value>) -> Result<Self> {
        let inner = Inner::from_bytes(text).map_err(|e| ModelError::file(file, format!("not a tokenizer: {e}")))?;
        let id = |name: &str| special_text(config?, name).and_then(|token| inner.token_to_id(token));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        Self::new(file, inner, None, None, bos, eos)
    }

    /// From a GGUF's metadata; `None` where it has no tokenizer.
    pub fn from_gguf(gguf: &Gguf<'_>) -> Result<Option<Self>> {
        gguf::build(gguf)
    }

    fn new(
        file: &str,
        mut inner: Inner,
        prefix: Option<u32>,
        suffix: Option<u32>,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<Self> {
        // Lengths are the engine's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        let decoder = serde_json::to_value(inner.get_decoder())
            .map_err(|e| ModelError::file(file, format!("its decoder cannot be read: {e}")))?;
        let spelling = Spelling::of(&decoder).ok_or_else(|| {
            let problem = format!("{} is not supported", crate::model::fields::show(&decoder));
            ModelError::field(file, "decoder", problem)
        })?;
        Ok(Self { shared: Arc::new(Shared { inner, spelling, prefix, suffix, bos, eos }) })
    }

    /// Tokens of `text`. Special tokens spelt out in it are taken as such;
    /// `add_special` also puts those around it that the model expects.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding =
            self.shared.inner.encode_fast(text, add_special).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        let (prefix, suffix) = (self.shared.prefix.filter(|_| add_special), self.shared.suffix.filter(|_| add_special));
        if prefix.is_none() && suffix.is_none() {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok(prefix.into_iter().chain(encoding.get_ids().iter().copied()).chain(suffix).collect())
    }

    /// Text of `ids`, from the beginning of a text. Bytes that are not UTF-8
    /// become U+FFFD, ids outside the vocabulary nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut bytes = Vec::new();
        for id in ids {
            self.append_bytes(*id, skip_special, &mut bytes);
        }
        let skip = match self.shared.spelling {
            Spelling::ByteLevel => 0,
            Spelling::Pieces { strip } => bytes.iter().take(strip).take_while(|b| **b == b' ').count(),
        };
        Ok(String::from_utf8_lossy(&bytes[skip..]).into_owned())
    }

    /// Decodes tokens one at a time, as the continuation of some text, without
    /// special tokens.
    pub fn stream(&self) -> DecodeStream {
        DecodeStream::new(self.clone(), true)
    }

    /// As [`stream`](Self::stream), with special tokens spelt out.
    pub fn stream_with_special(&self) -> DecodeStream {
        DecodeStream::new(self.clone(), false)
    }

    /// Text of one token, special or not.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// Bytes of one token, special or not; part of a character, maybe. None for
    /// an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.append_bytes(id, false, &mut bytes);
        bytes
    }

    /// Id of the token that is spelt so, e.g. `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// Tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.shared.inner.get_vocab_size(true)
    }

    /// Token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.shared.bos
    }

    /// Token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.shared.eos
    }

    fn append_bytes(&self, id: u32, skip_special: bool, bytes: &mut Vec<u8>) {
        let added = self.shared.inner.get_added_vocabulary();
        let Some(token) = added.simple_id_to_token(id).or_else(|| self.shared.inner.id_to_token(id)) else { return };
        if skip_special && added.is_special_token(&token) {
            return;
        }
        self.shared.spelling.spell(&token, bytes);
    }
}

impl Spelling {
    /// What a `decoder` of tokenizer.json does, if it is one of ours.
    fn of(decoder: &Value) -> Option<Self> {
        let parts: Vec<&Value> = match decoder["type"].as_str()? {
            "Sequence" => decoder["decoders"].as_array()?.iter().collect(),
            _ => vec![decoder],
        };
        let mut spelling = None;
        for part in parts {
            match (part["type"].as_str()?, &mut spelling) {
                ("ByteLevel", None) => spelling = Some(Self::ByteLevel),
                ("Replace", None) if part["pattern"]["String"] == "▁" && part["content"] == " " => {
                    spelling = Some(Self::Pieces { strip: 0 });
                }
                ("Metaspace", None) if part["replacement"] == "▁" => {
                    let strip = usize::from(part["prepend_scheme"] != "never");
                    spelling = Some(Self::Pieces { strip });
                }
                ("ByteFallback" | "Fuse", _) => {}
                ("Strip", Some(Self::Pieces { strip })) if part["content"] == " " && part["stop"] == 0 => {
                    *strip = usize::try_from(part["start"].as_u64()?).ok()?;
                }
                _ => return None,
            }
        }
        spelling
    }

    fn spell(self, token: &str, bytes: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let from = bytes.len();
                for c in token.chars() {
                    match byte_of(c) {
                        Some(byte) => bytes.push(byte),
                        None => {
                            // An added token, spelt as it is.
                            bytes.truncate(from);
                            bytes.extend_from_slice(token.as_bytes());
                            return;
                        }
                    }
                }
            }
            Self::Pieces { .. } => match byte_piece(token) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend_from_slice(token.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// The byte that SentencePiece's `<0xAB>` stands for.
fn byte_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The byte that a character stands for in GPT-2's byte-level alphabet:
/// printable Latin-1 stands for itself, the 68 others follow from U+0100.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        n @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(n as u8),
        n @ 0x100..=0x120 => Some((n - 0x100) as u8),
        n @ 0x121..=0x142 => Some((n - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The character that stands for a byte in GPT-2's byte-level alphabet.
pub(crate) fn char_of(byte: u8) -> char {
    let n = u32::from(byte);
    let code = match n {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => n,
        0..=0x20 => n + 0x100,
        0x7f..=0xa0 => n - 0x7f + 0x121,
        _ => 0x143,
    };
    char::from_u32(code).unwrap_or('\u{fffd}')
}

/// `bos_token` and the like of `tokenizer_config.json`: text, or an object with
/// the text in it.
pub(crate) fn special_text<'a>(config: &'a Value, name: &str) -> Option<&'a str> {
    let token = config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str())
}

#[cfg(test)]
mod tests;
