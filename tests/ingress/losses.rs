//! Whatever becomes of whoever runs a request, its client sees what an
//! undisturbed engine would have said, once and in order.

use distkv::engine::{Output, Rejected};
use distkv::ingress::Keys;
use distkv::ingress::wire::Said;
use distkv::kv::rblock::InstanceId;
use distkv::model::sampler::SamplingParams;

use crate::scripted::{Flag, Heard, MAX_TOKENS, Stage, VOCAB, frames, outputs, request, rest, token};

const PROMPT: [u32; 4] = [5, 6, 7, 8];

/// How a peer fails after it has said some tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Closes,
    Silent,
    Down,
    Leaves,
    Fails,
    SkipsToken,
    DoublesToken,
    SkipsFrame,
    FrameOfAnotherAnswer,
    OtherKey,
    Noise,
    Endless,
    UnknownToken,
    NoLogprobs,
    TooManyLogprobs,
    EndsEarly,
    TakesTwice,
    PromptAgain,
}

async fn fail(heard: &mut Heard, fault: Fault, said: usize, keep: Flag) {
    heard.begin(said).await;
    let index = heard.order.request.resume.len() + said;
    let token = |index: usize| Said::Token {
        index: index as u32,
        id: token(&PROMPT, index),
        logprobs: Some(crate::scripted::logprobs(index)),
    };
    let odd = |change: fn(&mut u32, &mut Option<distkv::model::sampler::TokenLogprobs>)| {
        let Said::Token { index, mut id, mut logprobs } = token(index) else { unreachable!() };
        change(&mut id, &mut logprobs);
        Said::Token { index, id, logprobs }
    };
    match fault {
        Fault::Closes => {}
        Fault::Silent => keep.wait().await,
        Fault::Down => {
            while !heard.socket_is_closed().await {
                heard.say(Said::Alive).await;
            }
        }
        Fault::Leaves => heard.say(Said::Leaving).await,
        Fault::Fails => heard.say(Said::Failed("no room".into())).await,
        Fault::SkipsToken => heard.say(token(index + 1)).await,
        Fault::DoublesToken => heard.say(token(index.max(1) - 1)).await,
        Fault::SkipsFrame => {
            drop(heard.answer.say(token(index)));
            heard.say(token(index + 1)).await;
        }
        Fault::FrameOfAnotherAnswer => {
            let other = crate::scripted::keys().answer(&[0; 16]).say(token(index));
            heard.write(&other).await;
        }
        Fault::OtherKey => {
            let other = Keys::new([6; 32]).answer(&heard.order.id).say(token(index));
            heard.write(&other).await;
        }
        Fault::Noise => heard.write(&[0x41; 300]).await,
        Fault::Endless => heard.write(&u32::MAX.to_le_bytes()).await,
        Fault::UnknownToken => heard.say(odd(|id, _| *id = VOCAB as u32)).await,
        Fault::NoLogprobs => heard.say(odd(|_, logprobs| *logprobs = None)).await,
        Fault::TooManyLogprobs => {
            heard.say(odd(|_, logprobs| logprobs.as_mut().unwrap().top.push((1, -1.0)))).await;
        }
        Fault::EndsEarly => heard.say(Said::Finished(distkv::engine::FinishReason::Length)).await,
        Fault::TakesTwice => heard.say(Said::Taken).await,
        Fault::PromptAgain => {
            heard.say(Said::PromptLogprobs { last: true, logprobs: vec![crate::scripted::logprobs(1); 3] }).await;
        }
    }
    if !matches!(fault, Fault::Closes | Fault::Silent) {
        heard.closed().await;
    }
}

impl Heard {
    async fn socket_is_closed(&mut self) -> bool {
        let read = self.socket.readable();
        tokio::time::timeout(std::time::Duration::from_millis(50), read).await.is_ok()
    }
}

