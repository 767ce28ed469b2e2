//! The driver, and all devices of the machine.

use std::ffi::{c_char, c_int};

use ublk_core::control::{CancelToken, Control, DeviceInfo, DeviceState, Wait};

use crate::boundary::{self, answer, entry, fill_sized, not_null, shared, store};
use crate::device::{UBLK_RS_FOREVER, millis};
use crate::error::ublk_rs_error;

/// The driver, open. Its functions may be called from any thread, several at a time, but for ublk_rs_control_free(),
/// which must be the last.
#[repr(C)]
pub struct ublk_rs_control {
    _private: [u8; 0],
}

struct Handle {
    control: Control,
    /// Ends waits when the handle is freed.
    ended: CancelToken,
}

/// It has no disk: not started, stopped, or its server is gone.
pub const UBLK_RS_STATE_DEAD: u32 = 0;
/// Its disk exists and is served.
pub const UBLK_RS_STATE_LIVE: u32 = 1;
/// Its server is gone; the disk exists and its I/O waits for another.
pub const UBLK_RS_STATE_QUIESCED: u32 = 2;
/// Its server is gone; the disk exists and its I/O fails until there is another.
pub const UBLK_RS_STATE_FAIL_IO: u32 = 3;

/// A device as the driver describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ublk_rs_device_info {
    /// sizeof (struct ublk_rs_device_info), set by the program.
    pub size: usize,
    /// What was granted: UBLK_RS_FEATURE_*.
    pub features: u64,
    /// The server's own 64 bits: the option fingerprint.
    pub fingerprint: u64,
    /// Bytes of its disk; 0 while it has none.
    pub capacity: u64,
    /// Its number: the N of /dev/ublkbN.
    pub id: u32,
    /// UBLK_RS_STATE_*, or another number of the driver's.
    pub state: u32,
    /// The process that serves it; 0 for none.
    pub server_pid: i32,
    /// Hardware queues.
    pub queues: u32,
    /// Tags of each queue.
    pub queue_depth: u32,
    /// Bytes of the largest request.
    pub max_io_bytes: u32,
    /// The user that added it.
    pub owner_uid: u32,
    /// The group that added it.
    pub owner_gid: u32,
}

fn plain(info: &DeviceInfo) -> ublk_rs_device_info {
    ublk_rs_device_info {
        size: 0,
        features: info.features.bits(),
        fingerprint: info.server_flags,
        capacity: info.capacity.unwrap_or(0),
        id: info.id,
        state: match info.state {
            DeviceState::Dead => UBLK_RS_STATE_DEAD,
            DeviceState::Live => UBLK_RS_STATE_LIVE,
            DeviceState::Quiesced => UBLK_RS_STATE_QUIESCED,
            DeviceState::FailIo => UBLK_RS_STATE_FAIL_IO,
            DeviceState::Other(raw) => raw.into(),
            _ => u32::MAX,
        },
        server_pid: info.server_pid.unwrap_or(0),
        queues: info.queues.into(),
        queue_depth: info.queue_depth.into(),
        max_io_bytes: info.max_io_bytes,
        owner_uid: info.owner_uid,
        owner_gid: info.owner_gid,
    }
}

/// # Safety
///
/// `control` is NULL or a handle that is not freed while the result is used.
unsafe fn of<'a>(
    control: *const ublk_rs_control,
    attempt: &'static str,
) -> ublk_core::Result<&'a Handle> {
    // SAFETY: the caller's promise; every handle of this type is a `Handle`.
    unsafe { shared(control.cast(), attempt, "control") }
}

fn wait(handle: &Handle, ms: u64) -> Wait {
    let wait = match ms {
        UBLK_RS_FOREVER => Wait::forever(),
        ms => Wait::for_(millis(ms)),
    };
    wait.cancelled_by(&handle.ended)
}

/// Opens the driver.
///
/// Waits: for the driver, 30 seconds at most. Not from a callback.
///
/// @param control  the handle, to be given back to ublk_rs_control_free()
/// @param error    NULL, or where to say what went wrong
/// @return 0; -ENXIO without the driver, -ENOSYS without io_uring, -EACCES or -EPERM without the privilege, -EINVAL for
///         NULL, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_open(
    control: *mut *mut ublk_rs_control,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "open the driver";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        if control.is_null() {
            return Err(not_null(ATTEMPT, "control"));
        }
        let handle = Handle { control: Control::open()?, ended: CancelToken::new() };
        let made = Box::into_raw(Box::new(handle));
        // SAFETY: not NULL, so writable by the program's promise.
        unsafe { store(control, made.cast(), ATTEMPT, "control") }
    })
}

/// Closes the driver. NULL is nothing. Never blocks.
///
/// @param control  the handle
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_free(control: *mut ublk_rs_control) {
    if !control.is_null() {
        // SAFETY: made by `ublk_rs_control_open`, and given up by this call.
        answer((), || drop(unsafe { Box::from_raw(control.cast::<Handle>()) }));
    }
}

/// What the driver offers: UBLK_RS_FEATURE_*; 0 from drivers that cannot say (before Linux 6.5), and for NULL.
///
/// Never blocks. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_features(control: *const ublk_rs_control) -> u64 {
    answer(0, || {
        // SAFETY: the program's promise about its handle.
        let handle = unsafe { of(control, "ask for the driver's features") };
        handle.ok().and_then(|h| h.control.features()).map_or(0, |features| features.bits())
    })
}

