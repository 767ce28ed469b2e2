//! Where the bytes of a striped disk are: arithmetic alone.

use std::ops::Range;

/// Chunks dealt out to members in turn. Member `m` has chunks `m`, `m + members`, `m + 2 * members`, …, one
/// after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes; not 0.
    chunk: u64,
    /// Not 0.
    members: u64,
}

/// A part of a range of the disk that lies in one piece on one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) member: usize,
    /// Where on the member.
    pub(super) at: u64,
    /// Which bytes of the range.
    pub(super) range: Range<u64>,
}

/// All of a range of the disk that lies on one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) member: usize,
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Layout {
    pub(super) fn new(chunk: u64, members: usize) -> Self {
        assert!(chunk > 0 && members > 0, "checked by who opens a stripe");
        Layout { chunk, members: members as u64 }
    }

    /// Bytes of a chunk on each member. More than there can be is `None`.
    pub(super) fn stripe(self) -> Option<u64> {
        self.chunk.checked_mul(self.members)
    }

    /// The disk's bytes, if each member has `member` bytes: whole stripes.
    pub(super) fn size(self, member: u64) -> Option<u64> {
        (member / self.chunk).checked_mul(self.stripe()?)
    }

    /// Bytes of each member for a disk of at least `size` bytes.
    pub(super) fn member_size(self, size: u64) -> Option<u64> {
        size.div_ceil(self.stripe()?).checked_mul(self.chunk)
    }

    fn locate(self, offset: u64) -> (usize, u64) {
        let (chunk, within) = (offset / self.chunk, offset % self.chunk);
        ((chunk % self.members) as usize, chunk / self.members * self.chunk + within)
    }

    /// The pieces of a range, in its order.
    pub(super) fn pieces(self, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let (member, at) = self.locate(offset + done);
            let n = match self.members {
                // Its chunks are one after the other.
                1 => len,
                _ => (self.chunk - (offset + done) % self.chunk).min(len - done),
            };
            let range = done..done + n;
            done += n;
            Some(Piece { member, at, range })
        })
    }

    /// What a range comes to on each member that has some of it: one piece, because chunks that follow each other
    /// there are a stripe apart on the disk, and only the first and the last of a range can be cut.
    pub(super) fn shares(self, offset: u64, len: u64) -> Vec<Share> {
        if len == 0 {
            return Vec::new();
        }
        let end = offset + len;
        let chunks = (offset / self.chunk)..end.div_ceil(self.chunk);
        let firsts = chunks.clone().take(self.members as usize);
        let share = |first| {
            // The last chunk that is on the same member.
            let last = first + (chunks.end - 1 - first) / self.members * self.members;
            let (member, at) = self.locate(offset.max(first * self.chunk));
            let stop = self.locate(end.min((last + 1) * self.chunk) - 1).1 + 1;
            Share { member, at, len: stop - at }
        };
        firsts.map(share).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn chunks_are_dealt_out_in_turn() {
        let layout = Layout::new(10, 3);
        let found: Vec<_> = layout.pieces(5, 30).collect();
        let piece = |member, at, range| Piece { member, at, range };
        assert_eq!(
            found,
            [piece(0, 5, 0..5), piece(1, 0, 5..15), piece(2, 0, 15..25), piece(0, 10, 25..30)]
        );
        let share = |member, at, len| Share { member, at, len };
        assert_eq!(layout.shares(5, 30), [share(0, 5, 10), share(1, 0, 10), share(2, 0, 10)]);
        assert_eq!(layout.shares(12, 3), [share(1, 2, 3)]);
        assert_eq!(layout.shares(12, 0), []);
    }

    #[test]
    fn sizes_are_whole_stripes() {
        let layout = Layout::new(10, 3);
        assert_eq!((layout.size(29), layout.size(9)), (Some(60), Some(0)));
        assert_eq!((layout.member_size(60), layout.member_size(61)), (Some(20), Some(30)));
        let huge = Layout::new(1 << 40, 1 << 30);
        assert_eq!((huge.stripe(), huge.size(u64::MAX), huge.member_size(1)), (None, None, None));
        assert_eq!(Layout::new(3, 2).size(u64::MAX), None);
    }

    proptest! {
        /// Every byte has one place that no other has, and those of a member are in the disk's order, without gaps.
        #[test]
        fn every_byte_has_a_place_of_its_own(chunk in 1u64..40, members in 1usize..9, stripes in 1u64..6) {
            let layout = Layout::new(chunk, members);
            let size = layout.size(stripes * chunk).unwrap();
            prop_assert_eq!(size, stripes * chunk * members as u64);
            let mut next = vec![0; members];
            for offset in 0..size {
                let (member, at) = layout.locate(offset);
                prop_assert_eq!(at, next[member], "byte {} of member {}", offset, member);
                next[member] += 1;
            }
            prop_assert_eq!(next, vec![stripes * chunk; members]);
        }

        /// The pieces of a range are its bytes in order, each where the byte is, and no longer than a chunk.
        #[test]
        fn pieces_are_the_range(
            chunk in 1u64..40, members in 1usize..9, offset in 0u64..1000, len in 0u64..1000,
        ) {
            let layout = Layout::new(chunk, members);
            let mut done = 0;
            for piece in layout.pieces(offset, len) {
                prop_assert_eq!(piece.range.start, done);
                prop_assert!(piece.range.end > done);
                prop_assert!(members == 1 || piece.range.end - done <= chunk);
                for (i, byte) in piece.range.clone().enumerate() {
                    prop_assert_eq!(layout.locate(offset + byte), (piece.member, piece.at + i as u64));
                }
                done = piece.range.end;
            }
            prop_assert_eq!(done, len);
        }

        /// The shares of a range have the same bytes as its pieces, each member once.
        #[test]
        fn shares_are_the_pieces_put_together(
            chunk in 1u64..40, members in 1usize..9, offset in 0u64..1000, len in 0u64..1000,
        ) {
            let layout = Layout::new(chunk, members);
            let mut merged: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
            for piece in layout.pieces(offset, len) {
                let n = piece.range.end - piece.range.start;
                let (at, so_far) = merged.entry(piece.member).or_insert((piece.at, 0));
                prop_assert_eq!(*at + *so_far, piece.at, "contiguous on its member");
                *so_far += n;
            }
            let shares = layout.shares(offset, len);
            let found: BTreeMap<_, _> = shares.iter().map(|s| (s.member, (s.at, s.len))).collect();
            prop_assert_eq!(shares.len(), found.len(), "each member once");
            prop_assert_eq!(found, merged);
        }

        /// The same for sizes as they are in use, where only the borders can be looked at.
        #[test]
        fn large_disks_do_not_overflow(
            chunk in 1u64..1 << 30, members in 1usize..100, offset in 0u64..1 << 62, len in 1u64..1 << 25,
        ) {
            let layout = Layout::new(chunk, members);
            let sum: u64 = layout.shares(offset, len).iter().map(|s| s.len).sum();
            prop_assert_eq!(sum, len);
            let (member, at) = layout.locate(offset);
            let back = (at / chunk * members as u64 + member as u64) * chunk + at % chunk;
            prop_assert_eq!(back, offset);
        }
    }
}
