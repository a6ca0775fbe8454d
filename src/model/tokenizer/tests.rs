use serde_json::{Value, json};

use super::*;
use crate::model::gguf;
use crate::model::gguf::testing::{Field, write};

/// A SentencePiece vocabulary with scores: words join in the order of scores.
fn pieces(prefix: bool) -> Tokenizer {
    let mut tokens: Vec<(String, f32, i32)> =
        vec![("<unk>".into(), 0.0, 2), ("<s>".into(), 0.0, 3), ("</s>".into(), 0.0, 3)];
    tokens.extend((0..=255u8).map(|b| (format!("<0x{b:02X}>"), 0.0, 6)));
    for (i, text) in ["▁t", "he", "▁the", "in", "▁", "t", "h", "e", "i", "n", "▁in", "er", "r"].into_iter().enumerate()
    {
        tokens.push((text.into(), -(i as f32), 1));
    }
    let bytes = write(
        &[
            ("tokenizer.ggml.model", Field::Str("llama")),
            ("tokenizer.ggml.tokens", Field::Strs(tokens.iter().map(|t| t.0.as_str()).collect())),
            ("tokenizer.ggml.scores", Field::F32s(tokens.iter().map(|t| t.1).collect())),
            ("tokenizer.ggml.token_type", Field::I32s(tokens.iter().map(|t| t.2).collect())),
            ("tokenizer.ggml.bos_token_id", Field::U32(1)),
            ("tokenizer.ggml.eos_token_id", Field::U32(2)),
            ("tokenizer.ggml.add_space_prefix", Field::Bool(prefix)),
        ],
        &[],
    );
    let parsed = gguf::parse("test.gguf", &bytes).unwrap();
    Tokenizer::from_gguf(&parsed).unwrap().unwrap()
}

fn texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| tokenizer.token_text(*id)).collect()
}

#[test]
fn sentence_pieces_join_by_score() {
    let tokenizer = pieces(true);
    let ids = tokenizer.encode("the inner", false).unwrap();
    // "▁t" outscores "he", which outscores "▁the".
    assert_eq!(texts(&tokenizer, &ids), [" the", " in", "n", "er"]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the inner");
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
    assert_eq!(tokenizer.encode("in", true).unwrap()[0], 1);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
}

#[test]
fn pieces_outside_the_vocabulary_are_bytes() {
    let tokenizer = pieces(false);
    let ids = tokenizer.encode("é", false).unwrap();
    assert_eq!(ids, [3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.token_bytes(ids[0]), [0xc3]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "é");
    assert_eq!(tokenizer.decode(&ids[..1], true).unwrap(), "\u{fffd}");
}

#[test]
fn special_tokens_in_text_are_special_and_can_be_left_out() {
    let tokenizer = pieces(false);
    let ids = tokenizer.encode("in</s>the<s>", false).unwrap();
    assert_eq!(ids.iter().filter(|id| **id < 3).count(), 2);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "inthe");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "in</s>the<s>");
}

#[test]
fn ids_outside_the_vocabulary_are_nothing() {
    let tokenizer = pieces(false);
    assert_eq!(tokenizer.token_text(1 << 20), "");
    assert_eq!(tokenizer.decode(&[u32::MAX], false).unwrap(), "");
}

#[test]
fn a_stream_gives_the_text_without_half_characters() {
    let tokenizer = pieces(true);
    let text = " the é😀 in";
    let ids = tokenizer.encode(text, true).unwrap();
    let mut stream = tokenizer.stream();
    let mut parts = Vec::new();
    for id in &ids {
        parts.extend(stream.push(*id).unwrap());
    }
    assert!(parts.iter().all(|part| !part.contains('\u{fffd}')));
    // A continuation keeps the space that the encoder puts before a text.
    assert_eq!(parts.concat() + &stream.finish(), format!(" {text}"));

    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(3 + 0xf0).unwrap(), None);
    assert_eq!(stream.push(3 + 0x9f).unwrap(), None);
    assert_eq!(stream.finish(), "\u{fffd}");
}

#[test]
fn every_byte_has_its_character() {
    for byte in 0..=255u8 {
        assert_eq!(byte_of(char_of(byte)), Some(byte));
    }
    assert_eq!((char_of(b' '), char_of(b'\n'), char_of(b'!')), ('Ġ', 'Ċ', '!'));
    assert_eq!(byte_of('€'), None);
}

fn refused(fields: &[(&str, Field<'_>)]) -> String {
    let bytes = write(fields, &[]);
    let parsed = gguf::parse("test.gguf", &bytes).unwrap();
    Tokenizer::from_gguf(&parsed).err().expect("refused").to_string()
}

#[test]
fn what_is_not_known_is_named() {
    let tokens = || ("tokenizer.ggml.tokens", Field::Strs(vec!["a", "b"]));
    let gpt2 = || ("tokenizer.ggml.model", Field::Str("gpt2"));
    let error = refused(&[("tokenizer.ggml.model", Field::Str("wordpiece")), tokens()]);
    assert!(error.contains("tokenizer.ggml.model") && error.contains("wordpiece"), "{error}");
    let error = refused(&[gpt2(), tokens(), ("tokenizer.ggml.pre", Field::Str("mystery"))]);
    assert!(error.contains("tokenizer.ggml.pre") && error.contains("mystery"), "{error}");
    let error = refused(&[gpt2(), tokens()]);
    assert!(error.contains("tokenizer.ggml.pre"), "{error}");
    let error = refused(&[gpt2()]);
    assert!(error.contains("tokenizer.ggml.tokens"), "{error}");
    let merges = ("tokenizer.ggml.merges", Field::Strs(vec!["a c"]));
    let error = refused(&[gpt2(), tokens(), ("tokenizer.ggml.pre", Field::Str("smollm")), merges]);
    assert!(error.contains("tokenizer.ggml.merges"), "{error}");
    let error = refused(&[("tokenizer.ggml.model", Field::Str("llama")), tokens()]);
    assert!(error.contains("tokenizer.ggml.scores"), "{error}");
    let error = refused(&[gpt2(), tokens(), ("tokenizer.ggml.token_type", Field::I32s(vec![1]))]);
    assert!(error.contains("tokenizer.ggml.token_type"), "{error}");
}

#[test]
fn a_decoder_that_is_not_ours_is_refused() {
    let spelling = |decoder: Value| Spelling::of(&decoder);
    assert_eq!(spelling(json!({"type": "ByteLevel"})), Some(Spelling::ByteLevel));
    assert_eq!(spelling(json!({"type": "WordPiece"})), None);
    assert_eq!(spelling(Value::Null), None);
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"});
    assert_eq!(spelling(metaspace), Some(Spelling::Pieces { strip: 1 }));
    let error = Tokenizer::from_json("tokenizer.json", b"{}", None).err().unwrap().to_string();
    assert!(error.starts_with("tokenizer.json: not a tokenizer"), "{error}");
}
