//! What the kernels are told: the structs of `cuda/api.h`, written from it when
//! the program is built.

include!(concat!(env!("OUT_DIR"), "/cuda_api.rs"));
