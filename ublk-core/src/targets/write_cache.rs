//! A disk that loses what was not flushed when its power is cut.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache_pages::{Pages, SECTOR};
use super::random::Random;
use crate::backend::{Backend, Capabilities};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::request::RequestFlags;
use crate::worker::serve::write_all;

/// Another backend behind a volatile write cache, whose power can be cut: what was written since the last flush is lost
/// then, as on a disk that keeps its promises and not one more. For tests of what databases and file systems make of
/// a crash.
///
/// Writes stay in the cache, in memory, until a flush passes them on. A FUA write goes to the backend at once; so do
/// discards and writes of zeroes, which therefore survive. When the cache holds more than its
/// [capacity](Self::with_capacity), all of it is passed on early. Requests are served one at a time, and are of whole
/// sectors of 512 bytes, as a disk's are: others are `EINVAL`. Clones share the cache and the backend.
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::Builder;
/// use ublk_core::targets::{Mem, OnWorker, WriteCache};
///
/// # fn main() -> ublk_core::Result<()> {
/// let cache = WriteCache::new(Mem::new(1 << 30));
/// let power = cache.power();
/// let disk = Builder::new(1 << 30, cache).start()?;
/// // ... mkfs, mount, run the database for a while ...
/// let lost = power.cut();
/// println!("{} bytes were not durable", lost.lost);
/// // ... everything fails now: kill the database, unmount ...
/// power.restore();
/// // ... mount again, and see what the database says ...
/// disk.stop(Duration::from_secs(10))?;
/// # Ok(())
/// # }
/// ```
pub struct WriteCache<B>(Arc<Shared<B>>);

struct Shared<B> {
    backend: B,
    cache: Mutex<Cache>,
    capacity: u64,
}

#[derive(Default)]
struct Cache {
    pages: Pages,
    /// Whether requests fail.
    off: bool,
}

/// What a switch sees of a cache, whatever is behind it.
trait Powered: Send + Sync {
    fn lock(&self) -> MutexGuard<'_, Cache>;
    /// Passes on what is held. What fails stays held.
    fn pass_on(&self, pages: &mut Pages) -> io::Result<()>;
}

impl<B: Backend> Powered for Shared<B> {
    fn lock(&self) -> MutexGuard<'_, Cache> {
        // A backend that panics leaves at most sectors in the cache that it has already.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass_on(&self, pages: &mut Pages) -> io::Result<()> {
        while let Some((at, data)) = pages.first() {
            let len = data.len() as u64;
            write_all(data, |rest, done| {
                self.backend.write(rest, at + done, RequestFlags::default())
            })?;
            pages.forget(at, len);
        }
        Ok(())
    }
}

/// The switch of a [`WriteCache`]'s power, for any thread.
#[derive(Clone)]
pub struct Power(Arc<dyn Powered>);

/// What a power cut did to bytes that were written and not flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Lost {
    /// Bytes that are gone.
    pub lost: u64,
    /// Bytes that reached the backend all the same.
    pub survived: u64,
}

impl<B: Backend> WriteCache<B> {
    /// `backend` behind a cache of 256 MiB.
    pub fn new(backend: B) -> Self {
        Self::with_capacity(backend, 256 << 20)
    }

    /// `backend` behind a cache of `bytes` bytes.
    pub fn with_capacity(backend: B, bytes: u64) -> Self {
        WriteCache(Arc::new(Shared { backend, cache: Mutex::default(), capacity: bytes }))
    }

    /// The switch.
    pub fn power(&self) -> Power {
        Power(Arc::clone(&self.0) as Arc<dyn Powered>)
    }

    /// What is behind the cache: what would be there after a power cut.
    pub fn inner(&self) -> &B {
        &self.0.backend
    }

    /// The cache, for a request of whole sectors, which is what it remembers.
    fn on(&self, offset: u64, len: u64) -> io::Result<MutexGuard<'_, Cache>> {
        if !(offset | len).is_multiple_of(SECTOR) {
            return Err(Errno::EINVAL.into());
        }
        let cache = self.0.lock();
        if cache.off { Err(Errno::EIO.into()) } else { Ok(cache) }
    }

    /// Has the backend make durable what it has.
    fn settle(&self) -> io::Result<()> {
        match self.inner().capabilities().contains(Capabilities::FLUSH) {
            true => self.inner().flush(),
            false => Ok(()),
        }
    }
}

impl<B> Clone for WriteCache<B> {
    fn clone(&self) -> Self {
        WriteCache(Arc::clone(&self.0))
    }
}

