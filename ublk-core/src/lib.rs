//! Serve Linux block devices from userspace.

pub mod uapi;
