//! Many requests at once, for a while: nothing leaks, nothing fails.

use std::time::{Duration, Instant};

use distkv::device::tensor::DType;
use distkv::engine::{Output, Request};
use distkv::kv::rblock::KvDtype;
use distkv::model::sampler::SamplingParams;
use distkv::node::transports::FabricChoice;
use hdrhistogram::Histogram;
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::Settings;
use crate::cluster::{Setup, prompt};

const CLIENTS: u64 = 256;

#[derive(Default)]
struct Tally {
    finished: u64,
    cancelled: u64,
    tokens: u64,
    failed: Vec<String>,
    gaps: Option<Histogram<u64>>,
}

/// 256 clients with prompts and answers of mixed lengths, some of which leave.
pub fn many_requests(settings: &Settings) -> Result<String, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let config = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536,
        "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "attention_bias": false, "hidden_act": "silu", "eos_token_id": 2
    });
    distkv::model::synth::synth_to(dir.path(), &config, 7, DType::Bf16).map_err(|e| e.to_string())?;
    let files = distkv::model::load::open(dir.path()).map_err(|e| e.to_string())?;
    let mut setup = Setup::new(FabricChoice::Shm, KvDtype::Bf16, &[200_000]);
    (setup.device, setup.chunk, setup.sequences) = (settings.device, 2048, 256);
    setup.taps = false;
    let cluster = setup.start(&files);
    let until = Instant::now() + Duration::from_secs(settings.seconds);
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let handle = cluster.node.handle().expect("an engine");
                scope.spawn(move || one_client(client, until, handle))
            })
            .collect();
        clients.into_iter().map(|c| c.join().expect("no panic")).collect()
    });
    cluster.assert_all_returned();
    cluster.stop();
    let mut gaps = histogram();
    let mut all = Tally::default();
    for tally in tallies {
        all.finished += tally.finished;
        all.cancelled += tally.cancelled;
        all.tokens += tally.tokens;
        all.failed.extend(tally.failed);
        if let Some(more) = tally.gaps {
            gaps.add(more).map_err(|e| e.to_string())?;
        }
    }
    if let Some(first) = all.failed.first() {
        return Err(format!("{} requests failed, the first: {first}", all.failed.len()));
    }
    println!("    inter-token latency of {CLIENTS} clients, microseconds:");
    for quantile in [0.5, 0.9, 0.99, 0.999, 1.0] {
        println!("    {:>7} {:>9}", format!("{}%", quantile * 100.0), gaps.value_at_quantile(quantile) / 1000);
    }
    Ok(format!(
        "{} s: {} requests finished, {} left, {} tokens, {:.0} tokens/s, p99 between tokens {:.1} ms; all memory came back",
        settings.seconds,
        all.finished,
        all.cancelled,
        all.tokens,
        all.tokens as f64 / settings.seconds as f64,
        gaps.value_at_quantile(0.99) as f64 / 1e6
    ))
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds")
}

fn one_client(client: u64, until: Instant, handle: &distkv::engine::EngineHandle) -> Tally {
    let mut random = ChaCha8Rng::seed_from_u64(client);
    let mut tally = Tally::default();
    let mut gaps = histogram();
    while Instant::now() < until {
        let len = match random.random_range(0..10) {
            0 => random.random_range(2000..4000),
            1..=3 => random.random_range(200..1000),
            _ => random.random_range(1..100),
        };
        let answer = random.random_range(1..200);
        let leaves = random.random_bool(0.1).then(|| random.random_range(0..answer));
        let sampling = match random.random_range(0..3) {
            0 => SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            1 => SamplingParams { temperature: 0.8, top_p: 0.9, top_k: 40, ..SamplingParams::default() },
            _ => SamplingParams { repetition_penalty: 1.1, logprobs: Some(5), ..SamplingParams::default() },
        };
        let request = Request {
            prompt: prompt(random.random(), len),
            sampling,
            max_tokens: answer,
            stop_tokens: Vec::new(),
            prompt_logprobs: false,
            resume: Vec::new(),
        };
        let mut stream = match handle.submit(request) {
            Ok(stream) => stream,
            Err(error) => {
                tally.failed.push(error.to_string());
                break;
            }
        };
        let (mut got, mut last) = (0, None);
        loop {
            match stream.blocking_next() {
                Some(Output::Token { .. }) => {
                    got += 1;
                    tally.tokens += 1;
                    let now = Instant::now();
                    if let Some(last) = last.replace(now) {
                        gaps.saturating_record((now - last).as_nanos() as u64);
                    }
                    if leaves.is_some_and(|at| got > at) {
                        tally.cancelled += 1;
                        break;
                    }
                }
                Some(Output::Finished { .. }) => {
                    tally.finished += 1;
                    if got != answer {
                        tally.failed.push(format!("{got} tokens of {answer}"));
                    }
                    break;
                }
                Some(Output::Failed { message }) => {
                    tally.failed.push(message);
                    break;
                }
                Some(_) => {}
                None => {
                    tally.failed.push("a stream ended without a last word".into());
                    break;
                }
            }
        }
        std::thread::sleep(Duration::from_millis(random.random_range(0..20)));
    }
    tally.gaps = Some(gaps);
    tally
}
