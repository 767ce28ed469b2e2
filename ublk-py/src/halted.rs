//! A device without a disk, between two lives.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use ublk_core::Added;

use crate::device::{Device, Why, end_apart};
use crate::errors::StateError;
use crate::interrupt::Token;
use crate::options::Spec;

/// The device of a disk that was halted. It is deleted with this.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Halted {
    added: Arc<Mutex<Option<Added>>>,
    /// A forked child has the object, but not the device.
    process: u32,
}

impl Halted {
    pub(crate) fn new(added: Added) -> Self {
        Halted { added: Arc::new(Mutex::new(Some(added))), process: std::process::id() }
    }

    fn take(&self) -> Option<Added> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pymethods]
impl Halted {
    /// Starts the disk again, as it is described now. If the description does not fit, the device stays as it is.
    fn start(&self, py: Python<'_>, spec: &Spec, token: &Token) -> PyResult<Device> {
        let Some(mut added) = self.take() else {
            return Err(StateError::new_err("the device was started again, or deleted"));
        };
        let place = Arc::clone(&self.added);
        spec.bring_up(py, token, move |builder| match added.describe(builder) {
            Ok(()) => added.start(),
            Err(error) => {
                *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(added);
                Err(error)
            }
        })
    }

    /// Whether the device is still there to be started.
    fn is_there(&self) -> bool {
        self.added.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Deletes the device.
    fn delete(&self, py: Python<'_>) {
        let added = self.take();
        py.detach(|| drop(added));
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        if std::process::id() == self.process
            && let Some(added) = self.take()
        {
            // The deletion may take its time, and this thread is attached to the interpreter.
            end_apart(Why::HandleLost, move || drop(added));
        }
    }
}
