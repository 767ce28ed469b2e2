//! A zoned disk in memory.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mem_chunks::Chunks;
use super::zoned_table::Table;
use crate::backend::{Backend, Capabilities};
use crate::control::Zoned;
use crate::device::Builder;
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::request::RequestFlags;
use crate::zones::{Zone, ZoneAction};

/// How a [`ZonedMem`] is made; what is not said has a default.
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct ZonedOptions {
    conventional: u32,
    capacity: Option<u64>,
    max_open: u32,
    max_active: u32,
    max_append: Option<u64>,
}

impl ZonedOptions {
    /// How many zones, the first ones of the disk, take writes anywhere. Default none.
    pub fn conventional(mut self, zones: u32) -> Self {
        self.conventional = zones;
        self
    }

    /// Bytes that each sequential zone holds: a multiple of 4096 up to the zone size, which is the default.
    pub fn zone_capacity(mut self, bytes: u64) -> Self {
        self.capacity = Some(bytes);
        self
    }

    /// Most open zones; 0, the default, for no limit.
    pub fn max_open(mut self, zones: u32) -> Self {
        self.max_open = zones;
        self
    }

    /// Most active zones; 0, the default, for no limit.
    pub fn max_active(mut self, zones: u32) -> Self {
        self.max_active = zones;
        self
    }

    /// Bytes of the largest append. Default 512 KiB, or a zone if that is less.
    pub fn max_append_bytes(mut self, bytes: u64) -> Self {
        self.max_append = Some(bytes);
        self
    }

    /// A disk of `size` bytes in zones of `zone_bytes`. It takes no memory for data yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] for sizes that do not fit together. What only concerns the kernel, for instance
    /// that the zone size is a power of two, is found when the device is made.
    pub fn create(self, size: u64, zone_bytes: u64) -> Result<ZonedMem> {
        let invalid = |cause: String| {
            Err(Error::new(ErrorKind::InvalidParameter, "make a zoned disk").because(cause))
        };
        if zone_bytes == 0 || size == 0 || !size.is_multiple_of(zone_bytes) {
            return invalid(format!("{size} bytes are not one or more zones of {zone_bytes}"));
        }
        let Ok(zones) = u32::try_from(size / zone_bytes) else {
            return invalid(format!("{} zones are more than 2^32", size / zone_bytes));
        };
        if self.conventional > zones {
            return invalid(format!("of {zones} zones not {} are conventional", self.conventional));
        }
        let capacity = self.capacity.unwrap_or(zone_bytes);
        if capacity == 0 || capacity > zone_bytes || !capacity.is_multiple_of(4096.min(zone_bytes))
        {
            return invalid(format!(
                "a zone of {zone_bytes} bytes holds a multiple of 4096 up to that, not {capacity}"
            ));
        }
        let zoned = Zoned {
            zone_bytes,
            max_open: self.max_open,
            max_active: self.max_active,
            max_append_bytes: self.max_append.unwrap_or((512 << 10).min(zone_bytes)),
        };
        let table = Table::new(zoned, zones, self.conventional, capacity);
        let inner = Inner { table: Mutex::new(table), chunks: Chunks::new(), zoned, size };
        Ok(ZonedMem(Arc::new(inner)))
    }
}

struct Inner {
    table: Mutex<Table>,
    chunks: Chunks,
    zoned: Zoned,
    size: u64,
}

/// A zoned disk in memory: zones that take writes at their write pointer only, with limits of open and active ones.
///
/// Conventional zones come first. Memory is taken as it is written, and given back when a zone is reset. What was not
/// written reads as zeroes. A write that needs an open zone too many closes one that was opened by a write; if there is
/// none it fails with `ETOOMANYREFS`, and with `EOVERFLOW` for one active zone too many, as the kernel's own zoned
/// disks do. A write elsewhere than at the write pointer is `EIO`.
///
/// Clones share the contents.
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::targets::ZonedMem;
///
/// # fn main() -> ublk_core::Result<()> {
/// // 64 zones of 4 MiB, of which the first two are conventional.
/// let mem = ZonedMem::options().conventional(2).max_open(8).create(256 << 20, 4 << 20)?;
/// let disk = mem.builder().start()?;
/// // ... blkzone report /dev/ublkb0 ...
/// disk.stop(Duration::from_secs(10))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ZonedMem(Arc<Inner>);

impl ZonedMem {
    /// How it is to be.
    pub fn options() -> ZonedOptions {
        ZonedOptions::default()
    }

    /// A device of these contents, of their size.
    pub fn builder(&self) -> Builder {
        Builder::new(self.0.size, self.clone()).zoned(self.0.zoned)
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Bytes of memory that the contents take at the moment.
    pub fn used(&self) -> u64 {
        self.0.chunks.used()
    }

    /// All zones as they are now.
    pub fn zones(&self) -> Vec<Zone> {
        self.table().report(0, u32::MAX)
    }

    // The table is in order whenever its lock is free: poison means nothing.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.0.size => Ok(()),
            _ => Err(Errno::EINVAL.into()),
        }
    }
}

