//! `libublk_rs`: disks from userspace for programs in C, over `ublk-core`'s public interface alone.
//!
//! `include/ublk_rs.h` is made from this by cbindgen (`tests/header.rs`); what it says about each function is what is said
//! here. Rules that hold for all of them:
//!
//! * handles are pointers to empty structs, so that nothing of a private type reaches the ABI;
//! * everything that C calls goes through [`boundary`]: no panic gets across, and NULL is an error;
//! * out-parameters are last (but for the error object) and are written on success only;
//! * structs that the program owns begin with their size and grow at their end.

#![allow(non_camel_case_types)] // the names are C's
#![allow(clippy::missing_safety_doc)] // what C programs promise is in the documentation of each function

mod backend;
mod boundary;
mod control;
mod device;
mod error;
mod features;
mod fork;
mod inbox;
mod lifecycle;
mod log;
mod options;
mod request;
mod serve;
mod stats;
mod table;
mod targets;
mod version;
mod words;
mod workers;

pub use backend::*;
pub use control::*;
pub use device::{UBLK_RS_FOREVER, ublk_rs_device};
pub use error::*;
pub use features::*;
pub use lifecycle::*;
pub use log::*;
pub use options::*;
pub use request::*;
pub use stats::*;
pub use targets::*;
pub use version::*;
pub use workers::*;
