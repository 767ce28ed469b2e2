//! Serve Linux block devices from userspace.

pub mod error;
pub mod uapi;

pub use error::{Errno, Error, ErrorKind, Result};
