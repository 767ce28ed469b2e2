//! The error object, and the numbers that errors have.

use std::ffi::{CString, c_char, c_int};
use std::ptr;

use ublk_core::{Error, ErrorKind};

use crate::boundary::answer;
use crate::words::of_c;

/// What went wrong, in numbers and words: made by the program once, and handed to as many calls as it likes.
///
/// A call that fails writes to it; one that succeeds leaves it alone. One object must not be in two calls at the same
/// time. Every function that takes one also takes NULL.
#[repr(C)]
pub struct ublk_rs_error {
    _private: [u8; 0],
}

/// There was no failure yet.
pub const UBLK_RS_KIND_NONE: u32 = 0;
/// The kernel has no ublk driver loaded (`modprobe ublk_drv`), or none at all: `-ENXIO`.
pub const UBLK_RS_KIND_DRIVER_MISSING: u32 = 1;
/// io_uring is switched off or not in this kernel: `-ENOSYS`.
pub const UBLK_RS_KIND_IO_URING_DISABLED: u32 = 2;
/// The caller lacks a privilege or a permission on a node: `-EACCES` or `-EPERM`.
pub const UBLK_RS_KIND_PERMISSION_DENIED: u32 = 3;
/// No device has this number: `-ENODEV`.
pub const UBLK_RS_KIND_NO_SUCH_DEVICE: u32 = 4;
/// The device number is taken: `-EEXIST`.
pub const UBLK_RS_KIND_ID_TAKEN: u32 = 5;
/// A limit of devices, files or buffers is reached: `-EMFILE`, or what the kernel said.
pub const UBLK_RS_KIND_TOO_MANY: u32 = 6;
/// Something still uses the device: `-EBUSY`. The message names what.
pub const UBLK_RS_KIND_BUSY: u32 = 7;
/// A parameter broke a rule that the message names: `-EINVAL`.
pub const UBLK_RS_KIND_INVALID_PARAMETER: u32 = 8;
/// The kernel, or what it granted, lacks a feature: `-EOPNOTSUPP`.
pub const UBLK_RS_KIND_UNSUPPORTED: u32 = 9;
/// The time was over: `-ETIMEDOUT`.
pub const UBLK_RS_KIND_TIMED_OUT: u32 = 10;
/// The wait was cancelled: `-ECANCELED`.
pub const UBLK_RS_KIND_CANCELLED: u32 = 11;
/// The request is gone: `-ESTALE`.
pub const UBLK_RS_KIND_GONE: u32 = 12;
/// The device is in another state than the call needs: `-EBADFD`.
pub const UBLK_RS_KIND_WRONG_STATE: u32 = 13;
/// A worker thread ended unexpectedly; its device was taken down: `-EIO`.
pub const UBLK_RS_KIND_WORKER_DIED: u32 = 14;
/// The handle was made before a `fork` by the parent: `-ECHILD`.
pub const UBLK_RS_KIND_FORKED: u32 = 15;
/// The call would wait for the very thread that makes it: `-EDEADLK`.
pub const UBLK_RS_KIND_WOULD_DEADLOCK: u32 = 16;
/// Any other failure of the kernel or of a file: what it said, or `-EIO`.
pub const UBLK_RS_KIND_IO: u32 = 17;
/// A defect of this library: `-ENOTRECOVERABLE`. Please report it.
pub const UBLK_RS_KIND_DEFECT: u32 = 18;

struct Object {
    code: c_int,
    kind: u32,
    errno: c_int,
    device: i64,
    message: CString,
    remedy: CString,
}

impl Object {
    fn empty() -> Self {
        Object {
            code: 0,
            kind: UBLK_RS_KIND_NONE,
            errno: 0,
            device: -1,
            message: CString::default(),
            remedy: CString::default(),
        }
    }
}

/// How a panic is told from other errors: by the one attempt that nothing else names.
const DEFECT: &str = "do this, by a defect of libublk_rs";

pub(crate) fn panicked(text: &str) -> Error {
    Error::new(ErrorKind::Io, DEFECT).because(text.to_owned()).remedy_is("please report it")
}

fn kind(error: &Error) -> u32 {
    match error.kind() {
        _ if error.attempt() == DEFECT => UBLK_RS_KIND_DEFECT,
        ErrorKind::DriverMissing => UBLK_RS_KIND_DRIVER_MISSING,
        ErrorKind::IoUringDisabled => UBLK_RS_KIND_IO_URING_DISABLED,
        ErrorKind::PermissionDenied => UBLK_RS_KIND_PERMISSION_DENIED,
        ErrorKind::NoSuchDevice => UBLK_RS_KIND_NO_SUCH_DEVICE,
        ErrorKind::IdTaken => UBLK_RS_KIND_ID_TAKEN,
        ErrorKind::TooMany => UBLK_RS_KIND_TOO_MANY,
        ErrorKind::Busy => UBLK_RS_KIND_BUSY,
        ErrorKind::InvalidParameter => UBLK_RS_KIND_INVALID_PARAMETER,
        ErrorKind::Unsupported => UBLK_RS_KIND_UNSUPPORTED,
        ErrorKind::TimedOut => UBLK_RS_KIND_TIMED_OUT,
        ErrorKind::Cancelled => UBLK_RS_KIND_CANCELLED,
        ErrorKind::Gone => UBLK_RS_KIND_GONE,
        ErrorKind::WrongState => UBLK_RS_KIND_WRONG_STATE,
        ErrorKind::WorkerDied => UBLK_RS_KIND_WORKER_DIED,
        ErrorKind::Forked => UBLK_RS_KIND_FORKED,
        ErrorKind::WouldDeadlock => UBLK_RS_KIND_WOULD_DEADLOCK,
        _ => UBLK_RS_KIND_IO,
    }
}

