//! The machine's devices and what its driver can do.

use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::control::{CancelToken, Control, DeviceInfo, Features, Wait};

use crate::errors::OrRaise;
use crate::interrupt::interruptible;

/// The kernel's names of features, without `UBLK_F_`; those that have none as numbers.
pub(crate) fn names(features: Features) -> Vec<String> {
    features.iter().map(|one| one.to_string()).collect()
}

/// A device in Python's words.
pub(crate) fn describe<'py>(py: Python<'py>, info: &DeviceInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("id", info.id)?;
    dict.set_item("state", info.state.to_string())?;
    dict.set_item("server_pid", info.server_pid)?;
    dict.set_item("queues", info.queues)?;
    dict.set_item("depth", info.queue_depth)?;
    dict.set_item("max_io_size", info.max_io_bytes)?;
    dict.set_item("features", names(info.features))?;
    dict.set_item("fingerprint", info.server_flags)?;
    dict.set_item("owner", (info.owner_uid, info.owner_gid))?;
    dict.set_item("size", info.capacity)?;
    Ok(dict)
}

/// What the driver offers; None from one that cannot say (before Linux 6.5).
#[pyfunction]
pub(crate) fn features(py: Python<'_>) -> PyResult<Option<Vec<String>>> {
    let control = py.detach(Control::open).or_raise(py)?;
    Ok(control.features().map(names))
}

/// Every feature that this version knows, with the Linux version that brought it.
#[pyfunction]
pub(crate) fn feature_names() -> Vec<(String, &'static str)> {
    let known = Features::known();
    known.iter().filter_map(|one| Some((one.to_string(), one.since()?))).collect()
}

/// Every device that the caller may ask about.
#[pyfunction]
pub(crate) fn list_devices(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let listed = py.detach(|| Control::open()?.list()).or_raise(py)?;
    listed.iter().map(|info| describe(py, info)).collect()
}

fn seconds(timeout: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(timeout)
        .map_err(|e| PyValueError::new_err(format!("timeout={timeout}: {e}")))
}

/// Stops a device, whoever serves it, and deletes it.
#[pyfunction]
pub(crate) fn delete(py: Python<'_>, id: u32, timeout: f64) -> PyResult<()> {
    let token = CancelToken::new();
    let wait = Wait::for_(seconds(timeout)?).cancelled_by(&token);
    interruptible(py, &token, move || Control::open()?.delete(id, &wait))?.or_raise(py)
}

/// Takes a live device from its server, whoever that is.
#[pyfunction]
pub(crate) fn quiesce(py: Python<'_>, id: u32, timeout: f64) -> PyResult<()> {
    let token = CancelToken::new();
    let wait = Wait::for_(seconds(timeout)?).cancelled_by(&token);
    interruptible(py, &token, move || Control::open()?.quiesce(id, &wait))?.or_raise(py)
}
