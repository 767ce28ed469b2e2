//! Workers and the interpreter: attached for their lives, detached while they wait.

use pyo3::prelude::*;
use ublk_core::Attendant;

/// Attaching a thread anew costs microseconds, stepping back and forth for a wait a fraction of one.
pub(crate) struct Interpreter;

/// Lets something cross into `Python::detach`, which asks for `Send` as a stand-in for "touches no Python".
struct Here<T>(T);

// SAFETY: `Python::detach` runs its closure on the calling thread, so nothing is sent anywhere.
unsafe impl<T> Send for Here<T> {}

impl<T> Here<T> {
    /// A method, so that a closure captures the whole.
    fn get(self) -> T {
        self.0
    }
}

impl Attendant for Interpreter {
    fn attend(&self, serve: &mut dyn FnMut()) {
        Python::attach(|_| serve());
    }

    fn pause(&self, wait: &mut dyn FnMut()) {
        Python::attach(|py| {
            let wait = Here(wait);
            py.detach(move || (wait.get())());
        });
    }
}
