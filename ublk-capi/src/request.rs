//! What a program does with a request that it was given by `submit`.

use std::ffi::{c_int, c_void};

use ublk_core::{Errno, Gone, Op, Request};

use crate::backend::{outcome, ublk_rs_zone};
use crate::boundary::answer;
use crate::device::{Device, ublk_rs_device};
use crate::table::Refusal;

fn refused(refusal: Refusal) -> c_int {
    match refusal {
        Refusal::Stale => -libc::ESTALE,
        Refusal::Busy => -libc::EBUSY,
    }
}

/// Looks at a request, and says what came of it as a number.
///
/// # Safety
///
/// As [`Device::of`].
unsafe fn with(
    device: *const ublk_rs_device,
    request: u64,
    look: impl FnOnce(&mut Request) -> Result<(), c_int>,
) -> c_int {
    answer(-libc::ENOTRECOVERABLE, || {
        // SAFETY: the caller's promise.
        let Ok(device) = (unsafe { Device::of(device, "look at a request") }) else {
            return -libc::EINVAL;
        };
        if !device.is_ours() {
            return -libc::ECHILD;
        }
        match device.table().with(request, look) {
            Ok(Ok(())) => 0,
            Ok(Err(code)) => code,
            Err(refusal) => refused(refusal),
        }
    })
}

/// Ends a request.
///
/// # Safety
///
/// As [`Device::of`].
#[inline]
unsafe fn end(
    device: *const ublk_rs_device,
    request: u64,
    end: impl FnOnce(Request) -> Result<(), Gone>,
) -> c_int {
    answer(-libc::ENOTRECOVERABLE, || {
        // SAFETY: the caller's promise.
        let Ok(device) = (unsafe { Device::of(device, "complete a request") }) else {
            return -libc::EINVAL;
        };
        if !device.is_ours() {
            return -libc::ECHILD;
        }
        match device.table().take(request) {
            Ok(request) => end(request).map_or(-libc::ESTALE, |()| 0),
            Err(refusal) => refused(refusal),
        }
    })
}

fn fits(request: &Request, op: Op, at: u64, length: usize) -> bool {
    request.op() == op && at.checked_add(length as u64).is_some_and(|end| end <= request.len())
}

/// Answers a request, once: 0 for all of it, or -errno as from a callback. Its buffers are not the program's any more.
///
/// Never blocks. Any thread, also from inside of submit.
///
/// @param device   the device that it is of
/// @param request  the request
/// @param result   0 or -errno
/// @return 0; -ESTALE if it was completed before or is gone, for instance because the device was stopped: until the device
///         is freed this is safe to find out; -EBUSY while another thread is at it; -EINVAL for a result that is neither 0
///         nor -errno, after which the request has ended with EIO, or for NULL
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_complete(
    device: *mut ublk_rs_device,
    request: u64,
    result: c_int,
) -> c_int {
    // SAFETY: the program's promise about its handle.
    let code = unsafe { end(device, request, |request| request.complete(outcome(result))) };
    if code == 0 && !(-4095..=0).contains(&result) { -libc::EINVAL } else { code }
}

/// Answers an append to a zone: all of it was written at byte offset of the disk. Otherwise as
/// ublk_rs_request_complete().
///
/// @param device   the device that it is of
/// @param request  the request, an append
/// @param offset   where it went, in bytes
/// @return as ublk_rs_request_complete(); a request that is no append, or an offset that makes no sense, ends with EIO
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_complete_append(
    device: *mut ublk_rs_device,
    request: u64,
    offset: u64,
) -> c_int {
    // SAFETY: the program's promise about its handle.
    unsafe { end(device, request, |request| request.complete_append(offset)) }
}

