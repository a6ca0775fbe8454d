//! loopback transport.
