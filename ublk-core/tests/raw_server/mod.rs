//! A server without the library's workers: SQEs written byte by byte, a plain ring, one thread a queue.
//! What it shows is the kernel's doing and nobody else's.
#![allow(dead_code, reason = "no suite uses all of it")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, squeue, types};
use ublk_core::control::{AddDevice, Control, DeviceInfo, DeviceParams, FeatureRequest, Features};
use ublk_core::uapi;

use crate::disk::{Aligned, eventually, patience};

/// How the queues' SQEs are written.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    pub(crate) fetch: u32,
    pub(crate) commit: u32,
    pub(crate) len: u32,
    /// Whether the driver is told the tags' buffers: it wants none where it does not copy.
    pub(crate) addresses: bool,
    pub(crate) user_data: fn(u16) -> u64,
}

impl Default for Style {
    fn default() -> Self {
        Style {
            fetch: 0xC010_7520,
            commit: 0xC010_7521,
            len: 0,
            addresses: true,
            user_data: u64::from,
        }
    }
}

/// A device that is added, with its node open.
pub(crate) struct Raw {
    pub(crate) control: Control,
    pub(crate) info: DeviceInfo,
    pub(crate) file: File,
}

impl Raw {
    pub(crate) fn add(params: &DeviceParams) -> Self {
        Self::add_with(params, Features::NONE)
    }

    pub(crate) fn add_with(params: &DeviceParams, features: Features) -> Self {
        let control = Control::open().unwrap();
        let features = FeatureRequest::require(features);
        let info = control.add_dev(&AddDevice { features, ..AddDevice::new(params) }).unwrap();
        let params = params.to_builder().queues(info.queues).build().unwrap();
        control.set_params(info.id, &params).unwrap();
        Self::open(control, info)
    }

    /// Another server's device, whose recovery begins.
    pub(crate) fn take_over(id: u32) -> Self {
        let control = Control::open().unwrap();
        eventually("the recovery begins", || control.start_user_recovery(id).is_ok());
        let info = control.get_dev_info(id).unwrap();
        Self::open(control, info)
    }