/// The negative number that functions return.
pub(crate) fn code(error: &Error) -> c_int {
    let said = |otherwise: c_int| error.errno().map_or(otherwise, |errno| errno.raw());
    let number = match kind(error) {
        UBLK_RS_KIND_DRIVER_MISSING => libc::ENXIO,
        UBLK_RS_KIND_IO_URING_DISABLED => libc::ENOSYS,
        UBLK_RS_KIND_PERMISSION_DENIED => said(libc::EACCES),
        UBLK_RS_KIND_NO_SUCH_DEVICE => libc::ENODEV,
        UBLK_RS_KIND_ID_TAKEN => libc::EEXIST,
        UBLK_RS_KIND_TOO_MANY => said(libc::EMFILE),
        UBLK_RS_KIND_BUSY => libc::EBUSY,
        UBLK_RS_KIND_INVALID_PARAMETER => libc::EINVAL,
        UBLK_RS_KIND_UNSUPPORTED => libc::EOPNOTSUPP,
        UBLK_RS_KIND_TIMED_OUT => libc::ETIMEDOUT,
        UBLK_RS_KIND_CANCELLED => libc::ECANCELED,
        UBLK_RS_KIND_GONE => libc::ESTALE,
        UBLK_RS_KIND_WRONG_STATE => libc::EBADFD,
        UBLK_RS_KIND_WORKER_DIED => libc::EIO,
        UBLK_RS_KIND_FORKED => libc::ECHILD,
        UBLK_RS_KIND_WOULD_DEADLOCK => libc::EDEADLK,
        UBLK_RS_KIND_DEFECT => libc::ENOTRECOVERABLE,
        _ => said(libc::EIO),
    };
    -number
}

/// For a C string: what a NUL would cut off is shown.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

/// Describes a failure to the program, if it wants to know.
pub(crate) fn fill(object: *mut ublk_rs_error, error: Error) {
    if object.is_null() {
        return;
    }
    let described = Object {
        code: code(&error),
        kind: kind(&error),
        errno: error.errno().map_or(0, |errno| errno.raw()),
        device: error.device().map_or(-1, i64::from),
        message: c_string(&of_c(&error.to_string())),
        remedy: c_string(&of_c(error.remedy().unwrap_or_default())),
    };
    // SAFETY: not NULL, so an object of `ublk_rs_error_new` that is in no other call, by that type's contract.
    unsafe { *object.cast::<Object>() = described };
}

/// # Safety
///
/// `error` is NULL or an object of `ublk_rs_error_new` that is in no other call.
unsafe fn look<'a, T: 'a>(
    error: *const ublk_rs_error,
    otherwise: T,
    at: impl FnOnce(&'a Object) -> T,
) -> T {
    // SAFETY: the caller's promise; every handle of this type is an `Object`.
    match unsafe { error.cast::<Object>().as_ref() } {
        Some(object) => answer(otherwise, || at(object)),
        None => otherwise,
    }
}

/// Makes an error object, to be given back to ublk_rs_error_free().
///
/// Returns NULL without memory. Never blocks.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_error_new() -> *mut ublk_rs_error {
    answer(ptr::null_mut(), || Box::into_raw(Box::new(Object::empty())).cast())
}

/// Ends an error object, and with it the strings that it gave out. NULL is nothing.
///
/// @param error  the object, which is in no call
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_free(error: *mut ublk_rs_error) {
    if !error.is_null() {
        // SAFETY: made by `ublk_rs_error_new`, and given up by this call.
        answer((), || drop(unsafe { Box::from_raw(error.cast::<Object>()) }));
    }
}

/// The negative number that the last call that failed has returned; 0 if none has. Of NULL, 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_code(error: *const ublk_rs_error) -> c_int {
    // SAFETY: the program's promise.
    unsafe { look(error, 0, |object| object.code) }
}

/// What kind of failure it was: UBLK_RS_KIND_*. Later versions may have more of these. Of NULL, UBLK_RS_KIND_NONE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_kind(error: *const ublk_rs_error) -> u32 {
    // SAFETY: the program's promise.
    unsafe { look(error, UBLK_RS_KIND_NONE, |object| object.kind) }
}

/// What the kernel said, positive; 0 if it was not asked. Of NULL, 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_errno(error: *const ublk_rs_error) -> c_int {
    // SAFETY: the program's promise.
    unsafe { look(error, 0, |object| object.errno) }
}

/// The number of the device that it was about; -1 if there was none. Of NULL, -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_device(error: *const ublk_rs_error) -> i64 {
    // SAFETY: the program's promise.
    unsafe { look(error, -1, |object| object.device) }
}

/// All about it in one line: what was tried, on which device, why it failed, what to do. Never NULL.
///
/// The string belongs to the object and lives until it is in another call or freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_message(error: *const ublk_rs_error) -> *const c_char {
    // SAFETY: the program's promise.
    unsafe { look(error, c"".as_ptr(), |object| object.message.as_ptr()) }
}

/// What to do about it, in words; empty if there is nothing to say. Never NULL.
///
/// The string belongs to the object and lives until it is in another call or freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_error_remedy(error: *const ublk_rs_error) -> *const c_char {
    // SAFETY: the program's promise.
    unsafe { look(error, c"".as_ptr(), |object| object.remedy.as_ptr()) }
}
