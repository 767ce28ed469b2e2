//! The functions of a device's life.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use ublk_core::{Ending, Error, ErrorKind, SharedBuffer};

use crate::backend::{Callbacks, ublk_rs_backend};
use crate::boundary::{self, answer, entry, invalid, store};
use crate::device::{Device, Source, millis, ublk_rs_device};
use crate::error::ublk_rs_error;
use crate::options::{Id, Value};
use crate::targets::Target;
use crate::words::of_c;
use crate::workers::{self, ublk_rs_workers};

/// The program stopped it, or halted it.
pub const UBLK_RS_ENDING_STOPPED: u32 = 1;
/// Somebody else stopped or deleted it, or quiesced it for another server.
pub const UBLK_RS_ENDING_STOPPED_BY_OTHERS: u32 = 2;
/// This program gave it away by ublk_rs_device_hand_over().
pub const UBLK_RS_ENDING_HANDED_OVER: u32 = 3;
/// It was taken down because something failed.
pub const UBLK_RS_ENDING_FAILED: u32 = 4;

pub(crate) fn ending_number(ending: Ending) -> u32 {
    match ending {
        Ending::Stopped => UBLK_RS_ENDING_STOPPED,
        Ending::StoppedByOthers => UBLK_RS_ENDING_STOPPED_BY_OTHERS,
        Ending::HandedOver => UBLK_RS_ENDING_HANDED_OVER,
        _ => UBLK_RS_ENDING_FAILED,
    }
}

fn hand_out(device: Arc<Device>) -> *mut ublk_rs_device {
    Arc::into_raw(device).cast_mut().cast()
}

/// Makes a device of size bytes that is served by the program's functions. Nothing exists in the kernel yet.
///
/// From here on the library owns what user stands for: backend->destroy is called once for it, by
/// ublk_rs_device_free(). If this fails it is not called.
///
/// Never blocks. Any thread.
///
/// @param size     bytes of the disk, a multiple of the logical block size
/// @param backend  the functions; copied
/// @param user     what each of them is given
/// @param device   the device, to be given back to ublk_rs_device_free()
/// @param error    NULL, or where to say what went wrong
/// @return 0; -EINVAL for a table that makes no sense or a NULL where none may be
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_new(
    size: u64,
    backend: *const ublk_rs_backend,
    user: *mut c_void,
    device: *mut *mut ublk_rs_device,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "make a device";
    entry(error, || {
        if device.is_null() {
            return Err(boundary::not_null(ATTEMPT, "device"));
        }
        // SAFETY: the program's promise about its table.
        let callbacks = unsafe { Callbacks::new(backend, user, ATTEMPT) }?;
        let made = Device::new(Source::Program(Arc::new(callbacks)));
        made.configure(ATTEMPT, |config| {
            config.set(Id::Size, Value::Number(size));
            Ok(())
        })?;
        // SAFETY: not NULL, so writable by the program's promise.
        unsafe { store(device, hand_out(made), ATTEMPT, "device") }
    })
}

/// Makes a device that is served by a ready-made backend of the library: "null", "mem", "file", "zoned-mem", "stripe";
/// ublk_rs_target_name() lists them. Options say the rest, its size among them.
///
/// Never blocks. Any thread.
///
/// @param target  the backend's name
/// @param device  the device, to be given back to ublk_rs_device_free()
/// @param error   NULL, or where to say what went wrong
/// @return 0; -EINVAL for a name that is none or a NULL where none may be
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_new_target(
    target: *const c_char,
    device: *mut *mut ublk_rs_device,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "make a device";
    entry(error, || {
        if device.is_null() {
            return Err(boundary::not_null(ATTEMPT, "device"));
        }
        // SAFETY: the program's promise about its string.
        let name = unsafe { boundary::text(target, ATTEMPT, "target") }?;
        let made = Device::new(Source::Ready(Target::find(name, ATTEMPT)?));
        // SAFETY: not NULL, so writable by the program's promise.
        unsafe { store(device, hand_out(made), ATTEMPT, "device") }
    })
}

