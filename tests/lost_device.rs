//! A device that breaks down in the middle of a step: its requests fail, what was
//! borrowed is given back, and the node says that it ends.

#[path = "common/cluster.rs"]
mod cluster;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use cluster::{Setup, model, outcome, prompt, tokens, until};
use distkv::device::cpu::{Buffer, CpuDevice, Matrix, Vector};
use distkv::device::tensor::RawTensor;
use distkv::device::{AttentionShape, Device, DeviceError, Norm, Pass, Result, Rope, StepInput};
use distkv::engine::{Rejected, Request};
use distkv::kv::pool::KvPool;
use distkv::kv::rblock::{KvDtype, KvShape};
use distkv::model::sampler::SamplingParams;
use distkv::node::device::EngineDevice;
use distkv::node::transports::FabricChoice;
use distkv::node::{ModelParts, Node, NodeError};
use distkv::server::{ServerState, serve};
use serde_json::{Value, json};

/// Steps that the device computes before it breaks down.
const STEPS: usize = 8;

/// The CPU, until it breaks down.
struct Failing {
    cpu: CpuDevice,
    left: usize,
}

impl EngineDevice for Failing {
    fn make(pin: bool, model: &ModelParts) -> std::result::Result<Self, NodeError> {
        Ok(Self { cpu: CpuDevice::make(pin, model)?, left: STEPS })
    }

    fn pool(&mut self, shape: KvShape, bytes: Option<usize>) -> std::result::Result<KvPool, NodeError> {
        EngineDevice::pool(&mut self.cpu, shape, bytes)
    }
}

impl Device for Failing {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;

    fn describe(&self) -> String {
        "cpu that breaks down".into()
    }

