//! Serve Linux block devices from userspace.

pub mod control;
pub mod error;
mod sys;
mod uring;
pub mod uapi;

pub use error::{Errno, Error, ErrorKind, Result};
