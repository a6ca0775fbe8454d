//! A model of bytes and an engine that follows a script, so that the server is
//! tested alone.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;
use distkv::engine::{EngineHandle, EngineStats, FinishReason, Output, Rejected, Request, Submit};
use distkv::model::sampler::{SamplingParams, TokenLogprobs};
use distkv::server::{Model, ServerState, TextModel, TextStream};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

/// Begins a text.
pub const BOS: u32 = 256;
/// Ends a generation.
pub const EOS: u32 = 257;
/// Bytes and the two special tokens.
pub const VOCAB: usize = 258;

/// A token a byte.
pub struct ToyText;

impl TextModel for ToyText {
    fn encode(&self, text: &str, add_special: bool) -> anyhow::Result<Vec<u32>> {
        Ok(add_special.then_some(BOS).into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    fn decode(&self, tokens: &[u32], _: bool) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&tokens.iter().flat_map(|&id| self.token_bytes(id)).collect::<Vec<u8>>()).into())
    }

    fn stream(&self) -> Box<dyn TextStream + '_> {
        Box::new(ToyStream(Vec::new()))
    }

    fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        u8::try_from(id).into_iter().collect()
    }

    fn render(&self, messages: &[Value], tools: Option<&[Value]>, generation: bool) -> anyhow::Result<String> {
        let mut prompt = tools.map_or(String::new(), |tools| format!("[{} tools]", tools.len()));
        for message in messages {
            let role = message["role"].as_str().unwrap_or_default();
            if !["system", "user", "assistant", "tool"].contains(&role) {
                bail!("role {role:?} is not known");
            }
            prompt += &format!("<{role}>{}", message["content"].as_str().unwrap_or_default());
            if let Some(calls) = message.get("tool_calls") {
                prompt += &calls.to_string();
            }
        }
        Ok(prompt + if generation { "<assistant>" } else { "" })
    }
}

struct ToyStream(Vec<u8>);

impl TextStream for ToyStream {
    fn push(&mut self, id: u32) -> anyhow::Result<Option<String>> {
        self.0.extend(u8::try_from(id));
        Ok(match std::str::from_utf8(&self.0) {
            Ok(text) if !text.is_empty() => {
                let text = text.to_owned();
                self.0.clear();
                Some(text)
            }
            _ => None,
        })
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.0)).into()
    }
}

/// One request as the script sees it.
pub struct Submitted {
    pub request: Request,
    pub outputs: UnboundedSender<Output>,
    pub cancelled: Arc<AtomicBool>,
    /// Requests before it.
    pub index: usize,
}

impl Submitted {
    pub fn send(&self, output: Output) {
        // The receiver is gone when the client is: the script need not care.
        let _ = self.outputs.send(output);
    }

    pub fn started(&self, cached_tokens: usize) {
        self.send(Output::Started { cached_tokens });
    }

    /// Emits `text`, a token a byte, with logprobs where they were asked for.
    pub fn say(&self, text: &str) {
        for byte in text.bytes() {
            let id = u32::from(byte);
            let logprobs = self.request.sampling.logprobs.map(|count| logprobs(id, count));
            self.send(Output::Token { id, logprobs });
        }
    }

    pub fn finish(&self, reason: FinishReason) {
        self.send(Output::Finished { reason });
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// Token `id` with −0.25 and `count` alternatives: itself, then its followers.
pub fn logprobs(id: u32, count: u32) -> TokenLogprobs {
    TokenLogprobs { chosen: -0.25, top: (0..count).map(|i| (id + i, -0.25 - i as f32)).collect() }
}

type Script = dyn Fn(Submitted) -> Result<(), Rejected> + Send + Sync;

/// Runs a script at each submission.
pub struct ToyEngine {
    script: Box<Script>,
    submitted: Mutex<usize>,
}

impl Submit for ToyEngine {
    fn submit(
        &self,
        request: Request,
        outputs: UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<(), Rejected> {
        let mut submitted = self.submitted.lock().unwrap();
        let index = *submitted;
        *submitted += 1;
        drop(submitted);
        (self.script)(Submitted { request, outputs, cancelled, index })
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: 2, blocks_total: 8, blocks_free: 4, ..EngineStats::default() }
    }
}

/// A model served by `script`, with a context of 128 tokens.
pub fn model(script: impl Fn(Submitted) -> Result<(), Rejected> + Send + Sync + 'static) -> Model {
    Model {
        engine: EngineHandle::new(Arc::new(ToyEngine { script: Box::new(script), submitted: Mutex::new(0) })),
        text: Arc::new(ToyText),
        name: "toy".into(),
        aliases: vec!["org/toy".into()],
        max_len: 128,
        vocab: VOCAB,
        eos: vec![EOS],
        defaults: SamplingParams::default(),
    }
}

/// A model that answers every request with `text` and stops.
pub fn says(text: &'static str) -> Model {
    model(move |submitted| {
        submitted.started(0);
        submitted.say(text);
        submitted.finish(FinishReason::Stop);
        Ok(())
    })
}

/// A ready server's state.
pub fn state(model: Option<Model>) -> ServerState {
    let engine = model.as_ref().map(|model| model.engine.clone());
    let stats = move || engine.as_ref().map(EngineHandle::stats).unwrap_or_default();
    let cluster = || json!({"self": "0", "instances": [], "loans": [], "links": []});
    ServerState::new(model, Arc::new(stats), Arc::new(cluster), Arc::new(AtomicBool::new(true)))
}
