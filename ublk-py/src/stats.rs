//! A device's counters as dictionaries, which the Python side makes objects of.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::{DeviceStats, OpStats, QueueStats};

fn op<'py>(py: Python<'py>, stats: &OpStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("completed", stats.completed)?;
    dict.set_item("bytes", stats.bytes)?;
    dict.set_item("errors", stats.errors)?;
    let quantile = |q| stats.latency.quantile(q).map(|time| time.as_secs_f64());
    for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("longest", 1.0)]
    {
        dict.set_item(name, quantile(q))?;
    }
    Ok(dict)
}

fn queue<'py>(py: Python<'py>, stats: &QueueStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, of) in [
        ("read", &stats.read),
        ("write", &stats.write),
        ("flush", &stats.flush),
        ("trim", &stats.discard),
        ("zero", &stats.write_zeroes),
        ("append", &stats.zone_append),
        ("report_zones", &stats.zone_report),
        ("zone", &stats.zone_action),
    ] {
        dict.set_item(name, op(py, of)?)?;
    }
    dict.set_item("in_flight", stats.in_flight)?;
    dict.set_item("oldest", stats.oldest.map(|age| age.as_secs_f64()))?;
    for (name, count) in [
        ("dropped", stats.dropped),
        ("panics", stats.panics),
        ("revoked", stats.revoked),
        ("refused", stats.refused),
        ("rejected", stats.rejected),
        ("unregistered", stats.unregistered),
        ("shared", stats.shared),
    ] {
        dict.set_item(name, count)?;
    }
    Ok(dict)
}

/// All of a device's.
pub(crate) fn stats<'py>(py: Python<'py>, stats: &DeviceStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let queues = stats.queues.iter().map(|q| queue(py, q)).collect::<PyResult<Vec<_>>>()?;
    dict.set_item("queues", queues)?;
    dict.set_item("total", queue(py, &stats.total())?)?;
    dict.set_item("enters", stats.enters)?;
    dict.set_item("wake_ups", stats.wake_ups)?;
    Ok(dict)
}
