//! Every order and frame comes back as it was, and nothing else does.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn order() -> impl Strategy<Value = Order> {
    let sampling = (
        (0f32..9.0, 0.1f32..=1.0, 0f32..=1.0, 0.5f32..2.0, -2f32..=2.0, -2f32..=2.0),
        (any::<u32>(), any::<u64>(), prop::option::of(0..=MAX_LOGPROBS)),
        vec((any::<u32>(), -100f32..=100.0), 0..4),
    )
        .prop_map(|((t, p, m, repetition, presence, frequency), (top_k, seed, logprobs), logit_bias)| {
            SamplingParams {
                temperature: t,
                top_p: p,
                top_k,
                min_p: m,
                seed: Some(seed),
                repetition_penalty: repetition,
                presence_penalty: presence,
                frequency_penalty: frequency,
                logit_bias,
                logprobs,
            }
        });
    let lists = (vec(any::<u32>(), 1..20), vec(any::<u32>(), 0..4), vec(any::<u32>(), 0..9), 1usize..99);
    (any::<([u8; 16], [u64; 2], [u8; 32], bool)>(), sampling, lists).prop_map(
        |((id, [from, to], model, prompt_logprobs), sampling, (prompt, stop_tokens, resume, more))| Order {
            id,
            from: InstanceId(from),
            to: InstanceId(to),
            model,
            request: Request {
                prompt,
                sampling,
                max_tokens: resume.len() + more,
                stop_tokens,
                prompt_logprobs,
                resume,
            },
        },
    )
}

fn frame() -> impl Strategy<Value = Frame> {
    let logprobs = || {
        (-99f32..0.0, vec((any::<u32>(), -99f32..0.0), 0..=MAX_LOGPROBS as usize))
            .prop_map(|(chosen, top)| TokenLogprobs { chosen, top })
    };
    let said = prop_oneof![
        Just(Said::Alive),
        Just(Said::Taken),
        Just(Said::Leaving),
        Just(Said::Refused(Rejected::Draining)),
        any::<[u32; 2]>().prop_map(|[t, l]| Said::Refused(Rejected::TooLong { tokens: t as usize, limit: l as usize })),
        any::<u32>().prop_map(|n| Said::Refused(Rejected::Overloaded { waiting: n as usize })),
        any::<u32>().prop_map(|n| Said::Started { cached_tokens: n as usize }),
        (any::<bool>(), vec(logprobs(), 0..9)).prop_map(|(last, logprobs)| Said::PromptLogprobs { last, logprobs }),
        (any::<u32>(), any::<u32>(), prop::option::of(logprobs())).prop_map(|(index, id, logprobs)| Said::Token {
            index,
            id,
            logprobs
        }),
        any::<bool>().prop_map(|stop| Said::Finished(if stop { FinishReason::Stop } else { FinishReason::Length })),
        "[a-zé ]{0,40}".prop_map(Said::Failed),
    ];
    (any::<u32>(), said).prop_map(|(number, said)| Frame { number, said })
}

type Damage = Vec<(prop::sample::Index, u8)>;

fn damage() -> impl Strategy<Value = Damage> {
    vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
}

fn damaged(mut bytes: Vec<u8>, damage: Damage) -> Vec<u8> {
    for (at, value) in damage {
        let at = at.index(bytes.len());
        bytes[at] = value;
    }
    bytes
}

proptest! {
    #[test]
    fn an_order_comes_back_as_it_was(order in order(), damage in damage()) {
        let mut bytes = Vec::new();
        order.encode(&mut bytes);
        prop_assert!(is_sendable(&order.request));
        prop_assert_eq!(&Order::decode(&bytes), &Ok(order));
        for end in 0..bytes.len() {
            prop_assert!(Order::decode(&bytes[..end]).is_err());
        }
        let bytes = damaged(bytes, damage);
        if let Ok(order) = Order::decode(&bytes) {
            let mut again = Vec::new();
            order.encode(&mut again);
            prop_assert_eq!(again, bytes, "one order has one encoding");
        }
    }

    #[test]
    fn a_frame_comes_back_as_it_was(frame in frame(), damage in damage()) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        prop_assert_eq!(&Frame::decode(&bytes), &Ok(frame));
        for end in 0..bytes.len() {
            prop_assert!(Frame::decode(&bytes[..end]).is_err());
        }
        let bytes = damaged(bytes, damage);
        if let Ok(frame) = Frame::decode(&bytes) {
            let mut again = Vec::new();
            frame.encode(&mut again);
            prop_assert_eq!(again, bytes, "one frame has one encoding");
        }
    }

    #[test]
    fn any_bytes_give_an_order_a_frame_or_an_error(bytes in vec(any::<u8>(), 0..300)) {
        let (_, _) = (Order::decode(&bytes), Frame::decode(&bytes));
    }
}

#[test]
fn the_longest_frame_there_is_keeps_to_the_limit() {
    let position = TokenLogprobs { chosen: 0.0, top: vec![(0, 0.0); MAX_LOGPROBS as usize] };
    let all = vec![position; 2 * MAX_POSITIONS + 1];
    let said = Said::of(Output::PromptLogprobs(all.clone()), 0);
    assert_eq!(said.len(), 3);
    let mut back = Vec::new();
    for (i, said) in said.into_iter().enumerate() {
        let mut bytes = Vec::new();
        Frame { number: 0, said: said.clone() }.encode(&mut bytes);
        assert!(bytes.len() + 64 < MAX_FRAME);
        let Said::PromptLogprobs { last, logprobs } = said else { panic!("{said:?}") };
        assert_eq!(last, i == 2);
        back.extend(logprobs);
    }
    assert_eq!(back, all);
    assert_eq!(
        Said::of(Output::PromptLogprobs(Vec::new()), 0),
        [Said::PromptLogprobs { last: true, logprobs: Vec::new() }]
    );
    let long = "é".repeat(9999);
    let mut bytes = Vec::new();
    Frame { number: 0, said: Said::Failed(long.clone()) }.encode(&mut bytes);
    let Ok(Frame { said: Said::Failed(cut), .. }) = Frame::decode(&bytes) else { panic!("no frame") };
    assert!(long.starts_with(&cut) && cut.len() <= 4096);
}
