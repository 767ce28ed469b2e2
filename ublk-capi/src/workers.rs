//! Workers that many devices share.

use std::ffi::c_int;

use ublk_core::Workers;

use crate::boundary::{self, entry, not_null, store};
use crate::error::ublk_rs_error;

/// Worker threads that serve the queues of any number of devices. Its functions may be called from any thread.
#[repr(C)]
pub struct ublk_rs_workers {
    _private: [u8; 0],
}

/// # Safety
///
/// `workers` is NULL or a pool that is not freed while the result is used.
pub(crate) unsafe fn pool<'a>(workers: *const ublk_rs_workers) -> Option<&'a Workers> {
    // SAFETY: the caller's promise; every handle of this type is a `Workers`.
    unsafe { workers.cast::<Workers>().as_ref() }
}

/// Starts a pool of workers for many devices: ublk_rs_device_set_workers(). A backend that blocks stalls every device that
/// shares its worker: give such a device the option threads.
///
/// Waits for the threads' start, a moment. Not from a callback.
///
/// @param count    workers, at least 1
/// @param workers  the pool, to be given back to ublk_rs_workers_free()
/// @param error    NULL, or where to say what went wrong
/// @return 0; -EINVAL for 0 or NULL, -EDEADLK, and what keeps a thread or ring from being made
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_workers_new(
    count: usize,
    workers: *mut *mut ublk_rs_workers,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "start a pool of workers";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        if workers.is_null() {
            return Err(not_null(ATTEMPT, "workers"));
        }
        let made = Box::into_raw(Box::new(Workers::new(count)?));
        // SAFETY: not NULL, so writable by the program's promise.
        unsafe { store(workers, made.cast(), ATTEMPT, "workers") }
    })
}

/// Lets go of a pool: its threads end when the last device that it serves has. NULL is nothing.
///
/// Never blocks. Any thread.
///
/// @param workers  the pool
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_workers_free(workers: *mut ublk_rs_workers) {
    if !workers.is_null() {
        // SAFETY: made by `ublk_rs_workers_new`, and given up by this call.
        boundary::answer((), || drop(unsafe { Box::from_raw(workers.cast::<Workers>()) }));
    }
}
