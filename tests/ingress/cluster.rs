//! Nodes as processes of their own on loopback, and clients that stream.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use distkv::device::tensor::DType;
use distkv::model::synth::{synth_to, write_tokenizer};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Long enough that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A small llama of random weights whose answers flow as text.
pub fn model(dir: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "torch_dtype": "float32"
    });
    synth_to(dir, &config, 11, DType::F32).unwrap();
    write_tokenizer(dir, 2048).unwrap();
}

/// One node. It dies with the test.
pub struct Node {
    child: Child,
    pub instance: String,
    pub http: String,
    fabric: String,
    log: Arc<Mutex<String>>,
}

impl Node {
    pub fn start(model: &Path, cluster: &str, tokens: usize, join: Option<&Node>, more: &[&str]) -> Self {
        let any = "127.0.0.1:0";
        let mut command = Command::new(env!("CARGO_BIN_EXE_distkv"));
        command
            .args(["serve", "--listen", any, "--fabric-listen", any, "--cluster", cluster, "--model"])
            .arg(model)
            .args(["--kv-tokens", &tokens.to_string(), "--threads", "1", "--no-pin", "--log", "info"])
            // What is computed again must be what was there before.
            .args(["--math", "exact", "--kv-dtype", "f32"])
            .args(more)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(node) = join {
            command.args(["--join", &node.fabric]);
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (said, hears) = mpsc::channel();
        let log = Arc::new(Mutex::new(String::new()));
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *kept.lock().unwrap() += &format!("{line}\n");
                // Nobody listens once the node is ready.
                let _ = said.send(line);
            }
        });
        let mut node = Self { child, instance: String::new(), http: String::new(), fabric: String::new(), log };
        loop {
            let line = hears.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("not ready: {}", node.log()));
            if line == "distkv: ready" {
                return node;
            }
            let Some(rest) = line.strip_prefix("distkv: instance ") else { continue };
            let word = |after: &str| rest.split(after).nth(1).unwrap().split([';', ' ']).next().unwrap().to_owned();
            node.instance = rest.split(' ').next().unwrap().to_owned();
            node.http = word("http://");
            node.fabric = word("fabric tcp://");
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until the process has ended.
    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        until("the process to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    fn open(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut socket = TcpStream::connect(&self.http).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(socket, "{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        socket
    }

    pub fn get(&self, path: &str) -> String {
        let mut text = String::new();
        self.open("GET", path, "").read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// Status and body.
    pub fn post(&self, body: &Value) -> (u16, Value) {
        let mut text = String::new();
        self.open("POST", "/v1/completions", &body.to_string()).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
    }

    pub fn cluster(&self) -> Value {
        serde_json::from_str(&self.get("/cluster")).unwrap()
    }

    /// One of its own figures of requests.
    pub fn requests(&self, name: &str) -> u64 {
        self.cluster()["requests"][name].as_u64().unwrap()
    }

    /// Requests that run or wait on it, by its own word.
    pub fn busy(&self) -> u64 {
        let cluster = self.cluster();
        let own = cluster["instances"].as_array().unwrap().iter().find(|i| i["id"] == cluster["self"]).unwrap();
        own["running"].as_u64().unwrap() + own["waiting"].as_u64().unwrap()
    }

    /// Waits until it knows so many instances with their figures.
    pub fn knows(&self, count: usize) {
        until("the nodes to know each other", || {
            let known = |i: &&Value| i["state"] == "serving" && i["peers"] != Value::Null;
            self.cluster()["instances"].as_array().unwrap().iter().filter(known).count() == count
        });
    }

    pub fn stream(&self, body: Value) -> Client {
        Client::start(self, body)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may be dead, and the test is over.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {} at {}\n{}", self.instance, self.http, self.log());
        }
    }
}

/// What a client has seen of its stream.
#[derive(Clone, Default)]
pub struct Seen {
    pub text: String,
    /// Logprobs of the tokens, as they came.
    pub logprobs: Vec<Value>,
    pub events: usize,
    pub longest_wait: Duration,
    /// Its last word: a finish reason, or what went wrong.
    pub end: Option<Result<String, String>>,
}

/// A client in a thread of its own.
pub struct Client {
    seen: Arc<Mutex<Seen>>,
    socket: TcpStream,
}

impl Client {
    fn start(node: &Node, mut body: Value) -> Self {
        body["stream"] = true.into();
        let socket = node.open("POST", "/v1/completions", &body.to_string());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (shared, reader) = (seen.clone(), BufReader::new(socket.try_clone().unwrap()));
        std::thread::spawn(move || {
            let end = read(reader, &shared);
            shared.lock().unwrap().end = Some(end);
        });
        Self { seen, socket }
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    pub fn runs(&self) -> bool {
        self.seen.lock().unwrap().end.is_none()
    }

    /// Waits for so many events, which must come.
    pub fn after(&self, events: usize) {
        until("the stream to flow", || {
            let seen = self.seen();
            assert!(seen.end.is_none(), "it ended too soon: {:?}", seen.end);
            seen.events >= events
        });
    }

    /// All of it, once it has ended well.
    pub fn whole(&self) -> Seen {
        until("the stream to end", || !self.runs());
        let seen = self.seen();
        assert_eq!(seen.end, Some(Ok("length".into())), "{}", seen.text);
        seen
    }

    /// Hangs up.
    pub fn go(self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

fn read(reader: impl BufRead, seen: &Mutex<Seen>) -> Result<String, String> {
    let (mut last, mut reason) = (None, None);
    for line in reader.lines() {
        let line = line.map_err(|error| error.to_string())?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return reason.ok_or("no finish reason".into());
        }
        let event: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
        if !event["error"].is_null() {
            return Err(event["error"]["message"].to_string());
        }
        let choice = &event["choices"][0];
        reason = choice["finish_reason"].as_str().map(str::to_owned).or(reason);
        let now = Instant::now();
        let mut seen = seen.lock().unwrap();
        seen.longest_wait = seen.longest_wait.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        seen.events += 1;
        seen.text += choice["text"].as_str().unwrap_or_default();
        if !choice["logprobs"].is_null() {
            seen.logprobs.push(choice["logprobs"]["tokens"].clone());
        }
    }
    Err("the stream broke off".into())
}

/// Waits for something that other processes bring about.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// A name that no other test's cluster has.
pub fn name() -> String {
    format!("ingress-{:016x}", rand::random::<u64>())
}
