//! `distkv serve`: one node of a cluster.
