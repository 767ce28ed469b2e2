//! Where a worker's core lives: its thread works with it, and others take it away when that thread is stuck.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::core::Core;
use crate::sys::fork;

/// The cell that a worker's core lives in.
pub(crate) struct Shared {
    core: Mutex<Option<Core>>,
    /// In a forked child there is no core: the memory of its ring is not mapped there.
    generation: u32,
}

/// The core, locked, and there.
pub(crate) struct Locked<'a>(MutexGuard<'a, Option<Core>>);

impl std::ops::Deref for Locked<'_> {
    type Target = Core;
    fn deref(&self) -> &Core {
        match &*self.0 {
            Some(core) => core,
            None => unreachable!("checked when it was locked"),
        }
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Core {
        match &mut *self.0 {
            Some(core) => core,
            None => unreachable!("checked when it was locked"),
        }
    }
}

impl Shared {
    pub(crate) fn empty() -> Arc<Self> {
        Arc::new(Shared { core: Mutex::new(None), generation: fork::generation() })
    }

    /// The worker's thread puts its core in.
    pub(crate) fn fill(&self, core: Core) {
        *self.core.lock().unwrap_or_else(PoisonError::into_inner) = Some(core);
    }

    /// The core; `None` if it was taken away.
    pub(crate) fn lock(&self) -> Option<Locked<'_>> {
        if !self.is_ours() {
            return None;
        }
        let guard = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        guard.is_some().then(|| Locked(guard))
    }

    /// Takes the core away from outside, unless the worker is using it.
    pub(crate) fn try_take(&self) -> Option<Core> {
        if !self.is_ours() {
            return None;
        }
        match self.core.try_lock() {
            Ok(mut guard) => guard.take(),
            Err(TryLockError::Poisoned(e)) => e.into_inner().take(),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The worker's thread takes its core back, to end.
    pub(crate) fn take(&self) -> Option<Core> {
        if !self.is_ours() {
            return None;
        }
        self.core.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_ours(&self) -> bool {
        self.generation == fork::generation()
    }
}
