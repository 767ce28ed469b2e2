//! Ready-made backends, written with the public traits alone.

mod null;

pub use null::Null;
