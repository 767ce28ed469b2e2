//! What a write cache holds: sectors that were written and are not durable yet.

use std::collections::BTreeMap;
use std::ops::Range;

pub(super) const SECTOR: u64 = 512;
const SECTORS: u64 = 8;
const PAGE: usize = (SECTOR * SECTORS) as usize;

struct Page {
    data: Box<[u8; PAGE]>,
    /// A bit for each sector that is held.
    held: u8,
}

/// Sectors by their place on the disk. Offsets and lengths are multiples of [`SECTOR`].
#[derive(Default)]
pub(super) struct Pages {
    pages: BTreeMap<u64, Page>,
    sectors: u64,
}

/// The part of a range that lies in one page: the page, its sectors, and the bytes of the range.
struct Cut {
    page: u64,
    sectors: Range<u64>,
    bytes: Range<usize>,
}

impl Cut {
    fn mask(&self) -> u8 {
        let up_to = |n: u64| ((1u16 << n) - 1) as u8;
        up_to(self.sectors.end) & !up_to(self.sectors.start)
    }

    /// Where the sectors are in the page.
    fn within(&self) -> Range<usize> {
        (self.sectors.start * SECTOR) as usize..(self.sectors.end * SECTOR) as usize
    }
}

fn cuts(offset: u64, len: u64) -> impl Iterator<Item = Cut> {
    let (mut at, end) = (offset / SECTOR, (offset + len) / SECTOR);
    let start = at;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (page, first) = (at / SECTORS, at % SECTORS);
        let n = (SECTORS - first).min(end - at);
        let bytes = ((at - start) * SECTOR) as usize..((at + n - start) * SECTOR) as usize;
        at += n;
        Some(Cut { page, sectors: first..first + n, bytes })
    })
}

impl Pages {
    /// Bytes that are held.
    pub(super) fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    pub(super) fn put(&mut self, data: &[u8], offset: u64) {
        for cut in cuts(offset, data.len() as u64) {
            let page = self
                .pages
                .entry(cut.page)
                .or_insert_with(|| Page { data: Box::new([0; PAGE]), held: 0 });
            page.data[cut.within()].copy_from_slice(&data[cut.bytes.clone()]);
            self.sectors += u64::from((cut.mask() & !page.held).count_ones());
            page.held |= cut.mask();
        }
    }

    /// Lays what is held over `buf`, which is the disk at `offset`.
    pub(super) fn overlay(&self, buf: &mut [u8], offset: u64) {
        for cut in cuts(offset, buf.len() as u64) {
            let Some(page) = self.pages.get(&cut.page) else { continue };
            for (i, sector) in cut.sectors.clone().enumerate() {
                if page.held & 1 << sector != 0 {
                    let (to, from) = (cut.bytes.start + i * 512, (sector * SECTOR) as usize);
                    buf[to..to + 512].copy_from_slice(&page.data[from..from + 512]);
                }
            }
        }
    }

    /// Forgets what is held of a range, however long.
    pub(super) fn forget(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = offset + len - SECTOR;
        let whole = SECTOR * SECTORS;
        let there: Vec<_> =
            self.pages.range(offset / whole..=last / whole).map(|(page, _)| *page).collect();
        for number in there {
            let start = offset.max(number * whole);
            let end = (last + SECTOR).min((number + 1) * whole);
            let Some(cut) = cuts(start, end - start).next() else { continue };
            let Some(page) = self.pages.get_mut(&number) else { continue };
            self.sectors -= u64::from((cut.mask() & page.held).count_ones());
            page.held &= !cut.mask();
            if page.held == 0 {
                self.pages.remove(&number);
            }
        }
    }

    /// The first run of sectors that are held, and where it is.
    pub(super) fn first(&self) -> Option<(u64, &[u8])> {
        let (number, page) = self.pages.first_key_value()?;
        let start = page.held.trailing_zeros();
        let len = (page.held >> start).trailing_ones();
        let (start, len) = (start as usize * 512, len as usize * 512);
        Some((number * PAGE as u64 + start as u64, &page.data[start..start + len]))
    }

    /// Keeps each sector that `keep` is true for.
    pub(super) fn retain(&mut self, mut keep: impl FnMut() -> bool) {
        for page in self.pages.values_mut() {
            for sector in 0..SECTORS {
                let bit = 1 << sector;
                if page.held & bit != 0 && !keep() {
                    page.held &= !bit;
                    self.sectors -= 1;
                }
            }
        }
        self.pages.retain(|_, page| page.held != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: u64 = 40;

    #[derive(Clone, Debug)]
    enum Step {
        Put(u64, u64, u8),
        Forget(u64, u64),
        TakeFirst,
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..DISK).prop_flat_map(|at| (Just(at), 1..=DISK - at));
        prop_oneof![
            3 => (range.clone(), 1u8..).prop_map(|((at, n), byte)| Step::Put(at, n, byte)),
            2 => range.prop_map(|(at, n)| Step::Forget(at, n)),
            1 => Just(Step::TakeFirst),
        ]
    }

    proptest! {
        /// Against a table with a sector in each place.
        #[test]
        fn it_is_a_table_of_sectors(steps in prop::collection::vec(step(), 0..40)) {
            let (mut pages, mut model) = (Pages::default(), vec![None; DISK as usize]);
            for step in steps {
                match step {
                    Step::Put(at, n, byte) => {
                        pages.put(&vec![byte; (n * SECTOR) as usize], at * SECTOR);
                        model[at as usize..(at + n) as usize].fill(Some(byte));
                    }
                    Step::Forget(at, n) => {
                        pages.forget(at * SECTOR, n * SECTOR);
                        model[at as usize..(at + n) as usize].fill(None);
                    }
                    Step::TakeFirst => {
                        let first = pages.first().map(|(at, data)| (at, data.to_vec()));
                        let expected = model.iter().position(Option::is_some);
                        prop_assert_eq!(first.as_ref().map(|(at, _)| at / SECTOR), expected.map(|at| at as u64));
                        if let Some((at, data)) = first {
                            for (i, sector) in data.chunks(512).enumerate() {
                                let there = &mut model[(at / SECTOR) as usize + i];
                                prop_assert_eq!(Some(sector[0]), *there);
                                *there = None;
                            }
                            pages.forget(at, data.len() as u64);
                        }
                    }
                }
                let mut disk = vec![0; (DISK * SECTOR) as usize];
                pages.overlay(&mut disk, 0);
                let seen: Vec<_> = disk.chunks(512).map(|sector| sector[0]).collect();
                let expected: Vec<_> = model.iter().map(|byte| byte.unwrap_or(0)).collect();
                prop_assert_eq!(seen, expected);
                let held = model.iter().flatten().count() as u64;
                prop_assert_eq!(pages.bytes(), held * SECTOR);
            }
            let mut turn = 0;
            let before = pages.bytes() / SECTOR;
            pages.retain(|| { turn += 1; turn % 2 == 0 });
            prop_assert_eq!((turn, pages.bytes() / SECTOR), (before, before / 2));
        }
    }
}
