//! A device's life, as types.
//!
//! ```text
//!             add            start              stop, stop_force
//!  Builder ─────────▶ Added ─────────▶ Running ─────────────────▶ Stopped
//!     │                 │  ▲     halt     │ │
//!     │ start = both    │  ╰──────────────╯ │ drop: stop_force
//!     ▼                 ▼ drop              ▼
//!  Running            (gone)              (gone)
//! ```
//!
//! * [`Builder`] checks everything that can be checked without the kernel; nothing exists yet.
//! * [`Added`]: the kernel knows the device; there is no disk, and nobody serves it. It may be given
//!   [another description](Added::describe) before it is started.
//! * [`Running`]: `/dev/ublkbN` is there and served. Its [`Device`] handle is for other threads.
//! * [`Running::halt`] takes the disk away and gives the [`Added`] device back, where the kernel starts a device a
//!   second time: it keeps its number, and what the description of a disk says may change in between.
//! * A disk with `USER_RECOVERY` outlives its server, which was killed or has [handed it over](Running::hand_over),
//!   and becomes the next one's [`Running`] by [`Builder::recover`].
//! * [`Stopped`]: the device is gone; this says how it went.
//!
//! Each step cleans up after itself when it fails: no device, thread, descriptor or mapping stays.

mod builder;
mod granted;
mod halt;
mod handover;
mod life;
mod mend;
mod recover;
mod resize;
mod running;
mod share;
mod start;
mod stats;
mod stop;
mod unprivileged;

pub use builder::Builder;
pub use life::Ending;
pub use running::{Device, Running, StopFailed, Stopped};
pub use share::SharedBuffer;
pub use start::Added;
pub use stats::{DeviceStats, OpStats, QueueStats};
