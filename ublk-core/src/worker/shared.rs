//! Memory that clients of a device share with its server: which request's data lies where.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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

#[derive(Default)]
struct Registered {
    maps: HashMap<u16, Arc<SharedMap>>,
    /// Registrations that are with the driver.
    under_way: u32,
}

/// The shared memory of one device, by the driver's numbers.
#[derive(Default)]
pub(crate) struct SharedBuffers {
    registered: Mutex<Registered>,
    changed: Condvar,
}

impl SharedBuffers {
    fn lock(&self) -> std::sync::MutexGuard<'_, Registered> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A registration begins: until what this returns is gone, requests may come by it that is not noted yet. The driver
    /// waits for requests meanwhile, which may be looking for their memory.
    pub(crate) fn begin(self: &Arc<Self>, map: &Arc<SharedMap>) -> Registration {
        self.lock().under_way += 1;
        Registration { buffers: Arc::clone(self), map: Arc::clone(map) }
    }

    /// Waits until no registration is with the driver. False at the deadline.
    pub(crate) fn wait_settled(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let settled = self.changed.wait_timeout_while(self.lock(), left, |r| r.under_way > 0);
        settled.unwrap_or_else(PoisonError::into_inner).0.under_way == 0
    }

    /// Whether there are neither buffers nor registrations.
    pub(crate) fn is_empty(&self) -> bool {
        let registered = self.lock();
        registered.maps.is_empty() && registered.under_way == 0
    }

    /// The numbers of the buffers.
    pub(crate) fn numbers(&self) -> Vec<u16> {
        self.lock().maps.keys().copied().collect()
    }

    /// The buffer that has this number.
    pub(crate) fn get(&self, number: u16) -> Option<Arc<SharedMap>> {
        self.lock().maps.get(&number).map(Arc::clone)
    }

    /// The driver has forgotten a buffer. Its number may be another's by now, which stays.
    pub(crate) fn forget(&self, number: u16, map: &Arc<SharedMap>) {
        let mut registered = self.lock();
        if registered.maps.get(&number).is_some_and(|is| Arc::ptr_eq(is, map)) {
            registered.maps.remove(&number);
        }
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
                the_only_way && !r.maps.contains_key(&number) && r.under_way > 0
            })
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        let map = Arc::clone(registered.maps.get(&number)?);
        map.range(at, usize::try_from(len).ok()?)?;
        Some(Part { map, at })
    }
}

/// A registration that is with the driver, and keeps its memory mapped.
pub(crate) struct Registration {
    buffers: Arc<SharedBuffers>,
    map: Arc<SharedMap>,
}

impl Registrar for Registration {
    fn registered(&self, index: u32) {
        // The driver has no others.
        if let Ok(number) = u16::try_from(index) {
            self.buffers.lock().maps.insert(number, Arc::clone(&self.map));
            self.buffers.changed.notify_all();
        }
    }

    fn unregistered(&self, index: u32) {
        if let Ok(number) = u16::try_from(index) {
            self.buffers.forget(number, &self.map);
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.buffers.lock().under_way -= 1;
        self.buffers.changed.notify_all();
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

    fn part(buffers: &SharedBuffers, number: u16, at: u32, len: u64) -> bool {
        buffers.part_of(&desc(number, at), len, true).is_some()
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn a_request_waits_for_a_registration_that_is_under_way() {
        let buffers = Arc::new(SharedBuffers::default());
        assert!(!part(&buffers, 3, 0, 512), "nobody registers");
        let map = map();
        let registration = buffers.begin(&map);
        assert!(!buffers.wait_settled(Instant::now()));
        let elsewhere = buffers.part_of(&desc(3, 4096), 4096, false);
        assert!(elsewhere.is_none(), "who has another way to the data does not wait");
        std::thread::scope(|scope| {
            let request = scope.spawn(|| part(&buffers, 3, 4096, 4096));
            registration.registered(3);
            assert!(request.join().unwrap());
        });
        drop(registration);
        assert!(buffers.wait_settled(Instant::now()));
        assert!(part(&buffers, 3, 4096, 4096));
        assert!(!part(&buffers, 3, 4096, 4097), "past the end");
        assert_eq!(buffers.numbers(), [3]);
        buffers.forget(3, &map);
        assert!(!part(&buffers, 3, 0, 512));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn who_forgets_a_buffer_leaves_another_that_has_its_number_by_now() {
        let buffers = Arc::new(SharedBuffers::default());
        let (old, new) = (map(), map());
        let late = buffers.begin(&old);
        late.registered(0);
        // The driver has taken the old one out, and a new one in, before the first of them was noted here.
        buffers.begin(&new).registered(0);
        buffers.forget(0, &old);
        late.unregistered(0);
        assert!(buffers.get(0).is_some_and(|map| Arc::ptr_eq(&map, &new)));
        buffers.forget(0, &new);
        assert!(buffers.get(0).is_none());
    }
}
