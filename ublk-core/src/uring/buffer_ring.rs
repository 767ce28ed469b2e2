//! Buffers that the kernel takes by itself for each completion of a multishot command (`IORING_REGISTER_PBUF_RING`).
//!
//! Invariant: from its registration until it is taken out of its ring the kernel writes to the buffers, whenever the
//! ring's thread enters it. Only buffers that a completion has named, and that were not given back yet, are read. If
//! nobody takes it out, the memory is left to the kernel for good.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use super::worker_ring::WorkerRing;
use crate::error::Errno;
use crate::sys::memory::{Backing, Region};

pub(crate) struct BufferRing {
    /// The entries, and the buffers behind them.
    region: ManuallyDrop<Region>,
    group: u16,
    count: u16,
    /// Bytes of a buffer.
    each: usize,
    tail: u16,
}

impl BufferRing {
    /// Gives the ring `count` buffers, a power of two, of `each` bytes, as the group `group`.
    pub(crate) fn new(
        ring: &WorkerRing,
        group: u16,
        count: u16,
        each: usize,
    ) -> Result<Self, Errno> {
        assert!(count.is_power_of_two());
        let mut this = Self::unregistered(group, count, each)?;
        let entries = this.region.at(0).as_ptr();
        // SAFETY: the region is page-aligned, large enough, and stays mapped: it is dropped by `free` alone, after
        // the ring has let go of it.
        if let Err(errno) = unsafe { ring.register_buffer_ring(entries as u64, count, group) } {
            // The kernel knows nothing of it.
            drop(ManuallyDrop::into_inner(this.region));
            return Err(errno);
        }
        for buffer in 0..count {
            this.put(buffer);
        }
        this.publish();
        Ok(this)
    }

    /// Memory that no ring knows.
    fn unregistered(group: u16, count: u16, each: usize) -> Result<Self, Errno> {
        let len = usize::from(count) * (size_of::<BufRingEntry>() + each);
        let region = ManuallyDrop::new(Region::new(len, Backing::default())?);
        Ok(BufferRing { region, group, count, each, tail: 0 })
    }

    /// A completion has left these bytes in a buffer.
    #[cfg(test)]
    pub(crate) fn fill(&self, index: u16, bytes: &[u8]) {
        assert!(bytes.len() <= self.each);
        // SAFETY: within the buffer; no kernel knows it.
        unsafe { self.buffer(index).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// For tests of what is done with the buffers' contents.
    #[cfg(test)]
    pub(crate) fn detached(count: u16, each: usize) -> Self {
        Self::unregistered(0, count, each).unwrap()
    }

    pub(crate) fn group(&self) -> u16 {
        self.group
    }

    fn buffer(&self, index: u16) -> *mut u8 {
        assert!(index < self.count);
        let entries = usize::from(self.count) * size_of::<BufRingEntry>();
        self.region.at(entries + usize::from(index) * self.each).as_ptr()
    }

    fn put(&mut self, index: u16) {
        let address = self.buffer(index) as u64;
        let place = usize::from(self.tail & (self.count - 1)) * size_of::<BufRingEntry>();
        let entry = self.region.at(place).cast::<BufRingEntry>();
        // SAFETY: an entry within the region, zeroed or written before; the kernel does not look at it before the tail
        // has moved past it. The tail itself lies in a field of the first entry that these do not touch.
        let entry = unsafe { &mut *entry.as_ptr() };
        entry.set_addr(address);
        entry.set_len(self.each as u32);
        entry.set_bid(index);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&self) {
        let first = self.region.at(0).cast::<BufRingEntry>();
        // SAFETY: the address of the first entry's field that is the ring's tail; nobody else writes it, the kernel
        // reads it.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(first.as_ptr()).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Copies what a completion has left in a buffer, as far as it fits, and gives the buffer back.
    pub(crate) fn take(&mut self, index: u16, to: &mut [u8]) {
        let from = self.buffer(index);
        let len = to.len().min(self.each);
        // SAFETY: within the buffer, which the completion has made ours; anonymous memory is initialised.
        unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), len) };
        self.put(index);
        self.publish();
    }

    /// Takes the buffers back from the ring and frees them.
    pub(crate) fn free(mut self, ring: &WorkerRing) {
        if ring.unregister_buffer_ring(self.group) {
            // SAFETY: the kernel has let go of it, and `self` ends here.
            unsafe { ManuallyDrop::drop(&mut self.region) };
        }
    }
}
