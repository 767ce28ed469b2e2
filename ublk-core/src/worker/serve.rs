//! From the traits that users implement to the one that workers call.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::ThreadId;

use super::turn::panic_text;
use crate::backend::{AsyncBackend, Backend, QueueContext, QueueHandler, Unanswered};
use crate::error::{Errno, Result};
use crate::request::{Op, Request};
use crate::sys::thread;
use crate::zones::Zone;

/// A blocking backend on the worker itself.
pub(crate) struct Inline<B>(pub(crate) Arc<B>);

impl<B: Backend> QueueHandler for Inline<B> {
    fn handle(&mut self, request: Request, _context: &mut QueueContext<'_>) {
        answer(&*self.0, request);
    }
}

/// Answers a request by blocking calls.
fn answer<B: Backend>(backend: &B, mut request: Request) {
    let (offset, len, flags) = (request.offset(), request.len(), request.flags());
    let result = match request.op() {
        Op::Read => read_all(backend, request.data_mut(), offset),
        Op::Write => {
            write_all(request.data(), |data, done| backend.write(data, offset + done, flags))
        }
        Op::Flush => backend.flush(),
        Op::Discard => backend.discard(offset, len),
        Op::WriteZeroes => backend.write_zeroes(offset, len, flags),
        Op::ZoneAppend => {
            let written = backend.append(request.data(), offset, flags);
            return answer_append(request, written);
        }
        Op::ReportZones => {
            let zones = backend.report_zones(offset, request.zones());
            return answer_report(request, zones);
        }
        op => match op.zone_action() {
            Some(action) => backend.zone_action(action, offset),
            None => Err(Errno::EOPNOTSUPP.into()),
        },
    };
    answer_with(request, result);
}

fn answer_with(request: Request, result: io::Result<()>) {
    // Gone: the client was answered by a stop in the meantime.
    let _ = match result {
        Err(e) if e.get_ref().is_some_and(|inner| inner.is::<Unanswered>()) => {
            drop(request);
            Ok(())
        }
        result => request.complete(result),
    };
}

fn answer_append(request: Request, written: io::Result<u64>) {
    let _ = match written {
        Ok(offset) => request.complete_append(offset),
        Err(e) => return answer_with(request, Err(e)),
    };
}

fn answer_report(request: Request, zones: io::Result<Vec<Zone>>) {
    let _ = match zones {
        Ok(zones) => request.complete_report(&zones),
        Err(e) => return answer_with(request, Err(e)),
    };
}

pub(crate) fn read_all<B: Backend>(
    backend: &B,
    mut buf: &mut [u8],
    mut offset: u64,
) -> io::Result<()> {
    while !buf.is_empty() {
        let n = advance(backend.read(buf, offset)?, buf.len())?;
        buf = &mut buf[n..];
        offset += n as u64;
    }
    Ok(())
}