async fn goes_on_after(fault: Fault, reason: &str, said: usize) {
    let stage = Stage::new();
    let end = Flag::default();
    let kept = end.clone();
    stage
        .peer(2, move |mut heard| {
            let kept = kept.clone();
            async move { fail(&mut heard, fault, said, kept).await }
        })
        .await;
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    if fault == Fault::Down {
        stage.ledger.down.lock().unwrap().push(InstanceId(2));
    }
    assert_eq!(outputs(stream).await, rest(&request(&PROMPT)), "{fault:?} after {said}");
    end.set();
    let reasons = stage.reasons();
    assert!(reasons.contains(&format!("reason=\"{reason}\"}} 1")), "{fault:?}: {reasons}");
    assert_eq!((stage.count("placed_elsewhere"), stage.count("continued"), stage.count("lost")), (1, 1, 0));
    // It went on here from what had been sent, with one seed all the way.
    let seen = stage.engine.seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].resume.len(), seen[0].prompt_logprobs), (said, false));
    assert!(seen[0].sampling.seed.is_some());
}

#[tokio::test]
async fn a_request_goes_on_after_every_fault() {
    let faults = [
        (Fault::Closes, "closed"),
        (Fault::Leaves, "leaving"),
        (Fault::Fails, "failed"),
        (Fault::SkipsToken, "garbage"),
        (Fault::DoublesToken, "garbage"),
        (Fault::SkipsFrame, "garbage"),
        (Fault::FrameOfAnotherAnswer, "garbage"),
        (Fault::OtherKey, "garbage"),
        (Fault::Noise, "garbage"),
        (Fault::Endless, "garbage"),
        (Fault::UnknownToken, "garbage"),
        (Fault::NoLogprobs, "garbage"),
        (Fault::TooManyLogprobs, "garbage"),
        (Fault::EndsEarly, "garbage"),
        (Fault::TakesTwice, "garbage"),
        (Fault::PromptAgain, "garbage"),
    ];
    for (fault, reason) in faults {
        for said in [1, 17, MAX_TOKENS - 1] {
            goes_on_after(fault, reason, said).await;
        }
    }
}

#[tokio::test]
async fn who_falls_silent_is_left_within_two_seconds() {
    let begun = std::time::Instant::now();
    goes_on_after(Fault::Silent, "silent", 9).await;
    let waited = begun.elapsed().as_secs_f64();
    println!("left after {waited:.2} s");
    assert!(waited >= 1.0, "not before its time");
}

#[tokio::test]
async fn who_is_down_by_gossip_is_left_although_it_speaks() {
    goes_on_after(Fault::Down, "down", 9).await;
}

#[tokio::test]
async fn what_is_lost_before_its_first_token_begins_anew() {
    for said in 0..3 {
        let stage = Stage::new();
        stage
            .peer(2, move |mut heard| async move {
                heard.accept().await;
                for frame in frames(&heard.order.request).into_iter().take(said + 1) {
                    heard.say(frame).await;
                }
            })
            .await;
        let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
        assert_eq!(outputs(stream).await, rest(&request(&PROMPT)));
        assert_eq!(stage.engine.seen.lock().unwrap()[0].prompt_logprobs, said < 2);
    }
}

