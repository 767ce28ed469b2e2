//! A process that serves a disk forks: the child has nothing of it, and cannot harm it.

mod disk;

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use disk::kernel::lacks;
use disk::{Client, Ram, SOON, bounded, devices, no_devices};
use ublk_core::control::{Control, Features, Wait};
use ublk_core::{
    Builder, Capabilities, DataPath, Device, Errno, ErrorKind, QueueContext, Request, Running,
    SharedBuffer, Workers,
};

const MIB: u64 = 1 << 20;

fn ram() -> Running {
    Builder::new(MIB, Ram::new(1 << 20)).queues(2).queue_depth(8).start().unwrap()
}

/// Forks; the child runs `child` and ends with its answer as its status.
fn forked(child: impl FnOnce() -> i32) -> Child {
    // SAFETY: the child of this many-threaded process allocates, which glibc allows (its fork takes the
    // allocator's locks), and otherwise makes system calls and calls what is under test.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(99);
        // SAFETY: ends the child; the harness of the parent must not run here.
        unsafe { libc::_exit(code) };
    }
    Child(pid)
}

struct Child(i32);

impl Child {
    fn status(&self) -> i32 {
        let pid = self.0;
        let status = bounded("the child ends", move || {
            let mut status = 0;
            // SAFETY: `status` is writable for the call.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            status
        });
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        libc::WEXITSTATUS(status)
    }

    fn end(&self) {
        // SAFETY: takes two integers; the process is our child, not waited for yet.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        let mut status = 0;
        // SAFETY: `status` is writable for the call.
        unsafe { libc::waitpid(self.0, &mut status, 0) };
    }
}

/// A pipe by which the child says that it runs.
fn pipe() -> (fs::File, fs::File) {
    use std::os::fd::FromRawFd;
    let mut fds = [0; 2];
    // SAFETY: the array is writable for two descriptors.
    assert_eq!(unsafe { libc::pipe(fds.as_mut_ptr()) }, 0);
    // SAFETY: both were made just now and belong to nobody else.
    unsafe { (fs::File::from_raw_fd(fds[0]), fs::File::from_raw_fd(fds[1])) }
}

