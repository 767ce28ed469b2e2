//! A disk over several files or block devices, by operations on the workers' rings.

use std::fmt;
use std::io;
use std::path::Path;

use super::file::File;
use super::join::join_all;
use super::stripe_layout::{Layout, Piece, Share};
use super::stripe_open::StripeOptions;
use crate::backend::{AsyncBackend, Capabilities};
use crate::device::Builder;
use crate::error::Result;
use crate::request::Request;
use crate::worker::ring::Ring;

/// Several files or block devices as one disk (RAID 0): chunks of a fixed size are dealt out to them in turn.
///
/// The disk's bytes `k * chunk..(k + 1) * chunk` are chunk `k / n` of member `k % n`, of `n` members. Nothing but the
/// disk's data is on the members, so who opens them again has to name the same ones in the same order, with the same
/// chunk size. There is no redundancy: what one member loses, the disk has lost.
///
/// * Its size is as many whole stripes (a chunk of each member) as all members have: that of the smallest member
///   times their number, rounded down. What is beyond stays unused.
/// * The parts of a request go to their members at the same time. The request is answered when all of them are done,
///   with the error of the first part that failed, if any did; the other parts are then written or not.
/// * A flush goes to every member. A discard or a write of zeroes is one operation on each member that it
///   concerns. Otherwise each member does as [`File`] does.
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::targets::Stripe;
///
/// # fn main() -> ublk_core::Result<()> {
/// let stripe = Stripe::options().chunk(64 << 10).open(["/dev/nvme0n1", "/dev/nvme1n1"])?;
/// let disk = stripe.builder().queues(4).start()?;
/// println!("{}", disk.path().display());
/// disk.stop(Duration::from_secs(10))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Stripe {
    members: Vec<File>,
    layout: Layout,
    chunk: u64,
    size: u64,
    block: u32,
    pub(super) fingerprint: u64,
}

impl Stripe {
    /// Opens the members for reading and writing through the page cache, with chunks of 512 KiB.
    ///
    /// # Errors
    ///
    /// As [`StripeOptions::open`].
    pub fn open<P: AsRef<Path>>(members: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::options().open(members)
    }

    /// Other ways to open them.
    pub fn options() -> StripeOptions {
        StripeOptions::default()
    }

    /// Everything has been checked.
    pub(super) fn new(
        members: Vec<File>,
        chunk: u64,
        size: u64,
        block: u32,
        fingerprint: u64,
    ) -> Self {
        let layout = Layout::new(chunk, members.len());
        Stripe { members, layout, chunk, size, block, fingerprint }
    }

    /// A device of the stripe: its size, and the logical block size that it was opened with. Chunk and stripe are
    /// told to clients as the best sizes of I/O where they are powers of two, and its
    /// [fingerprint](Builder::fingerprint) is that of the members, their order and the chunk size: a server that
    /// would put them together another way does not recover the disk.
    pub fn builder(self) -> Builder {
        let served = self.clone();
        self.describe(Builder::new_async(self.size, served))
    }

    /// The size and the blocks, on a builder of whoever serves the stripe.
    pub(super) fn describe(&self, builder: Builder) -> Builder {
        let hint = |bytes: Option<u64>| {
            let bytes = u32::try_from(bytes?).ok()?;
            (bytes.is_power_of_two() && bytes <= MOST_HINT).then_some(bytes)
        };
        let physical = self.block.max(4096);
        let mut builder = builder
            .logical_block_size(self.block)
            .physical_block_size(physical)
            .fingerprint(self.fingerprint);
        if let Some(chunk) = hint(Some(self.chunk)).filter(|chunk| *chunk >= physical) {
            builder = builder.io_min(chunk).io_opt(chunk);
            if let Some(stripe) = hint(self.layout.stripe()) {
                builder = builder.io_opt(stripe);
            }
        }
        builder
    }

