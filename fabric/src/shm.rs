//! shm transport.
