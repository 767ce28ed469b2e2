//! Clients' I/O from and to memory that they share with the server is not copied by the driver (Linux 7.1).
//!
//! `shared_memory SIZE_IN_BYTES` serves a disk in memory and prints its path and that of the memory; at the end of stdin
//! it says how many requests lay there, and stops the disk. `shared_memory DISK MEMORY` is a client: it maps the memory,
//! writes a block of the disk from it and reads the block back into it.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ublk_core::control::Features;
use ublk_core::targets::Mem;
use ublk_core::{Builder, Capabilities, Errno, Op, QueueContext, Request, SharedBuffer};

const BUFFER: usize = 1 << 20;
const BLOCK: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [size] => serve(size.parse()?),
        [disk, memory] => use_it(disk, memory),
        _ => Err("SIZE_IN_BYTES, or DISK MEMORY".into()),
    }
}

fn serve(size: u64) -> Result<(), Box<dyn Error>> {
    let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let (mem, counted) = (Mem::new(size), Arc::clone(&counts));
    let builder = Builder::with_handlers(size, Capabilities::WRITE, move |_queue| {
        let (mem, counts) = (mem.clone(), Arc::clone(&counted));
        move |mut request: Request, _: &mut QueueContext<'_>| {
            counts[usize::from(request.is_shared())].fetch_add(1, Ordering::Relaxed);
            let offset = request.offset();
            let done = match request.op() {
                Op::Read => mem.read_at(request.data_mut(), offset),
                Op::Write => mem.write_at(request.data(), offset),
                _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            };
            // Gone is nobody's loss: the client has had its answer.
            let _ = request.complete(done.map_err(|e| Errno::from(&e)));
        }
    });
    let disk = builder.require(Features::SHMEM_ZC).start()?;
    // Clients may be given the descriptor by a socket just as well.
    let buffer = SharedBuffer::new(BUFFER as u64)?;
    disk.share(&buffer)?;
    println!("{}", disk.path().display());
    println!("/proc/{}/fd/{}", std::process::id(), buffer.as_file().as_raw_fd());
    io::copy(&mut io::stdin(), &mut io::sink())?;
    disk.stop(Duration::from_secs(30))?;
    let [elsewhere, shared] = [0, 1].map(|i| counts[i].load(Ordering::Relaxed));
    println!("{shared} requests in shared memory, {elsewhere} elsewhere");
    Ok(())
}

fn use_it(disk: &str, memory: &str) -> Result<(), Box<dyn Error>> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let memory = OpenOptions::new().read(true).write(true).open(memory)?;
    let shared = Mapping::of(&memory)?;
    shared.fill(0xa5);
    // Direct I/O with this memory is what the driver recognises.
    transfer(
        |fd| {
            // SAFETY: the mapping has as many bytes.
            unsafe { libc::pwrite(fd, shared.0, BLOCK, 0) }
        },
        &disk,
    )?;
    shared.fill(0);
    transfer(
        |fd| {
            // SAFETY: the mapping has as many bytes, which nobody else looks at.
            unsafe { libc::pread(fd, shared.0, BLOCK, 0) }
        },
        &disk,
    )?;
    println!("{:#x}", shared.first());
    Ok(())
}

fn transfer(call: impl Fn(i32) -> isize, disk: &File) -> io::Result<()> {
    match call(disk.as_raw_fd()) {
        n if n == BLOCK as isize => Ok(()),
        n if n < 0 => Err(io::Error::last_os_error()),
        n => Err(io::Error::other(format!("{n} bytes of {BLOCK}"))),
    }
}

/// The memory as this process sees it. Others change it, so there is no slice of it.
struct Mapping(*mut libc::c_void);

impl Mapping {
    fn of(file: &impl std::os::fd::AsFd) -> io::Result<Self> {
        let fd: BorrowedFd<'_> = file.as_fd();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), BUFFER, access, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        match at == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(Mapping(at)),
        }
    }

    fn fill(&self, byte: u8) {
        // SAFETY: within the mapping, which no reference is to.
        unsafe { ptr::write_bytes(self.0.cast::<u8>(), byte, BLOCK) }
    }

    fn first(&self) -> u8 {
        // SAFETY: within the mapping.
        unsafe { ptr::read_volatile(self.0.cast::<u8>()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `of`, and used no more.
        unsafe { libc::munmap(self.0, BUFFER) };
    }
}
