//! A device's life, as types.
//!
//! The drawing of it is in the crate's own documentation, where users find it.

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
