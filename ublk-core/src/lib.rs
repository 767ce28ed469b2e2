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
//!
//! # A device's life
//!
//! ```text
//!             add            start              stop, stop_force
//!  Builder ─────────▶ Added ─────────▶ Running ─────────────────▶ Stopped
//!     │                 │  ▲     halt     │ │
//!     │ start = both    │  ╰──────────────╯ │ drop: stop_force
//!     ▼                 ▼ drop              ▼
//!  Running            (gone)              (gone)
//!
//!             recover            hand_over, or a killed server
//!  Builder ─────────▶ Running ───────────────────────────────▶ the next one's Builder::recover
//! ```
//!
//! * [`Builder`] checks everything that can be checked without the kernel; nothing exists yet.
//! * [`Added`]: the kernel knows the device; there is no disk, and nobody serves it. It may be given
//!   [another description](Added::describe) before it is started.
//! * [`Running`]: `/dev/ublkbN` is there and served. Its [`Device`] handle is for other threads; it
//!   [resizes](Device::resize) the disk, and [shares memory](Device::share) with its clients.
//! * [`Running::stop`] refuses while the disk is in use, and names by whom; [`Running::stop_force`] pulls it from under
//!   them. Both have a deadline. [`Stopped`]: the device is gone; this says how it went.
//! * [`Running::halt`] takes the disk away and gives the [`Added`] device back, where the kernel starts a device a
//!   second time (Linux 7.3): it keeps its number, and what the description of a disk says may change in between.
//! * A disk with [`USER_RECOVERY`](control::Features::USER_RECOVERY) outlives its server, which was killed or has
//!   [handed it over](Running::hand_over), and becomes the next one's [`Running`] by [`Builder::recover`]. Its users
//!   wait meanwhile and see no error. `examples/successor.rs` does that between two processes.
//!
//! Each step cleans up after itself when it fails: no device, thread, descriptor or mapping stays.
//!
//! # What a disk can be
//!
//! | | |
//! |---|---|
//! | who makes the calls | the queue's worker; a pool ([`Builder::threads`]); workers that devices share ([`Builder::workers`]); several for a queue ([`Builder::workers_per_queue`]) |
//! | how data moves | [`Builder::data_path`]: copied by the driver or by us, or not at all |
//! | what the kernel must, may or must not grant | [`Builder::require`], [`Builder::prefer`], [`Builder::forbid`] |
//! | [zoned](Builder::zoned) | `examples/zoned_disk.rs`, [`targets::ZonedMem`] |
//! | with [metadata](Builder::integrity) beside its data | [`targets::Mem::with_metadata`] |
//! | an ordinary user's | [`UNPRIVILEGED_DEV`](control::Features::UNPRIVILEGED_DEV), `examples/own_disk.rs` |
//! | one that uses its clients' memory where it is | [`SharedBuffer`], `examples/shared_memory.rs` |
//! | ready-made, striped, failing on purpose | [`targets`] |
//! | somebody else's | [`control::Control`] lists, describes, stops and deletes any device |

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
