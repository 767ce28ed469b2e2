//! Memory that clients of a device share with its server: which request's data lies where.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::control::Registrar;
use crate::error::Errno;
use crate::sys::shared_memory::SharedMap;
use crate::uapi;

/// Where the data of a request is, if it is in shared memory.
#[derive(Clone)]
pub(crate) struct Part {
    map: Arc<SharedMap>,
    at: u64,
}

impl Part {
    pub(crate) fn map(&self) -> &Arc<SharedMap> {
        &self.map
    }

    /// The address of bytes of the request's data.
    pub(crate) fn address(&self, at: usize, len: usize) -> Option<*mut u8> {
        Some(self.map.range(self.at + at as u64, len)?.as_ptr())
    }

    /// Copies the first `len` bytes of the data to an address.
    ///
    /// # Safety
    ///
    /// As [`SharedMap::copy_from`].
    pub(crate) unsafe fn pull(&self, to: *mut u8, len: usize) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { self.map.copy_from(self.at, to, len) }
    }

    /// Copies `len` bytes at an address to the data, from its byte `at` on.
    ///
    /// # Safety
    ///
    /// As [`SharedMap::copy_to`].
    pub(crate) unsafe fn push(&self, at: u64, from: *const u8, len: usize) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { self.map.copy_to(self.at + at, from, len) }
    }
}

/// How long a request waits for the registration that it came by to be noted here.
const PATIENCE: Duration = Duration::from_secs(5);

/// What of ours is with the driver.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum UnderWay {
    #[default]
    Nothing,
    /// What makes no memory known.
    Command,
    Registration,
}

#[derive(Default)]
struct Registered {
    maps: HashMap<u16, Arc<SharedMap>>,
    under_way: UnderWay,
}

/// The shared memory of one device, by the driver's numbers.
#[derive(Default)]
pub(crate) struct SharedBuffers {
    registered: Mutex<Registered>,
    changed: Condvar,
}

impl SharedBuffers {
    fn lock(&self) -> MutexGuard<'_, Registered> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is with the driver, or for the deadline.
    fn settled(&self, deadline: Instant) -> MutexGuard<'_, Registered> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.changed
            .wait_timeout_while(self.lock(), left, |r| r.under_way != UnderWay::Nothing)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// The turn of one command, once the driver has answered the former one and that is noted here: a number that is free
    /// with the driver is another's at once. `None` at the deadline.
    pub(crate) fn begin(self: &Arc<Self>, deadline: Instant) -> Option<Turn> {
        let mut registered = self.settled(deadline);
        if registered.under_way != UnderWay::Nothing {
            return None;
        }
        registered.under_way = UnderWay::Command;
        drop(registered);
        Some(Turn(Arc::clone(self)))
    }

    /// Waits until nobody has a turn. False at the deadline.
    pub(crate) fn wait_settled(&self, deadline: Instant) -> bool {
        self.settled(deadline).under_way == UnderWay::Nothing
    }

    /// The numbers of the buffers.
    pub(crate) fn numbers(&self) -> Vec<u16> {
        self.lock().maps.keys().copied().collect()
    }

    /// Where the data of a request with this descriptor is. `None` if the memory is unknown: a former server's, or just
    /// being registered, which is waited for if it is `the_only_way` to the data.
    pub(crate) fn part_of(
        &self,
        desc: &uapi::ublksrv_io_desc,
        len: u64,
        the_only_way: bool,
    ) -> Option<Part> {
        let number = uapi::ublk_shmem_zc_index(desc.addr);
        let at = u64::from(uapi::ublk_shmem_zc_offset(desc.addr));
        // The driver may be using a buffer whose number has not come back to us yet.
        let registered = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |r| {
                let noted = r.maps.contains_key(&number);
                the_only_way && !noted && r.under_way == UnderWay::Registration
            })
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        let map = Arc::clone(registered.maps.get(&number)?);
        map.range(at, usize::try_from(len).ok()?)?;
        Some(Part { map, at })
    }
}

/// The right to have one command with the driver. It goes with the command: whoever has it ends it when the driver has
/// answered, which may be long after its caller has given up, or by not asking.
pub(crate) struct Turn(Arc<SharedBuffers>);

impl Turn {
    /// For a registration: until what this returns is gone, requests may come by it that is not noted yet.
    pub(crate) fn register(self, map: &Arc<SharedMap>) -> Registration {
        self.0.lock().under_way = UnderWay::Registration;
        Registration { turn: self, map: Arc::clone(map) }
    }

