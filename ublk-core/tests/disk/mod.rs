//! What suites that serve disks share: a client with direct I/O, a backend in memory, what a process
//! holds, children of this very binary, and waiting with a bound.
#![allow(dead_code, reason = "no suite uses all of it")]

pub(crate) mod cycle;
pub(crate) mod kernel;
pub(crate) mod node;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::RwLock;
use std::time::{Duration, Instant};

use ublk_core::{Backend, Capabilities, RequestFlags};

/// Long enough for anything that works, also in an emulated guest on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The same on a machine that is slower still, by the rig's word: it says 3 of an emulated processor.
pub(crate) fn patience() -> Duration {
    let scale = std::env::var("UBLK_TIMESCALE").ok().and_then(|scale| scale.parse::<f64>().ok());
    SOON.mul_f64((scale.unwrap_or(1.0) / 3.0).clamp(1.0, 20.0))
}

/// Longer than what is answered takes, and as short as can be for waiting it out.
pub(crate) fn impatience() -> Duration {
    patience() / 60
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + patience();
    while !holds() {
        assert!(Instant::now() < end, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs something that must not hang, on a thread of its own.
pub(crate) fn bounded<T: Send + 'static>(
    what: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = done.send(run());
    });
    match result.recv_timeout(patience()) {
        Ok(value) => {
            thread.join().unwrap();
            value
        }
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => panic!("{what}: panicked"),
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("{what}: not in time"),
    }
}

/// Has this thread run on one CPU only.
pub(crate) fn pin(cpu: u32) {
    let mut mask = [0u64; 16];
    mask[cpu as usize / 64] |= 1 << (cpu % 64);
    // SAFETY: the pointer is to `size_of_val(&mask)` readable bytes.
    let pinned = unsafe { libc::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr().cast()) };
    assert_eq!(pinned, 0);
}