fn works(disk: &Device) {
    let client = Client::open(disk.path());
    client.write(0, &[9; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [9; 4096]);
}

/// A code for the first descriptor of ours that this process has.
fn foreign_descriptor() -> i32 {
    for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        for (code, part) in [(11, "ublkc"), (12, "io_uring"), (13, "eventfd"), (14, "ublk-control")]
        {
            if target.contains(part) {
                return code;
            }
        }
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    if maps.lines().any(|l| l.contains("ublkc") || l.contains("io_uring")) {
        return 15;
    }
    0
}

#[test]
fn a_child_has_none_of_our_descriptors_and_mappings() {
    let disk = ram();
    assert_ne!(foreign_descriptor(), 0, "the parent has them");
    assert_eq!(forked(foreign_descriptor).status(), 0);
    works(&disk);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_childs_handles_refuse() {
    let disk = ram();
    let control = Control::open().unwrap();
    let workers = Workers::new(1).unwrap();
    let child = forked(|| {
        let pooled = Builder::new(MIB, Ram::new(1 << 20)).workers(&workers).start();
        let kinds = [
            pooled.unwrap_err().kind(),
            disk.handle().stop(SOON).unwrap_err().kind(),
            disk.handle().stop_force(SOON).unwrap_err().kind(),
            disk.wait().unwrap_err().kind(),
            disk.wait_timeout(SOON).unwrap_err().kind(),
            disk.state().unwrap_err().kind(),
            control.get_dev_info(disk.id()).unwrap_err().kind(),
            control.stop_dev(disk.id(), &Wait::for_(SOON)).unwrap_err().kind(),
            control.delete(disk.id(), &Wait::for_(SOON)).unwrap_err().kind(),
        ];
        i32::from(kinds.iter().any(|kind| *kind != ErrorKind::Forked))
    });
    assert_eq!(child.status(), 0);
    works(&disk);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_child_that_ends_with_or_without_destructors_does_not_touch_the_disk() {
    let mut disk = Some(ram());
    let mut control = Some(Control::open().unwrap());
    for destructors in [false, true] {
        let child = forked(|| {
            if destructors {
                drop(disk.take());
                drop(control.take());
            }
            0
        });
        assert_eq!(child.status(), 0);
        works(disk.as_ref().unwrap());
        assert_eq!(control.as_ref().unwrap().list().unwrap().len(), 1);
    }
    disk.take().unwrap().stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_device_that_was_added_before_a_fork_is_not_started_or_deleted_by_the_child() {
    let control = Control::open().unwrap();
    let mut added = Some(Builder::new(MIB, Ram::new(1 << 20)).add(&control).unwrap());
    let child = forked(|| drop_in_child(added.take()));
    assert_eq!(child.status(), 0);
    let child = forked(|| match added.take().unwrap().start() {
        Err(e) if e.kind() == ErrorKind::Forked => 0,
        _ => 1,
    });
    assert_eq!(child.status(), 0);
    let disk = added.take().unwrap().start().unwrap();
    works(&disk);
    disk.stop(SOON).unwrap();
    no_devices();
}

fn drop_in_child<T>(value: T) -> i32 {
    drop(value);
    0
}

#[test]
fn a_living_child_does_not_keep_the_device() {
    let disk = ram();
    let (reader, writer) = pipe();
    let child = forked(|| {
        // SAFETY: one byte that lives across the call.
        unsafe { libc::write(writer.as_raw_fd(), [1u8].as_ptr().cast(), 1) };
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    let mut byte = [0u8];
    // SAFETY: one writable byte.
    assert_eq!(unsafe { libc::read(reader.as_raw_fd(), byte.as_mut_ptr().cast(), 1) }, 1);
    works(&disk);
    let stopped = disk.stop(SOON).unwrap();
    assert!(stopped.leftovers.is_empty(), "{:?}", stopped.leftovers);
    assert!(devices().is_empty());
    child.end();
}

#[test]
fn a_child_sees_zeroes_in_a_requests_memory_and_its_completion_goes_nowhere() {
    let (sender, receiver) = mpsc::channel();
    let sender = Mutex::new(sender);
    let sender = Arc::new(sender);
    let disk = Builder::with_handlers(MIB, Capabilities::WRITE, move |_| {
        let sender = Arc::clone(&sender);
        move |request: Request, _: &mut QueueContext<'_>| {
            if request.offset() == 65536 && request.len() == 4096 {
                sender.lock().unwrap().send(request).unwrap();
            } else {
                let _ = request.complete(Ok::<(), Errno>(()));
            }
        }
    })
    .start()
    .unwrap();
    let client = Client::open(disk.path());
    let writer = std::thread::spawn(move || client.write_errno(65536, &[0x77; 4096]));
    let mut request = Some(receiver.recv_timeout(SOON).unwrap());
    assert_eq!(request.as_ref().unwrap().data(), &[0x77; 4096]);
    let child = forked(|| {
        let request = request.take().unwrap();
        let zero = request.data().iter().all(|b| *b == 0);
        // Whatever it says, the parent's request is not answered by it.
        let _ = request.complete(Err(Errno::ENOSPC));
        i32::from(!zero)
    });
    assert_eq!(child.status(), 0);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!writer.is_finished());
    let request = request.take().unwrap();
    assert_eq!(request.data(), &[0x77; 4096]);
    request.complete(Ok::<(), Errno>(())).unwrap();
    assert_eq!(bounded("the write", move || writer.join().unwrap()), 0);
    disk.stop(SOON).unwrap();
    no_devices();
}

/// The numbers of descriptors that were closed in the child are the next that it gets.
#[test]
fn what_a_child_does_with_an_inherited_request_does_not_reach_files_of_its_own() {
    for path in [DataPath::Copy, DataPath::UserCopy] {
        let (sender, receiver) = mpsc::channel();
        let disk = Builder::with_handlers(MIB, Capabilities::NONE, move |_| {
            let sender = sender.clone();
            move |request: Request, _: &mut QueueContext<'_>| match request.offset() {
                65536 => sender.send(request).unwrap(),
                _ => request.complete(Ok::<(), Errno>(())).unwrap(),
            }
        });
        let disk = disk.data_path(path).start().unwrap();
        let client = Client::open(disk.path());
        let reader = std::thread::spawn(move || client.read(65536, 4096));
        let mut request = Some(receiver.recv_timeout(SOON).unwrap());
        // The worker sleeps by now, so that whoever has an answer for it has to wake it.
        std::thread::sleep(Duration::from_millis(50));
        let child = forked(|| {
            let mut request = request.take().unwrap();
            let own: Vec<fs::File> = (0..64)
                // SAFETY: the name is a C string, and the descriptor is new.
                .map(|_| unsafe { fs::File::from_raw_fd(libc::memfd_create(c"own".as_ptr(), 0)) })
                .collect();
            request.put(0, &[7; 4096]);
            let _ = request.complete(Ok::<(), Errno>(()));
            i32::from(own.iter().any(|file| file.metadata().unwrap().len() != 0))
        });
        assert_eq!(child.status(), 0, "{path}");
        let mut request = request.take().unwrap();
        request.put(0, &[9; 4096]);
        request.complete(Ok::<(), Errno>(())).unwrap();
        assert_eq!(bounded("the read", move || reader.join().unwrap()).unwrap(), [9; 4096]);
        disk.stop(SOON).unwrap();
    }
    no_devices();
}

#[test]
fn a_child_makes_disks_of_its_own() {
    let disk = ram();
    let child = forked(|| {
        let own = ram();
        works(&own);
        let ok = own.id() != disk.id() && own.stop(SOON).is_ok();
        i32::from(!ok)
    });
    assert_eq!(child.status(), 0);
    works(&disk);
    disk.stop(SOON).unwrap();
    no_devices();
}

#[test]
fn a_child_shares_memory_that_it_has_mapped_itself() {
    if lacks(Features::SHMEM_ZC) {
        return;
    }
    let buffer = SharedBuffer::new(65536).unwrap();
    let child = forked(|| {
        let own = Builder::new(MIB, Ram::new(1 << 20)).require(Features::SHMEM_ZC).start().unwrap();
        let refused = own.share(&buffer).unwrap_err();
        let file = buffer.as_file().try_clone_to_owned().unwrap();
        let anew = SharedBuffer::from_memfd(file, false).unwrap();
        let ok = refused.kind() == ErrorKind::Forked
            && refused.to_string().contains("from_memfd")
            && own.share(&anew).is_ok_and(|number| number == 0)
            && own.stop(SOON).is_ok();
        i32::from(!ok)
    });
    assert_eq!(child.status(), 0);
    no_devices();
}

#[test]
fn forks_under_load_hurt_nobody() {
    let disk = ram();
    let clients: Vec<_> = (0..2u64)
        .map(|i| {
            let client = Client::open(disk.path());
            std::thread::spawn(move || {
                for n in 0..200u64 {
                    let byte = (n ^ i) as u8;
                    client.write(i * 65536, &[byte; 4096]).unwrap();
                    assert_eq!(client.read(i * 65536, 4096).unwrap(), [byte; 4096]);
                }
            })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(forked(|| 0).status(), 0);
    }
    clients.into_iter().for_each(|c| c.join().unwrap());
    disk.stop(SOON).unwrap();
    no_devices();
}
