//! What the driver's errnos mean, command by command.

use crate::error::{Errno, Error, ErrorKind};
use crate::uring::sqe::ControlCommand;

/// The error that an errno of the kernel stands for. `device` is the id that was asked for, if any.
pub(crate) fn error(command: ControlCommand, device: Option<u32>, errno: Errno) -> Error {
    use ControlCommand as C;
    use ErrorKind as K;
    let of = |kind, cause: &'static str| Error::new(kind, command.verb()).because(cause);
    let error = match (errno, command) {
        (Errno::EEXIST, C::AddDev) => of(K::IdTaken, "another device has this id")
            .remedy_is("delete that device, or let the kernel choose an id"),
        (Errno::ENOSPC, C::AddDev) => of(K::TooMany, "no device number is free"),
        (Errno::EACCES, C::AddDev) => {
            of(K::TooMany, "the limit of unprivileged devices on this machine is reached")
                .remedy_is("delete devices, or raise /sys/module/ublk_drv/parameters/ublks_max")
        }
        (Errno::EPERM, C::AddDev) => {
            of(K::PermissionDenied, "adding a device takes CAP_SYS_ADMIN in the kernel's own namespace")
                .remedy_is(
                    "run as root, or make a device of your own: require(Features::UNPRIVILEGED_DEV), see \
                     docs/unprivileged.md",
                )
        }
        (Errno::EINVAL, C::AddDev) => of(
            K::InvalidParameter,
            "the driver refuses the queues, the depth, the id or the combination of features",
        ),
        (Errno::EACCES, C::SetParams) => of(
            K::WrongState,
            "parameters are settled once the disk exists, also after a stop while somebody has it open",
        ),
        (Errno::EINVAL, C::SetParams) => {
            of(K::InvalidParameter, "the driver refuses a parameter that this library does not check")
        }
        (Errno::EEXIST, C::StartDev) => of(
            K::WrongState,
            "the device is live, or the disk of its former life is still open somewhere",
        ),
        (Errno::EBUSY, C::StartDev) => of(
            K::WrongState,
            "the device was stopped and /dev/ublkcN has not been closed since",
        )
        .remedy_is("close /dev/ublkcN, open it again and fetch again, or delete the device"),
        (Errno::EINVAL, C::StartDev) => of(
            K::InvalidParameter,
            "no parameters are set, or /dev/ublkcN was opened by another process than the one named",
        ),
        (Errno::EBUSY, C::StartUserRecovery) => of(
            K::Busy,
            "the former server is not gone, or the driver has not finished with it",
        )
        .remedy_is("wait until the former server has ended"),
        (Errno::EINVAL, C::StartUserRecovery | C::EndUserRecovery) => {
            of(K::WrongState, "the device was added without USER_RECOVERY, or never served")
        }
        (Errno::EBUSY, C::EndUserRecovery) => of(K::WrongState, "the device is not being recovered"),
        (Errno::EBUSY, C::TryStopDev) => of(K::Busy, "somebody has the disk open"),
        (Errno::ENODEV, C::TryStopDev | C::UpdateSize | C::QuiesceDev) => {
            of(K::WrongState, "the device has no disk")
        }
        (Errno::EBUSY, C::QuiesceDev) => of(K::Busy, "requests are with the server"),
        (Errno::EINVAL, C::DelDevAsync) => {
            of(K::Unsupported, "the driver refuses this on unprivileged devices")
                .remedy_is("use the waiting delete")
        }
        (Errno::ENODEV, C::GetFeatures) | (Errno::EOPNOTSUPP, C::GetFeatures) => {
            of(K::Unsupported, "the driver cannot say what it supports (since Linux 6.5)")
        }
        (Errno::EOPNOTSUPP, C::RegBuf | C::UnregBuf) => {
            of(K::Unsupported, "the device was added without SHMEM_ZC")
        }
        (Errno::EOPNOTSUPP, C::QuiesceDev) => {
            of(K::Unsupported, "the device was added without QUIESCE, or the driver does not know it")
        }
        (Errno::ENODEV, _) => of(K::NoSuchDevice, "no device has this id"),
        (Errno::EPERM, _) => {
            of(K::PermissionDenied, "the device belongs to privileged users, or its path is another node's")
                .remedy_is("run as root, or as the owner of an unprivileged device")
        }
        (Errno::EACCES, _) => of(
            K::PermissionDenied,
            "the permissions of /dev/ublkcN do not allow this: an unprivileged device obeys whoever may write \
             to its node",
        )
        .remedy_is(NO_UDEV_RULES),
        (Errno::EBUSY, _) => of(K::Busy, "the device is in use"),
        (Errno::EOPNOTSUPP, _) => of(K::Unsupported, "the driver does not know this command"),
        (Errno::ENOMEM, _) => of(K::TooMany, "the kernel has no memory for it"),
        (Errno::EINVAL, _) => of(K::InvalidParameter, "the driver refuses an argument"),
        (Errno::EINTR | Errno::ECANCELED, _) => {
            of(K::Cancelled, "the kernel gave the unfinished command back")
        }
        _ => Error::new(K::Io, command.verb()),
    }
    .with_errno(errno);
    match device {
        Some(id) => error.on_device(id),
        None => error,
    }
}

/// What an owner lacks whose node was not handed over.
pub(crate) const NO_UDEV_RULES: &str = "run as the device's owner; if you are, the udev rules that give its nodes to you \
     are missing: install udev/80-ublk.rules and its helper (docs/unprivileged.md)";

/// What is usually missing when a command does not return.
pub(crate) fn slow_remedy(command: ControlCommand) -> Option<&'static str> {
    match command {
        ControlCommand::StartDev | ControlCommand::EndUserRecovery => {
            Some("the kernel waits until every tag of every queue has been fetched")
        }
        ControlCommand::StopDev | ControlCommand::TryStopDev => Some(
            "the kernel waits for requests that the server holds and for writeback to the disk",
        ),
        ControlCommand::DelDev => Some(
            "the kernel waits until nobody has /dev/ublkcN or the disk open, mapped or mounted",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_kind() {
        use ControlCommand as C;
        use ErrorKind as K;
        for (command, errno, kind) in [
            (C::AddDev, Errno::EEXIST, K::IdTaken),
            (C::AddDev, Errno::ENOSPC, K::TooMany),
            (C::AddDev, Errno::EACCES, K::TooMany),
            (C::AddDev, Errno::EPERM, K::PermissionDenied),
            (C::DelDev, Errno::ENODEV, K::NoSuchDevice),
            (C::GetDevInfo, Errno::EACCES, K::PermissionDenied),
            (C::TryStopDev, Errno::EBUSY, K::Busy),
            (C::SetParams, Errno::EACCES, K::WrongState),
            (C::UpdateSize, Errno::EOPNOTSUPP, K::Unsupported),
        ] {
            let e = error(command, Some(4), errno);
            assert_eq!((e.kind(), e.errno(), e.device()), (kind, Some(errno), Some(4)));
            assert!(e.cause().is_some());
        }
    }
}