impl Power {
    /// Cuts the power: everything that is not durable is lost, and requests fail with `EIO` until
    /// [`restore`](Self::restore). Once more when it is off does nothing.
    pub fn cut(&self) -> Lost {
        self.keep(|| false).0
    }

    /// Cuts; what `survives` is left to be passed on.
    fn keep(&self, survives: impl FnMut() -> bool) -> (Lost, Pages, MutexGuard<'_, Cache>) {
        let mut cache = self.0.lock();
        cache.off = true;
        let mut pages = std::mem::take(&mut cache.pages);
        let held = pages.bytes();
        pages.retain(survives);
        let survived = pages.bytes();
        (Lost { lost: held - survived, survived }, pages, cache)
    }

    /// As [`cut`](Self::cut), but each sector of 512 bytes that is not durable survives with a `probability` from 0 to
    /// 1, as on a disk that was writing its cache back, in whatever order: writes are torn, and later ones may be
    /// there without earlier ones. `seed` says which ones.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] for another probability; [`ErrorKind::Io`] if the backend does not take what
    /// survives: that is lost then.
    pub fn cut_some(&self, probability: f64, seed: u64) -> Result<Lost> {
        const ATTEMPT: &str = "cut the power of a disk";
        if !(0.0..=1.0).contains(&probability) {
            let why = format!("a probability is from 0 to 1, not {probability}");
            return Err(Error::new(ErrorKind::InvalidParameter, ATTEMPT).because(why));
        }
        let mut random = Random::new(seed, 0);
        let (lost, mut pages, _cache) = self.keep(|| random.below_one() < probability);
        self.0
            .pass_on(&mut pages)
            .map_err(|e| Error::new(ErrorKind::Io, ATTEMPT).with_source(e))?;
        Ok(lost)
    }

    /// Requests are served again, from what has survived. Clients have still cached what they read and wrote before.
    pub fn restore(&self) {
        self.0.lock().off = false;
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        !self.0.lock().off
    }

    /// Bytes that a cut would lose now.
    pub fn unflushed(&self) -> u64 {
        self.0.lock().pages.bytes()
    }
}

impl<B: Backend> Backend for WriteCache<B> {
    fn capabilities(&self) -> Capabilities {
        let theirs = self.inner().capabilities();
        if !theirs.contains(Capabilities::WRITE) {
            return Capabilities::NONE;
        }
        let also = [Capabilities::DISCARD, Capabilities::WRITE_ZEROES];
        let also = also.into_iter().filter(|able| theirs.contains(*able));
        let own = Capabilities::WRITE | Capabilities::FLUSH | Capabilities::FUA;
        also.fold(own, |sum, able| sum | able)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let cache = self.on(offset, buf.len() as u64)?;
        let n = self.inner().read(buf, offset)?;
        // Of a part of a sector the rest is asked for again: leave it out.
        let n = if n < buf.len() { n / 512 * 512 } else { n };
        cache.pages.overlay(&mut buf[..n], offset);
        Ok(n)
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        let mut cache = self.on(offset, data.len() as u64)?;
        if flags.fua() {
            write_all(data, |rest, done| self.inner().write(rest, offset + done, flags))?;
            if !self.inner().capabilities().contains(Capabilities::FUA) {
                self.settle()?;
            }
            cache.pages.forget(offset, data.len() as u64);
            return Ok(data.len());
        }
        cache.pages.put(data, offset);
        if cache.pages.bytes() > self.0.capacity {
            self.0.pass_on(&mut cache.pages)?;
        }
        Ok(data.len())
    }

    fn flush(&self) -> io::Result<()> {
        let mut cache = self.on(0, 0)?;
        self.0.pass_on(&mut cache.pages)?;
        self.settle()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut cache = self.on(offset, len)?;
        self.inner().discard(offset, len)?;
        cache.pages.forget(offset, len);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        let mut cache = self.on(offset, len)?;
        self.inner().write_zeroes(offset, len, flags)?;
        if flags.fua() {
            self.settle()?;
        }
        cache.pages.forget(offset, len);
        Ok(())
    }
}