impl Backend for ZonedMem {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::ZONED
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.check(offset, buf.len() as u64)?;
        // One zone at a time: the rest is asked for again.
        let (readable, part) = self.table().readable(offset, buf.len() as u64);
        let (data, beyond) = buf[..part as usize].split_at_mut(readable as usize);
        self.0.chunks.read(offset, data.len(), |at, piece| match piece {
            Ok(bytes) => data[at..][..bytes.len()].copy_from_slice(bytes),
            Err(hole) => data[at..][..hole].fill(0),
        });
        beyond.fill(0);
        Ok(part as usize)
    }

    fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
        self.check(offset, data.len() as u64)?;
        self.table().write(offset, data.len() as u64)?;
        // Where this fails, the write pointer has moved on over zeroes.
        self.0.chunks.write(data, offset)?;
        Ok(data.len())
    }

    fn append(&self, data: &[u8], zone: u64, _: RequestFlags) -> io::Result<u64> {
        self.check(zone, data.len() as u64)?;
        let offset = self.table().append(zone, data.len() as u64)?;
        self.0.chunks.write(data, offset)?;
        Ok(offset)
    }

    fn report_zones(&self, offset: u64, count: u32) -> io::Result<Vec<Zone>> {
        self.check(offset, 0)?;
        Ok(self.table().report(offset, count))
    }

    fn zone_action(&self, action: ZoneAction, zone: u64) -> io::Result<()> {
        self.check(zone, 0)?;
        let mut table = self.table();
        let (emptied, rest) = match action {
            ZoneAction::Open => (0..0, table.open(zone)),
            ZoneAction::Close => (0..0, table.close(zone)),
            ZoneAction::Finish => (0..0, table.finish(zone)),
            ZoneAction::Reset => {
                let range = table.reset(zone)?;
                (range, Ok(()))
            }
            ZoneAction::ResetAll => (table.reset_all(), Ok(())),
        };
        // Under the lock, so that nothing that is written afterwards is cleared.
        self.0.chunks.zero(emptied.start, emptied.end - emptied.start);
        Ok(rest?)
    }
}

impl fmt::Debug for ZonedMem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZonedMem")
            .field("size", &self.0.size)
            .field("zoned", &self.0.zoned)
            .field("used", &self.used())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn errno<T: fmt::Debug>(result: io::Result<T>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has neither madvise nor statx")]
    fn data_ends_at_the_write_pointer_and_a_reset_takes_it_away() {
        let mem = ZonedMem::options().create(1024 * KIB, 256 * KIB).unwrap();
        let flags = RequestFlags::default();
        assert_eq!(mem.append(&[7; 4096], 256 * KIB, flags).unwrap(), 256 * KIB);
        assert_eq!(mem.append(&[8; 4096], 256 * KIB, flags).unwrap(), 260 * KIB);
        assert_eq!(errno(mem.write(&[9; 512], 256 * KIB, flags)), Some(libc::EIO));
        assert_eq!(errno(mem.write(&[9; 512], 1024 * KIB, flags)), Some(libc::EINVAL));
        mem.write(&[9; 512], 264 * KIB, flags).unwrap();
        let mut buf = [1; 16384];
        assert_eq!(mem.read(&mut buf, 256 * KIB).unwrap(), 16384);
        assert_eq!((buf[0], buf[4096], buf[8192], buf[8704]), (7, 8, 9, 0));
        // A read over the end of a zone is short.
        assert_eq!(mem.read(&mut buf, 504 * KIB).unwrap(), 8 << 10);
        mem.zone_action(ZoneAction::Finish, 256 * KIB).unwrap();
        assert_eq!(mem.read(&mut buf, 256 * KIB).unwrap(), 16384);
        assert_eq!((buf[0], buf[8704]), (7, 0), "a finished zone keeps its data");
        mem.zone_action(ZoneAction::Reset, 256 * KIB).unwrap();
        mem.read(&mut buf, 256 * KIB).unwrap();
        assert!(buf.iter().all(|b| *b == 0));
        assert_eq!(mem.used(), 0);
    }

    #[test]
    fn what_a_zoned_disk_cannot_be_is_refused_before_the_kernel_is_asked() {
        use crate::control::Features;
        use crate::{DataPath, targets::Null};
        let mem = ZonedMem::options().create(8 << 20, 1 << 20).unwrap();
        let zoned = mem.0.zoned;
        let odd = ZonedMem::options().create(9 << 20, 3 << 20).unwrap();
        let many = ZonedMem::options().max_open(9).create(8 << 20, 1 << 20).unwrap();
        let more_open =
            ZonedMem::options().max_open(3).max_active(2).create(8 << 20, 1 << 20).unwrap();
        let append = ZonedMem::options().max_append_bytes(1000).create(8 << 20, 1 << 20).unwrap();
        for (builder, words) in [
            (mem.builder().read_only(true), "not read-only"),
            (mem.builder().data_path(DataPath::Copy), "use user-copy"),
            (mem.builder().data_path(DataPath::NeedGetData), "cannot move by need-get-data"),
            (Builder::new(8 << 20, mem.clone()), "Builder::zoned"),
            (Null::new().builder(8 << 20).zoned(zoned), "the capability ZONED"),
            (mem.builder().require(Features::ZONED), "asked for by Builder::zoned"),
            (Builder::new(9 << 19, mem.clone()).zoned(zoned), "multiple of the zone size"),
            (odd.builder(), "the zone size is a power of two"),
            (many.builder(), "of 8 zones not 9 can be open"),
            (more_open.builder(), "not 3 of 2 active zones"),
            (append.builder(), "the largest append is a multiple of"),
        ] {
            let e = builder.start().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidParameter, "{e}");
            assert!(e.to_string().contains(words), "{e}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_by_name() {
        let options = ZonedOptions::default;
        for (made, words) in [
            (options().create(100, 0), "not one or more zones"),
            (options().create(3 << 20, 2 << 20), "not one or more zones"),
            (options().conventional(3).create(2 << 20, 1 << 20), "not 3 are conventional"),
            (options().zone_capacity(5000).create(2 << 20, 1 << 20), "a multiple of 4096"),
            (options().zone_capacity(2 << 20).create(2 << 20, 1 << 20), "a multiple of 4096"),
        ] {
            let e = made.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidParameter);
            assert!(e.to_string().contains(words), "{e}");
        }
    }
}