#[tokio::test]
async fn what_was_lost_after_its_last_token_is_over() {
    let stage = Stage::new();
    stage.peer(2, |mut heard| async move { heard.begin(MAX_TOKENS).await }).await;
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    assert_eq!(outputs(stream).await, rest(&request(&PROMPT)));
    assert!(stage.engine.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_request_outlives_one_peer_after_the_other() {
    let stage = Stage::new();
    // More of them than losses after which it stays here.
    for instance in 2..14 {
        stage.peer(instance, |mut heard| async move { heard.begin(2).await }).await;
    }
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    assert_eq!(outputs(stream).await, rest(&request(&PROMPT)));
    assert_eq!((stage.count("placed_elsewhere"), stage.count("continued")), (8, 8));
    let seen = stage.engine.seen.lock().unwrap();
    assert_eq!((seen.len(), seen[0].resume.len()), (1, 16));
}

#[tokio::test]
async fn a_client_that_goes_closes_the_connection() {
    let stage = Stage::new();
    let gone = Flag::default();
    let flag = gone.clone();
    stage
        .peer(2, move |mut heard| {
            let flag = flag.clone();
            async move {
                heard.begin(3).await;
                heard.closed().await;
                flag.set();
            }
        })
        .await;
    let mut stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    assert!(matches!(stream.next().await, Some(Output::Started { .. })));
    drop(stream);
    gone.wait().await;
    assert_eq!(stage.count("continued"), 0);
}

#[tokio::test]
async fn who_does_not_take_a_request_is_passed_over() {
    let stage = Stage::new();
    stage.peer(2, |mut heard| async move { heard.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").await }).await;
    stage.peer(3, |mut heard| async move { heard.write(&[b'x'; 20_000]).await }).await;
    stage
        .peer(4, |mut heard| async move {
            heard.accept().await;
            heard.say(Said::Refused(Rejected::Overloaded { waiting: 9 })).await;
        })
        .await;
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    assert_eq!(outputs(stream).await, rest(&request(&PROMPT)));
    assert_eq!((stage.count("declined"), stage.count("placed_elsewhere"), stage.count("continued")), (3, 0, 0));
}

#[tokio::test]
async fn what_this_node_refuses_runs_elsewhere_or_is_refused_honestly() {
    let stage = Stage::new();
    let full = Rejected::Overloaded { waiting: 7 };
    *stage.engine.refuses.lock().unwrap() = Some(full.clone());
    assert_eq!(stage.handle.place(request(&PROMPT)).await.err(), Some(full.clone()));
    stage
        .peer(2, |mut heard| async move {
            heard.begin(MAX_TOKENS).await;
            heard.say(Said::Finished(distkv::engine::FinishReason::Length)).await;
        })
        .await;
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    assert_eq!(outputs(stream).await, rest(&request(&PROMPT)));
    // Where nobody has room a queue that is full elsewhere is no help.
    stage.ledger.candidates.lock().unwrap()[0].load.waiting = 3;
    assert_eq!(stage.handle.place(request(&PROMPT)).await.err(), Some(full));
}

#[tokio::test]
async fn what_was_lost_waits_for_room() {
    let stage = Stage::new();
    *stage.engine.refuses.lock().unwrap() = Some(Rejected::Overloaded { waiting: 7 });
    stage.peer(2, |mut heard| async move { heard.begin(5).await }).await;
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    let all = tokio::spawn(outputs(stream));
    while stage.engine.seen.lock().unwrap().len() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    *stage.engine.refuses.lock().unwrap() = None;
    assert_eq!(all.await.unwrap(), rest(&request(&PROMPT)));
    assert_eq!(stage.count("lost"), 0);
}

#[tokio::test]
async fn what_nobody_can_go_on_with_says_so() {
    let stage = Stage::new();
    *stage.engine.refuses.lock().unwrap() = Some(Rejected::Draining);
    stage.peer(2, |mut heard| async move { heard.begin(5).await }).await;
    let stream = stage.handle.place(request(&PROMPT)).await.unwrap();
    let all = outputs(stream).await;
    let Some(Output::Failed { message }) = all.last() else { panic!("{all:?}") };
    assert!(message.contains("draining"), "{message}");
    assert_eq!(stage.count("lost"), 1);
}

#[tokio::test]
async fn a_seed_that_was_given_is_kept() {
    let stage = Stage::new();
    let mut asked = request(&PROMPT);
    asked.sampling = SamplingParams { seed: Some(77), ..asked.sampling };
    stage
        .peer(2, |mut heard| async move {
            assert_eq!(heard.order.request.sampling.seed, Some(77));
            heard.begin(4).await;
        })
        .await;
    outputs(stage.handle.place(asked).await.unwrap()).await;
    assert_eq!(stage.engine.seen.lock().unwrap()[0].sampling.seed, Some(77));
}
