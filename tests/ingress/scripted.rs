//! An ingress whose engine, ledger and peers follow scripts.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use distkv::control::placement::{Candidate, Load};
use distkv::engine::{EngineHandle, EngineStats, FinishReason, Output, Rejected, Request, Stream, Submit};
use distkv::ingress::wire::{Order, Said};
use distkv::ingress::{Answer, Directory, Identity, Ingress, IngressStats, Keys};
use distkv::kv::rblock::InstanceId;
use distkv::model::sampler::{SamplingParams, TokenLogprobs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedSender;

pub const VOCAB: usize = 1000;
pub const MAX_TOKENS: usize = 40;
/// Long enough that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The token that every engine here generates as the `k`-th after `prompt`.
pub fn token(prompt: &[u32], k: usize) -> u32 {
    (prompt.iter().sum::<u32>() + 7 * k as u32) % VOCAB as u32
}

/// What is said of the `k`-th token where logprobs are asked for.
pub fn logprobs(k: usize) -> TokenLogprobs {
    TokenLogprobs { chosen: -(k as f32), top: vec![(k as u32, -0.5)] }
}

pub fn request(prompt: &[u32]) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: SamplingParams { logprobs: Some(1), ..SamplingParams::default() },
        max_tokens: MAX_TOKENS,
        stop_tokens: Vec::new(),
        prompt_logprobs: true,
        resume: Vec::new(),
    }
}

pub fn identity(instance: u64) -> Identity {
    Identity { instance: InstanceId(instance), model: [3; 32], vocab: VOCAB, block_tokens: 16, max_model_len: 4096 }
}

pub fn keys() -> Keys {
    Keys::new([5; 32])
}

/// An engine that answers at once, or refuses.
#[derive(Default)]
pub struct Engine {
    pub waiting: usize,
    pub refuses: Mutex<Option<Rejected>>,
    pub seen: Mutex<Vec<Request>>,
}

impl Submit for Engine {
    fn submit(&self, request: Request, outputs: UnboundedSender<Output>, _: Arc<AtomicBool>) -> Result<(), Rejected> {
        self.seen.lock().unwrap().push(request.clone());
        if let Some(rejected) = self.refuses.lock().unwrap().clone() {
            return Err(rejected);
        }
        for output in rest(&request) {
            // A client that is gone is no matter.
            let _ = outputs.send(output);
        }
        Ok(())
    }

    fn stats(&self) -> EngineStats {
        EngineStats { waiting: self.waiting, blocks_total: 100, blocks_free: 100, ..EngineStats::default() }
    }
}

/// All that an engine has to say of a request.
pub fn rest(request: &Request) -> Vec<Output> {
    let Request { prompt, resume, .. } = request;
    assert!(resume.iter().enumerate().all(|(k, &id)| id == token(prompt, k)), "it resumes from what was sent");
    let mut outputs = vec![Output::Started { cached_tokens: resume.len() }];
    if request.prompt_logprobs {
        outputs.push(Output::PromptLogprobs((1..prompt.len()).map(logprobs).collect()));
    }
    let id = |k| Output::Token { id: token(prompt, k), logprobs: Some(logprobs(k)) };
    outputs.extend((resume.len()..MAX_TOKENS).map(id));
    outputs.push(Output::Finished { reason: FinishReason::Length });
    outputs
}

/// The same as an answer's frames; the engine's `Taken` before them.
pub fn frames(request: &Request) -> Vec<Said> {
    let mut index = request.resume.len() as u32;
    let mut said = vec![Said::Taken];
    for output in rest(request) {
        let token = matches!(output, Output::Token { .. });
        said.extend(Said::of(output, index));
        index += u32::from(token);
    }
    said
}

/// A ledger of instances at addresses.
#[derive(Default)]
pub struct Ledger {
    pub candidates: Mutex<Vec<Candidate>>,
    pub down: Mutex<Vec<InstanceId>>,
}

impl Ledger {
    pub fn add(&self, instance: u64, address: SocketAddr) {
        let load = Load { block_tokens: 16, total: 100, free: 100, running: 0, waiting: 0, queued: 0 };
        let candidate = Candidate { instance: InstanceId(instance), address: address.to_string(), load };
        self.candidates.lock().unwrap().push(candidate);
    }
}

