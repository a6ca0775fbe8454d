//! The real model of our tests: SmolLM2-135M-Instruct as a GGUF, which
//! `scripts/setup` fetches.
//!
//! Use it as `#[path = "common/smollm2.rs"] mod smollm2;`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// `tests/golden/smollm2.json`.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// Texts and llama.cpp's tokens for them.
    pub tokens: Vec<Tokens>,
    /// Prompts and their greedy continuations.
    pub greedy: Vec<Greedy>,
}

/// A text and its tokens.
#[derive(Debug, Deserialize)]
pub struct Tokens {
    /// Text.
    pub text: String,
    /// llama.cpp's ids.
    pub ids: Vec<u32>,
}

/// A prompt and its greedy continuations.
#[derive(Debug, Deserialize)]
pub struct Greedy {
    /// Text; its special tokens are spelt out.
    pub prompt: String,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// llama.cpp's continuation, the end of text included.
    pub llama_cpp: Vec<u32>,
    /// Whether both continuations are the same.
    pub exact: bool,
    /// The continuation in float32 arithmetic.
    pub float32: Vec<u32>,
    /// The lead of the best logit at each step of it.
    pub float32_margins: Vec<f32>,
    /// The largest logits after the prompt, in float32.
    pub float32_top_logits: Vec<(u32, f32)>,
}

/// Below this lead of the best logit arithmetic of fewer bits than f32's may decide
/// otherwise, as llama.cpp's does: see `golden/README.md`.
const SMALL_LEAD: f32 = 0.3;

impl Greedy {
    /// How many of `found`'s tokens are the float32 continuation's before they part,
    /// and how many that has before the end of the text.
    ///
    /// # Errors
    ///
    /// A step at which they part though the best logit has more than a small lead.
    pub fn common(&self, found: &[u32], eos: &[u32]) -> Result<(usize, usize), String> {
        let end = self.float32.iter().position(|t| eos.contains(t)).unwrap_or(self.float32.len());
        let same = found.iter().zip(&self.float32[..end]).take_while(|(a, b)| a == b).count();
        if same < end && self.float32_margins[same] >= SMALL_LEAD {
            let lead = self.float32_margins[same];
            return Err(format!("{:?}: another token at step {same}, where one leads by {lead}", self.prompt));
        }
        Ok((same, end))
    }
}

/// Reads the goldens.
pub fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    serde_json::from_slice(&std::fs::read(path).expect("readable")).expect("a golden")
}

/// Where the model is: `DISTKV_TEST_MODEL`, or a .gguf file in or below
/// `.cache/`.
pub fn path() -> PathBuf {
    if let Some(path) = std::env::var_os("DISTKV_TEST_MODEL") {
        return path.into();
    }
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache");
    let mut folders = vec![cache];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.file_name().is_some_and(|n| n == "SmolLM2-135M-Instruct.Q4_1.gguf") {
                return path;
            }
            if path.is_dir() && path.file_name().is_some_and(|n| n != "venv") {
                folders.push(path);
            }
        }
    }
    panic!("this test needs SmolLM2-135M-Instruct.Q4_1.gguf: run scripts/setup, or set DISTKV_TEST_MODEL to its path");
}
