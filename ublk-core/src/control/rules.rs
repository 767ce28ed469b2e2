//! What is refused before the driver is asked, and what its refusals mean: the rules of each command.

use super::features::Features;
use super::info::DeviceState;
use super::node::Places;
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

/// The driver is told the path of an unprivileged device's node, and answers with what comes of following it.
pub(super) fn node_is_there(command: C, id: u32, places: &Places) -> Result<()> {
    let node = places.char_device(id);
    if node.exists() {
        return Ok(());
    }
    if places.ids().is_ok_and(|ids| !ids.contains(&id)) {
        let cause = "it has just been deleted";
        return Err(broken(command, id, ErrorKind::NoSuchDevice, cause).with_errno(Errno::ENODEV));
    }
    let cause = format!(
        "{} is not there, and the driver judges by the permissions of that node who may do this",
        node.display()
    );
    Err(broken(command, id, ErrorKind::PermissionDenied, cause)
        .with_errno(Errno::ENOENT)
        .remedy_is("have udev or devtmpfs make it, or say where it is (ControlOptions::dev_dir)"))
}

/// What a command without a path is told about an unprivileged device, be it by root.
pub(super) fn wants_its_path(command: C, id: u32) -> Error {
    let cause = "it is an unprivileged device, and the driver wants the path of its node with each command about one";
    broken(command, id, ErrorKind::InvalidParameter, cause)
        .with_errno(Errno::EINVAL)
        .remedy_is("open the driver with ControlOptions::device_paths(true)")
}

/// Which queues there are.
pub(super) fn no_such_queue(error: Error, info: &ublksrv_ctrl_dev_info) -> Error {
    match info.nr_hw_queues {
        1 => error.because("the device has one queue, with the number 0"),
        queues => {
            error.because(format!("the device has the queues 0 to {}", queues.saturating_sub(1)))
        }
    }
}

/// Parameters are for what the device was added for. `driver` is what the driver says of itself.
pub(super) fn settable(
    params: &ublk_params,
    info: &ublksrv_ctrl_dev_info,
    driver: Option<Features>,
) -> Result<()> {
    // Of a disk that there is they are settled, whatever they are.
    if DeviceState::from_raw(info.state) != DeviceState::Dead {
        return Ok(());
    }
    let has = |section| params.types & section != 0;
    let added_with = |feature| Features::from_bits(info.flags).contains(feature);
    // A driver that does not know a section drops it, which is noticed later.
    let known = |feature| driver.is_some_and(|d| d.contains(feature));
    let (zoned, integrity) = (Features::ZONED, Features::INTEGRITY);
    let bytes = |sectors: u32| u64::from(sectors) << 9;
    let room = info.max_io_buf_bytes >> 9;
    let cause = if params.len == 0 || params.len as usize > size_of::<ublk_params>() {
        format!("len is that of the struct, 1 to {}, not {}", size_of::<ublk_params>(), params.len)
    } else if !has(uapi::UBLK_PARAM_TYPE_BASIC) {
        "the basic parameters are missing (UBLK_PARAM_TYPE_BASIC)".into()
    } else if has(uapi::UBLK_PARAM_TYPE_DEVT) {
        "device numbers are the driver's to give: clear UBLK_PARAM_TYPE_DEVT, which GET_PARAMS has set".into()
    } else if params.basic.max_sectors > room {
        format!(
            "the largest request has {} bytes, and the device was added with room for {}",
            bytes(params.basic.max_sectors),
            bytes(room)
        )
    } else if has(uapi::UBLK_PARAM_TYPE_ZONED) && !added_with(zoned) && known(zoned) {
        "zones are for a device that was added with ZONED".into()
    } else if !has(uapi::UBLK_PARAM_TYPE_ZONED) && added_with(zoned) {
        "the device was added with ZONED, and the parameters say nothing of its zones".into()
    } else if has(uapi::UBLK_PARAM_TYPE_INTEGRITY) && !added_with(integrity) && known(integrity) {
        "metadata is for a device that was added with INTEGRITY".into()
    } else {
        return Ok(());
    };
    Err(broken(C::SetParams, info.dev_id, ErrorKind::InvalidParameter, cause))
}

