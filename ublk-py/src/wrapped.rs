//! The ready-made backends by calls on the caller's thread: for Python backends that wrap them, and for those of them that
//! are put behind one another.

use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ublk_core::targets as core;
use ublk_core::{AsyncBackend, Backend, Capabilities, Errno, RequestFlags};

/// A ready-made backend; clones are the same.
#[derive(Clone)]
pub(crate) enum Wrapped {
    Null,
    Mem(core::Mem),
    File(Arc<Plain>),
    Stripe(Arc<Members>),
    Fault(Arc<core::Fault<Wrapped>>),
    Cache(core::WriteCache<Arc<Wrapped>>),
}

/// A file's calls.
pub(crate) struct Plain {
    file: std::fs::File,
    /// Every write is durable when it returns, as is every change.
    syncs: bool,
    capabilities: Capabilities,
    size: u64,
    block: u32,
}

/// A stripe's.
pub(crate) struct Members {
    stripe: core::Stripe,
    files: Vec<Plain>,
}

impl Plain {
    fn new(file: &core::File) -> io::Result<Self> {
        // The other backends see requests by copies, never in place.
        let capabilities = file.capabilities().without(Capabilities::FIXED_BUFFERS);
        Ok(Plain {
            file: std::fs::File::from(file.as_fd().try_clone_to_owned()?),
            syncs: capabilities.contains(Capabilities::WRITE)
                && !capabilities.contains(Capabilities::FLUSH),
            capabilities,
            size: file.size(),
            block: file.logical_block_size(),
        })
    }

    /// The file's bytes, now; a block device's, too. Nothing uses the position that this moves.
    fn room(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        if flags.fua() { self.file.sync_data() } else { Ok(()) }
    }

    /// A hole is no write, and not covered by `O_DSYNC`.
    fn settle(&self, flags: RequestFlags) -> io::Result<()> {
        if self.syncs || flags.fua() { self.file.sync_data() } else { Ok(()) }
    }

    /// Gives a range back, which reads as zeroes then.
    fn punch(&self, offset: u64, count: u64) -> io::Result<()> {
        const MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let range = (libc::off_t::try_from(offset), libc::off_t::try_from(count));
        let (Ok(offset), Ok(count)) = range else { return Err(Errno::EINVAL.into()) };
        // SAFETY: the descriptor is open, and there are no pointers.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), MODE, offset, count) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn zero(&self, mut offset: u64, mut count: u64) -> io::Result<()> {
        match self.punch(offset, count) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            punched => return punched,
        }
        let mut zeroes = Aligned::new(64 << 10);
        while count > 0 {
            let part = count.min(64 << 10);
            // At most 64 KiB.
            self.file.write_all_at(&zeroes.data()[..part as usize], offset)?;
            (count, offset) = (count - part, offset + part);
        }
        Ok(())
    }
}

impl Members {
    /// Makes a call for each part of a range that lies on one member: the file, where on it, and which bytes of the range.
    fn each(
        &self,
        offset: u64,
        len: u64,
        mut call: impl FnMut(&Plain, u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(offset, len)?;
        for (member, at, range) in self.stripe.pieces_of(offset, len) {
            call(&self.files[member], at, range.start as usize..range.end as usize)?;
        }
        Ok(())
    }
}

impl Members {
    /// Whole stripes on the least of the members, now.
    fn room(&self) -> io::Result<u64> {
        let rooms = self.files.iter().map(Plain::room).collect::<io::Result<Vec<_>>>()?;
        let (least, count) = (rooms.iter().min().copied().unwrap_or(0), rooms.len() as u64);
        let chunk = self.stripe.chunk();
        Ok((least / chunk).saturating_mul(chunk.saturating_mul(count)))
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        // Its files may have grown since they were opened.
        match end <= self.stripe.size() || end <= self.room()? {
            true => Ok(()),
            false => Err(Errno::EINVAL.into()),
        }
    }

    /// The same for what each member has of a range, in one: chunks may be smaller than a file system's blocks.
    fn shares(
        &self,
        offset: u64,
        len: u64,
        mut call: impl FnMut(&Plain, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(offset, len)?;
        self.stripe
            .shares_of(offset, len)
            .try_for_each(|(member, at, len)| call(&self.files[member], at, len))
    }
}

impl Wrapped {
    pub(crate) fn file(file: &core::File) -> io::Result<Self> {
        Ok(Wrapped::File(Arc::new(Plain::new(file)?)))
    }

    pub(crate) fn stripe(stripe: core::Stripe) -> io::Result<Self> {
        let files = stripe.files().iter().map(Plain::new).collect::<io::Result<_>>()?;
        Ok(Wrapped::Stripe(Arc::new(Members { stripe, files })))
    }

    /// None of one that is as large as is wanted.
    pub(crate) fn size(&self) -> Option<u64> {
        match self {
            Wrapped::Null => None,
            Wrapped::Mem(mem) => Some(mem.size()),
            Wrapped::File(file) => Some(file.size),
            Wrapped::Stripe(members) => Some(members.stripe.size()),
            Wrapped::Fault(fault) => fault.inner().size(),
            Wrapped::Cache(cache) => cache.inner().size(),
        }
    }

