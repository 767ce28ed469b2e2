//! The control plane: adding, starting, stopping and deleting devices, from any thread.
//!
//! [`Control`] is a handle of `/dev/ublk-control`. It is cheap to clone and may be shared; each
//! command runs on a thread of the library's, so that a caller can stop waiting for one that the
//! kernel does not give back ([`Wait`], [`Control::outstanding`]).
//!
//! ```no_run
//! use ublk_core::control::{AddDevice, Control, DeviceParams, Wait};
//!
//! let control = Control::open()?;
//! let params = DeviceParams::builder(1 << 30).queues(2).build()?;
//! let device = control.add_dev(&AddDevice::new(&params))?;
//! control.set_params(device.id, &params)?;
//! // … open /dev/ublkcN, fetch every tag, start, serve …
//! control.delete(device.id, &Wait::forever())?;
//! # Ok::<(), ublk_core::Error>(())
//! ```

mod answer;
mod commands;
mod cpus;
mod devices;
mod features;
mod holders;
mod info;
mod node;
mod node_maker;
pub(crate) mod node_watch;
mod params;
mod params_integrity;
mod params_wire;
mod pool;
pub(crate) mod probe;
mod rules;
pub(crate) mod wait;

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

pub(crate) use answer::NO_UDEV_RULES;
pub(crate) use commands::Registrar;
pub(crate) use devices::QUIESCE_IDLE_MS;

pub use crate::uring::sqe::{ControlCommand, Encoding};
pub use cpus::CpuSet;
pub use features::{FeatureRequest, Features};
pub use holders::Holder;
pub use info::{AddDevice, DeviceInfo, DeviceState};
pub use params::{
    DEFAULT_MAX_IO_BYTES, DeviceParams, Discard, MAX_IO_BYTES, ParamsBuilder, SECTOR,
    SegmentLimits, Zoned,
};
pub use params_integrity::{Checksum, Integrity};
pub use pool::Outstanding;
pub use wait::{CancelToken, Wait};

use crate::error::{ErrorKind, Result};
use crate::sys::fork::OwnFd;

/// How [`Control`] is opened.
#[derive(Clone, Debug)]
#[must_use]
pub struct ControlOptions {
    encoding: Option<Encoding>,
    places: node::Places,
    device_paths: bool,
    patience: Duration,
}

impl Default for ControlOptions {
    fn default() -> Self {
        ControlOptions {
            encoding: None,
            places: node::Places::default(),
            device_paths: false,
            patience: Duration::from_secs(30),
        }
    }
}

impl ControlOptions {
    /// The defaults: `/dev`, the encoding that the driver asks for, 30 seconds for commands that
    /// should be short.
    pub fn new() -> Self {
        Self::default()
    }

    /// Numbers commands this way and not as the driver asks for; also the I/O commands of devices that are
    /// [added](crate::Builder::add) or [recovered](crate::Builder::recover) by this handle.
    pub fn encoding(mut self, encoding: Encoding) -> Self {
        self.encoding = Some(encoding);
        self
    }

    /// Looks for `ublk-control` and `ublkcN` in this directory and not in `/dev`.
    pub fn dev_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.places.dev = dir.into();
        self
    }

    /// Sends the path of `/dev/ublkcN` with each command about an unprivileged device: the driver
    /// then checks the caller's permissions on that node in place of CAP_SYS_ADMIN. Costs a
    /// GET_DEV_INFO2 before each command, since the driver takes the path for the payload where a
    /// device is not an unprivileged one.
    pub fn device_paths(mut self, on: bool) -> Self {
        self.device_paths = on;
        self
    }

    /// How long to wait for commands that have no [`Wait`] of their own. They take microseconds
    /// unless another command of somebody else's is stuck in the driver.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Opens the driver and asks for its features.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DriverMissing`], [`ErrorKind::IoUringDisabled`],
    /// [`ErrorKind::PermissionDenied`], [`ErrorKind::TooMany`].
    pub fn open(self) -> Result<Control> {
        let pool = pool::Pool::new(node::open_control(&self.places)?);
        let mut inner = Inner {
            pool: Arc::new(pool),
            encoding: Encoding::Ioctl,
            features: None,
            places: self.places,
            device_paths: self.device_paths,
            patience: self.patience,
        };
        match commands::ask_features(&inner) {
            Ok(features) => inner.features = Some(features),
            // Before Linux 6.5 the driver could not say, and the answer for an unknown command
            // depended on whether the id of the header existed.
            Err(e) if e.kind() == ErrorKind::Unsupported => inner.encoding = Encoding::Legacy,
            Err(e) => return Err(e),
        }
        if let Some(encoding) = self.encoding {
            inner.encoding = encoding;
        }
        Ok(Control(Arc::new(inner)))
    }
}

/// A handle of the ublk driver, usable from any thread and shared by its clones.
///
/// In a forked child every call is refused with [`ErrorKind::Forked`]. Dropping the last clone ends
/// the idle control threads; a thread that waits for the kernel ends when its command comes back.
#[derive(Clone)]
pub struct Control(Arc<Inner>);

/// A [`Control`] as long as somebody else has it.
#[derive(Clone, Debug, Default)]
pub(crate) struct WeakControl(Weak<Inner>);

impl WeakControl {
    pub(crate) fn upgrade(&self) -> Option<Control> {
        self.0.upgrade().map(Control)
    }
}

struct Inner {
    pool: Arc<pool::Pool>,
    encoding: Encoding,
    features: Option<Features>,
    places: node::Places,
    device_paths: bool,
    patience: Duration,
}

impl Control {
    /// Opens `/dev/ublk-control` with the default options.
    ///
    /// # Errors
    ///
    /// See [`ControlOptions::open`].
    pub fn open() -> Result<Self> {
        ControlOptions::new().open()
    }

    pub(crate) fn downgrade(&self) -> WeakControl {
        WeakControl(Arc::downgrade(&self.0))
    }

    /// The same handle, sending [paths](ControlOptions::device_paths).
    pub(crate) fn with_device_paths(&self) -> Self {
        if self.0.device_paths {
            return self.clone();
        }
        Control(Arc::new(Inner {
            pool: Arc::clone(&self.0.pool),
            encoding: self.0.encoding,
            features: self.0.features,
            places: self.0.places.clone(),
            device_paths: true,
            patience: self.0.patience,
        }))
    }

    /// How commands are numbered.
    pub fn encoding(&self) -> Encoding {
        self.0.encoding
    }

    /// What the driver offered when this was opened; `None` from drivers that cannot say (before
    /// Linux 6.5).
    pub fn features(&self) -> Option<Features> {
        self.0.features
    }

    /// The commands that are with the kernel now, those included whose callers have stopped
    /// waiting.
    pub fn outstanding(&self) -> Vec<Outstanding> {
        self.0.pool.outstanding()
    }

    /// Opens `/dev/ublkcN` for serving.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSuchDevice`], [`ErrorKind::Busy`] while another server has it open,
    /// [`ErrorKind::PermissionDenied`]; until the wait is over, the latter two are waited for.
    #[allow(dead_code, reason = "the device module opens what it serves")]
    pub(crate) fn open_char_device(&self, id: u32, wait: &Wait) -> Result<OwnFd> {
        node::open_char_device(&self.0.places, id, wait)
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("encoding", &self.0.encoding)
            .field("features", &self.0.features)
            .finish_non_exhaustive()
    }
}

const _: () = {
    const fn shared<T: Clone + Send + Sync>() {}
    shared::<Control>();
    shared::<CancelToken>();
};
