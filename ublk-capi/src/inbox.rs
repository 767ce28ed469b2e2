//! Requests that wait for the program's own event loop, and the descriptor that it watches.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ublk_core::{Error, ErrorKind, Request, Result};

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// The descriptor is readable, or about to be.
    signalled: bool,
    /// Queues that are served.
    queues: usize,
    /// The thread that dispatches, as far as that is known: 0 for none.
    dispatcher: i32,
}

/// See the module's text.
pub(crate) struct Inbox {
    state: Mutex<State>,
    event: OwnedFd,
}

/// The calling thread's number in the kernel.
pub(crate) fn this_thread() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

impl Inbox {
    pub(crate) fn new(attempt: &'static str) -> Result<Self> {
        // SAFETY: two integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            let error = Error::new(ErrorKind::TooMany, attempt);
            return Err(error.with_source(io::Error::last_os_error()));
        }
        // SAFETY: the call has just made it, and nobody else has it.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Inbox { state: Mutex::default(), event })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the descriptor readable. The counter cannot overflow: it is cleared before it is written again.
    fn signal(&self, state: &mut State) {
        if !std::mem::replace(&mut state.signalled, true) {
            let one = 1u64;
            // SAFETY: eight readable bytes.
            unsafe { libc::write(self.fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Makes the descriptor readable for whoever waits for it.
    pub(crate) fn wake(&self) {
        let mut state = self.lock();
        self.signal(&mut state);
    }

    pub(crate) fn push(&self, request: Request) {
        let mut state = self.lock();
        state.waiting.push_back(request);
        self.signal(&mut state);
    }

    pub(crate) fn queue_begins(&self) {
        self.lock().queues += 1;
    }

    pub(crate) fn queue_ends(&self) {
        let mut state = self.lock();
        state.queues -= 1;
        self.signal(&mut state);
    }

    /// The calling thread dispatches from now on: those of its calls that wait do that meanwhile.
    pub(crate) fn adopt(&self) {
        self.lock().dispatcher = this_thread();
    }

    pub(crate) fn is_mine(&self) -> bool {
        self.lock().dispatcher == this_thread()
    }

    /// How many wait now.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// The next request; without one, the descriptor is not readable any more, and this is whether anything may still
    /// come.
    pub(crate) fn next(&self) -> std::result::Result<Request, bool> {
        let mut state = self.lock();
        state.waiting.pop_front().ok_or_else(|| self.settled(&mut state))
    }

    /// The descriptor is not readable any more if nothing waits: for a caller that had all that it wanted.
    pub(crate) fn settle(&self) {
        let mut state = self.lock();
        if state.waiting.is_empty() {
            self.settled(&mut state);
        }
    }

    /// Nothing waits; whether anything may still come. Once everything has ended the descriptor stays readable, so that no
    /// loop waits for ever.
    fn settled(&self, state: &mut State) -> bool {
        let alive = state.queues > 0;
        if alive {
            self.silence(state);
        }
        alive
    }

    fn silence(&self, state: &mut State) {
        if std::mem::replace(&mut state.signalled, false) {
            let mut count = 0u64;
            // SAFETY: eight writable bytes.
            unsafe { libc::read(self.fd(), (&raw mut count).cast(), 8) };
        }
    }

    /// The descriptor is not readable any more: for a caller that looks for requests next.
    pub(crate) fn clear_signal(&self) {
        self.silence(&mut self.lock());
    }

    /// Waits until the descriptor is readable.
    pub(crate) fn wait(&self) {
        let mut poll = libc::pollfd { fd: self.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one writable pollfd. A signal only makes the caller look once more.
        unsafe { libc::poll(&mut poll, 1, -1) };
    }

    /// Forgets what waits: the device has ended.
    pub(crate) fn clear(&self) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        // Outside of the lock: each is answered as it goes.
        drop(waiting);
    }
}
