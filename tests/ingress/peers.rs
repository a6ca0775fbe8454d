//! The side that runs requests for others: whom it hears, and what it does when
//! they go.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use distkv::engine::{EngineHandle, EngineStats, FinishReason, Output, Rejected, Request, Submit};
use distkv::ingress::wire::{Order, Said};
use distkv::ingress::{IngressStats, Keys, PATH, Runner};
use distkv::kv::rblock::InstanceId;
use distkv::server::{ServerState, serve};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::scripted::{Engine, Ledger, PATIENCE, Stage, identity, keys, outputs, request, rest};

/// A node whose engine is `engine`, as instance 2.
struct Node {
    address: SocketAddr,
    stats: IngressStats,
    ledger: Arc<Ledger>,
    drain: Option<oneshot::Sender<()>>,
}

impl Node {
    async fn start(engine: Arc<dyn Submit>) -> Self {
        let (stats, ledger) = (IngressStats::default(), Arc::new(Ledger::default()));
        let engine = EngineHandle::new(engine);
        let runner = Runner::new(identity(2), engine, keys(), ledger.clone(), stats.clone());
        let ready = Arc::new(AtomicBool::new(true));
        let state = ServerState::new(None, Arc::new(EngineStats::default), Arc::new(|| json!({})), ready)
            .with_api_key(Some("clients only"))
            .with_runner(Some(Arc::new(runner)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (drain, drained) = oneshot::channel();
        tokio::spawn(serve(listener, Arc::new(state), async { drop(drained.await) }));
        Self { address, stats, ledger, drain: Some(drain) }
    }

    async fn send(&self, body: &[u8]) -> (String, TcpStream) {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let head = format!("POST {PATH} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len());
        socket.write_all(head.as_bytes()).await.unwrap();
        socket.write_all(body).await.unwrap();
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(timeout(PATIENCE, socket.read_u8()).await.unwrap().unwrap());
        }
        (String::from_utf8(line).unwrap(), socket)
    }

    async fn status(&self, body: &[u8]) -> u16 {
        self.send(body).await.0.split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        self.stats.json()[name].as_u64().unwrap()
    }
}

fn order(id: u8) -> Order {
    let mut request = request(&[1, 2, 3]);
    request.sampling.seed = Some(1);
    Order { id: [id; 16], from: InstanceId(1), to: InstanceId(2), model: identity(2).model, request }
}

/// An engine whose requests the test answers.
struct Manual(UnboundedSender<Submitted>);
type Submitted = (Request, UnboundedSender<Output>, Arc<AtomicBool>);

fn manual() -> (Arc<Manual>, UnboundedReceiver<Submitted>) {
    let (sender, submitted) = unbounded_channel();
    (Arc::new(Manual(sender)), submitted)
}

impl Submit for Manual {
    fn submit(&self, request: Request, to: UnboundedSender<Output>, gone: Arc<AtomicBool>) -> Result<(), Rejected> {
        self.0.send((request, to, gone)).map_err(|_| Rejected::Draining)
    }

    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }
}

#[tokio::test]
async fn who_has_another_key_or_none_is_not_heard_and_counted() {
    let engine = Arc::new(Engine::default());
    let node = Node::start(engine.clone()).await;
    let sealed = keys().seal_order(&order(1));
    let mut bent = sealed.clone();
    bent[40] ^= 1;
    let strangers = [
        vec![],
        b"{\"prompt\": \"a\"}".to_vec(),
        vec![1; 4000],
        Keys::new([9; 32]).seal_order(&order(1)),
        bent,
        sealed[..sealed.len() - 1].to_vec(),
    ];
    // What is longer than any order is not even read.
    assert_eq!(node.status(&vec![1; 1 << 20]).await, 413);
    for body in &strangers {
        assert_eq!(node.status(body).await, 403);
    }
    assert_eq!(node.count("refused"), strangers.len() as u64);
    assert!(engine.seen.lock().unwrap().is_empty());
    // A good one is heard once: recorded and sent again it is a stranger's.
    assert_eq!(node.status(&sealed).await, 200);
    assert_eq!(node.status(&sealed).await, 403);
    assert_eq!((node.count("refused"), node.count("taken_in")), (strangers.len() as u64 + 1, 1));
}

#[tokio::test]
async fn an_order_for_another_instance_or_model_is_not_run() {
    let engine = Arc::new(Engine::default());
    let node = Node::start(engine.clone()).await;
    assert_eq!(node.status(&keys().seal_order(&Order { to: InstanceId(3), ..order(1) })).await, 421);
    assert_eq!(node.status(&keys().seal_order(&Order { model: [9; 32], ..order(2) })).await, 421);
    assert!(engine.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_ingress_and_a_runner_understand_each_other() {
    let engine = Arc::new(Engine::default());
    let node = Node::start(engine.clone()).await;
    let stage = Stage::new();
    stage.ledger.add(2, node.address);
    let mut asked = request(&(0..5000).map(|i| i % 900).collect::<Vec<u32>>());
    asked.max_tokens = 40;
    let expected = rest(&asked);
    // Longer than what the runner can hold: it runs here.
    assert_eq!(outputs(stage.handle.place(asked).await.unwrap()).await, expected);
    assert_eq!(stage.count("placed_elsewhere"), 0);

    let stage = Stage::new();
    stage.ledger.add(2, node.address);
    let asked = request(&(0..1000).map(|i| i % 900).collect::<Vec<u32>>());
    let expected = rest(&asked);
    assert_eq!(outputs(stage.handle.place(asked).await.unwrap()).await, expected);
    assert_eq!((stage.count("placed_elsewhere"), stage.count("continued"), node.count("taken_in")), (1, 0, 1));
    assert!(stage.engine.seen.lock().unwrap().is_empty());

    *engine.refuses.lock().unwrap() = Some(Rejected::Overloaded { waiting: 3 });
    let stage = Stage::new();
    stage.ledger.add(2, node.address);
    assert_eq!(outputs(stage.handle.place(request(&[4, 5])).await.unwrap()).await, rest(&request(&[4, 5])));
    assert_eq!((stage.count("placed_elsewhere"), stage.count("declined")), (0, 1));
}

#[tokio::test]
async fn while_a_request_waits_the_runner_says_that_it_lives() {
    let (engine, mut submitted) = manual();
    let node = Node::start(engine).await;
    let stage = Stage::new();
    stage.ledger.add(2, node.address);
    let stream = stage.handle.place(request(&[4, 5])).await.unwrap();
    let (request, to, _) = submitted.recv().await.unwrap();
    // Longer than a silence that is taken for death.
    tokio::time::sleep(distkv::ingress::SILENCE + Duration::from_millis(500)).await;
    for output in rest(&request) {
        to.send(output).unwrap();
    }
    drop(to);
    outputs(stream).await;
    assert_eq!((stage.count("continued"), node.count("taken_in")), (0, 1));
}

#[tokio::test]
async fn when_the_client_goes_the_runner_cancels() {
    let (engine, mut submitted) = manual();
    let node = Node::start(engine).await;
    let stage = Stage::new();
    stage.ledger.add(2, node.address);
    let mut stream = stage.handle.place(request(&[4, 5])).await.unwrap();
    let (_, to, cancelled) = submitted.recv().await.unwrap();
    to.send(Output::Started { cached_tokens: 0 }).unwrap();
    stream.next().await.unwrap();
    assert!(!cancelled.load(Ordering::Acquire));
    drop(stream);
    timeout(PATIENCE, to.closed()).await.unwrap();
    assert!(cancelled.load(Ordering::Acquire));
}

#[tokio::test]
async fn when_the_ingress_is_cut_off_the_runner_cancels() {
    let (engine, mut submitted) = manual();
    let node = Node::start(engine).await;
    node.ledger.down.lock().unwrap().push(InstanceId(1));
    // Its connection stays, as one to a host behind a cut wire does.
    let (line, _socket) = node.send(&keys().seal_order(&order(1))).await;
    assert!(line.contains("200"), "{line}");
    let (_, to, cancelled) = submitted.recv().await.unwrap();
    timeout(PATIENCE, to.closed()).await.unwrap();
    assert!(cancelled.load(Ordering::Acquire));
}

#[tokio::test]
async fn a_node_that_drains_gives_requests_back_and_takes_no_more() {
    let (engine, mut submitted) = manual();
    let mut node = Node::start(engine).await;
    let stage = Stage::new();
    stage.ledger.add(2, node.address);
    let mut stream = stage.handle.place(request(&[4, 5])).await.unwrap();
    let (request, to, cancelled) = submitted.recv().await.unwrap();
    for output in rest(&request).into_iter().take(7) {
        to.send(output).unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 7 {
        seen.push(stream.next().await.unwrap());
    }
    node.drain.take().unwrap().send(()).unwrap();
    seen.extend(outputs(stream).await);
    assert_eq!(seen, rest(&request));
    assert!(cancelled.load(Ordering::Acquire));
    assert!(stage.reasons().contains("reason=\"leaving\"} 1"), "{}", stage.reasons());
    assert_eq!(stage.engine.seen.lock().unwrap()[0].resume.len(), 5);
}

#[tokio::test]
async fn an_answer_can_be_heard_by_who_ordered_it() {
    let node = Node::start(Arc::new(Engine::default())).await;
    let order = order(4);
    let (_, mut socket) = node.send(&keys().seal_order(&order)).await;
    let mut bytes = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut bytes)).await.unwrap().unwrap();
    let body = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let mut arrived = bytes.split_off(body);
    let (mut answer, mut said) = (keys().answer(&order.id), Vec::new());
    while let Some(frame) = answer.hear(&mut arrived).unwrap() {
        said.push(frame);
    }
    said.retain(|said| *said != Said::Alive);
    assert_eq!(said, crate::scripted::frames(&order.request));
    assert!(matches!(said.last(), Some(Said::Finished(FinishReason::Length))) && arrived.is_empty());
}
