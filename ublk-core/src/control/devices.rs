//! All devices of the machine: listing them, and deleting one whoever made it.

use super::Control;
use super::features::Features;
use super::holders::{self, Holder, Nodes};
use std::path::Path;

use super::info::{DeviceInfo, DeviceState};
use super::wait::Wait;
use crate::error::{Error, ErrorKind, Result};

const PROC: &str = "/proc";

impl Control {
    /// Every device of this machine that the caller may ask about, by ascending id.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PermissionDenied`] if there are devices and the caller may ask about none of
    /// them, [`ErrorKind::Io`] without a sysfs at `/sys`.
    pub fn list(&self) -> Result<Vec<DeviceInfo>> {
        let ids = self.0.places.ids().map_err(|e| {
            Error::new(ErrorKind::Io, "list the devices")
                .with_source(e)
                .because("/sys/class/ublk-char is not readable")
                .remedy_is("mount sysfs on /sys")
        })?;
        let mut devices = Vec::with_capacity(ids.len());
        let mut refused = None;
        for id in ids {
            match self.get_dev_info(id).or_else(|e| match e.kind() {
                // Of an unprivileged device the owner may know.
                ErrorKind::PermissionDenied | ErrorKind::InvalidParameter => self.get_dev_info2(id),
                _ => Err(e),
            }) {
                Ok(info) => devices.push(info),
                // It went away since its id was read.
                Err(e) if e.kind() == ErrorKind::NoSuchDevice => {}
                Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                    tracing::debug!(device = id, "not listed: {e}");
                    refused = Some(e);
                }
                Err(e) => return Err(e),
            }
        }
        match refused {
            Some(e) if devices.is_empty() => Err(e),
            _ => Ok(devices),
        }
    }

    /// Stops a device if it has a disk, and deletes it: also one whose server is gone, and whoever
    /// added it. Its disk is pulled from under its users.
    ///
    /// The two steps are separate because DEL_DEV would stop under the driver's global lock, where
    /// a server that does not answer would hold up every other device.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSuchDevice`] if there is none to begin with; [`ErrorKind::TimedOut`] if the stop waits for a server that
    /// does not answer, or the deletion for processes that have the device open, which the error
    /// names as far as they are visible.
    pub fn delete(&self, id: u32, wait: &Wait) -> Result<()> {
        let info = self.get_dev_info(id).or_else(|e| match e.kind() {
            ErrorKind::PermissionDenied | ErrorKind::InvalidParameter => self.get_dev_info2(id),
            _ => Err(e),
        })?;
        let nodes = Nodes::of(&self.0.places.sys, id);
        // Without its path the driver takes no command about such a device, be it from root.
        let control = match info.features.contains(Features::UNPRIVILEGED_DEV) {
            true => self.with_device_paths(),
            false => self.clone(),
        };
        let deleted = match info.state {
            DeviceState::Dead => Ok(()),
            _ => control.stop_dev(id, wait),
        }
        .and_then(|()| control.del_dev(id, wait));
        // It was there a moment ago: its own server, which the stop has ended, was faster.
        let deleted = deleted.or_else(|e| match e.kind() {
            ErrorKind::NoSuchDevice => Ok(()),
            _ => Err(e),
        });
        deleted.map_err(|e| {
            if e.kind() != ErrorKind::TimedOut {
                return e;
            }
            let found = holders::sentence(&holders::holders(Path::new(PROC), &nodes));
            let cause = e.cause().unwrap_or_default().to_owned();
            let server = info.server_pid.map(|pid| format!("process {pid} serves it"));
            match (found.is_empty(), server) {
                (false, _) => e.because(format!("{cause} ({found})")),
                (true, Some(server)) => e.because(format!("{cause} ({server})")),
                (true, None) => e,
            }
        })
    }

    /// What keeps a device in use, as far as this process can see: as root every process, otherwise
    /// the same user's; mounts of this mount namespace only. A server that keeps its node in a
    /// ring's table of files is not seen.
    pub fn holders(&self, id: u32) -> Vec<Holder> {
        holders::holders(Path::new(PROC), &Nodes::of(&self.0.places.sys, id))
    }
}