/// Ends the handle, and what it still has: a disk that runs is stopped by force within five seconds, a halted device is
/// deleted. Then backend->destroy is called. NULL is nothing.
///
/// No other function may be at work on the device, and none may come. Buffers of requests that were never completed end
/// with it. In a forked child nothing happens, and destroy is not called.
///
/// Waits: for requests in progress, five seconds at most, and some twenty if a callback is stuck. Not from a callback.
///
/// @param device  the device
/// @return 0; -EDEADLK from inside of a callback, and the device is as before
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_free(device: *mut ublk_rs_device) -> c_int {
    entry(ptr::null_mut(), || {
        boundary::may_wait("free the device")?;
        if !device.is_null() {
            // SAFETY: a handle that `hand_out` made, given up by this call.
            let device = unsafe { Arc::from_raw(device.cast_const().cast::<Device>()) };
            match device.is_ours() {
                true => device.close(),
                // All that it has is the parent's, the threads that use it among it.
                false => std::mem::forget(device),
            }
        }
        Ok(())
    })
}

/// Sets an option that is a number, features, or yes and no (1 and 0).
///
/// Never blocks. Any thread. Before the device starts, or while it is halted. Whether the value makes sense together
/// with the others is found by the start.
///
/// @param device  the device
/// @param name    the option: "queue_depth"; ublk_rs_option_name() lists them
/// @param value   what it is to be
/// @param error   NULL, or where to say what went wrong
/// @return 0; -EINVAL for a name that is none or takes something else, -EBADFD once it was started
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_set_number(
    device: *mut ublk_rs_device,
    name: *const c_char,
    value: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "set an option";
    entry(error, || {
        // SAFETY: the program's promises about its handle and its string.
        let (device, name) =
            unsafe { (Device::of(device, ATTEMPT)?, boundary::text(name, ATTEMPT, "name")?) };
        device.configure(ATTEMPT, |config| config.set_number(name, value))
    })
}

/// Sets any option from text: numbers as "65536" or "64K", yes and no as "yes" and "no", features as
/// "USER_RECOVERY,QUIESCE".
///
/// Never blocks. Any thread. Before the device starts, or while it is halted. Whether the value makes sense together
/// with the others is found by the start.
///
/// @param device  the device
/// @param name    the option
/// @param value   what it is to be; copied
/// @param error   NULL, or where to say what went wrong
/// @return 0; -EINVAL for a name that is none or text that is no such value, -EBADFD once it was started
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_set(
    device: *mut ublk_rs_device,
    name: *const c_char,
    value: *const c_char,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "set an option";
    entry(error, || {
        // SAFETY: the program's promises about its handle and its strings.
        let (device, name, value) = unsafe {
            (
                Device::of(device, ATTEMPT)?,
                boundary::text(name, ATTEMPT, "name")?,
                boundary::text(value, ATTEMPT, "value")?,
            )
        };
        device.configure(ATTEMPT, |config| config.set_text(name, value))
    })
}