/// Lists the devices of the machine that the caller may ask about, by ascending number, whoever made them.
///
/// Waits: for the driver, 30 seconds at most. Not from a callback.
///
/// @param control   the driver
/// @param ids       where the numbers go; NULL if capacity is 0
/// @param capacity  how many fit
/// @param count     how many there are, which may be more
/// @param error     NULL, or where to say what went wrong
/// @return 0; -EACCES or -EPERM if there are devices and the caller may ask about none, -EINVAL, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_list(
    control: *const ublk_rs_control,
    ids: *mut u32,
    capacity: usize,
    count: *mut usize,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "list the devices";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        if ids.is_null() && capacity > 0 {
            return Err(not_null(ATTEMPT, "ids"));
        }
        if count.is_null() {
            return Err(not_null(ATTEMPT, "count"));
        }
        // SAFETY: the program's promise about its handle.
        let devices = unsafe { of(control, ATTEMPT) }?.control.list()?;
        for (at, info) in devices.iter().take(capacity).enumerate() {
            // SAFETY: `capacity` numbers are writable by the program's promise.
            unsafe { ids.add(at).write(info.id) };
        }
        // SAFETY: not NULL, so writable by the program's promise.
        unsafe { store(count, devices.len(), ATTEMPT, "count") }
    })
}

/// Describes a device of the machine, whoever made it.
///
/// Waits: for the driver, 30 seconds at most. Not from a callback.
///
/// @param control  the driver
/// @param id       the device's number
/// @param info     where to, with its size set
/// @param error    NULL, or where to say what went wrong
/// @return 0; -ENODEV, -EACCES or -EPERM, -EINVAL, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_info(
    control: *const ublk_rs_control,
    id: u32,
    info: *mut ublk_rs_device_info,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "describe the device";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        // SAFETY: the program's promise about its handle.
        let control = &unsafe { of(control, ATTEMPT) }?.control;
        let mut found = control.get_dev_info(id).or_else(|e| match e.kind() {
            ublk_core::ErrorKind::PermissionDenied | ublk_core::ErrorKind::InvalidParameter => {
                control.get_dev_info2(id)
            }
            _ => Err(e),
        })?;
        if found.capacity.is_none() && found.state != DeviceState::Dead {
            // Of an unprivileged device only its path would tell: then it stays unknown.
            found.capacity = control.get_params(id).map(|params| params.capacity()).ok();
        }
        // SAFETY: the program's promise about its struct, which begins with a size.
        unsafe { fill_sized(info, plain(&found), ATTEMPT, "info") }
    })
}

/// Stops a device if it has a disk, and deletes it: also one whose server is gone, and whoever made it. Its disk is pulled
/// from under its users. For a device of this program use ublk_rs_device_stop().
///
/// Waits. Not from a callback.
///
/// @param control     the driver
/// @param id          the device's number
/// @param timeout_ms  for how long at most; UBLK_RS_FOREVER
/// @param error       NULL, or where to say what went wrong
/// @return 0; -ENODEV; -ETIMEDOUT for a server that does not answer or somebody who has it open, which the message names;
///         -EACCES or -EPERM, -EINVAL, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_delete(
    control: *const ublk_rs_control,
    id: u32,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "delete the device";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        // SAFETY: the program's promise about its handle.
        let handle = unsafe { of(control, ATTEMPT) }?;
        handle.control.delete(id, &wait(handle, timeout_ms))
    })
}

/// Takes a live disk from its server, whoever that is, for another to recover it (UBLK_RS_FEATURE_QUIESCE, since Linux
/// 6.16): new requests wait until then, those that the server has are waited for. A server that is to give its disk away by
/// itself has ublk_rs_device_hand_over(). A disk that is quiesced already is what was asked for.
///
/// Waits. Not from a callback.
///
/// @param control     the driver
/// @param id          the device's number
/// @param timeout_ms  for how long at most; UBLK_RS_FOREVER
/// @param error       NULL, or where to say what went wrong
/// @return 0 once the server has let go of it; -ETIMEDOUT if it has not: new requests wait all the same, and this has to be
///         called again; -EBADFD without a disk, or if somebody stopped it meanwhile, -EOPNOTSUPP without the feature and
///         with UBLK_RS_FEATURE_BATCH_IO, -ENODEV, -EINVAL, -EDEADLK
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_quiesce(
    control: *const ublk_rs_control,
    id: u32,
    timeout_ms: u64,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "quiesce the device";
    entry(error, || {
        boundary::may_wait(ATTEMPT)?;
        // SAFETY: the program's promise about its handle.
        let handle = unsafe { of(control, ATTEMPT) }?;
        handle.control.quiesce(id, &wait(handle, timeout_ms))
    })
}

/// Names what keeps a device in use, as far as this process can see, a line for each: processes, mounts, devices on top.
///
/// Blocks for a look around in /proc. Any thread.
///
/// @param control   the driver
/// @param id        the device's number
/// @param capacity  bytes at text
/// @param text      where it goes, with a NUL at its end, cut if it does not fit
/// @return how many there are; -EINVAL
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_control_holders(
    control: *const ublk_rs_control,
    id: u32,
    capacity: usize,
    text: *mut c_char,
) -> c_int {
    answer(-libc::ENOTRECOVERABLE, || {
        // SAFETY: the program's promise about its handle.
        let Ok(handle) = (unsafe { of(control, "see who uses the device") }) else {
            return -libc::EINVAL;
        };
        if text.is_null() || capacity == 0 {
            return -libc::EINVAL;
        }
        let holders = handle.control.holders(id);
        let lines: Vec<_> = holders.iter().map(ToString::to_string).collect();
        let mut all = lines.join("\n").replace('\0', " ").into_bytes();
        all.truncate(capacity - 1);
        all.push(0);
        // SAFETY: `capacity` bytes are writable by the program's promise, and it fits.
        unsafe { text.cast::<u8>().copy_from_nonoverlapping(all.as_ptr(), all.len()) };
        c_int::try_from(holders.len()).unwrap_or(c_int::MAX)
    })
}