pub(crate) fn write_all(
    mut data: &[u8],
    mut write: impl FnMut(&[u8], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while !data.is_empty() {
        let n = advance(write(data, done)?, data.len())?;
        data = &data[n..];
        done += n as u64;
    }
    Ok(())
}

/// What a backend says it transferred: nothing, or more than there was, is a failure.
fn advance(n: usize, asked: usize) -> io::Result<usize> {
    if n == 0 || n > asked { Err(Errno::EIO.into()) } else { Ok(n) }
}

/// A blocking backend behind a pool of threads.
pub(crate) struct Pooled(pub(crate) Arc<Pool>);

impl QueueHandler for Pooled {
    fn handle(&mut self, request: Request, _context: &mut QueueContext<'_>) {
        self.0.push(request);
    }
}

#[derive(Default)]
struct Backlog {
    requests: VecDeque<Request>,
    closed: bool,
}

/// Threads that answer the requests of one device. The backlog is bounded by the device's tags.
pub(crate) struct Pool {
    backlog: Mutex<Backlog>,
    arrived: Condvar,
    running: Mutex<usize>,
    threads: Mutex<Vec<ThreadId>>,
    ended: Condvar,
    panics: AtomicU64,
}

impl Pool {
    /// Starts the threads. They end when the pool is closed.
    pub(crate) fn start<B: Backend>(
        backend: Arc<B>,
        threads: usize,
        name: &str,
    ) -> Result<Arc<Self>> {
        let pool = Arc::new(Pool {
            backlog: Mutex::default(),
            arrived: Condvar::new(),
            running: Mutex::new(0),
            threads: Mutex::new(Vec::new()),
            ended: Condvar::new(),
            panics: AtomicU64::new(0),
        });
        for _ in 0..threads {
            *pool.running() += 1;
            let (this, backend) = (Arc::clone(&pool), Arc::clone(&backend));
            let spawned = thread::spawn(name.to_owned(), move || {
                // Where that is not permitted, the workers' own attempt has put it in the warnings.
                let _ = thread::set_io_flusher();
                this.serve(&*backend);
                // Before the device hears of it, so that nothing of the user's is alive then.
                let _ = catch_unwind(AssertUnwindSafe(|| drop(backend)));
                *this.running() -= 1;
                this.ended.notify_all();
            });
            match spawned {
                Ok(thread) => pool.threads().push(thread.thread().id()),
                Err(e) => {
                    *pool.running() -= 1;
                    pool.close();
                    return Err(e);
                }
            }
        }
        Ok(pool)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, usize> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<ThreadId>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a thread is one of the pool's.
    pub(crate) fn has_thread(&self, thread: ThreadId) -> bool {
        self.threads().contains(&thread)
    }

    fn push(&self, request: Request) {
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        if backlog.closed {
            drop(backlog);
            let _ = request.complete(Err(Errno::EIO));
            return;
        }
        backlog.requests.push_back(request);
        drop(backlog);
        self.arrived.notify_one();
    }

    fn serve<B: Backend>(&self, backend: &B) {
        loop {
            let request = {
                let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    if let Some(request) = backlog.requests.pop_front() {
                        break request;
                    }
                    if backlog.closed {
                        return;
                    }
                    backlog = self.arrived.wait(backlog).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let (device, queue, tag) = (request.device(), request.queue(), request.tag());
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| answer(backend, request))) {
                self.panics.fetch_add(1, Ordering::Relaxed);
                let text = panic_text(&*panic);
                tracing::error!(
                    device,
                    queue,
                    tag,
                    text,
                    "the backend panicked: the client gets EIO"
                );
            }
        }
    }

    /// Ends the threads once they have answered what is queued.
    pub(crate) fn close(&self) {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.arrived.notify_all();
    }

    /// Waits for the threads' end. Returns how many have not ended: they are stuck in the backend.
    pub(crate) fn wait(&self, deadline: std::time::Instant) -> usize {
        let mut running = self.running();
        while *running > 0 {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                break;
            }
            running =
                self.ended.wait_timeout(running, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *running
    }

    /// Panics of the backend on these threads.
    pub(crate) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }
}

/// An asynchronous backend: a task for each request.
pub(crate) struct Async<B>(pub(crate) Arc<B>);

impl<B: AsyncBackend> QueueHandler for Async<B> {
    fn handle(&mut self, mut request: Request, context: &mut QueueContext<'_>) {
        let backend = Arc::clone(&self.0);
        let ring = context.ring().clone();
        let offset = request.offset();
        context.spawn(async move {
            let result = match request.op() {
                Op::Read => backend.read(&mut request, &ring).await,
                Op::Write => backend.write(&mut request, &ring).await,
                Op::Flush => backend.flush(&ring).await,
                Op::Discard => backend.discard(&mut request, &ring).await,
                Op::WriteZeroes => backend.write_zeroes(&mut request, &ring).await,
                Op::ZoneAppend => {
                    let written = backend.append(&mut request, &ring).await;
                    return answer_append(request, written);
                }
                Op::ReportZones => {
                    let zones = backend.report_zones(offset, request.zones(), &ring).await;
                    return answer_report(request, zones);
                }
                op => match op.zone_action() {
                    Some(action) => backend.zone_action(action, offset, &ring).await,
                    None => Err(Errno::EOPNOTSUPP.into()),
                },
            };
            answer_with(request, result);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestFlags;

    /// Transfers at most three bytes at a time, and what it is told to at position 100.
    struct Short;

    impl Backend for Short {
        fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            match offset {
                100.. => Ok(0),
                50.. => Ok(buf.len() + 1),
                _ => {
                    let n = buf.len().min(3);
                    for (i, byte) in buf[..n].iter_mut().enumerate() {
                        *byte = offset as u8 + i as u8;
                    }
                    Ok(n)
                }
            }
        }

        fn write(&self, data: &[u8], _: u64, _: RequestFlags) -> io::Result<usize> {
            Ok(data.len().min(3))
        }
    }

    #[test]
    fn short_transfers_are_finished() {
        let mut buf = [0; 10];
        read_all(&Short, &mut buf, 5).unwrap();
        assert_eq!(buf, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
        let mut seen = Vec::new();
        write_all(&[0; 10], |data, done| {
            seen.push((data.len(), done));
            Short.write(data, done, RequestFlags::default())
        })
        .unwrap();
        assert_eq!(seen, [(10, 0), (7, 3), (4, 6), (1, 9)]);
    }

    #[test]
    fn nothing_and_too_much_are_eio() {
        for offset in [100, 50] {
            let e = read_all(&Short, &mut [0; 4], offset).unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::EIO));
        }
    }
}
