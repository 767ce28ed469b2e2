//! What the crate needs from the operating system besides io_uring: mappings, event counters, threads
//! and forks. Leaf modules: each wraps a few libc calls in a safe type and says why that is sound.

pub(crate) mod clock;
pub(crate) mod event;
pub(crate) mod fork;
pub(crate) mod memory;
pub(crate) mod shared_memory;
pub(crate) mod thread;
mod ticks;