/// Memory for direct I/O.
pub(crate) struct Aligned {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory, owned.
unsafe impl Send for Aligned {}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, 4096).unwrap();
        assert!(len > 0);
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
        Aligned { start, layout }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation is this long and was zeroed; shared with `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, unique with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

/// Somebody who uses the disk, past the page cache.
pub(crate) struct Client(pub(crate) File);

impl Client {
    pub(crate) fn open(path: &Path) -> Self {
        Self::try_open(path).unwrap()
    }

    pub(crate) fn try_open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_DIRECT;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map(Client)
    }

    pub(crate) fn reader(path: &Path) -> Self {
        Client(OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap())
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = Aligned::new(len);
        // SAFETY: the pointer is to `len` writable bytes.
        let n = unsafe {
            libc::pread(self.0.as_raw_fd(), buf.as_mut_ptr().cast(), len, offset as libc::off_t)
        };
        match n {
            n if n < 0 => Err(io::Error::last_os_error()),
            // The end of a disk that is gone: its capacity is 0.
            n if n as usize != len => Err(io::Error::from_raw_os_error(libc::ENODATA)),
            _ => Ok(buf.to_vec()),
        }
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<usize> {
        let mut buf = Aligned::new(data.len());
        buf.copy_from_slice(data);
        // SAFETY: the pointer is to that many readable bytes.
        let n = unsafe {
            libc::pwrite(self.0.as_raw_fd(), buf.as_ptr().cast(), buf.len(), offset as libc::off_t)
        };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }

    /// The errno of a read, 0 if it succeeds.
    pub(crate) fn read_errno(&self, offset: u64, len: usize) -> i32 {
        self.read(offset, len).map_or_else(|e| e.raw_os_error().unwrap(), |_| 0)
    }

    pub(crate) fn write_errno(&self, offset: u64, data: &[u8]) -> i32 {
        self.write(offset, data).map_or_else(|e| e.raw_os_error().unwrap(), |_| 0)
    }

    pub(crate) fn fsync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}

/// A disk in memory.
pub(crate) struct Ram(RwLock<Vec<u8>>);

impl Ram {
    pub(crate) fn new(size: usize) -> Self {
        Ram(RwLock::new(vec![0; size]))
    }
}

impl Backend for Ram {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        buf.copy_from_slice(&self.0.read().unwrap()[offset as usize..][..buf.len()]);
        Ok(buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
        self.0.write().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(data.len())
    }
}

/// What this process holds that a device could leave behind.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Held {
    pub(crate) threads: Vec<String>,
    pub(crate) files: Vec<String>,
    pub(crate) mappings: Vec<String>,
}

fn targets(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut all: Vec<_> = entries
        .filter_map(|e| Some(fs::read_link(e.ok()?.path()).ok()?.to_string_lossy().into_owned()))
        .filter(|t| !t.starts_with("/proc/"))
        .collect();
    all.sort();
    all
}

pub(crate) fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let mut names: Vec<_> = tasks
        .filter_map(|t| fs::read_to_string(t.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    names.sort();
    names
}

impl Held {
    pub(crate) fn now() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let ours = |l: &&str| l.contains("ublkc") || l.contains("io_uring");
        Held {
            threads: threads(),
            files: targets("/proc/self/fd"),
            mappings: maps
                .lines()
                .filter(ours)
                .map(|l| l.split_whitespace().skip(5).collect())
                .collect(),
        }
    }

    /// Waits until the process holds nothing that it did not hold before.
    pub(crate) fn is_again(&self) {
        let end = Instant::now() + patience();
        loop {
            let now = Held::now();
            let more = [
                more(&self.threads, &now.threads),
                more(&self.files, &now.files),
                more(&self.mappings, &now.mappings),
            ];
            if more.iter().all(Vec::is_empty) {
                return;
            }
            assert!(
                Instant::now() < end,
                "threads, files, mappings that were not there: {more:#?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn more(before: &[String], now: &[String]) -> Vec<String> {
    let mut before = before.to_vec();
    let mut more = now.to_vec();
    more.retain(|item| match before.iter().position(|b| b == item) {
        Some(at) => {
            before.remove(at);
            false
        }
        None => true,
    });
    more
}

/// Bytes of anonymous memory that is mapped for writing.
pub(crate) fn anonymous_bytes() -> u64 {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|l| l.split_whitespace().count() == 5 && l.contains(" rw-p "))
        .map(|l| {
            let (start, end) = l.split_whitespace().next().unwrap().split_once('-').unwrap();
            u64::from_str_radix(end, 16).unwrap() - u64::from_str_radix(start, 16).unwrap()
        })
        .sum()
}

/// Resident bytes of this process.
pub(crate) fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// The ids of the devices that the kernel has.
pub(crate) fn devices() -> Vec<u32> {
    let Ok(nodes) = fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let mut ids: Vec<u32> = nodes
        .filter_map(|n| n.ok()?.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

pub(crate) fn no_devices() {
    eventually("no device is left", || devices().is_empty());
}

/// This binary again, running one test of it as a program.
pub(crate) struct Server {
    pub(crate) child: Child,
    lines: Option<BufReader<std::process::ChildStdout>>,
}

const ROLE: &str = "UBLK_TEST_ROLE";

/// What this process is to be, if it is a child.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Tells the parent.
pub(crate) fn say(what: &str) {
    println!("\n@{what}");
}

/// A child never ends by itself.
pub(crate) fn idle() -> ! {
    loop {
        std::thread::park();
    }
}

impl Server {
    pub(crate) fn start(test: &str, role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = child.stdout.take().map(BufReader::new);
        Server { child, lines }
    }

    /// The rest of the next line that the child says with this word first.
    pub(crate) fn hear(&mut self, word: &str) -> String {
        let mut lines = self.lines.take().unwrap();
        let word = format!("@{word}");
        let (rest, lines) = bounded("the child says something", move || {
            loop {
                let mut line = String::new();
                assert!(lines.read_line(&mut line).unwrap() > 0, "the child ended before {word}");
                if let Some(rest) = line.strip_prefix(&word) {
                    return (rest.trim().to_owned(), lines);
                }
            }
        });
        self.lines = Some(lines);
        rest
    }

    /// Tells the child something, which it hears by [`order`].
    pub(crate) fn order(&mut self, order: u8) {
        self.child.stdin.as_mut().unwrap().write_all(&[order]).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let end = Instant::now() + patience();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the child does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // A child that is stuck in the kernel must not hang the test's own unwinding.
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// For a child: the next order of the parent.
pub(crate) fn order() -> char {
    let mut byte = [0];
    io::stdin().read_exact(&mut byte).expect("the parent has gone");
    char::from(byte[0])
}

/// For a child: the parent says when to go on.
pub(crate) fn go_ahead() {
    let mut byte = [0];
    let _ = io::stdin().read(&mut byte);
}
