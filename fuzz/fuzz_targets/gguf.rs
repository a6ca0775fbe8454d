//! A GGUF file of any bytes: opening it gives a model or an error.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = distkv::model::gguf::check_file("fuzz.gguf", bytes);
});
