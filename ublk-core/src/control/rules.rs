//! What is refused before the driver is asked, and what its refusals mean: the rules of each command.

use super::features::Features;
use super::info::DeviceState;
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::sys::memory::page_size;
use crate::sys::shared_memory::MOST;
use crate::uapi::{self, ublk_params, ublk_shmem_buf_reg, ublksrv_ctrl_dev_info};
use crate::uring::sqe::ControlCommand as C;

fn broken(command: C, id: u32, kind: ErrorKind, cause: impl Into<String>) -> Error {
    Error::new(kind, command.verb()).on_device(id).because(cause.into())
}

/// START_DEV and END_USER_RECOVERY name a process.
pub(super) fn server(command: C, id: u32, pid: i32) -> Result<()> {
    match pid {
        1.. => Ok(()),
        _ => Err(broken(
            command,
            id,
            ErrorKind::InvalidParameter,
            format!(
                "the server is the process that has opened /dev/ublkc{id}: its number is positive, not {pid}"
            ),
        )),
    }
}

/// A disk needs a size before it is started.
pub(super) fn startable(id: u32, params: &ublk_params) -> Result<()> {
    if params.types & uapi::UBLK_PARAM_TYPE_BASIC != 0 {
        return Ok(());
    }
    Err(broken(C::StartDev, id, ErrorKind::InvalidParameter, "no parameters are set")
        .remedy_is("set them first (Control::set_params)"))
}

/// Which of the reasons that share an errno it was that a device was not started for.
pub(super) fn not_started(
    error: Error,
    errno: Errno,
    pid: i32,
    info: &ublksrv_ctrl_dev_info,
) -> Error {
    match (errno, DeviceState::from_raw(info.state)) {
        (Errno::EEXIST, DeviceState::Live) => error.because("the device is live already"),
        (Errno::EEXIST, _) => {
            error.because("the disk of the device's former life is still open somewhere")
        }
        (Errno::EINVAL, _) => error.because(format!(
            "/dev/ublkc{} was opened by another process than {pid}, or by none",
            info.dev_id
        )),
        _ => error,
    }
}

/// Which devices the two commands of a recovery are for. The driver would wait for fetches before it says so.
pub(super) fn recoverable(command: C, info: &ublksrv_ctrl_dev_info) -> Result<()> {
    let wrong = |cause: String| Err(broken(command, info.dev_id, ErrorKind::WrongState, cause));
    if !Features::from_bits(info.flags).contains(Features::USER_RECOVERY) {
        return wrong("the device was added without USER_RECOVERY".into());
    }
    match DeviceState::from_raw(info.state) {
        DeviceState::Dead => {
            wrong("the device has no disk: it was never started, or was stopped".into())
        }
        // The driver may be about to notice that its server is gone.
        DeviceState::Live if command == C::EndUserRecovery => {
            wrong("the device is live: it is not being recovered".into())
        }
        _ => Ok(()),
    }
}

/// Memory that can be registered.
pub(super) fn shareable(id: u32, buffer: &ublk_shmem_buf_reg) -> Result<()> {
    let page = page_size() as u64;
    let cause = if buffer.flags & !uapi::UBLK_SHMEM_BUF_READ_ONLY != 0 {
        format!("of the flags {:#x} the driver knows READ_ONLY alone", buffer.flags)
    } else if buffer.reserved != 0 {
        "what is reserved is 0".into()
    } else if buffer.len == 0 || buffer.len > MOST {
        format!("a buffer has 1 to {} bytes, not {}", MOST, buffer.len)
    } else if !buffer.len.is_multiple_of(page) || !buffer.addr.is_multiple_of(page) {
        format!("a buffer is whole pages of {page} bytes, not {} at {:#x}", buffer.len, buffer.addr)
    } else {
        return Ok(());
    };
    Err(broken(C::RegBuf, id, ErrorKind::InvalidParameter, cause))
}

/// The driver's numbers of buffers.
pub(super) fn index(id: u32, index: u32) -> Result<()> {
    if u16::try_from(index).is_ok() {
        return Ok(());
    }
    let cause = format!("buffers have the indices 0 to 65535, not {index}");
    Err(broken(C::UnregBuf, id, ErrorKind::InvalidParameter, cause))
}

/// The driver waits for all requests before it takes memory or forgets it, with the device's lock held, without which no
/// server comes. A server that is on its way has not all of them either while the state is still this one.
pub(super) fn served(command: C, info: &ublksrv_ctrl_dev_info) -> Result<()> {
    let known = Features::from_bits(info.flags).contains(Features::SHMEM_ZC);
    match DeviceState::from_raw(info.state) {
        DeviceState::Quiesced | DeviceState::FailIo if known => Err(broken(
            command,
            info.dev_id,
            ErrorKind::WrongState,
            "its server is gone: the driver would wait for requests that only the next one answers, and keep that one \
             out meanwhile",
        )
        .remedy_is("recover the device first (Builder::recover), or delete it")),
        _ => Ok(()),
    }
}