/// Says what an option is, as text: what it was set to, or its default, which is empty if it depends.
///
/// Never blocks. Any thread, at any time.
///
/// @param device    the device
/// @param name      the option
/// @param capacity  bytes at value
/// @param value     where the text goes, with a NUL at its end
/// @param error     NULL, or where to say what went wrong
/// @return 0; -EINVAL for a name that is none, -ERANGE if the text does not fit
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_get(
    device: *const ublk_rs_device,
    name: *const c_char,
    capacity: usize,
    value: *mut c_char,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "read an option";
    entry(error, || {
        // SAFETY: the program's promises about its handle and its string.
        let (device, name) =
            unsafe { (Device::of(device, ATTEMPT)?, boundary::text(name, ATTEMPT, "name")?) };
        if value.is_null() {
            return Err(boundary::not_null(ATTEMPT, "value"));
        }
        let text = device.config(|config| config.get(name))?;
        let bytes = text.as_bytes_with_nul();
        if bytes.len() > capacity {
            let small = Error::new(ErrorKind::Io, ATTEMPT).with_errno(ublk_core::Errno::ERANGE);
            return Err(small.because(format!("it takes {} bytes", bytes.len())));
        }
        // SAFETY: `capacity` bytes are writable by the program's promise, and the text fits.
        unsafe { value.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    })
}

/// Has the device served by a pool of workers that it shares with others.
///
/// Never blocks. Any thread. Before the device starts.
///
/// @param device   the device
/// @param workers  the pool, which the device keeps; NULL: workers of its own again
/// @param error    NULL, or where to say what went wrong
/// @return 0; -EBADFD once it was started
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_set_workers(
    device: *mut ublk_rs_device,
    workers: *const ublk_rs_workers,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "set the device's workers";
    entry(error, || {
        // SAFETY: the program's promise about its handles.
        let (device, pool) = unsafe { (Device::of(device, ATTEMPT)?, workers::pool(workers)) };
        device.configure(ATTEMPT, |config| {
            config.workers = pool.cloned();
            Ok(())
        })
    })
}

/// Starts the disk: when this returns, its node can be opened.
///
/// Waits: for the kernel, up to the option start_timeout_ms. Not from a callback. With the option dispatch the calling
/// thread calls the backend meanwhile. If it fails nothing stays behind, and it can be tried again with other options; so
/// can a halted device that these do not fit, which stays.
///
/// @param device  the device
/// @param error   NULL, or where to say what went wrong
/// @return 0; -ENXIO without the driver, -EACCES or -EPERM without the privilege, -EINVAL for options that do not fit
///         together, -EOPNOTSUPP for what the kernel does not have, -EEXIST if the id is taken, -ETIMEDOUT, -EBADFD if it
///         was started before, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_start(
    device: *mut ublk_rs_device,
    error: *mut ublk_rs_error,
) -> c_int {
    // SAFETY: the program's promise about its handle.
    entry(error, || unsafe { Device::kept(device, "start the device") }?.start())
}

/// Takes over a disk whose server is gone, or has handed it over: one that was started with the feature
/// UBLK_RS_FEATURE_USER_RECOVERY. Otherwise as ublk_rs_device_start().
///
/// The disk stays as it is; size, fingerprint and what the backend can do have to fit it.
///
/// @param device  the device, described and not started
/// @param id      the number of the disk
/// @param error   NULL, or where to say what went wrong
/// @return 0; -ENODEV, -EBUSY while its server lives, -EBADFD if it cannot be recovered, -EINVAL if it is not what the
///         options describe, and as ublk_rs_device_start(). The disk is as before then
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_recover(
    device: *mut ublk_rs_device,
    id: u32,
    error: *mut ublk_rs_error,
) -> c_int {
    // SAFETY: the program's promise about its handle.
    entry(error, || unsafe { Device::kept(device, "recover the device") }?.recover(id))
}

/// Waits until the device has ended, by whomever.
///
/// Waits. Not from a callback. With the option dispatch, on the thread that dispatches, this is the event loop.
///
/// @param device      the device
/// @param timeout_ms  for how long at most; UBLK_RS_FOREVER
/// @param error       NULL, or where to say what went wrong
/// @return 0 once it has ended; -ETIMEDOUT if it goes on, -EBADFD if it was not started, -EDEADLK; what took it down, if
///         it failed
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_wait(
    device: *mut ublk_rs_device,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    entry(error, || {
        // SAFETY: the program's promise about its handle.
        unsafe { Device::of(device, "wait for the device") }?.wait(millis(timeout_ms)).map(drop)
    })
}

/// Stops the disk when nobody uses it, and deletes the device.
///
/// While the disk is open, mounted or claimed it is left alone; that is tried again until the time is over. Requests
/// that the program still has not answered by then are answered with EIO; their buffers stay valid until it completes
/// them, which gives -ESTALE, or frees the device.
///
/// Waits: timeout_ms, and some seconds if the backend is stuck. Not from a callback.
///
/// @param device      the device
/// @param timeout_ms  for how long at most
/// @param error       NULL, or where to say what went wrong
/// @return 0, also if it had ended before; -EBUSY: the disk goes on, and the message names who has it; -EBADFD if it was
///         not started, -EDEADLK, -ECHILD in a forked child
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_stop(
    device: *mut ublk_rs_device,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    // SAFETY: the program's promise about its handle.
    entry(error, || unsafe { stop(device, timeout_ms, false) })
}

