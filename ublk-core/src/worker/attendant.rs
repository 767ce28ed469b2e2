//! What a program has done around the life and the waits of workers.

/// Stands around workers: for programs in whose language a thread has to announce itself before it runs code, and to
/// step back before it waits.
///
/// Given to [`Builder::attendant`](crate::Builder::attendant) or
/// [`Workers::with_attendant`](crate::Workers::with_attendant), it is called on the worker's thread. Handlers,
/// futures and their destructors run inside of [`attend`](Self::attend) and outside of [`pause`](Self::pause).
/// While `pause` is running no lock of the worker is held outside of `wait`, so what it waits for may take its time.
///
/// ```
/// use ublk_core::Attendant;
///
/// struct Quiet;
/// impl Attendant for Quiet {
///     fn attend(&self, serve: &mut dyn FnMut()) {
///         // announce the thread …
///         serve();
///         // … and take it back
///     }
///     fn pause(&self, wait: &mut dyn FnMut()) {
///         wait();
///     }
/// }
/// ```
pub trait Attendant: Send + Sync + 'static {
    /// A worker begins: calls `serve`, which returns when the worker ends. If it does not call it, or panics before,
    /// the worker counts as one that died.
    fn attend(&self, serve: &mut dyn FnMut()) {
        serve();
    }

    /// The worker has nothing to do: calls `wait`, which returns when there is something. If it does not call it, the
    /// wait happens without it.
    fn pause(&self, wait: &mut dyn FnMut()) {
        wait();
    }
}

/// Nobody around.
pub(crate) struct Unattended;

impl Attendant for Unattended {}
