//! What goes wrong with the verbs transport, over the software HCA: devices and
//! wires that fail, peers that break the protocol, strangers at the control
//! channel. Each ends as designed, and the transport goes on.

#[path = "verbs_faults/bootstrap.rs"]
mod bootstrap;
#[path = "verbs_faults/credits.rs"]
mod credits;
#[path = "verbs_faults/devices.rs"]
mod devices;
#[path = "verbs_faults/gpu.rs"]
mod gpu;
#[path = "verbs_faults/guest.rs"]
mod guest;
#[path = "verbs_faults/hand.rs"]
mod hand;
#[path = "verbs_faults/hostile.rs"]
mod hostile;
#[path = "suite/node.rs"]
#[expect(dead_code, reason = "the suite uses the rest")]
mod node;
#[path = "software_hca/place.rs"]
mod place;
#[path = "verbs_faults/reconnects.rs"]
mod reconnects;
#[path = "software_hca/rig.rs"]
#[expect(dead_code, reason = "the tests of the software HCA use the rest")]
mod rig;
#[path = "strangers/wire.rs"]
mod wire;
#[path = "verbs_faults/world.rs"]
mod world;