/// As ublk_rs_device_stop(), whoever uses the disk: it is pulled from under them. What a file system on it has not
/// written is lost. Never -EBUSY.
///
/// @param device      the device
/// @param timeout_ms  for how long requests are waited for
/// @param error       NULL, or where to say what went wrong
/// @return as ublk_rs_device_stop()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_stop_force(
    device: *mut ublk_rs_device,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    // SAFETY: the program's promise about its handle.
    entry(error, || unsafe { stop(device, timeout_ms, true) })
}

/// # Safety
///
/// As [`Device::of`].
unsafe fn stop(device: *mut ublk_rs_device, ms: u64, force: bool) -> ublk_core::Result<()> {
    // SAFETY: the caller's promise.
    let stopped = unsafe { Device::of(device, "stop the device") }?.stop(millis(ms), force)?;
    for what in &stopped.leftovers {
        tracing::warn!(device = stopped.id, "after a stop: {what}");
    }
    Ok(())
}

/// Stops the disk when nobody uses it and keeps the device: options can be set again, and ublk_rs_device_start() gives
/// it another disk with the same number (since Linux 7.3). ublk_rs_device_stop() deletes it.
///
/// Waits, as ublk_rs_device_stop(). Not from a callback.
///
/// @param device      the device
/// @param timeout_ms  for how long at most
/// @param error       NULL, or where to say what went wrong
/// @return 0; -EOPNOTSUPP where the kernel starts no device twice, -EBUSY, -EBADFD, -ETIMEDOUT, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_halt(
    device: *mut ublk_rs_device,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    entry(error, || {
        // SAFETY: the program's promise about its handle.
        unsafe { Device::of(device, "halt the device") }?.halt(millis(timeout_ms))
    })
}

/// Gives the disk to the next server, which takes it by ublk_rs_device_recover(): under its users, without a failed
/// request. It must have been started with UBLK_RS_FEATURE_USER_RECOVERY.
///
/// Memory that was shared with clients is shared no more, so that the next server can do that. That may have happened also
/// if the handover then fails: clients' data is copied until it is shared again.
///
/// Waits: for what this program has not answered. Not from a callback.
///
/// @param device      the device
/// @param timeout_ms  for how long at most
/// @param error       NULL, or where to say what went wrong
/// @return 0; -EOPNOTSUPP without the features, -ETIMEDOUT, -EBADFD, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_hand_over(
    device: *mut ublk_rs_device,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    entry(error, || {
        // SAFETY: the program's promise about its handle.
        unsafe { Device::of(device, "hand the device over") }?.hand_over(millis(timeout_ms))
    })
}

/// Gives a running disk another size (since Linux 6.16). The backend serves the larger of both meanwhile. Of the ready-made
/// ones "mem" keeps the bytes that it was made with: what a larger disk has behind them is EINVAL for clients.
///
/// Waits: for the kernel, a moment. Not from a callback.
///
/// @param device  the device
/// @param size    bytes, a multiple of the logical block size
/// @param error   NULL, or where to say what went wrong
/// @return 0; -EOPNOTSUPP, -EINVAL, -EBADFD, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_resize(
    device: *mut ublk_rs_device,
    size: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    entry(error, || {
        boundary::may_wait("resize the device")?;
        // SAFETY: the program's promise about its handle.
        let device = unsafe { Device::of(device, "resize the device") }?;
        let core = device.core("resize the device")?;
        device.dispatching(|| core.resize(size))
    })
}

