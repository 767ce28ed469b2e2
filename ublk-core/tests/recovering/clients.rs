//! Clients that write stamped blocks, one or several with a request, and know which stamps a read may find.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::disk::{Client, bounded, eventually};

const BLOCK: usize = 4096;
const BLOCKS: usize = 16;
/// Blocks of one request, in turn: up to 64 KiB.
const LENGTHS: [usize; 4] = [1, 3, 16, 7];

struct Shared {
    ended: AtomicBool,
    errors: AtomicU64,
    /// Requests of each client that were answered without an error.
    done: Vec<AtomicU64>,
}

/// Clients that go on across errors.
pub(crate) struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

fn block(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(BLOCK / 8)
}

fn stamp(data: &[u8]) -> u64 {
    let stamp = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert_eq!(data, block(stamp), "a block is torn");
    stamp
}

/// Where request `n` begins, and its length, in blocks.
fn extent(n: u64, step: u64) -> (usize, usize) {
    let len = LENGTHS[n as usize % LENGTHS.len()];
    ((n * step) as usize % (BLOCKS - len + 1), len)
}

impl Shared {
    fn run(&self, number: usize, client: &Client, start: u64) {
        // What was written to each block last, or may have been: a write that failed may have happened.
        let mut may: Vec<Vec<u64>> = vec![vec![0]; BLOCKS];
        let mut next = 1;
        while !self.ended.load(Ordering::Relaxed) {
            let (at, len) = extent(next, 5);
            // Distinct from every other client's.
            let written = next << 8 | number as u64;
            let write = client.write(start + (at * BLOCK) as u64, &block(written).repeat(len));
            next += 1;
            match &write {
                Ok(n) => {
                    assert_eq!(*n, len * BLOCK);
                    may[at..at + len].fill(vec![written]);
                }
                // Any part of it.
                Err(_) => may[at..at + len].iter_mut().for_each(|may| may.push(written)),
            }
            let (at, len) = extent(next, 7);
            let read = client.read(start + (at * BLOCK) as u64, len * BLOCK);
            if let Ok(data) = &read {
                for (data, may) in data.chunks(BLOCK).zip(&may[at..]) {
                    let found = stamp(data);
                    assert!(may.contains(&found), "{found:#x}, not {may:#x?}");
                }
            }
            for result in [write.map(drop), read.map(drop)] {
                match result {
                    Ok(()) => {
                        self.done[number].fetch_add(1, Ordering::Relaxed);
                    }
                    Err(e) => {
                        // The latter while there is no server and I/O is to fail.
                        let known = [Some(libc::EIO), Some(libc::EREMOTEIO)];
                        assert!(known.contains(&e.raw_os_error()), "{e}");
                        self.errors.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            }
        }
        // Nothing that was acknowledged is lost.
        for (at, may) in may.iter().enumerate() {
            let found = stamp(&client.read(start + (at * BLOCK) as u64, BLOCK).unwrap());
            assert!(may.contains(&found), "in the end {found:#x}, not {may:#x?}");
        }
    }
}

impl Clients {
    /// Starts `count` clients, each on `room` bytes of its own.
    pub(crate) fn start(disk: &Path, count: usize, room: u64) -> Self {
        assert!(room >= (BLOCKS * BLOCK) as u64);
        let shared = Arc::new(Shared {
            ended: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            done: (0..count).map(|_| AtomicU64::new(0)).collect(),
        });
        let threads = (0..count).map(|number| {
            let (shared, client) = (Arc::clone(&shared), Client::open(disk));
            let start = number as u64 * room / BLOCK as u64 * BLOCK as u64;
            std::thread::spawn(move || shared.run(number, &client, start))
        });
        Clients { threads: threads.collect(), shared }
    }

    /// Waits until each client has had so many requests more.
    pub(crate) fn advance(&self, requests: u64) {
        let now = || self.shared.done.iter().map(|d| d.load(Ordering::Relaxed)).collect::<Vec<_>>();
        let before = now();
        eventually("every client gets on", || {
            assert!(self.threads.iter().all(|t| !t.is_finished()), "a client has ended");
            now().iter().zip(&before).all(|(now, before)| *now >= before + requests)
        });
    }

    /// Ends the clients, which check everything once more. Returns the number of errors they saw.
    pub(crate) fn stop(self) -> u64 {
        self.shared.ended.store(true, Ordering::Relaxed);
        for thread in self.threads {
            bounded("a client's end", move || thread.join()).unwrap();
        }
        self.shared.errors.load(Ordering::Relaxed)
    }
}