    /// The size in bytes, as it was when the members were opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the disk's logical blocks.
    pub fn logical_block_size(&self) -> u32 {
        self.block
    }

    /// Bytes of a chunk.
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// The members, in their order.
    pub fn files(&self) -> &[File] {
        &self.members
    }

    /// Where a range of the disk lies: for each part of it that is in one piece on a member, the member's number, the
    /// byte there, and which bytes of the range. In the range's order.
    pub fn pieces_of(
        &self,
        offset: u64,
        len: u64,
    ) -> impl Iterator<Item = (usize, u64, std::ops::Range<u64>)> {
        self.layout.pieces(offset, len).map(|piece| (piece.member, piece.at, piece.range))
    }

    /// What a range of the disk comes to on each member that has some of it, which is one piece: the member's number,
    /// the byte there, and how many bytes.
    pub fn shares_of(&self, offset: u64, len: u64) -> impl Iterator<Item = (usize, u64, u64)> {
        let shares = self.layout.shares(offset, len);
        shares.into_iter().map(|share| (share.member, share.at, share.len))
    }

    /// How many members there are.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// The one piece of a request that lies within a chunk, as most do.
    fn single(&self, request: &Request) -> Option<(&File, Piece)> {
        let mut pieces = self.layout.pieces(request.offset(), request.len());
        let piece = pieces.next().filter(|piece| piece.range.end == request.len())?;
        Some((&self.members[piece.member], piece))
    }

    fn pieces(&self, request: &Request) -> impl Iterator<Item = (&File, Piece)> {
        let pieces = self.layout.pieces(request.offset(), request.len());
        pieces.map(|piece| (&self.members[piece.member], piece))
    }

    fn shares(&self, request: &Request) -> impl Iterator<Item = (&File, Share)> {
        let shares = self.layout.shares(request.offset(), request.len());
        shares.into_iter().map(|share| (&self.members[share.member], share))
    }
}

/// The largest hint that a device's parameters take.
const MOST_HINT: u32 = 256 << 20;

impl Piece {
    /// A request's data is at most 32 MiB.
    fn bytes(&self) -> std::ops::Range<usize> {
        self.range.start as usize..self.range.end as usize
    }
}

impl AsyncBackend for Stripe {
    fn capabilities(&self) -> Capabilities {
        // They are all opened the same way, and there is one.
        self.members[0].capabilities()
    }

    async fn read(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let request = &*request;
        if let Some((file, piece)) = self.single(request) {
            return file.read_part(ring, request, piece.bytes(), piece.at).await;
        }
        let pieces = self.pieces(request);
        join_all(pieces.map(|(file, piece)| async move {
            file.read_part(ring, request, piece.bytes(), piece.at).await
        }))
        .await
    }

    async fn write(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let request = &*request;
        if let Some((file, piece)) = self.single(request) {
            return file.write_part(ring, request, piece.bytes(), piece.at).await;
        }
        let pieces = self.pieces(request);
        join_all(pieces.map(|(file, piece)| async move {
            file.write_part(ring, request, piece.bytes(), piece.at).await
        }))
        .await
    }

    async fn flush(&self, ring: &Ring) -> io::Result<()> {
        join_all(self.members.iter().map(|file| file.sync(ring))).await
    }

    async fn discard(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let shares = self.shares(request);
        join_all(shares.map(|(file, share)| file.punch(ring, share.at, share.len))).await
    }

    async fn write_zeroes(&self, request: &mut Request, ring: &Ring) -> io::Result<()> {
        let flags = request.flags();
        let shares = self.shares(request);
        join_all(shares.map(|(file, share)| file.zero_part(ring, flags, share.at, share.len))).await
    }
}

impl fmt::Debug for Stripe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stripe")
            .field("members", &self.members)
            .field("chunk", &self.chunk)
            .field("size", &self.size)
            .field("logical_block_size", &self.block)
            .finish_non_exhaustive()
    }
}