/// Has requests whose data lies in a memory file travel without a copy (since Linux 7.1, with
/// UBLK_RS_FEATURE_SHMEM_ZC): clients map the same file and use it for direct I/O.
///
/// Waits: the disk stands still for a moment. Not from a callback.
///
/// ublk_rs_device_hand_over() and ublk_rs_device_halt() end it. What a killed server has shared the driver keeps: to the
/// server that recovers the disk requests in it are like others, and it can share the memory again once it has called
/// ublk_rs_device_unshare() with the number that the former one was told.
///
/// @param device     the device
/// @param memfd      a memory file that is sealed against shrinking; not kept
/// @param read_only  not 0 for a file that may not be written to; such memory serves writes of the client alone
/// @param number     the memory's number with this device, for ublk_rs_device_unshare()
/// @param error      NULL, or where to say what went wrong
/// @return 0; -EOPNOTSUPP without the feature, -EINVAL without the seal or for another file, -EEXIST if a part of it is
///         shared, -ETIMEDOUT if the backend does not answer the requests that it has, or the driver a former call,
///         -EBADFD, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_share(
    device: *mut ublk_rs_device,
    memfd: c_int,
    read_only: c_int,
    number: *mut u32,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "share memory with the disk's clients";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        if number.is_null() {
            return Err(boundary::not_null(ATTEMPT, "number"));
        }
        // SAFETY: the program's promise about its handle.
        let device = unsafe { Device::of(device, ATTEMPT) }?;
        let core = device.core(ATTEMPT)?;
        // SAFETY: two integers; a number that is no descriptor is an error.
        let fd = unsafe { libc::fcntl(memfd, libc::F_DUPFD_CLOEXEC, 0) };
        if fd < 0 {
            return Err(invalid(ATTEMPT, format!("{memfd} is no open file")));
        }
        // SAFETY: just made by the call above.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let buffer = SharedBuffer::from_memfd(file, read_only != 0)?;
        let shared = device.dispatching(|| core.share(&buffer))?;
        // SAFETY: not NULL, so writable by the program's promise.
        unsafe { store(number, shared.into(), ATTEMPT, "number") }
    })
}

/// Ends the sharing of the memory with this number, which may be one that a former server of the disk was told, once the
/// requests that are out are answered.
///
/// Waits: the disk stands still for a moment. Not from a callback.
///
/// @param device  the device
/// @param number  what ublk_rs_device_share() has stored
/// @param error   NULL, or where to say what went wrong
/// @return 0; -ENOENT if there is none, -ETIMEDOUT as of ublk_rs_device_share(), or if the driver does not answer, which
///         then goes on with it, -EBADFD, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_unshare(
    device: *mut ublk_rs_device,
    number: u32,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "stop sharing memory with the disk's clients";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        // SAFETY: the program's promise about its handle.
        let device = unsafe { Device::of(device, ATTEMPT) }?;
        let core = device.core(ATTEMPT)?;
        let number = u16::try_from(number).map_err(|_| {
            let none = Error::new(ErrorKind::Io, ATTEMPT).with_errno(ublk_core::Errno::ENOENT);
            none.because(format!("there is no buffer {number}"))
        })?;
        device.dispatching(|| core.unshare(number))
    })
}

/// The descriptor to watch for readability, of a device with the option dispatch: while it is readable,
/// ublk_rs_device_dispatch() has something to do. It belongs to the device and must not be read or closed. Who watches for
/// its edges (EPOLLET) dispatches until that returns 0.
///
/// Never blocks. Any thread, once the device was started.
///
/// @param device  the device
/// @return the descriptor; -EINVAL for NULL, -EBADFD without the option or before the start
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_fd(device: *const ublk_rs_device) -> c_int {
    answer(-libc::ENOTRECOVERABLE, || {
        // SAFETY: the program's promise about its handle.
        match unsafe { Device::of(device, "find the descriptor") } {
            Ok(device) => device.inbox().map_or(-libc::EBADFD, |inbox| inbox.fd()),
            Err(_) => -libc::EINVAL,
        }
    })
}

/// Calls the backend for requests that have come, of a device with the option dispatch, on the calling thread.
///
/// Blocks only as far as the backend does. Any thread; several may do it at a time, and then the backend is called by
/// several. The thread that did it last is taken for the one that will: if it is the one that stops the device, it goes
/// on calling the backend while it waits.
///
/// @param device  the device
/// @param most    how many requests at most; 0 for all that are there now. Those that come meanwhile have the next call,
///                for which the descriptor is readable
/// @return how many it were; -ENODEV once the device has ended and nothing will come any more, -EINVAL for NULL, -EBADFD
///         without the option or before the start, -EDEADLK from inside of a callback, -ECHILD
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_dispatch(device: *mut ublk_rs_device, most: u32) -> c_int {
    answer(-libc::ENOTRECOVERABLE, || {
        if boundary::is_inside() {
            return -libc::EDEADLK;
        }
        // SAFETY: the program's promise about its handle.
        let Ok(device) = (unsafe { Device::of(device, "dispatch requests") }) else {
            return -libc::EINVAL;
        };
        if !device.is_ours() {
            return -libc::ECHILD;
        }
        let Some(inbox) = device.inbox() else { return -libc::EBADFD };
        inbox.adopt();
        let most = if most == 0 { c_int::MAX.cast_unsigned() } else { most };
        match device.dispatch(most.min(c_int::MAX.cast_unsigned())) {
            Ok(count) => count.cast_signed(),
            Err(()) => -libc::ENODEV,
        }
    })
}

