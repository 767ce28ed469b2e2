//! What the driver's errnos mean, command by command.

use super::features::Features;
use crate::error::{Errno, Error, ErrorKind};
use crate::uring::sqe::{ControlCommand, Encoding};

/// The feature by which a driver says that it knows a command.
fn announced_by(command: ControlCommand) -> Option<Features> {
    use ControlCommand as C;
    Some(match command {
        C::StartUserRecovery | C::EndUserRecovery => Features::USER_RECOVERY,
        C::UpdateSize => Features::UPDATE_SIZE,
        C::QuiesceDev => Features::QUIESCE,
        C::TryStopDev => Features::SAFE_STOP_DEV,
        C::RegBuf | C::UnregBuf => Features::SHMEM_ZC,
        _ => return None,
    })
}

/// The Linux version that brought a command; none for those that were always there.
fn since(command: ControlCommand) -> Option<&'static str> {
    match command {
        ControlCommand::GetDevInfo2 => Some("6.3"),
        ControlCommand::GetFeatures => Some("6.5"),
        // Nothing announces it.
        ControlCommand::DelDevAsync => Some("6.9"),
        _ => announced_by(command)?.since(),
    }
}

/// The error that an errno of the kernel stands for. `device` is the id that was asked for, if any; `driver` is what
/// the driver says of itself, and `encoding` how it was asked.
pub(crate) fn error(
    command: ControlCommand,
    device: Option<u32>,
    errno: Errno,
    driver: Option<Features>,
    encoding: Encoding,
) -> Error {
    use ControlCommand as C;
    use ErrorKind as K;
    let of = |kind, cause: &'static str| Error::new(kind, command.verb()).because(cause);
    let announced = announced_by(command).zip(driver).map(|(f, d)| d.contains(f));
    let (known, unknown) = (announced == Some(true), announced == Some(false));
    let by_bare_number = command.cmd_op(encoding) != command.cmd_op(Encoding::Ioctl);
    let not_known = || {
        let since = since(command).map(|since| format!(" (since Linux {since})"));
        let cause = format!("the driver does not know this command{}", since.unwrap_or_default());
        Error::new(K::Unsupported, command.verb()).because(cause)
    };
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
            "no parameters are set, /dev/ublkcN was opened by another process than the one named, or the kernel \
             refuses the parameters",
        ),
        (Errno::EBUSY, C::StartUserRecovery) => of(
            K::Busy,
            "the former server is not gone, or the driver has not finished with it",
        )
        .remedy_is("wait until the former server has ended"),
        (Errno::EINVAL, C::StartUserRecovery) => {
            of(K::WrongState, "the device was added without USER_RECOVERY, or never served")
        }
        (Errno::EINVAL, C::EndUserRecovery) => of(
            K::InvalidParameter,
            "/dev/ublkcN was opened by another process than the one named",
        ),
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
        (Errno::EOPNOTSUPP, C::RegBuf | C::UnregBuf) if known => {
            of(K::Unsupported, "the device was added without SHMEM_ZC")
        }
        (Errno::EOPNOTSUPP, C::QuiesceDev) if known => {
            of(K::Unsupported, "the device was added without QUIESCE")
        }
        (Errno::EEXIST, C::RegBuf) => of(K::Io, "a part of the memory is registered already")
            .remedy_is("unregister it first; a former server of the disk may have left it"),
        (Errno::EFAULT, C::RegBuf) => {
            of(K::Io, "not all of it is mapped, or it is not writable")
        }
        (Errno::ENOSPC, C::RegBuf) => of(K::TooMany, "a device has 65,536 buffers at most")
            .remedy_is("unregister some, or register larger ones"),
        (Errno::ENOENT, C::UnregBuf) => of(K::Io, "no buffer has this index"),
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
        // A driver that says what it has knows every command that has a bare number.
        (Errno::EOPNOTSUPP, _) if by_bare_number && driver.is_some() => of(
            K::Unsupported,
            "the kernel is built without CONFIG_BLKDEV_UBLK_LEGACY_OPCODES and does not take commands by bare numbers",
        )
        .remedy_is("leave the encoding to the driver, or ask for Encoding::Ioctl"),
        (Errno::EOPNOTSUPP, _) => not_known(),
        // Said of unprivileged devices, whose caller is looked at before the command.
        (Errno::EINVAL, _) if unknown => not_known(),
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
            (C::RegBuf, Errno::ENOSPC, K::TooMany),
            (C::DelDevAsync, Errno::EINVAL, K::Unsupported),
        ] {
            let e = error(command, Some(4), errno, Some(Features::known()), Encoding::Ioctl);
            assert_eq!((e.kind(), e.errno(), e.device()), (kind, Some(errno), Some(4)));
            assert!(e.cause().is_some());
        }
    }

    #[test]
    fn a_command_that_the_driver_does_not_know_is_named_with_its_version() {
        use ControlCommand as C;
        const LINUX_6_12: Features = Features::from_bits(0x1fe);
        for (command, words) in [
            (C::UpdateSize, "since Linux 6.16"),
            (C::QuiesceDev, "since Linux 6.16"),
            (C::TryStopDev, "since Linux 7.0"),
            (C::RegBuf, "since Linux 7.1"),
            (C::UnregBuf, "since Linux 7.1"),
            (C::DelDevAsync, "since Linux 6.9"),
            (C::GetDevInfo2, "since Linux 6.3"),
        ] {
            for driver in [Some(LINUX_6_12), None] {
                let e = error(command, Some(4), Errno::EOPNOTSUPP, driver, Encoding::Ioctl);
                assert_eq!(e.kind(), ErrorKind::Unsupported);
                let text = e.to_string();
                assert!(text.contains(words) && text.contains("does not know"), "{text}");
            }
            if announced_by(command).is_none() {
                continue;
            }
            // About an unprivileged device.
            let e = error(command, Some(4), Errno::EINVAL, Some(LINUX_6_12), Encoding::Ioctl);
            assert!(e.to_string().contains(words), "{e}");
            let e =
                error(command, Some(4), Errno::EINVAL, Some(Features::known()), Encoding::Ioctl);
            assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
        }
        for (command, words) in
            [(C::RegBuf, "without SHMEM_ZC"), (C::QuiesceDev, "without QUIESCE")]
        {
            let e = error(
                command,
                Some(4),
                Errno::EOPNOTSUPP,
                Some(Features::known()),
                Encoding::Ioctl,
            );
            assert!(e.to_string().contains(words), "{e}");
        }
    }

    #[test]
    fn a_kernel_without_bare_numbers_is_named_for_what_it_is_built_without() {
        let said = |command, driver, encoding| {
            error(command, Some(4), Errno::EOPNOTSUPP, driver, encoding).to_string()
        };
        let (driver, legacy) = (Some(Features::known()), Encoding::Legacy);
        for &command in ControlCommand::ALL {
            let bare = command.cmd_op(legacy) < 0x100;
            let text = said(command, driver, legacy);
            assert_eq!(text.contains("CONFIG_BLKDEV_UBLK_LEGACY_OPCODES"), bare, "{text}");
            for text in [said(command, driver, Encoding::Ioctl), said(command, None, legacy)] {
                assert!(!text.contains("LEGACY_OPCODES"), "{text}");
            }
        }
    }
}
