//! Ready-made backends, written with the public traits alone.
//!
//! * [`Null`] keeps nothing: for measuring.
//! * [`Mem`] keeps what was written in memory.
//! * [`ZonedMem`] is the same with zones.
//! * [`File`] is a regular file or another block device.

mod file;
mod file_align;
mod file_open;
mod mem;
mod mem_chunks;
mod mem_slab;
mod null;
mod zoned;
mod zoned_table;

pub use file::File;
pub use file_open::{FileOptions, SyncPolicy};
pub use mem::Mem;
pub use null::Null;
pub use zoned::{ZonedMem, ZonedOptions};