/// The disk: "/dev/ublkbN"; NULL before the device was started. The string lives until the device is freed; a device that
/// was halted may have another number after its next start.
///
/// Never blocks. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_path(device: *const ublk_rs_device) -> *const c_char {
    answer(ptr::null(), || {
        // SAFETY: the program's promise about its handle.
        let device = unsafe { Device::of(device, "find the disk") };
        device.map_or(ptr::null(), Device::path)
    })
}

/// The device's number; -1 before it was started, and for NULL.
///
/// Never blocks. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_id(device: *const ublk_rs_device) -> i64 {
    // SAFETY: the program's promise about its handle.
    answer(-1, || unsafe { core(device) }.map_or(-1, |core| core.id().into()))
}

/// UBLK_RS_FEATURE_* that the driver granted; 0 before the device was started, and for NULL.
///
/// Never blocks. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_features(device: *const ublk_rs_device) -> u64 {
    // SAFETY: the program's promise about its handle.
    answer(0, || unsafe { core(device) }.map_or(0, |core| core.features().bits()))
}

/// The disk's present size in bytes; 0 before the device was started, and for NULL.
///
/// Never blocks. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_size(device: *const ublk_rs_device) -> u64 {
    // SAFETY: the program's promise about its handle.
    answer(0, || unsafe { core(device) }.map_or(0, |core| core.params().capacity()))
}

/// How the device ended: UBLK_RS_ENDING_*; 0 while it has not.
///
/// Never blocks. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_ending(device: *const ublk_rs_device) -> u32 {
    // SAFETY: the program's promise about its handle.
    answer(0, || unsafe { core(device) }.and_then(|core| core.ending()).map_or(0, ending_number))
}

/// What is not as it should be though the disk works, a privilege that is missing for instance, a line for each; empty if
/// there is nothing.
///
/// Never blocks. Any thread.
///
/// @param device    the device
/// @param capacity  bytes at text
/// @param text      where it goes, with a NUL at its end, cut if it does not fit
/// @return how many warnings there are; -EINVAL for NULL, -EBADFD before the start
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_warnings(
    device: *const ublk_rs_device,
    capacity: usize,
    text: *mut c_char,
) -> c_int {
    answer(-libc::ENOTRECOVERABLE, || {
        if text.is_null() || device.is_null() || capacity == 0 {
            return -libc::EINVAL;
        }
        // SAFETY: the program's promise about its handle.
        let Some(core) = (unsafe { core(device) }) else { return -libc::EBADFD };
        let warnings = core.warnings();
        let mut all = of_c(&warnings.join("\n")).replace('\0', " ").into_bytes();
        all.truncate(capacity - 1);
        all.push(0);
        // SAFETY: `capacity` bytes are writable by the program's promise, and it fits.
        unsafe { text.cast::<u8>().copy_from_nonoverlapping(all.as_ptr(), all.len()) };
        c_int::try_from(warnings.len()).unwrap_or(c_int::MAX)
    })
}

/// # Safety
///
/// As [`Device::of`].
pub(crate) unsafe fn core(device: *const ublk_rs_device) -> Option<ublk_core::Device> {
    // SAFETY: the caller's promise.
    unsafe { Device::of(device, "look at the device") }.ok()?.core_if_any()
}

/// Declares the calling thread to be one that the disk's I/O depends on (PR_SET_IO_FLUSHER): the kernel then does not make
/// it wait for writeback to that disk. For threads of the program that answer requests; those of the library do it by
/// themselves. Needs CAP_SYS_RESOURCE.
///
/// Never blocks.
///
/// @return 0; -EPERM without the privilege
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_declare_io_flusher() -> c_int {
    answer(-libc::ENOTRECOVERABLE, || match ublk_core::declare_io_flusher() {
        Ok(()) => 0,
        Err(e) => crate::error::code(&e),
    })
}
