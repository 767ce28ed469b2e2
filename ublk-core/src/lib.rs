//! Serve Linux block devices from userspace.
//!
//! The kernel's `ublk` driver hands the I/O of a disk, `/dev/ublkbN`, to a program. This crate is the program's
//! side of that: implement [`Backend`] (or [`AsyncBackend`], or [`QueueHandler`]), give it to a [`Builder`],
//! and the system has a disk that mkfs, databases and virtual machines use like any other.
//!
//! ```no_run
//! use std::{io, sync::RwLock, time::Duration};
//! use ublk_core::{Backend, Builder, Capabilities, RequestFlags};
//!
//! struct Ram(RwLock<Vec<u8>>);
//!
//! impl Backend for Ram {
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities::WRITE
//!     }
//!     fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
//!         buf.copy_from_slice(&self.0.read().unwrap()[offset as usize..][..buf.len()]);
//!         Ok(buf.len())
//!     }
//!     fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
//!         self.0.write().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
//!         Ok(data.len())
//!     }
//! }
//!
//! fn main() -> ublk_core::Result<()> {
//!     let disk = Builder::new(64 << 20, Ram(RwLock::new(vec![0; 64 << 20]))).start()?;
//!     println!("serving {}", disk.path().display());
//!     disk.wait()?;
//!     Ok(())
//! }
//! ```
//!
//! It needs a kernel with the driver (`modprobe ublk_drv`) and, as a rule, root.

pub mod backend;
pub mod control;
mod device;
pub mod error;
mod request;
mod sys;
pub mod targets;
pub mod uapi;
mod uring;
mod worker;
mod zones;

pub use backend::{AsyncBackend, Backend, Capabilities, QueueContext, QueueHandler};
pub use device::{
    Added, Builder, Device, DeviceStats, Ending, OpStats, QueueStats, Running, SharedBuffer,
    StopFailed, Stopped,
};
pub use error::{Errno, Error, ErrorKind, Result};
pub use request::{Gone, KeptBuffer, Op, Request, RequestFlags};
pub use sys::thread::declare_io_flusher;
pub use worker::attendant::Attendant;
pub use worker::meter::Latency;
pub use worker::path::DataPath;
pub use worker::pool::Workers;
pub use worker::ring::{IoBuf, IoBufMut, Ring, RingFile};
pub use zones::{Zone, ZoneAction, ZoneKind, ZoneState};

/// The programs of the README and of the pages compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
#[cfg(doctest)]
#[doc = include_str!("../../docs/faults.md")]
struct Faults;