impl Directory for Ledger {
    fn candidates(&self) -> Vec<Candidate> {
        self.candidates.lock().unwrap().clone()
    }

    fn is_up(&self, instance: InstanceId) -> bool {
        !self.down.lock().unwrap().contains(&instance)
    }
}

/// An ingress, and what it stands on. Whoever comes has to wait here.
pub struct Stage {
    pub handle: EngineHandle,
    pub engine: Arc<Engine>,
    pub ledger: Arc<Ledger>,
    pub stats: IngressStats,
}

impl Stage {
    pub fn new() -> Self {
        let engine = Arc::new(Engine { waiting: 1, ..Engine::default() });
        let (ledger, stats) = (Arc::new(Ledger::default()), IngressStats::default());
        let ingress = Ingress::new(identity(1), engine.clone(), keys(), ledger.clone(), stats.clone());
        Self { handle: EngineHandle::new(Arc::new(ingress)), engine, ledger, stats }
    }

    /// A peer that answers each order by `script`.
    pub async fn peer<F: Future<Output = ()> + Send + 'static>(
        &self,
        instance: u64,
        script: impl Fn(Heard) -> F + Send + Sync + 'static,
    ) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.ledger.add(instance, listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                script(Heard::read(socket).await).await;
            }
        });
    }

    pub fn count(&self, name: &str) -> u64 {
        self.stats.json()[name].as_u64().unwrap()
    }

    /// Figures of losses, by how they showed.
    pub fn reasons(&self) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        self.stats.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text.lines().filter(|line| line.starts_with("requests_continued_total{")).collect()
    }
}

/// An order as a peer heard it, and the way to answer.
pub struct Heard {
    pub order: Order,
    pub answer: Answer,
    pub socket: TcpStream,
}

impl Heard {
    async fn read(mut socket: TcpStream) -> Self {
        let mut bytes = Vec::new();
        let body = loop {
            socket.read_buf(&mut bytes).await.unwrap();
            let text = String::from_utf8_lossy(&bytes);
            let Some(head) = text.find("\r\n\r\n") else { continue };
            let length = text.split("Content-Length: ").nth(1).unwrap().split('\r').next().unwrap();
            if bytes.len() >= head + 4 + length.parse::<usize>().unwrap() {
                break bytes.split_off(text.find("\r\n\r\n").unwrap() + 4);
            }
        };
        let order = keys().open_order(&body).unwrap().unwrap();
        let answer = keys().answer(&order.id);
        Self { order, answer, socket }
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        // The ingress may have closed already.
        let _ = self.socket.write_all(bytes).await;
    }

    pub async fn accept(&mut self) {
        self.write(b"HTTP/1.0 200 OK\r\n\r\n").await;
    }

    pub async fn say(&mut self, said: Said) {
        let frame = self.answer.say(said);
        self.write(&frame).await;
    }

    /// Answers as it should, up to and with `count` tokens.
    pub async fn begin(&mut self, count: usize) {
        self.accept().await;
        let mut said = 0;
        for frame in frames(&self.order.request) {
            said += usize::from(matches!(frame, Said::Token { .. }));
            if said > count || frame.is_last() {
                return;
            }
            self.say(frame).await;
        }
    }

    /// Waits until the ingress closes the connection.
    pub async fn closed(&mut self) {
        let read = tokio::time::timeout(PATIENCE, self.socket.read(&mut [0; 16])).await;
        assert!(matches!(read, Ok(Ok(0) | Err(_))), "the connection is closed");
    }
}

/// All outputs of a stream; the last one is a last word.
pub async fn outputs(mut stream: Stream) -> Vec<Output> {
    let mut outputs = Vec::new();
    while let Some(output) = tokio::time::timeout(PATIENCE, stream.next()).await.expect("an end") {
        outputs.push(output);
    }
    assert!(matches!(outputs.last(), Some(Output::Finished { .. } | Output::Failed { .. })), "{outputs:?}");
    outputs
}

/// Flag that a peer sets.
#[derive(Clone, Default)]
pub struct Flag(Arc<AtomicBool>);

impl Flag {
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub async fn wait(&self) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !self.0.load(Ordering::Acquire) {
            assert!(tokio::time::Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
    }
}
