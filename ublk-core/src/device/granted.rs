//! Whether a device that is there already can be served as a builder says.
//!
//! What is settled when a device is added can be other than what is asked for: preferences are granted or not, and
//! another builder may describe the device later, or recover it. So the rules that the serving side rests on are
//! about what was granted.

use super::builder::Builder;
use crate::control::{DeviceInfo, Features};
use crate::error::{Error, ErrorKind, Result};
use crate::worker::path::DataPath;

const ATTEMPT: &str = "describe the device";

fn invalid(cause: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidParameter, ATTEMPT).because(cause.into())
}

impl Builder {
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] for what the device lacks, or what its features do not go with;
    /// [`ErrorKind::InvalidParameter`] for what is said wrongly of it.
    pub(super) fn serves(&self, device: &DeviceInfo) -> Result<()> {
        let granted = device.features;
        let batched = granted.contains(Features::BATCH_IO);
        self.request_of(batched).check(granted)?;
        self.check_lanes(device.queue_depth, batched, DataPath::of(granted))?;
        if granted.contains(Features::ZONED) && self.zoned.is_none() {
            return Err(invalid(
                "the device was added with zones, and these are to be said: Builder::zoned",
            ));
        }
        if self.misplaces_appends(granted) {
            return Err(Error::new(ErrorKind::Unsupported, ATTEMPT).because(
                "with BATCH_IO and AUTO_BUF_REG the driver tells clients wrong places of appends",
            ));
        }
        Ok(())
    }

    /// Whether a queue of this depth, of a device that works like this, can have as many workers as are asked for.
    pub(super) fn check_lanes(&self, depth: u16, batched: bool, path: DataPath) -> Result<()> {
        let lanes = self.workers_per_queue;
        if lanes == 0 || lanes > depth {
            return Err(invalid(format!(
                "{lanes} workers for each queue: there must be 1 to the queue depth, {depth}"
            )));
        }
        if lanes == 1 || !batched {
            return Ok(());
        }
        if self.workers.is_some() {
            return Err(invalid("a pool's workers cannot share a queue that works in batches"));
        }
        if path.is_copied_by_driver() {
            return Err(invalid(
                "several workers of a queue that works in batches need a data path on which the driver does not copy: \
                 it copies before it is known which of them takes the request",
            ));
        }
        Ok(())
    }
}