/// Answers a report of zones, of which the first is the one that holds the request's offset and each other follows its
/// predecessor. Otherwise as ublk_rs_request_complete().
///
/// @param device   the device that it is of
/// @param request  the request, a report
/// @param zones    the zones
/// @param count    how many; for what is missing the kernel asks again, none at all is EIO
/// @return as ublk_rs_request_complete(); -EINVAL for a zone of unknown kind or state, and the request goes on
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_complete_report(
    device: *mut ublk_rs_device,
    request: u64,
    zones: *const ublk_rs_zone,
    count: usize,
) -> c_int {
    let told = answer(None, || {
        if zones.is_null() && count > 0 || count > 1 << 24 {
            return None;
        }
        let given = match count {
            0 => &[],
            // SAFETY: not NULL, so `count` zones are readable by the program's promise.
            _ => unsafe { std::slice::from_raw_parts(zones, count) },
        };
        given.iter().map(|zone| zone.to_core()).collect::<Option<Vec<_>>>()
    });
    let Some(zones) = told else { return -libc::EINVAL };
    // SAFETY: the program's promise about its handle.
    unsafe {
        end(device, request, |request| match request.op() {
            Op::ReportZones => request.complete_report(&zones),
            _ => request.complete(Err::<(), _>(Errno::EIO)),
        })
    }
}

/// Finds a request's data in memory: of a write or an append what is to be stored, of a read where to put it, which is
/// zeroed. On every data path; on those that do not copy this does. May be called again.
///
/// Blocks for a copy of the data on such paths, not otherwise. Any thread, one at a time for each request.
///
/// @param device   the device that it is of
/// @param request  a read or write
/// @param buf      the data, valid until the request is completed; of a write to be read only
/// @param length   its bytes
/// @return 0; -ESTALE, -EBUSY, -EINVAL for another operation or a NULL where none may be
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_buffer(
    device: *mut ublk_rs_device,
    request: u64,
    buf: *mut *mut c_void,
    length: *mut usize,
) -> c_int {
    if buf.is_null() || length.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: the program's promise about its handle.
    unsafe {
        with(device, request, |request| {
            let (start, len) = match request.op() {
                Op::Read => {
                    let data = request.data_mut();
                    (data.as_mut_ptr(), data.len())
                }
                Op::Write | Op::ZoneAppend => {
                    let data = request.data();
                    (data.as_ptr().cast_mut(), data.len())
                }
                _ => return Err(-libc::EINVAL),
            };
            // Not NULL, so writable by the program's promise.
            buf.write(start.cast());
            length.write(len);
            Ok(())
        })
    }
}

/// Copies data to a read: straight to the client where the driver does not copy, and without zeroing a buffer first. What
/// was not put when the request is completed reads as zeroes.
///
/// Blocks for the copy. Any thread, one at a time for each request.
///
/// @param device   the device that it is of
/// @param request  a read
/// @param at       the first byte, from the start of the request's range
/// @param data     the data, elsewhere than in the request's own buffer
/// @param length   its bytes
/// @return 0; -ESTALE, -EBUSY, -EINVAL for another operation, a range that is not within the request's, or NULL
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_put(
    device: *mut ublk_rs_device,
    request: u64,
    at: u64,
    data: *const c_void,
    length: usize,
) -> c_int {
    if data.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: the program's promises about its handle and about `length` bytes at `data`, which are looked at only once
    // it is known that they fit a request.
    unsafe {
        with(device, request, |request| {
            if !fits(request, Op::Read, at, length) {
                return Err(-libc::EINVAL);
            }
            request.put(at as usize, std::slice::from_raw_parts(data.cast(), length));
            Ok(())
        })
    }
}

/// Copies a write's integrity metadata, all of it.
///
/// Blocks for the copy. Any thread, one at a time for each request.
///
/// @param device   the device that it is of
/// @param request  a write with UBLK_RS_FLAG_INTEGRITY
/// @param data     where it goes
/// @param length   what `submit` was told as metadata_length
/// @return 0; -ESTALE, -EBUSY, -EINVAL for another length or request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_metadata(
    device: *mut ublk_rs_device,
    request: u64,
    data: *mut c_void,
    length: usize,
) -> c_int {
    if data.is_null() || length > 1 << 30 {
        return -libc::EINVAL;
    }
    // SAFETY: the program's promises about its handle and about `length` writable bytes.
    unsafe {
        with(device, request, |request| {
            if request.metadata_len() != length {
                return Err(-libc::EINVAL);
            }
            let data = std::slice::from_raw_parts_mut(data.cast(), length);
            request.metadata(data).map_err(|errno| -errno.raw())
        })
    }
}