    /// The driver has forgotten the buffer with this number.
    pub(crate) fn unregistered(self, number: u16) {
        // Unmapped when nobody has to wait for that.
        let _map = self.0.lock().maps.remove(&number);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.lock().under_way = UnderWay::Nothing;
        self.0.changed.notify_all();
    }
}

/// A registration that is with the driver, and keeps its memory mapped.
pub(crate) struct Registration {
    turn: Turn,
    map: Arc<SharedMap>,
}

impl Registrar for Registration {
    fn registered(&self, index: u32) {
        // The driver has no others.
        if let Ok(number) = u16::try_from(index) {
            let buffers = &self.turn.0;
            buffers.lock().maps.insert(number, Arc::clone(&self.map));
            buffers.changed.notify_all();
        }
    }

    fn unregistered(&self, index: u32) {
        if let Ok(number) = u16::try_from(index) {
            let _map = self.turn.0.lock().maps.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::shared_memory::sealed_file;

    fn map() -> Arc<SharedMap> {
        let file = sealed_file(8192, false).unwrap();
        // SAFETY: sealed at that size.
        Arc::new(unsafe { SharedMap::new(file.as_fd(), 8192, true).unwrap() })
    }

    fn desc(number: u16, at: u32) -> uapi::ublksrv_io_desc {
        let addr = uapi::ublk_shmem_zc_addr(number, at);
        uapi::ublksrv_io_desc { addr, ..Default::default() }
    }

    fn part(buffers: &SharedBuffers, number: u16, at: u32, len: u64) -> Option<Part> {
        buffers.part_of(&desc(number, at), len, true)
    }

    fn at_once(buffers: &Arc<SharedBuffers>) -> Option<Turn> {
        buffers.begin(Instant::now())
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn a_request_waits_for_a_registration_that_is_under_way() {
        let buffers = Arc::new(SharedBuffers::default());
        assert!(part(&buffers, 3, 0, 512).is_none(), "nobody registers");
        let registration = at_once(&buffers).unwrap().register(&map());
        assert!(!buffers.wait_settled(Instant::now()));
        let elsewhere = buffers.part_of(&desc(3, 4096), 4096, false);
        assert!(elsewhere.is_none(), "who has another way to the data does not wait");
        std::thread::scope(|scope| {
            let request = scope.spawn(|| part(&buffers, 3, 4096, 4096).is_some());
            registration.registered(3);
            assert!(request.join().unwrap());
        });
        drop(registration);
        assert!(buffers.wait_settled(Instant::now()));
        assert!(part(&buffers, 3, 4096, 4096).is_some());
        assert!(part(&buffers, 3, 4096, 4097).is_none(), "past the end");
        assert_eq!(buffers.numbers(), [3]);
        // What the driver forgets makes no memory known: it may be waiting for the very request.
        let turn = at_once(&buffers).unwrap();
        let begin = Instant::now();
        assert!(part(&buffers, 4, 0, 512).is_none());
        assert!(begin.elapsed() < PATIENCE / 2);
        turn.unregistered(3);
        assert!(part(&buffers, 3, 0, 512).is_none());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn a_number_has_no_other_owner_before_the_end_of_the_former_one_is_noted() {
        let buffers = Arc::new(SharedBuffers::default());
        let (one, other) = (map(), map());
        let is = |map| part(&buffers, 0, 0, 512).is_some_and(|part| Arc::ptr_eq(part.map(), map));
        at_once(&buffers).unwrap().register(&one).registered(0);
        for next in [&one, &other] {
            let unregistration = at_once(&buffers).unwrap();
            // The driver has done it, and the number is free there.
            assert!(at_once(&buffers).is_none() && is(&one));
            std::thread::scope(|scope| {
                let registration = scope.spawn(|| {
                    let turn = buffers.begin(Instant::now() + PATIENCE).unwrap();
                    let registration = turn.register(next);
                    registration.registered(0);
                    registration
                });
                unregistration.unregistered(0);
                // Also one that is undone has its turn until then.
                let registration = registration.join().unwrap();
                assert!(at_once(&buffers).is_none() && is(next));
                drop(registration);
            });
            assert!(buffers.wait_settled(Instant::now()));
        }
        let undone = at_once(&buffers).unwrap().register(&one);
        undone.registered(1);
        undone.unregistered(1);
        drop(undone);
        assert_eq!(buffers.numbers(), [0]);
        // Who is refused or gives up ends its turn as well.
        drop(at_once(&buffers).unwrap());
        assert!(at_once(&buffers).is_some());
    }
}