    /// The most bytes that a disk of it can have by now, files having grown. None of one that is as large as is wanted.
    pub(crate) fn room(&self) -> io::Result<Option<u64>> {
        Ok(match self {
            Wrapped::Null => None,
            Wrapped::Mem(mem) => Some(mem.size()),
            Wrapped::File(file) => Some(file.room()?),
            Wrapped::Stripe(members) => Some(members.room()?),
            Wrapped::Fault(fault) => fault.inner().room()?,
            Wrapped::Cache(cache) => cache.inner().room()?,
        })
    }

    /// Whether files are read and written past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        let direct = |file: &Plain| {
            // SAFETY: the descriptor is open; the call takes no pointer.
            unsafe { libc::fcntl(file.file.as_raw_fd(), libc::F_GETFL) & libc::O_DIRECT != 0 }
        };
        match self {
            Wrapped::Null | Wrapped::Mem(_) => false,
            Wrapped::File(file) => direct(file),
            Wrapped::Stripe(members) => members.files.iter().any(direct),
            Wrapped::Fault(fault) => fault.inner().is_direct(),
            Wrapped::Cache(cache) => cache.inner().is_direct(),
        }
    }

    /// The least logical block.
    pub(crate) fn block(&self) -> u32 {
        match self {
            Wrapped::Null | Wrapped::Mem(_) => 512,
            Wrapped::File(file) => file.block,
            Wrapped::Stripe(members) => members.stripe.logical_block_size(),
            Wrapped::Fault(fault) => fault.inner().block(),
            Wrapped::Cache(cache) => cache.inner().block(),
        }
    }
}

/// A transfer is of the whole buffer, or an error.
fn whole(done: io::Result<()>, len: usize) -> io::Result<usize> {
    done.map(|()| len)
}

impl Backend for Wrapped {
    fn capabilities(&self) -> Capabilities {
        let all = Capabilities::WRITE | Capabilities::DISCARD | Capabilities::WRITE_ZEROES;
        match self {
            Wrapped::Null | Wrapped::Mem(_) => all,
            Wrapped::File(file) => file.capabilities,
            // They are all opened the same way.
            Wrapped::Stripe(members) => members.files[0].capabilities,
            Wrapped::Fault(fault) => fault.inner().capabilities(),
            Wrapped::Cache(cache) => cache.capabilities(),
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let len = buf.len();
        match self {
            Wrapped::Null => {
                buf.fill(0);
                Ok(len)
            }
            Wrapped::Mem(mem) => whole(mem.read_at(buf, offset), len),
            Wrapped::File(file) => whole(file.file.read_exact_at(buf, offset), len),
            Wrapped::Stripe(members) => {
                let read = |file: &Plain, at, range| file.file.read_exact_at(&mut buf[range], at);
                whole(members.each(offset, len as u64, read), len)
            }
            Wrapped::Fault(fault) => fault.read(buf, offset),
            Wrapped::Cache(cache) => cache.read(buf, offset),
        }
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        let len = data.len();
        match self {
            Wrapped::Null => Ok(len),
            Wrapped::Mem(mem) => whole(mem.write_at(data, offset), len),
            Wrapped::File(file) => whole(file.write(data, offset, flags), len),
            Wrapped::Stripe(members) => {
                let write = |file: &Plain, at, range: std::ops::Range<usize>| {
                    file.write(&data[range], at, flags)
                };
                whole(members.each(offset, len as u64, write), len)
            }
            Wrapped::Fault(fault) => fault.write(data, offset, flags),
            Wrapped::Cache(cache) => cache.write(data, offset, flags),
        }
    }

    fn flush(&self) -> io::Result<()> {
        match self {
            Wrapped::Null | Wrapped::Mem(_) => Ok(()),
            Wrapped::File(file) => file.file.sync_data(),
            Wrapped::Stripe(members) => members.files.iter().try_for_each(|f| f.file.sync_data()),
            Wrapped::Fault(fault) => fault.flush(),
            Wrapped::Cache(cache) => cache.flush(),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Wrapped::Null => Ok(()),
            Wrapped::Mem(mem) => mem.zero(offset, len),
            Wrapped::File(file) => file.punch(offset, len),
            Wrapped::Stripe(members) => {
                members.shares(offset, len, |file, at, len| file.punch(at, len))
            }
            Wrapped::Fault(fault) => fault.discard(offset, len),
            Wrapped::Cache(cache) => cache.discard(offset, len),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        match self {
            Wrapped::Null => Ok(()),
            Wrapped::Mem(mem) => mem.zero(offset, len),
            Wrapped::File(file) => {
                file.zero(offset, len)?;
                file.settle(flags)
            }
            Wrapped::Stripe(members) => members.shares(offset, len, |file, at, len| {
                file.zero(at, len)?;
                file.settle(flags)
            }),
            Wrapped::Fault(fault) => fault.write_zeroes(offset, len, flags),
            Wrapped::Cache(cache) => cache.write_zeroes(offset, len, flags),
        }
    }
}

/// Memory that direct I/O takes.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    len: usize,
}

impl Aligned {
    const ALIGNMENT: usize = 4096;

    pub(crate) fn new(len: usize) -> Self {
        Aligned { memory: vec![0; len + Self::ALIGNMENT], len }
    }

    pub(crate) fn data(&mut self) -> &mut [u8] {
        let start = self.memory.as_ptr().align_offset(Self::ALIGNMENT);
        &mut self.memory[start..][..self.len]
    }
}
