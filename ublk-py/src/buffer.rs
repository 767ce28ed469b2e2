//! A request's memory as Python sees it.
//!
//! The invariant: memory that a view was exported of stays mapped, and is nobody else's, until the last view is gone.
//! While a request is unanswered it keeps its memory itself. When it is answered, [`Buffer::close`] says whether views
//! are left; if so, the request's tag gets other memory and the buffer takes this one
//! ([`ublk_core::KeptBuffer`]) until they are gone. No slice of it is ever made on the Rust side.

use std::ffi::c_int;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;
use ublk_core::{KeptBuffer, Op, Request};

/// Exports a request's memory by the buffer protocol.
#[pyclass(frozen, module = "ublk._native")]
pub(crate) struct Buffer(Mutex<State>);

struct State {
    /// `None` when the request was answered.
    memory: Option<Memory>,
    exports: usize,
    kept: Option<KeptBuffer>,
}

struct Memory {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: an address; what is behind it is reached by Python alone, under Python's rules for buffers.
unsafe impl Send for Memory {}

impl Buffer {
    pub(crate) fn new() -> Self {
        Buffer(Mutex::new(State { memory: None, exports: 0, kept: None }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the data of a request, which stays unanswered until [`close`](Self::close).
    pub(crate) fn open(&self, request: &mut Request) {
        let len = usize::try_from(request.len()).unwrap_or(0);
        let (start, writable) = match request.op() {
            Op::Read => (request.data_mut().as_mut_ptr(), true),
            _ => (request.data().as_ptr().cast_mut(), false),
        };
        let mut state = self.lock();
        debug_assert!(state.exports == 0 && state.kept.is_none());
        state.memory = NonNull::new(start).map(|start| Memory { start, len, writable });
    }

    /// Ends that. True if no view is left.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.lock();
        state.memory = None;
        state.exports == 0
    }

    /// Takes the memory over for the views that are left.
    pub(crate) fn keep(&self, kept: KeptBuffer) {
        let mut state = self.lock();
        if state.exports > 0 {
            state.kept = Some(kept);
        }
    }

    /// A view is gone.
    fn forget_one(&self) {
        let kept = {
            let mut state = self.lock();
            state.exports -= 1;
            if state.exports == 0 { state.kept.take() } else { None }
        };
        drop(kept);
    }

    /// A view of what is shown.
    pub(crate) fn view<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyMemoryView>> {
        PyMemoryView::from(this.as_any())
    }
}

#[pymethods]
impl Buffer {
    /// # Safety
    ///
    /// Called by the interpreter alone, with a view that is to be filled.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        // Not locked while the interpreter works: what it does may release another view of this, by its collector.
        let (start, len, writable) = {
            let mut state = slf.get().lock();
            let Some(memory) = &state.memory else {
                return Err(PyBufferError::new_err("the request of this buffer has been answered"));
            };
            let shown = (memory.start, memory.len, memory.writable);
            state.exports += 1;
            shown
        };
        let len = ffi::Py_ssize_t::try_from(len).unwrap_or(ffi::Py_ssize_t::MAX);
        // SAFETY: the interpreter gives a view to be filled. The memory is `len` bytes, valid while the request is
        // unanswered, and after that as long as an export is counted, which is from here to `__releasebuffer__`; the
        // view keeps this object.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                start.as_ptr().cast(),
                len,
                c_int::from(!writable),
                flags,
            )
        };
        if filled != 0 {
            let error = PyErr::fetch(slf.py());
            slf.get().forget_one();
            return Err(error);
        }
        Ok(())
    }

    /// # Safety
    ///
    /// Called by the interpreter alone, once for each view.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.forget_one();
    }
}

/// Buffers that nobody else has a reference to, for the next requests.
#[derive(Default)]
pub(crate) struct Spares(Vec<Py<Buffer>>);

impl Spares {
    /// More than one are in use only while a handler keeps some.
    const MOST: usize = 4;

    pub(crate) fn take(&mut self, py: Python<'_>) -> PyResult<Py<Buffer>> {
        match self.0.pop() {
            Some(buffer) => Ok(buffer),
            None => Py::new(py, Buffer::new()),
        }
    }

    /// Takes a closed buffer back, if it is this caller's alone.
    pub(crate) fn put(&mut self, _attached: Python<'_>, buffer: Py<Buffer>) {
        // SAFETY: the object lives, as `buffer` is a reference to it, and this thread is attached.
        let references = unsafe { ffi::Py_REFCNT(buffer.as_ptr()) };
        if references == 1 && self.0.len() < Self::MOST {
            self.0.push(buffer);
        }
    }
}
