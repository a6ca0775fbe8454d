use super::*;
use proptest::prelude::{Just, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};

fn logits(seed: u64, vocab: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..vocab).map(|_| (rng.next_u32() as f32 / u32::MAX as f32) * 12.0 - 6.0).collect()
}

fn run(params: &SamplingParams, seed: u64, steps: u64, vocab: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(params, &[1, 2, 3], seed);
    (0..steps).map(|step| sampler.sample(&mut logits(step, vocab)).unwrap().0).collect()
}

#[test]
fn the_same_seed_chooses_the_same_tokens_and_another_does_not() {
    let params = SamplingParams { seed: Some(7), top_p: 0.9, ..Default::default() };
    assert_eq!(run(&params, 1, 64, 1000), run(&params, 2, 64, 1000));
    let other = SamplingParams { seed: Some(8), ..params.clone() };
    assert_ne!(run(&params, 1, 64, 1000), run(&other, 1, 64, 1000));
    let unseeded = SamplingParams { seed: None, ..params };
    assert_eq!(run(&unseeded, 7, 64, 1000), run(&unseeded, 7, 64, 1000));
}

/// Pins the choice across machines and versions: these figures may change only
/// on purpose.
#[test]
fn a_seed_chooses_these_tokens_on_every_machine() {
    let mut sampler = Sampler::new(&SamplingParams { seed: Some(42), ..Default::default() }, &[], 0);
    let tokens: Vec<u32> = (0..8)
        .map(|step| {
            let mut logits: Vec<f32> = (0..100).map(|i| ((i * 37 + step * 11) % 100) as f32 * 0.05).collect();
            sampler.sample(&mut logits).unwrap().0
        })
        .collect();
    assert_eq!(tokens, PINNED);
}

/// From an independent program: ChaCha8 with the key 42, the upper 53 bits of each
/// 64-bit word as the mark on the cumulative distribution.
const PINNED: [u32; 8] = [35, 26, 48, 36, 79, 6, 46, 22];

#[test]
fn draws_follow_the_distribution() {
    let base = [1.0f32, 0.0, -1.0, 2.0, 0.5];
    let temperature = 0.7;
    let mut sampler = Sampler::new(&SamplingParams { temperature, ..Default::default() }, &[], 3);
    let draws = 200_000;
    let mut counts = [0usize; 5];
    for _ in 0..draws {
        counts[sampler.sample(&mut base.clone()).unwrap().0 as usize] += 1;
    }
    let total: f64 = base.iter().map(|l| f64::from(l / temperature).exp()).sum();
    for (i, &count) in counts.iter().enumerate() {
        let p = f64::from(base[i] / temperature).exp() / total;
        let sigma = (p * (1.0 - p) / draws as f64).sqrt();
        assert!((count as f64 / draws as f64 - p).abs() < 5.0 * sigma, "token {i}: {count} of {draws}, p = {p}");
    }
}

#[test]
fn top_k_and_min_p_exclude_the_unlikely() {
    let base = [5.0f32, 4.0, 3.0, -2.0];
    let choices = |params: SamplingParams| {
        let mut sampler = Sampler::new(&params, &[], 1);
        let mut seen: Vec<u32> = (0..2000).map(|_| sampler.sample(&mut base.clone()).unwrap().0).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    };
    assert_eq!(choices(SamplingParams { top_k: 1, ..Default::default() }), [0]);
    assert_eq!(choices(SamplingParams { top_k: 2, ..Default::default() }), [0, 1]);
    // e⁻¹ = 0.37 and e⁻² = 0.14 of the likeliest.
    assert_eq!(choices(SamplingParams { min_p: 0.3, ..Default::default() }), [0, 1]);
    assert_eq!(choices(SamplingParams { min_p: 0.1, ..Default::default() }), [0, 1, 2]);
    // Probabilities 0.66, 0.24, 0.09, 0.0006.
    assert_eq!(choices(SamplingParams { top_p: 0.6, ..Default::default() }), [0]);
    assert_eq!(choices(SamplingParams { top_p: 0.7, ..Default::default() }), [0, 1]);
    // Of the two kept by top_k the first has 0.73.
    assert_eq!(choices(SamplingParams { top_k: 2, top_p: 0.7, ..Default::default() }), [0]);
}

