//! The kernel's userspace interface of ublk, one to one with `include/uapi/linux/ublk_cmd.h` of
//! Linux 7.3.
//!
//! Names are the kernel's, so that a search for one finds both sides. Structs are `repr(C)` plain
//! integers without padding bytes, which [`bytes`] relies on; sizes and offsets are asserted when
//! this compiles, and `tests/uapi_header.rs` compares every size, offset and constant with the real
//! header. Nothing here has behaviour: what the fields mean together is the business of `control`
//! and `worker`.

mod batch;
pub mod bytes;
mod commands;
mod device;
mod features;
mod io;
mod offsets;
mod params;
mod shmem;
mod uring;
mod zoned;

pub use batch::*;
pub use commands::*;
pub use device::*;
pub use features::*;
pub use io::*;
pub use offsets::*;
pub use params::*;
pub use shmem::*;
pub use uring::*;
pub use zoned::*;

/// Fails the build where a struct of ours is not laid out as the kernel's.
macro_rules! assert_layout {
    ($name:ident: $size:literal, align $align:literal { $($field:ident @ $offset:literal),* $(,)? }) => {
        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!(align_of::<$name>() == $align);
            $(assert!(core::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}
use assert_layout;
