//! RDMA verbs. `libibverbs` is opened when the first device is asked for, not
//! linked: one binary runs on machines with and without it.

pub mod device;
pub mod sys;
