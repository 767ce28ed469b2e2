//! How long a caller waits, and how it is told to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A bound of a wait: a deadline, a [`CancelToken`], both or none.
///
/// ```
/// use std::time::Duration;
/// use ublk_core::control::{CancelToken, Wait};
///
/// let token = CancelToken::new();
/// let wait = Wait::for_(Duration::from_secs(5)).cancelled_by(&token);
/// assert!(!wait.is_over());
/// token.cancel();
/// assert!(wait.is_over());
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Wait {
    deadline: Option<Instant>,
    cancel: Option<CancelToken>,
}

impl Wait {
    /// Until the kernel answers, however long that takes.
    pub const fn forever() -> Self {
        Wait { deadline: None, cancel: None }
    }

    /// Until a moment.
    pub const fn until(deadline: Instant) -> Self {
        Wait { deadline: Some(deadline), cancel: None }
    }

    /// For a time from now; forever if it ends beyond what the clock can say.
    pub fn for_(time: Duration) -> Self {
        Wait { deadline: Instant::now().checked_add(time), cancel: None }
    }

    /// Until the token is cancelled as well.
    pub fn cancelled_by(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }

    /// When the wait ends.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What ends the wait before its deadline.
    pub fn cancel_token(&self) -> Option<&CancelToken> {
        self.cancel.as_ref()
    }

    /// What is left until the deadline: `None` without one, zero after it.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|d| d.saturating_duration_since(Instant::now()))
    }

    /// Whether the deadline has passed or the token was cancelled.
    pub fn is_over(&self) -> bool {
        self.is_cancelled() || self.remaining() == Some(Duration::ZERO)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(CancelToken::is_cancelled)
    }
}

/// Something that waits and can be told to look again.
pub(crate) trait Wake: Send + Sync {
    fn wake(&self);
}

/// Ends waits from another thread, at once and for good.
///
/// Clones are the same token. Cancelling is idempotent; a wait that starts afterwards ends
/// immediately.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<Token>);

#[derive(Default)]
struct Token {
    cancelled: AtomicBool,
    waiting: Mutex<Vec<Weak<dyn Wake>>>,
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every wait that this token bounds.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *self.waiting());
        for waiter in waiting {
            if let Some(waiter) = waiter.upgrade() {
                waiter.wake();
            }
        }
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Lists a waiter for as long as the guard lives. The waiter has to look at
    /// [`is_cancelled`](Self::is_cancelled) once after this.
    pub(crate) fn listen(&self, waiter: &Arc<impl Wake + 'static>) -> Listening<'_> {
        let weak: Weak<dyn Wake> = Arc::downgrade(waiter) as _;
        self.waiting().push(Weak::clone(&weak));
        Listening { token: self, waiter: weak }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Weak<dyn Wake>>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelToken").field("cancelled", &self.is_cancelled()).finish()
    }
}

pub(crate) struct Listening<'a> {
    token: &'a CancelToken,
    waiter: Weak<dyn Wake>,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.token.waiting().retain(|w| !w.ptr_eq(&self.waiter));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count(std::sync::atomic::AtomicU32);
    impl Wake for Count {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_token_wakes_those_who_listen_once() {
        let token = CancelToken::new();
        let here = Arc::new(Count(0.into()));
        let gone = Arc::new(Count(0.into()));
        let _listening = token.listen(&here);
        drop(token.listen(&gone));
        token.clone().cancel();
        token.cancel();
        assert_eq!(here.0.load(Ordering::SeqCst), 1);
        assert_eq!(gone.0.load(Ordering::SeqCst), 0);
        assert!(token.is_cancelled());
    }

    #[test]
    fn a_wait_is_over_at_its_deadline() {
        assert!(Wait::for_(Duration::ZERO).is_over());
        assert!(!Wait::for_(Duration::MAX).is_over());
        assert!(!Wait::forever().is_over());
        assert_eq!(Wait::forever().remaining(), None);
    }
}