impl<B: fmt::Debug> fmt::Debug for WriteCache<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteCache")
            .field("backend", &self.0.backend)
            .field("capacity", &self.0.capacity)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Power")
            .field("is_on", &self.is_on())
            .field("unflushed", &self.unflushed())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Mem;
    use super::*;
    use crate::uapi::UBLK_IO_F_FUA;

    fn read(disk: &impl Backend, offset: u64) -> io::Result<u8> {
        let mut buf = [0; 512];
        assert_eq!(disk.read(&mut buf, offset)?, 512);
        assert_eq!(buf, [buf[0]; 512]);
        Ok(buf[0])
    }

    fn write(disk: &impl Backend, offset: u64, byte: u8) {
        assert_eq!(disk.write(&[byte; 512], offset, RequestFlags::default()).unwrap(), 512);
    }

    #[test]
    fn parts_of_sectors_are_refused() {
        let cache = WriteCache::new(Mem::new(1 << 20));
        let refused = |done: io::Result<()>| {
            assert_eq!(done.unwrap_err().raw_os_error(), Some(Errno::EINVAL.raw()));
        };
        for (offset, len) in [(1, 512), (512, 4), (256, 256)] {
            refused(cache.read(&mut vec![0; len], offset).map(drop));
            refused(cache.write(&vec![1; len], offset, RequestFlags::default()).map(drop));
            refused(cache.discard(offset, len as u64));
            refused(cache.write_zeroes(offset, len as u64, RequestFlags::default()));
        }
        assert_eq!(cache.power().unflushed(), 0);
    }

    #[test]
    fn what_was_flushed_survives_and_nothing_else() {
        let cache = WriteCache::new(Mem::new(1 << 20));
        let power = cache.power();
        write(&cache, 0, 1);
        write(&cache, 4096, 1);
        cache.flush().unwrap();
        write(&cache, 0, 2);
        cache.write(&[3; 512], 512, RequestFlags::from_uapi(UBLK_IO_F_FUA)).unwrap();
        write(&cache, 8192, 4);
        cache.write_zeroes(4096, 512, RequestFlags::default()).unwrap();
        let all = |cache: &WriteCache<Mem>| [0, 512, 4096, 8192].map(|at| read(cache, at).unwrap());
        assert_eq!((all(&cache), power.unflushed()), ([2, 3, 0, 4], 1024));
        assert_eq!(power.cut(), Lost { lost: 1024, survived: 0 });
        assert!(!power.is_on());
        let eio = |e: io::Error| assert_eq!(e.raw_os_error(), Some(libc::EIO));
        eio(read(&cache, 0).unwrap_err());
        eio(cache.flush().unwrap_err());
        eio(cache.write(&[9; 512], 0, RequestFlags::default()).unwrap_err());
        assert_eq!(power.cut(), Lost::default());
        power.restore();
        assert_eq!(all(&cache), [1, 3, 0, 0]);
    }

    #[test]
    fn a_write_before_a_fua_write_of_the_same_place_does_not_come_back() {
        let cache = WriteCache::new(Mem::new(1 << 20));
        write(&cache, 0, 1);
        cache.write(&[2; 512], 0, RequestFlags::from_uapi(UBLK_IO_F_FUA)).unwrap();
        assert_eq!(cache.power().unflushed(), 0);
        cache.flush().unwrap();
        assert_eq!(read(&cache, 0).unwrap(), 2);
    }

    #[test]
    fn some_survive_by_chance_the_same_for_the_same_seed() {
        let survivors = |probability, seed| {
            let cache = WriteCache::new(Mem::new(1 << 20));
            (0..1000).for_each(|i| write(&cache, i * 512, 7));
            let lost = cache.power().cut_some(probability, seed).unwrap();
            let there: Vec<_> =
                (0..1000).filter(|i| read(cache.inner(), i * 512).unwrap() == 7).collect();
            assert_eq!(
                (lost.survived, lost.lost + lost.survived),
                (there.len() as u64 * 512, 512_000)
            );
            there
        };
        let half = survivors(0.5, 1);
        assert!((400..600).contains(&half.len()), "{}", half.len());
        assert_eq!(survivors(0.5, 1), half);
        assert_ne!(survivors(0.5, 2), half);
        assert_eq!((survivors(0.0, 1).len(), survivors(1.0, 1).len()), (0, 1000));
        let cache = WriteCache::new(Mem::new(512));
        let e = cache.power().cut_some(f64::NAN, 1).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidParameter);
        assert!(cache.power().is_on());
    }

    #[test]
    fn a_full_cache_is_passed_on() {
        let cache = WriteCache::with_capacity(Mem::new(1 << 20), 1024);
        (0..3).for_each(|i| write(&cache, i * 512, 1));
        assert_eq!((cache.power().unflushed(), read(cache.inner(), 0).unwrap()), (0, 1));
    }
}
