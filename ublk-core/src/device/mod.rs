//! A device's life, as types.
//!
//! ```text
//!             add            start              stop, stop_force
//!  Builder ─────────▶ Added ─────────▶ Running ─────────────────▶ Stopped
//!     │                 │ drop            │ drop: stop_force
//!     │ start = both    ▼                 ▼
//!     ▼               (gone)            (gone)
//!  Running
//! ```
//!
//! * [`Builder`] checks everything that can be checked without the kernel; nothing exists yet.
//! * [`Added`]: the kernel knows the device; there is no disk, and nobody serves it.
//! * [`Running`]: `/dev/ublkbN` is there and served. Its [`Device`] handle is for other threads.
//! * A disk with `USER_RECOVERY` outlives its server, which was killed or has [handed it over](Running::hand_over),
//!   and becomes the next one's [`Running`] by [`Builder::recover`].
//! * [`Stopped`]: the device is gone; this says how it went.
//!
//! Each step cleans up after itself when it fails: no device, thread, descriptor or mapping stays.

mod builder;
mod handover;
mod life;
mod mend;
mod recover;
mod resize;
mod running;
mod start;
mod stats;
mod stop;

pub use builder::Builder;
pub use life::Ending;
pub use running::{Device, Running, StopFailed, Stopped};
pub use start::Added;
pub use stats::{DeviceStats, OpStats, QueueStats};
