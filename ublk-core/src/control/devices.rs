//! All devices of the machine: listing them, and deleting one whoever made it.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Control;
use super::features::Features;
use super::holders::{self, Holder, Nodes};
use super::info::{DeviceInfo, DeviceState};
use super::wait::Wait;
use crate::error::{Error, ErrorKind, Result};

const PROC: &str = "/proc";
/// How long the driver has for one QUIESCE_DEV: it waits for no request, but its locks may be held.
const ANSWER: Duration = Duration::from_secs(5);
/// What drivers that do find busy queues are given before they say so, in milliseconds: the time is spent with the
/// device's lock held.
pub(crate) const QUIESCE_IDLE_MS: u64 = 20;
/// How long tags have to come home after a QUIESCE_DEV before the next.
const HOMEWARD: Duration = Duration::from_millis(100);
/// How often a device is looked at that its server has not let go of. Nothing tells of that.
const STEP: Duration = Duration::from_millis(20);

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
        let (control, info) = self.reaching(id)?;
        let nodes = Nodes::of(&self.0.places.sys, id);
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

    /// Takes a live disk from its server, whoever that is, for another to recover it: new requests wait until then, those that
    /// the server has are waited for. A server that is to give its disk away by itself has
    /// [`Running::hand_over`](crate::Running::hand_over).
    ///
    /// It repeats [`quiesce_dev`](Self::quiesce_dev), which leaves a tag that was with the server waiting for nothing, until
    /// the driver has seen the last of the server. A disk that is quiesced already is what was asked for.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`] or [`ErrorKind::Cancelled`] if the wait ends before the server has let go of it: new requests
    /// wait all the same, and it has to be called again; [`ErrorKind::WrongState`] without a disk, or if somebody stopped it
    /// meanwhile; [`ErrorKind::Unsupported`] for a device without QUIESCE, by an older driver (Linux 6.16) and for one with
    /// BATCH_IO, of which the driver fails what comes after a QUIESCE; [`ErrorKind::NoSuchDevice`].
    pub fn quiesce(&self, id: u32, wait: &Wait) -> Result<()> {
        const ATTEMPT: &str = "quiesce the device";
        let refuse = |kind, cause| Err(Error::new(kind, ATTEMPT).on_device(id).because(cause));
        let (control, info) = self.reaching(id)?;
        if info.features.contains(Features::QUIESCE | Features::BATCH_IO) {
            return refuse(
                ErrorKind::Unsupported,
                "of a device with BATCH_IO the driver fails the requests that come after a QUIESCE",
            )
            .map_err(|e| e.remedy_is("end its server: the next one gets its requests"));
        }
        let from = info.server_pid;
        loop {
            // Not until the caller's deadline: what it has begun is known when it ends.
            let mut soon = Wait::for_(ANSWER);
            if let Some(token) = wait.cancel_token() {
                soon = soon.cancelled_by(token);
            }
            match control.quiesce_dev(id, QUIESCE_IDLE_MS, &soon) {
                Err(e) if !matches!(e.kind(), ErrorKind::Busy | ErrorKind::TimedOut) => {
                    return Err(e);
                }
                _ => {}
            }
            let again = Instant::now() + HOMEWARD;
            while Instant::now() < again {
                let now = control.get_dev_info(id)?;
                match now.state {
                    // The next server may have it already.
                    DeviceState::Live if now.server_pid == from => {}
                    DeviceState::Dead => {
                        return refuse(ErrorKind::WrongState, "somebody stopped it meanwhile")
                            .map_err(|e| e.remedy_is("delete it (Control::delete)"));
                    }
                    _ => return Ok(()),
                }
                if wait.is_over() {
                    let kind = if wait.is_cancelled() {
                        ErrorKind::Cancelled
                    } else {
                        ErrorKind::TimedOut
                    };
                    return refuse(
                        kind,
                        "its server has not let go of it; new requests wait until it has",
                    )
                    .map_err(|e| {
                        e.remedy_is(
                            "have its server answer the requests that it has, and call this again",
                        )
                    });
                }
                std::thread::sleep(STEP);
            }
        }
    }

    /// What is known of a device, and the control that may give commands about it: without its path the driver takes none
    /// about an unprivileged device, be it from root.
    fn reaching(&self, id: u32) -> Result<(Control, DeviceInfo)> {
        let info = self.get_dev_info(id).or_else(|e| match e.kind() {
            ErrorKind::PermissionDenied | ErrorKind::InvalidParameter => self.get_dev_info2(id),
            _ => Err(e),
        })?;
        let control = match info.features.contains(Features::UNPRIVILEGED_DEV) {
            true => self.with_device_paths(),
            false => self.clone(),
        };
        Ok((control, info))
    }

    /// What keeps a device in use, as far as this process can see: as root every process, otherwise
    /// the same user's; mounts of this mount namespace only. A server that keeps its node in a
    /// ring's table of files is not seen.
    pub fn holders(&self, id: u32) -> Vec<Holder> {
        holders::holders(Path::new(PROC), &Nodes::of(&self.0.places.sys, id))
    }
}
