//! Devices as ADD_DEV takes them and as the driver describes them.

use std::fmt;

use super::features::{FeatureRequest, Features};
use super::params::DeviceParams;
use crate::error::{Error, ErrorKind, Result};
use crate::uapi;

/// The driver's limits (`UBLK_MAX_UBLKS`, `UBLK_MAX_NR_QUEUES` and `UBLK_MAX_QUEUE_DEPTH`,
/// `UBLK_MAX_IO_DESC_SIZE`).
const MOST_DEVICES: u32 = 1 << 20;
const MOST: u16 = 4096;
const MOST_DESC: u16 = 256;

/// Where a device is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceState {
    /// It has no disk: not yet started, stopped, or its server is gone.
    Dead,
    /// Its disk exists and a server serves it.
    Live,
    /// Its server is gone; the disk exists and its I/O waits for another.
    Quiesced,
    /// Its server is gone; the disk exists and its I/O fails until there is another.
    FailIo,
    /// A state that this crate does not know.
    Other(u16),
}

impl DeviceState {
    /// From `UBLK_S_DEV_*`.
    pub const fn from_raw(raw: u16) -> Self {
        match raw {
            uapi::UBLK_S_DEV_DEAD => DeviceState::Dead,
            uapi::UBLK_S_DEV_LIVE => DeviceState::Live,
            uapi::UBLK_S_DEV_QUIESCED => DeviceState::Quiesced,
            uapi::UBLK_S_DEV_FAIL_IO => DeviceState::FailIo,
            other => DeviceState::Other(other),
        }
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceState::Dead => f.write_str("dead"),
            DeviceState::Live => f.write_str("live"),
            DeviceState::Quiesced => f.write_str("quiesced"),
            DeviceState::FailIo => f.write_str("fail-io"),
            DeviceState::Other(raw) => write!(f, "state {raw}"),
        }
    }
}

/// A device as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its number: the N of `/dev/ublkcN` and `/dev/ublkbN`.
    pub id: u32,
    /// Where it is in its life.
    pub state: DeviceState,
    /// The process that serves it, in this process's pid namespace.
    pub server_pid: Option<i32>,
    /// Hardware queues: the driver clamps what was asked for to the number of CPUs.
    pub queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// Bytes of the largest request.
    pub max_io_bytes: u32,
    /// What was granted.
    pub features: Features,
    /// Bytes of a request's descriptor in the mapping of `/dev/ublkcN`.
    pub io_desc_size: u16,
    /// The server's own 64 bits, which the driver keeps and returns untouched.
    pub server_flags: u64,
    /// The user that added it.
    pub owner_uid: u32,
    /// The group that added it.
    pub owner_gid: u32,
    /// Bytes of its disk; `None` while it has none.
    pub capacity: Option<u64>,
}

impl DeviceInfo {
    pub(crate) fn from_uapi(info: &uapi::ublksrv_ctrl_dev_info) -> Self {
        let features = Features::from_bits(info.flags);
        let plain = size_of::<uapi::ublksrv_io_desc>() as u16;
        DeviceInfo {
            id: info.dev_id,
            state: DeviceState::from_raw(info.state),
            server_pid: (info.ublksrv_pid > 0).then_some(info.ublksrv_pid),
            queues: info.nr_hw_queues,
            queue_depth: info.queue_depth,
            max_io_bytes: info.max_io_buf_bytes,
            features,
            // Drivers without the feature return what was passed.
            io_desc_size: match features.contains(Features::IO_DESC_SIZE) {
                true => info.io_desc_size,
                false => plain,
            },
            server_flags: info.ublksrv_flags,
            owner_uid: info.owner_uid,
            owner_gid: info.owner_gid,
            capacity: None,
        }
    }
}

/// A device to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddDevice {
    /// The number, below 2^20; `None` lets the driver take the lowest free one.
    pub id: Option<u32>,
    /// Hardware queues, 1 to 4096.
    pub queues: u16,
    /// Tags of each queue, 1 to 4096.
    pub queue_depth: u16,
    /// Bytes of the largest request: a multiple of the page size, at most 32 MiB.
    pub max_io_bytes: u32,
    /// The features.
    pub features: FeatureRequest,
    /// Bytes of a descriptor: 24 to 256 in steps of 8; other than 24 needs IO_DESC_SIZE.
    pub io_desc_size: u16,
    /// 64 bits for the server's own use.
    pub server_flags: u64,
}

