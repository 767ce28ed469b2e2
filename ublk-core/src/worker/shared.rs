//! Memory that clients of a device share with its server: which request's data lies where.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

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

    /// Has the driver register a buffer, which answers with its number.
    pub(crate) fn register<E>(
        &self,
        map: &Arc<SharedMap>,
        command: impl FnOnce() -> Result<u16, E>,
    ) -> Result<u16, E> {
        self.lock().under_way += 1;
        // Not under the lock: the driver waits for requests, which may be looking for their memory.
        let answer = command();
        let mut registered = self.lock();
        registered.under_way -= 1;
        if let Ok(number) = answer {
            registered.maps.insert(number, Arc::clone(map));
        }
        drop(registered);
        self.changed.notify_all();
        answer
    }

    /// The driver has forgotten a buffer.
    pub(crate) fn forget(&self, number: u16) {
        self.lock().maps.remove(&number);
    }

    /// Where the data of a request with this descriptor is.
    pub(crate) fn part_of(&self, desc: &uapi::ublksrv_io_desc, len: u64) -> Option<Part> {
        let number = uapi::ublk_shmem_zc_index(desc.addr);
        let at = u64::from(uapi::ublk_shmem_zc_offset(desc.addr));
        // The driver may be using a buffer whose number has not come back to us yet.
        let registered = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |r| {
                !r.maps.contains_key(&number) && r.under_way > 0
            })
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        let map = Arc::clone(registered.maps.get(&number)?);
        map.range(at, usize::try_from(len).ok()?)?;
        Some(Part { map, at })
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

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn a_request_waits_for_a_registration_that_is_under_way() {
        let buffers = SharedBuffers::default();
        assert!(buffers.part_of(&desc(3, 0), 512).is_none(), "nobody registers");
        std::thread::scope(|scope| {
            let mut request = None;
            let number = buffers.register(&map(), || {
                request = Some(scope.spawn(|| buffers.part_of(&desc(3, 4096), 4096).is_some()));
                Ok::<_, Errno>(3)
            });
            assert_eq!(number, Ok(3));
            assert!(request.unwrap().join().unwrap());
        });
        assert!(buffers.part_of(&desc(3, 4096), 4096).is_some());
        assert!(buffers.part_of(&desc(3, 4096), 4097).is_none(), "past the end");
        buffers.forget(3);
        assert!(buffers.part_of(&desc(3, 0), 512).is_none());
    }
}