    fn load_matrix(&mut self, parts: &[RawTensor<'_>]) -> Result<Matrix> {
        self.cpu.load_matrix(parts)
    }

    fn load_vector(&mut self, parts: &[RawTensor<'_>]) -> Result<Vector> {
        self.cpu.load_vector(parts)
    }

    fn buffer(&mut self, rows: usize, cols: usize) -> Result<Buffer> {
        self.cpu.buffer(rows, cols)
    }

    fn begin_step(&mut self, rope: &Rope, step: &StepInput<'_>, pool: &KvPool, local: bool) -> Result<Pass> {
        self.cpu.begin_step(rope, step, pool, local)
    }

    fn end_step(&mut self) -> Result<()> {
        match self.left.checked_sub(1) {
            Some(left) => self.left = left,
            None => return Err(DeviceError::Lost("a step on it: an illegal memory access".into())),
        }
        self.cpu.end_step()
    }

    fn embed(&mut self, table: &Matrix, out: &mut Buffer) {
        self.cpu.embed(table, out);
    }

    fn rms_norm(&mut self, x: &Buffer, rows: usize, norm: Norm<'_, Vector>, out: &mut Buffer) {
        self.cpu.rms_norm(x, rows, norm, out);
    }

    fn linear(&mut self, x: &Buffer, rows: usize, weight: &Matrix, bias: Option<&Vector>, out: &mut Buffer) {
        self.cpu.linear(x, rows, weight, bias, out);
    }

    fn linear_add(&mut self, x: &Buffer, rows: usize, weight: &Matrix, bias: Option<&Vector>, out: &mut Buffer) {
        self.cpu.linear_add(x, rows, weight, bias, out);
    }

    fn rope_append(
        &mut self,
        shape: &AttentionShape,
        qk_norm: Option<(&Vector, &Vector, f32)>,
        layer: usize,
        pool: &KvPool,
        qkv: &mut Buffer,
    ) {
        self.cpu.rope_append(shape, qk_norm, layer, pool, qkv);
    }

    fn attention(
        &mut self,
        shape: &AttentionShape,
        window: Option<u32>,
        layer: usize,
        pool: &KvPool,
        qkv: &Buffer,
        o: &mut Buffer,
        lse: &mut Buffer,
    ) {
        self.cpu.attention(shape, window, layer, pool, qkv, o, lse);
    }

    fn export_queries(&mut self, shape: &AttentionShape, qkv: &Buffer, rows: &[Range<u32>], dst: &mut [f32]) {
        self.cpu.export_queries(shape, qkv, rows, dst);
    }

    fn merge(
        &mut self,
        shape: &AttentionShape,
        rows: &[Range<u32>],
        remote_o: &[f32],
        remote_lse: &[f32],
        o: &mut Buffer,
        lse: &mut Buffer,
    ) {
        self.cpu.merge(shape, rows, remote_o, remote_lse, o, lse);
    }

    fn swiglu(&mut self, gate_up: &Buffer, rows: usize, out: &mut Buffer) {
        self.cpu.swiglu(gate_up, rows, out);
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        self.cpu.gather(x, rows, out);
    }

    fn download(&mut self, x: &Buffer, rows: usize, dst: &mut [f32]) -> Result<()> {
        self.cpu.download(x, rows, dst)
    }
}

#[test]
fn its_requests_fail_and_what_was_borrowed_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    // Not all of the first request's KV has room here.
    let setup = Setup::new(FabricChoice::Shm, KvDtype::F32, &[64, 256]);
    let cluster = setup.start_by(&files, Node::engine_on::<Failing>).unwrap();
    assert_eq!(cluster.node.lost().reason(), None);
    let streams = [cluster.submit(prompt(1, 150), 64, false), cluster.submit(prompt(2, 100), 64, false)];
    for stream in streams {
        let message = outcome(stream).unwrap_err();
        assert!(message.starts_with("the device is lost: a step on it: an illegal memory access"), "{message}");
        assert!(message.ends_with("this node ends: send the request again"), "{message}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let reason = runtime.block_on(cluster.node.lost().wait());
    assert_eq!(cluster.node.stats().lost, Some(reason));
    let request = Request {
        prompt: prompt(3, 5),
        sampling: SamplingParams::default(),
        max_tokens: 1,
        stop_tokens: Vec::new(),
        prompt_logprobs: false,
        resume: Vec::new(),
    };
    assert_eq!(cluster.node.handle().unwrap().submit(request).err(), Some(Rejected::Draining));
    let lender = cluster.lenders[0].lent_pool().unwrap();
    until("the loan to be repaid", || lender.table().counts().free == lender.blocks());
    cluster.stop();
}

fn get(address: SocketAddr, path: &str) -> (u16, Value) {
    let mut socket = TcpStream::connect(address).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).unwrap();
    let status = reply.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap();
    (status, serde_json::from_str(reply.split_once("\r\n\r\n").unwrap().1).unwrap())
}

#[test]
fn the_node_is_no_longer_healthy() {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), json!({}));
    let setup = Setup::new(FabricChoice::Shm, KvDtype::F32, &[256]);
    let cluster = setup.start_by(&files, Node::engine_on::<Failing>).unwrap();
    let ready = Arc::new(AtomicBool::new(true));
    let state = ServerState::new(None, cluster.node.stats_source(), Arc::new(|| json!({})), ready);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let served = runtime.spawn(serve(listener, Arc::new(state), async { drop(ended.await) }));
    assert_eq!(tokens(cluster.submit(prompt(1, 20), 3, false)).len(), 3);
    assert_eq!(get(address, "/health"), (200, json!({"status": "ok"})));
    outcome(cluster.submit(prompt(2, 20), 64, false)).unwrap_err();
    runtime.block_on(cluster.node.lost().wait());
    for path in ["/health", "/ready"] {
        let (status, body) = get(address, path);
        assert_eq!((status, &body["error"]["code"]), (503, &json!("device_lost")), "{body}");
        assert!(body["error"]["message"].as_str().unwrap().contains("illegal memory access"), "{body}");
    }
    end.send(()).unwrap();
    runtime.block_on(served).unwrap().unwrap();
    cluster.stop();
}
