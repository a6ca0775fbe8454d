//! tcp transport.