/// The driver gives a zoned disk another size, and nobody looks for the zones that came: the kernel's own books end where
/// they did.
pub(super) fn resizable(id: u32, params: &ublk_params) -> Result<()> {
    if params.types & uapi::UBLK_PARAM_TYPE_ZONED == 0 {
        return Ok(());
    }
    let cause = "the kernel does not look for other zones on a disk that is in use";
    Err(broken(C::UpdateSize, id, ErrorKind::Unsupported, cause))
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
            "/dev/ublkc{} was opened by another process than {pid}, or by none, or the kernel refuses the parameters (then \
             its log may say why)",
            info.dev_id
        )),
        // The driver reads the zones before the disk appears.
        (Errno::ENODEV, _) if Features::from_bits(info.flags).contains(Features::ZONED) => {
            broken(
                C::StartDev,
                info.dev_id,
                ErrorKind::InvalidParameter,
                "the kernel refuses the zones that the backend reports: each begins where the one before it ends, has the \
                 zone size (the last one may be shorter), and a capacity of 1 sector to its length, which is all of it in a \
                 conventional zone",
            )
            .with_errno(errno)
            .remedy_is("look at the kernel's log, which names the zone")
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_for_a_device_that_was_added_for_it_where_the_driver_knows_it() {
        let params = |types| ublk_params {
            len: size_of::<ublk_params>() as u32,
            types: uapi::UBLK_PARAM_TYPE_BASIC | types,
            ..Default::default()
        };
        let device = |features: Features| ublksrv_ctrl_dev_info {
            state: uapi::UBLK_S_DEV_DEAD,
            flags: features.bits(),
            ..Default::default()
        };
        let all = Some(Features::known());
        for (section, feature) in [
            (uapi::UBLK_PARAM_TYPE_ZONED, Features::ZONED),
            (uapi::UBLK_PARAM_TYPE_INTEGRITY, Features::INTEGRITY),
        ] {
            assert!(settable(&params(section), &device(feature), all).is_ok());
            let e = settable(&params(section), &device(Features::NONE), all).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidParameter);
            assert!(e.to_string().contains(&format!("added with {feature}")), "{e}");
            // It drops the section, which is an error of its own.
            for driver in [None, Some(Features::known() - feature)] {
                assert!(settable(&params(section), &device(Features::NONE), driver).is_ok());
            }
            // The driver has another answer.
            let live =
                ublksrv_ctrl_dev_info { state: uapi::UBLK_S_DEV_LIVE, ..device(Features::NONE) };
            assert!(settable(&params(section), &live, all).is_ok());
        }
        let e = settable(&params(0), &device(Features::ZONED), all).unwrap_err();
        assert!(e.to_string().contains("say nothing of its zones"), "{e}");
        assert!(settable(&params(0), &device(Features::INTEGRITY), all).is_ok());
    }

    #[test]
    fn memory_is_for_a_device_with_a_server_where_the_driver_knows_it() {
        let device = |state, features: Features| ublksrv_ctrl_dev_info {
            state,
            flags: features.bits(),
            ..Default::default()
        };
        let (knows, plain) = (Features::SHMEM_ZC, Features::NONE);
        for state in [uapi::UBLK_S_DEV_DEAD, uapi::UBLK_S_DEV_LIVE] {
            assert!(served(C::UnregBuf, &device(state, knows)).is_ok());
        }
        for state in [uapi::UBLK_S_DEV_QUIESCED, uapi::UBLK_S_DEV_FAIL_IO] {
            let e = served(C::UnregBuf, &device(state, knows)).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::WrongState);
            assert!(served(C::UnregBuf, &device(state, plain)).is_ok(), "it has another answer");
        }
    }
}