#[test]
fn greedy_takes_the_first_of_equals_after_bias_and_penalties() {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    assert_eq!(Sampler::new(&params, &[], 0).sample(&mut [1.0, 3.0, 3.0]).unwrap().0, 1);
    assert_eq!(greedy(&[1.0, 3.0, 3.0]), Ok(1));
    let biased = SamplingParams { logit_bias: vec![(0, 5.0)], ..params.clone() };
    assert_eq!(Sampler::new(&biased, &[], 0).sample(&mut [1.0, 3.0, 3.0]).unwrap().0, 0);
    let mut sampler = Sampler::new(&SamplingParams { presence_penalty: 1.0, ..params }, &[1], 0);
    let chosen: Vec<u32> = (0..3).map(|_| sampler.sample(&mut [1.0, 3.0, 2.5]).unwrap().0).collect();
    assert_eq!(chosen, [1, 2, 1]);
}

#[test]
fn logprobs_are_of_the_raw_distribution() {
    let params =
        SamplingParams { temperature: 0.0, logit_bias: vec![(2, 50.0)], logprobs: Some(2), ..Default::default() };
    let raw = [1.0f32, 2.0, 0.0];
    let normaliser = raw.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
    let mut sampler = Sampler::new(&params, &[], 0);
    let (token, logprobs) = sampler.sample(&mut raw.clone()).unwrap();
    let logprobs = logprobs.unwrap();
    assert_eq!(token, 2);
    assert!((f64::from(logprobs.chosen) - (0.0 - normaliser)).abs() < 1e-5);
    assert_eq!(logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
    assert!((f64::from(logprobs.top[0].1) - (2.0 - normaliser)).abs() < 1e-5);
    let prompt = sampler.prompt_logprobs(&raw, 0).unwrap();
    assert!((f64::from(prompt.chosen) - (1.0 - normaliser)).abs() < 1e-5);
    assert_eq!(sampler.prompt_logprobs(&raw, 3), Err(SampleError::OutsideVocabulary { token: 3, vocab: 3 }));
}

#[test]
fn logits_that_are_no_numbers_are_an_error() {
    for temperature in [0.0, 1.0] {
        let mut sampler = Sampler::new(&SamplingParams { temperature, ..Default::default() }, &[], 0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(sampler.sample(&mut [0.0, bad, 1.0]), Err(SampleError::NotFinite));
        }
        assert_eq!(sampler.sample(&mut []), Err(SampleError::Empty));
    }
    assert_eq!(greedy(&[f32::NAN]), Err(SampleError::NotFinite));
}

#[test]
fn a_bias_outside_the_vocabulary_is_an_error() {
    let mut sampler = Sampler::new(&SamplingParams { logit_bias: vec![(3, 1.0)], ..Default::default() }, &[], 0);
    assert_eq!(sampler.sample(&mut [0.0; 3]), Err(SampleError::OutsideVocabulary { token: 3, vocab: 3 }));
}

#[test]
fn validation_names_the_field_and_its_range() {
    let base = SamplingParams::default();
    assert_eq!(base.validate(), Ok(()));
    let bad = [
        (SamplingParams { temperature: -0.1, ..base.clone() }, "temperature must be at least 0"),
        (SamplingParams { temperature: f32::NAN, ..base.clone() }, "temperature must be"),
        (SamplingParams { top_p: 0.0, ..base.clone() }, "top_p must be more than 0 and at most 1, not 0"),
        (SamplingParams { top_p: 1.1, ..base.clone() }, "top_p must be"),
        (SamplingParams { min_p: 1.5, ..base.clone() }, "min_p must be from 0 to 1"),
        (SamplingParams { repetition_penalty: 0.0, ..base.clone() }, "repetition_penalty must be"),
        (SamplingParams { presence_penalty: 3.0, ..base.clone() }, "presence_penalty must be from -2 to 2"),
        (SamplingParams { frequency_penalty: -3.0, ..base.clone() }, "frequency_penalty must be from -2 to 2"),
        (SamplingParams { logit_bias: vec![(5, 101.0)], ..base.clone() }, "logit_bias of token 5 must be from -100"),
        (SamplingParams { logprobs: Some(21), ..base.clone() }, "must be from 0 to 20"),
    ];
    for (params, message) in bad {
        let error = params.validate().unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

proptest! {
    /// Wherever a request is broken off, whoever goes on with it from the tokens
    /// so far chooses what the first would have chosen.
    #[test]
    fn a_resumed_sampler_goes_on_as_an_undisturbed_one(
        temperature in prop_oneof![Just(0.0f32), 0.2f32..2.0],
        top_k in 0u32..30,
        repetition_penalty in prop_oneof![Just(1.0f32), 1.05f32..2.0],
        frequency_penalty in prop_oneof![Just(0.0f32), -1.0f32..2.0],
        presence_penalty in prop_oneof![Just(0.0f32), -1.0f32..2.0],
        cut in 0usize..40,
        seed in any::<u64>(),
    ) {
        let params = SamplingParams {
            temperature, top_k, repetition_penalty, frequency_penalty, presence_penalty, seed: Some(seed),
            ..Default::default()
        };
        let (prompt, vocab, steps) = ([1, 2, 3], 50, 40);
        // Flat enough that the penalties and the draws decide.
        let row = |step: usize| logits(seed ^ step as u64, vocab).into_iter().map(|l| l * 0.2).collect::<Vec<_>>();
        let mut whole = Sampler::new(&params, &prompt, 0);
        let tokens: Vec<u32> = (0..steps).map(|step| whole.sample(&mut row(step)).unwrap().0).collect();
        let mut rest = Sampler::resumed(&params, &prompt, &tokens[..cut], 99);
        let again: Vec<u32> = (cut..steps).map(|step| rest.sample(&mut row(step)).unwrap().0).collect();
        prop_assert_eq!(&again, &tokens[cut..]);
    }

    /// Any parameters in range and any finite logits give a token of the
    /// vocabulary, one that truncation did not exclude.
    #[test]
    fn every_choice_is_allowed(
        row in prop::collection::vec(-50.0f32..50.0, 1..500),
        temperature in 0.0f32..4.0,
        top_p in 0.01f32..=1.0,
        top_k in 0u32..50,
        min_p in 0.0f32..=1.0,
        seed in any::<u64>(),
    ) {
        let params = SamplingParams { temperature, top_p, top_k, min_p, seed: Some(seed), ..Default::default() };
        let token = Sampler::new(&params, &[], 0).sample(&mut row.clone()).unwrap().0 as usize;
        prop_assert!(token < row.len());
        let likelier = row.iter().filter(|&&l| l > row[token]).count();
        prop_assert!(params.is_greedy() || top_k == 0 || likelier < top_k as usize);
        if params.is_greedy() {
            prop_assert_eq!(likelier, 0);
        } else if min_p > 0.0 {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            prop_assert!(((row[token] - max) / temperature).exp() >= min_p * 0.999);
        }
    }
}

#[test]
fn a_choice_draws_nothing_until_it_is_accepted() {
    let params = SamplingParams { seed: Some(7), presence_penalty: 0.5, ..SamplingParams::default() };
    let logits: Vec<f32> = (0..50).map(|i| ((i * 31 % 17) as f32) / 4.0).collect();
    let (mut here, mut there) = (Sampler::new(&params, &[1, 2], 0), Sampler::new(&params, &[1, 2], 0));
    for _ in 0..20 {
        let first = there.choice(0, logits.len()).unit;
        assert_eq!(there.choice(0, logits.len()).unit, first, "asking twice draws once");
        let (token, _) = here.sample(&mut logits.clone()).unwrap();
        there.accept(Chosen { token: Some(token), logprobs: None }).unwrap();
    }
    // Both stand at the same place of the same stream.
    assert_eq!(here.sample(&mut logits.clone()), there.sample(&mut logits.clone()));
}
