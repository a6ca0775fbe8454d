//! The suite of the official Python client against the toy model, so that the
//! suite itself is known to pass where only the server is under test.

use std::collections::HashSet;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use distkv::engine::{EngineHandle, EngineStats, FinishReason, Output, Rejected, Request, Submit};
use distkv::model::sampler::Sampler;
use distkv::server::Model;
use tokio::sync::mpsc::UnboundedSender;

use crate::http::Server;
use crate::toy::{self, BOS, EOS, VOCAB};

/// Tokens of a block of the pretended prefix cache.
const BLOCK: usize = 16;

/// A language model of a sort: each byte has a few likely followers. Requests
/// run in threads of their own, through the real sampler.
#[derive(Default)]
struct Babbler {
    running: Arc<AtomicUsize>,
    generated: Arc<AtomicU64>,
    /// Prompt beginnings, whole blocks long, that were seen.
    cache: Mutex<HashSet<Vec<u32>>>,
}

/// Logits after `context`.
fn logits(context: &[u32]) -> Vec<f32> {
    let seed = context
        .iter()
        .rev()
        .take(2)
        .fold(context.len() as u32 % 7, |hash, &token| (hash ^ token).wrapping_mul(0x0100_0193).rotate_left(11));
    (0..VOCAB as u32)
        .map(|id| {
            let noise = (seed ^ id.wrapping_mul(0x9e37_79b1)).wrapping_mul(0x85eb_ca6b) >> 8;
            let logit = noise as f32 / (1 << 24) as f32 * 6.0;
            match id {
                0x61..=0x7a => logit + 4.0,
                0x20 => logit + 5.0,
                EOS => logit - 2.0,
                BOS => -20.0,
                _ => logit - 12.0,
            }
        })
        .collect()
}

impl Babbler {
    fn cached(&self, prompt: &[u32]) -> usize {
        let mut cache = self.cache.lock().unwrap();
        // One token at least is computed: the first logits come from it.
        let blocks = 1..=(prompt.len().saturating_sub(1) / BLOCK);
        let hits = blocks.clone().take_while(|n| cache.contains(&prompt[..n * BLOCK])).count();
        cache.extend(blocks.map(|n| prompt[..n * BLOCK].to_vec()));
        hits * BLOCK
    }
}

fn babble(request: &Request, cached_tokens: usize, generated: &AtomicU64, emit: impl Fn(Output) -> bool) {
    let mut sampler = Sampler::new(&request.sampling, &request.prompt, rand::random());
    emit(Output::Started { cached_tokens });
    let mut context = request.prompt.clone();
    if request.prompt_logprobs {
        let rows = (1..context.len()).map(|n| sampler.prompt_logprobs(&logits(&context[..n]), context[n]));
        let logprobs = rows.collect::<Result<_, _>>().unwrap();
        emit(Output::PromptLogprobs(logprobs));
    }
    for _ in 0..request.max_tokens {
        let (id, logprobs) = sampler.sample(&mut logits(&context)).unwrap();
        if request.stop_tokens.contains(&id) {
            emit(Output::Finished { reason: FinishReason::Stop });
            return;
        }
        context.push(id);
        generated.fetch_add(1, Ordering::Relaxed);
        if !emit(Output::Token { id, logprobs }) {
            return;
        }
        // A pace at which a client can go in the middle.
        std::thread::sleep(Duration::from_millis(1));
    }
    emit(Output::Finished { reason: FinishReason::Length });
}

impl Submit for Babbler {
    fn submit(
        &self,
        request: Request,
        outputs: UnboundedSender<Output>,
        cancelled: Arc<std::sync::atomic::AtomicBool>,
    ) -> Result<(), Rejected> {
        let cached = self.cached(&request.prompt);
        let (running, generated) = (self.running.clone(), self.generated.clone());
        running.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            babble(&request, cached, &generated, |output| {
                outputs.send(output).is_ok() && !cancelled.load(Ordering::Acquire)
            });
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(())
    }

    fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.load(Ordering::SeqCst),
            generated_tokens: self.generated.load(Ordering::Relaxed),
            ..EngineStats::default()
        }
    }
}

#[test]
#[ignore = "needs python3 with tests/openai/requirements.txt; DISTKV_PYTHON names it"]
fn the_official_client_is_content() {
    let model = Model { engine: EngineHandle::new(Arc::new(Babbler::default())), max_len: 2048, ..toy::says("") };
    let server = Server::start(model);
    let python = std::env::var("DISTKV_PYTHON").unwrap_or_else(|_| "python3".into());
    let suite = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai/test_openai.py");
    let status = Command::new(python)
        .arg(suite)
        .env("DISTKV_URL", server.url())
        .env("DISTKV_MODEL", "toy")
        .status()
        .expect("python3 starts");
    assert!(status.success(), "the suite failed");
}
