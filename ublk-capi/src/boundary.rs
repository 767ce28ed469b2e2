//! Where C meets Rust: no panic gets across, every error has a number and words, and who calls from inside of a
//! callback is known.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use ublk_core::{Error, ErrorKind, Result};

use crate::error::{self, ublk_rs_error};

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, this thread is inside of a callback of the program's.
pub(crate) struct Inside {
    before: bool,
}

impl Inside {
    pub(crate) fn of_callback() -> Self {
        Inside { before: IN_CALLBACK.replace(true) }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        IN_CALLBACK.set(self.before);
    }
}

/// This thread is the library's: what it ever runs of the program is callbacks.
pub(crate) fn stay_inside() {
    IN_CALLBACK.set(true);
}

/// Whether this thread is inside of a callback.
pub(crate) fn is_inside() -> bool {
    IN_CALLBACK.get()
}

/// For a function that waits for others: refused where those others wait for the caller.
pub(crate) fn may_wait(attempt: &'static str) -> Result<()> {
    match is_inside() {
        true => Err(Error::new(ErrorKind::WouldDeadlock, attempt)
            .because(
                "it waits for requests to be answered, and was called from inside of a callback",
            )
            .remedy_is("call it from a thread of the program's own")),
        false => Ok(()),
    }
}

/// A function's body: 0, or the negative number of what went wrong, which is described in `object` if there is one.
pub(crate) fn entry(object: *mut ublk_rs_error, body: impl FnOnce() -> Result<()>) -> c_int {
    // Whatever the body leaves half done is behind locks that forgive a panic.
    let done = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(defect(&*panic)));
    match done {
        Ok(()) => 0,
        Err(e) => {
            let code = error::code(&e);
            error::fill(object, e);
            code
        }
    }
}

/// A function that only says something: what it says, or `otherwise` should it panic.
pub(crate) fn answer<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

fn defect(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "(no message)",
    };
    error::panicked(text)
}

/// What is wrong with an argument.
pub(crate) fn invalid(attempt: &'static str, cause: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidParameter, attempt).because(cause.into())
}

/// A pointer that must not be NULL.
pub(crate) fn not_null(attempt: &'static str, what: &str) -> Error {
    invalid(attempt, format!("{what} is NULL"))
}

/// Shared access to what an argument points to.
///
/// # Safety
///
/// `pointer` is NULL or valid for reads of a `T` that nobody changes but through interior mutability, for as long as
/// the reference is used.
pub(crate) unsafe fn shared<'a, T>(
    pointer: *const T,
    attempt: &'static str,
    what: &str,
) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| not_null(attempt, what))
}

/// Stores an out-parameter.
///
/// # Safety
///
/// `pointer` is NULL or valid for writes of a `T`.
pub(crate) unsafe fn store<T>(
    pointer: *mut T,
    value: T,
    attempt: &'static str,
    what: &str,
) -> Result<()> {
    if pointer.is_null() {
        return Err(not_null(attempt, what));
    }
    // SAFETY: not NULL, so that the caller's promise holds.
    unsafe { pointer.write(value) };
    Ok(())
}

/// A string argument.
///
/// # Safety
///
/// `pointer` is NULL or a string that ends with NUL and does not change while the result is used.
pub(crate) unsafe fn text<'a>(
    pointer: *const c_char,
    attempt: &'static str,
    what: &str,
) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(not_null(attempt, what));
    }
    // SAFETY: not NULL, so that the caller's promise holds.
    unsafe { CStr::from_ptr(pointer) }
        .to_str()
        .map_err(|_| invalid(attempt, format!("{what} is not UTF-8")))
}

/// Fills a struct of the program's that says how large it is: as much of it as the program knows of.
///
/// # Safety
///
/// `to` is NULL or valid for writes of as many bytes as its first field, a `size_t`, says; `T` is `repr(C)` without
/// padding that matters and begins with that field.
pub(crate) unsafe fn fill_sized<T: Copy>(
    to: *mut T,
    mut value: T,
    attempt: &'static str,
    what: &str,
) -> Result<()> {
    if to.is_null() {
        return Err(not_null(attempt, what));
    }
    // SAFETY: not NULL; the first field is a size_t by the caller's promise.
    let size = unsafe { to.cast::<usize>().read() };
    if size < size_of::<usize>() * 2 {
        return Err(invalid(attempt, format!("{what}->size is {size}: set it to sizeof *{what}")));
    }
    let len = size.min(size_of::<T>());
    let from = (&raw mut value).cast::<u8>();
    // SAFETY: `value` begins with a size_t, which keeps saying what the program has; then `len` bytes are within both.
    unsafe {
        from.cast::<usize>().write(size);
        to.cast::<u8>().copy_from_nonoverlapping(from, len);
        to.cast::<u8>().add(len).write_bytes(0, size - len);
    }
    Ok(())
}