    fn open(control: Control, info: DeviceInfo) -> Self {
        let path = format!("/dev/ublkc{}", info.id);
        let mut file = None;
        eventually("the node opens", || {
            file = OpenOptions::new().read(true).write(true).open(&path).ok();
            file.is_some()
        });
        Raw { control, info, file: file.unwrap() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.info.id
    }

    pub(crate) fn disk(&self) -> std::path::PathBuf {
        format!("/dev/ublkb{}", self.info.id).into()
    }
}

/// Descriptors as the kernel maps them.
pub(crate) struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: memory that only the kernel writes, read with volatile loads.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(file: &File, protection: i32, offset: u64, len: usize) -> Result<Self, i32> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
        }
        Ok(Mapping { start, len })
    }

    pub(crate) fn descriptor(&self, tag: u16) -> uapi::ublksrv_io_desc {
        assert!((usize::from(tag) + 1) * 24 <= self.len);
        // SAFETY: inside of the mapping; 24 is a multiple of the struct's alignment.
        unsafe { self.start.cast::<uapi::ublksrv_io_desc>().add(usize::from(tag)).read_volatile() }
    }

    /// Tries to make it writable.
    pub(crate) fn protect(&self, protection: i32) -> Result<(), i32> {
        // SAFETY: our own mapping.
        match unsafe { libc::mprotect(self.start, self.len, protection) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// Where the driver puts the descriptors of a queue: 4096 of them apart, whatever the depth.
pub(crate) fn offset_of(queue: u16) -> u64 {
    u64::from(queue) * (4096 * 24)
}

pub(crate) fn length_for(depth: u16) -> usize {
    (usize::from(depth) * 24).next_multiple_of(4096)
}

/// One queue, served by the thread that makes it.
pub(crate) struct Queue {
    pub(crate) ring: IoUring,
    pub(crate) style: Style,
    fd: i32,
    number: u16,
    pub(crate) depth: u16,
    descriptors: Mapping,
    pub(crate) buffers: Vec<Aligned>,
    /// Results with which the tags came home.
    pub(crate) home: Vec<i32>,
}

impl Queue {
    pub(crate) fn new(raw: &Raw, number: u16, style: Style) -> Self {
        let depth = raw.info.queue_depth;
        let at = offset_of(number);
        let buffer = raw.info.max_io_bytes as usize;
        Queue {
            ring: IoUring::new(u32::from(depth).next_power_of_two()).unwrap(),
            style,
            fd: raw.file.as_raw_fd(),
            number,
            depth,
            descriptors: Mapping::new(&raw.file, libc::PROT_READ, at, length_for(depth)).unwrap(),
            buffers: (0..depth).map(|_| Aligned::new(buffer)).collect(),
            home: Vec::new(),
        }
    }

    /// The SQE, byte by byte.
    pub(crate) fn entry(&self, cmd_op: u32, tag: u16, result: i32) -> squeue::Entry {
        let mut sqe = [0u8; 64];
        sqe[0] = 46; // IORING_OP_URING_CMD
        sqe[4..8].copy_from_slice(&self.fd.to_ne_bytes());
        sqe[8..12].copy_from_slice(&cmd_op.to_ne_bytes());
        sqe[24..28].copy_from_slice(&self.style.len.to_ne_bytes());
        sqe[32..40].copy_from_slice(&(self.style.user_data)(tag).to_ne_bytes());
        // struct ublksrv_io_cmd
        sqe[48..50].copy_from_slice(&self.number.to_ne_bytes());
        sqe[50..52].copy_from_slice(&tag.to_ne_bytes());
        sqe[52..56].copy_from_slice(&result.to_ne_bytes());
        let address = match self.style.addresses {
            true => self.buffers[usize::from(tag)].as_ptr() as u64,
            false => 0,
        };
        sqe[56..64].copy_from_slice(&address.to_ne_bytes());
        // SAFETY: an entry is the kernel's 64-byte struct of integers, and any bytes are one.
        unsafe { std::mem::transmute::<[u8; 64], squeue::Entry>(sqe) }
    }

    pub(crate) fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the commands point to lives as long as the queue, which its thread keeps until
        // every tag is home.
        unsafe { self.ring.submission().push(entry) }.unwrap();
        self.ring.submit().unwrap();
    }

    pub(crate) fn fetch(&mut self, tag: u16) {
        let entry = self.entry(self.style.fetch, tag, -1);
        self.push(&entry);
    }

    pub(crate) fn fetch_all(&mut self) {
        for tag in 0..self.depth {
            self.fetch(tag);
        }
    }

    pub(crate) fn commit(&mut self, tag: u16, result: i32) {
        let entry = self.entry(self.style.commit, tag, result);
        self.push(&entry);
    }

    pub(crate) fn descriptor(&self, tag: u16) -> uapi::ublksrv_io_desc {
        self.descriptors.descriptor(tag)
    }

    /// The next completion.
    pub(crate) fn next(&mut self) -> (u64, i32) {
        let end = Instant::now() + patience();
        loop {
            if let Some(cqe) = self.ring.completion().next() {
                return (cqe.user_data(), cqe.result());
            }
            assert!(Instant::now() < end, "no completion in time");
            let step = types::Timespec::from(Duration::from_secs(1));
            let args = types::SubmitArgs::new().timespec(&step);
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
    }

    /// The tag of a completion.
    pub(crate) fn tag_of(&self, user_data: u64) -> u16 {
        (0..self.depth)
            .find(|tag| (self.style.user_data)(*tag) == user_data)
            .expect("the user_data that was given")
    }

    /// Serves until every tag is home. `answer` says what is committed; `None` if it did that itself.
    pub(crate) fn serve(
        mut self,
        mut answer: impl FnMut(&mut Queue, u16, uapi::ublksrv_io_desc) -> Option<i32>,
    ) -> Vec<i32> {
        while self.home.len() < usize::from(self.depth) {
            let (user_data, result) = self.next();
            let tag = self.tag_of(user_data);
            if result == 0 {
                let descriptor = self.descriptor(tag);
                if let Some(result) = answer(&mut self, tag, descriptor) {
                    self.commit(tag, result);
                }
            } else {
                self.home.push(result);
            }
        }
        std::mem::take(&mut self.home)
    }
}

/// Answers everything: reads with bytes that say which sector they are.
pub(crate) fn sectors(queue: &mut Queue, tag: u16, d: uapi::ublksrv_io_desc) -> Option<i32> {
    let bytes = d.nr_sectors as usize * 512;
    if d.op_flags & 0xff == uapi::UBLK_IO_OP_READ {
        fill(&mut queue.buffers[usize::from(tag)][..bytes], d.start_sector);
    }
    Some(bytes as i32)
}

pub(crate) fn fill(buf: &mut [u8], first: u64) {
    for (i, word) in buf.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(first + i as u64 / 64).to_le_bytes());
    }
}
