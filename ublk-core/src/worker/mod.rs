//! Workers: threads with a ring that serve any number of queues of any number of devices.
//!
//! One turn of a worker ([`turn`]) takes what others put in its [`mailbox`], commits the requests that have
//! ended, enters the kernel once (and waits there if there is nothing else to do), reaps what has
//! completed, and hands new requests to their queues' handlers. Everything that the kernel sees is in the
//! [`core`], behind a lock that is not held while user code runs; what a request shares with its worker is
//! a [`slot`].
//!
//! Two seams are for the strategies of moving requests and data: [`commands`] and [`batch`] say how requests come
//! in and results go out, and [`path`] how their data gets here and back.

pub(crate) mod attendant;
pub(crate) mod batch;
pub(crate) mod cell;
pub(crate) mod commands;
pub(crate) mod core;
pub(crate) mod executor;
pub(crate) mod handoff;
pub(crate) mod mailbox;
pub(crate) mod meter;
pub(crate) mod operations;
pub(crate) mod path;
pub(crate) mod pool;
pub(crate) mod portal;
pub(crate) mod queue;
pub(crate) mod ring;
pub(crate) mod serve;
pub(crate) mod shared;
pub(crate) mod slot;
pub(crate) mod turn;