/// Gives a read's integrity metadata to the client, all of it.
///
/// Blocks for the copy. Any thread, one at a time for each request.
///
/// @param device   the device that it is of
/// @param request  a read with UBLK_RS_FLAG_INTEGRITY
/// @param data     the metadata
/// @param length   what `submit` was told as metadata_length
/// @return 0; -ESTALE, -EBUSY, -EINVAL for another length or request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_put_metadata(
    device: *mut ublk_rs_device,
    request: u64,
    data: *const c_void,
    length: usize,
) -> c_int {
    if data.is_null() || length > 1 << 30 {
        return -libc::EINVAL;
    }
    // SAFETY: the program's promises about its handle and about `length` readable bytes.
    unsafe {
        with(device, request, |request| {
            if request.metadata_len() != length {
                return Err(-libc::EINVAL);
            }
            let data = std::slice::from_raw_parts(data.cast(), length);
            request.put_metadata(data).map_err(|errno| -errno.raw())
        })
    }
}

/// Fills a submission queue entry for an io_uring of the program's own: it puts the pages of a request of the data path
/// zero-copy into place index of that ring's sparse table of registered buffers. READ_FIXED, SEND_ZC and their like then
/// work on the client's own memory, whose byte 0 has address 0.
///
/// Set user_data afterwards; submit it before the request is completed, on any thread (since Linux 6.17). The pages have
/// to leave the table again by ublk_rs_request_unregister_sqe(), or with the ring: as long as they are there the client
/// has no answer. A read is then not zeroed where nothing was put.
///
/// Never blocks. Any thread, one at a time for each request.
///
/// @param device   the device that it is of
/// @param request  a read or write
/// @param index    the place in the ring's table
/// @param sqe      the entry, 64 bytes (struct io_uring_sqe)
/// @return 0; -EOPNOTSUPP on other data paths, -EINVAL for a request without data or NULL, -ENODEV once the device has
///         ended, -ESTALE, -EBUSY
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_register_sqe(
    device: *mut ublk_rs_device,
    request: u64,
    index: u16,
    sqe: *mut c_void,
) -> c_int {
    // SAFETY: the program's promises.
    unsafe { entry_of(device, request, sqe, |request| request.register_entry(index)) }
}

/// Fills the entry that takes the pages out of the table again: the same index, the same ring. As
/// ublk_rs_request_register_sqe().
///
/// @param device   the device that it is of
/// @param request  the request
/// @param index    the place in the ring's table
/// @param sqe      the entry, 64 bytes (struct io_uring_sqe)
/// @return as ublk_rs_request_register_sqe()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_request_unregister_sqe(
    device: *mut ublk_rs_device,
    request: u64,
    index: u16,
    sqe: *mut c_void,
) -> c_int {
    // SAFETY: the program's promises.
    unsafe { entry_of(device, request, sqe, |request| request.unregister_entry(index)) }
}

/// # Safety
///
/// As [`Device::of`], and `sqe` is NULL or 64 writable bytes.
unsafe fn entry_of(
    device: *mut ublk_rs_device,
    request: u64,
    sqe: *mut c_void,
    make: impl FnOnce(&Request) -> Result<[u8; 64], Errno>,
) -> c_int {
    if sqe.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: the caller's promises; not NULL.
    unsafe {
        with(device, request, |request| {
            let entry = make(request).map_err(|errno| -errno.raw())?;
            sqe.cast::<[u8; 64]>().write_unaligned(entry);
            Ok(())
        })
    }
}