impl AddDevice {
    /// A device for these parameters, with a number that the driver chooses and no features asked
    /// for.
    pub fn new(params: &DeviceParams) -> Self {
        AddDevice {
            id: None,
            queues: params.queues(),
            queue_depth: params.queue_depth(),
            max_io_bytes: params.max_io_bytes(),
            features: FeatureRequest::default(),
            io_desc_size: size_of::<uapi::ublksrv_io_desc>() as u16,
            server_flags: 0,
        }
    }

    /// With this number.
    #[must_use]
    pub fn id(mut self, id: Option<u32>) -> Self {
        self.id = id;
        self
    }

    /// With these features.
    #[must_use]
    pub fn features(mut self, features: FeatureRequest) -> Self {
        self.features = features;
        self
    }

    /// Refuses what the driver would refuse without saying why, or ignore.
    pub(super) fn check(&self) -> Result<()> {
        let invalid = |cause: String| {
            let error = Error::new(ErrorKind::InvalidParameter, "add the device").because(cause);
            Err(match self.id {
                Some(id) => error.on_device(id),
                None => error,
            })
        };
        if let Some(id) = self.id
            && id >= MOST_DEVICES
        {
            return invalid(format!("a device's number is below {MOST_DEVICES}"));
        }
        for (what, n) in [("queues", self.queues), ("tags a queue", self.queue_depth)] {
            if !(1..=MOST).contains(&n) {
                return invalid(format!("a device has 1 to {MOST} {what}, not {n}"));
            }
        }
        let (plain, size) = (size_of::<uapi::ublksrv_io_desc>() as u16, self.io_desc_size);
        let wanted = Features::IO_DESC_SIZE;
        if size != plain && !(self.features.require | self.features.prefer).contains(wanted) {
            return invalid(format!(
                "descriptors of {size} bytes need {wanted} (since Linux {}); without it they have {plain}",
                wanted.since().unwrap_or_default()
            ));
        }
        if !(plain..=MOST_DESC).contains(&size) || !size.is_multiple_of(8) {
            return invalid(format!(
                "a descriptor has {plain} to {MOST_DESC} bytes in steps of 8, not {size}"
            ));
        }
        Ok(())
    }

    pub(crate) fn to_uapi(&self, flags: Features) -> uapi::ublksrv_ctrl_dev_info {
        uapi::ublksrv_ctrl_dev_info {
            nr_hw_queues: self.queues,
            queue_depth: self.queue_depth,
            io_desc_size: self.io_desc_size,
            max_io_buf_bytes: self.max_io_bytes,
            dev_id: self.id.unwrap_or(u32::MAX),
            flags: flags.bits(),
            ublksrv_flags: self.server_flags,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_the_kernels() {
        let states: Vec<_> = (0..5).map(|raw| DeviceState::from_raw(raw).to_string()).collect();
        assert_eq!(states, ["dead", "live", "quiesced", "fail-io", "state 4"]);
    }

    #[test]
    fn what_no_driver_takes_is_refused_by_name() {
        let params = DeviceParams::builder(1 << 20).build().unwrap();
        let ok = AddDevice::new(&params);
        assert!(ok.check().is_ok());
        let sized = |io_desc_size, features| {
            let features = FeatureRequest::require(features);
            AddDevice { io_desc_size, features, ..ok.clone() }
        };
        let size = Features::IO_DESC_SIZE;
        assert!(sized(24, size).check().is_ok() && sized(256, size).check().is_ok());
        for (device, words) in [
            (ok.clone().id(Some(1 << 20)), "below 1048576"),
            (AddDevice { queues: 0, ..ok.clone() }, "1 to 4096 queues, not 0"),
            (AddDevice { queues: 4097, ..ok.clone() }, "not 4097"),
            (AddDevice { queue_depth: 0, ..ok.clone() }, "1 to 4096 tags a queue, not 0"),
            (sized(32, Features::NONE), "need IO_DESC_SIZE (since Linux 7.3)"),
            (sized(16, size), "24 to 256 bytes"),
            (sized(28, size), "steps of 8, not 28"),
            (sized(264, size), "not 264"),
        ] {
            let error = device.check().unwrap_err();
            assert_eq!((error.kind(), error.device()), (ErrorKind::InvalidParameter, device.id));
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn descriptors_have_24_bytes_unless_another_size_was_granted() {
        let mut raw = uapi::ublksrv_ctrl_dev_info { io_desc_size: 64, ..Default::default() };
        assert_eq!(DeviceInfo::from_uapi(&raw).io_desc_size, 24);
        raw.flags = uapi::UBLK_F_IO_DESC_SIZE;
        assert_eq!(DeviceInfo::from_uapi(&raw).io_desc_size, 64);
        raw.ublksrv_pid = -1;
        assert_eq!(DeviceInfo::from_uapi(&raw).server_pid, None);
    }
}
