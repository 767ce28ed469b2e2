//! Ready-made backends, written with the public traits alone.
//!
//! * [`Null`] keeps nothing: for measuring.
//! * [`Mem`] keeps what was written in memory.
//! * [`ZonedMem`] is the same with zones.
//! * [`File`] is a regular file or another block device.
//! * [`Stripe`] is several of them as one disk.
//! * [`Fault`] is any other backend that misbehaves by rules, for tests.
//! * [`WriteCache`] is another that loses what was not flushed when its power is cut.

mod cache_pages;
mod fault;
mod fault_gate;
mod fault_handle;
mod fault_rules;
mod file;
mod file_align;
mod file_open;
mod join;
mod mem;
mod mem_chunks;
mod mem_slab;
mod null;
mod on_worker;
mod random;
mod stripe;
mod stripe_layout;
mod stripe_open;
mod write_cache;
mod zoned;
mod zoned_table;

pub use fault::Fault;
pub use fault_handle::{Faults, Injected, RuleStatus};
pub use fault_rules::{Action, Rule, RuleId};
pub use file::File;
pub use file_open::{FileOptions, SyncPolicy};
pub use mem::Mem;
pub use null::Null;
pub use on_worker::OnWorker;
pub use stripe::Stripe;
pub use stripe_open::StripeOptions;
pub use write_cache::{Lost, Power, WriteCache};
pub use zoned::{ZonedMem, ZonedOptions};
