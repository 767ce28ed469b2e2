//! The states of a zoned disk's zones: what may be written where, and how many are open and active.
//!
//! The rules are those of the kernel's own emulation (`drivers/block/null_blk/zoned.c`) and of NVMe's zoned namespaces.
//! Nothing here knows of data: a range that was granted is the caller's to fill.

use std::ops::Range;

use crate::control::Zoned;
use crate::error::Errno;
use crate::zones::{Zone, ZoneKind, ZoneState};

#[derive(Clone, Copy)]
struct Entry {
    kind: ZoneKind,
    state: ZoneState,
    /// Bytes from the zone's start to the end of what was written.
    written: u64,
}

pub(super) struct Table {
    limits: Zoned,
    /// Of each sequential zone.
    capacity: u64,
    entries: Vec<Entry>,
    open: u32,
    active: u32,
}

impl Table {
    pub(super) fn new(limits: Zoned, zones: u32, conventional: u32, capacity: u64) -> Self {
        let entry = |index| match index < conventional {
            true => Entry {
                kind: ZoneKind::Conventional,
                state: ZoneState::NoWritePointer,
                written: limits.zone_bytes,
            },
            false => Entry { kind: ZoneKind::Sequential, state: ZoneState::Empty, written: 0 },
        };
        let entries = (0..zones).map(entry).collect();
        Table { limits, capacity, entries, open: 0, active: 0 }
    }

    fn index(&self, offset: u64) -> usize {
        (offset / self.limits.zone_bytes) as usize
    }

    /// The zone that holds a byte, if it has a write pointer.
    fn sequential(&self, offset: u64) -> Result<usize, Errno> {
        let index = self.index(offset);
        match self.entries.get(index) {
            Some(Entry { kind: ZoneKind::Sequential, .. }) => Ok(index),
            _ => Err(Errno::EIO),
        }
    }

    /// Moves a zone to another state and counts.
    fn set(&mut self, index: usize, state: ZoneState) {
        let old = std::mem::replace(&mut self.entries[index].state, state);
        self.open = self.open + u32::from(state.is_open()) - u32::from(old.is_open());
        self.active = self.active + u32::from(state.is_active()) - u32::from(old.is_active());
    }

    fn close_index(&mut self, index: usize) {
        let state = match self.entries[index].written {
            0 => ZoneState::Empty,
            _ => ZoneState::Closed,
        };
        self.set(index, state);
    }

    /// Opens a zone, as far as it is not.
    fn open_as(&mut self, index: usize, target: ZoneState) -> Result<(), Errno> {
        let state = self.entries[index].state;
        if state.is_open() {
            // An explicit opening remains one.
            if target == ZoneState::ExplicitlyOpen {
                self.set(index, target);
            }
            return Ok(());
        }
        if !matches!(state, ZoneState::Empty | ZoneState::Closed) {
            return Err(Errno::EIO);
        }
        let Zoned { max_open, max_active, .. } = self.limits;
        if !state.is_active() && max_active > 0 && self.active >= max_active {
            return Err(Errno::EOVERFLOW);
        }
        if max_open > 0 && self.open >= max_open {
            let implicit = |entry: &Entry| entry.state == ZoneState::ImplicitlyOpen;
            let victim = self.entries.iter().position(implicit).ok_or(Errno::ETOOMANYREFS)?;
            self.close_index(victim);
        }
        self.set(index, target);
        Ok(())
    }

    fn advance(&mut self, index: usize, len: u64) -> Result<(), Errno> {
        if self.entries[index].written + len > self.capacity || len == 0 {
            return Err(Errno::EIO);
        }
        self.open_as(index, ZoneState::ImplicitlyOpen)?;
        self.entries[index].written += len;
        if self.entries[index].written == self.capacity {
            self.set(index, ZoneState::Full);
        }
        Ok(())
    }

    /// A write of `len` bytes at `offset`, within the disk.
    pub(super) fn write(&mut self, offset: u64, len: u64) -> Result<(), Errno> {
        let index = self.index(offset);
        let inside = offset % self.limits.zone_bytes;
        let Some(entry) = self.entries.get(index) else { return Err(Errno::EIO) };
        // The kernel splits requests at the ends of zones.
        if inside + len > self.limits.zone_bytes {
            return Err(Errno::EIO);
        }
        match entry.kind {
            ZoneKind::Conventional => Ok(()),
            ZoneKind::Sequential if inside == entry.written => self.advance(index, len),
            ZoneKind::Sequential => Err(Errno::EIO),
        }
    }

    /// An append of `len` bytes to the zone that starts at `zone`. Where it goes.
    pub(super) fn append(&mut self, zone: u64, len: u64) -> Result<u64, Errno> {
        let index = self.sequential(zone)?;
        if !zone.is_multiple_of(self.limits.zone_bytes) {
            return Err(Errno::EIO);
        }
        let offset = zone + self.entries[index].written;
        self.advance(index, len)?;
        Ok(offset)
    }

    pub(super) fn open(&mut self, zone: u64) -> Result<(), Errno> {
        let index = self.sequential(zone)?;
        self.open_as(index, ZoneState::ExplicitlyOpen)
    }

    pub(super) fn close(&mut self, zone: u64) -> Result<(), Errno> {
        let index = self.sequential(zone)?;
        match self.entries[index].state {
            state if state.is_open() => self.close_index(index),
            ZoneState::Closed => {}
            _ => return Err(Errno::EIO),
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, zone: u64) -> Result<(), Errno> {
        let index = self.sequential(zone)?;
        self.set(index, ZoneState::Full);
        Ok(())
    }

    /// Returns the range whose data is gone.
    pub(super) fn reset(&mut self, zone: u64) -> Result<Range<u64>, Errno> {
        let index = self.sequential(zone)?;
        let start = index as u64 * self.limits.zone_bytes;
        self.entries[index].written = 0;
        self.set(index, ZoneState::Empty);
        Ok(start..start + self.limits.zone_bytes)
    }

    /// Returns the range whose data is gone.
    pub(super) fn reset_all(&mut self) -> Range<u64> {
        let is_sequential = |entry: &Entry| entry.kind == ZoneKind::Sequential;
        let first = self.entries.iter().position(is_sequential).unwrap_or(self.entries.len());
        for index in first..self.entries.len() {
            self.entries[index].written = 0;
            self.set(index, ZoneState::Empty);
        }
        let zone = self.limits.zone_bytes;
        first as u64 * zone..self.entries.len() as u64 * zone
    }

    /// Of a range: how much of it there is data for, and how much of it is in its first zone.
    pub(super) fn readable(&self, offset: u64, len: u64) -> (u64, u64) {
        let inside = offset % self.limits.zone_bytes;
        let part = len.min(self.limits.zone_bytes - inside);
        let written = self.entries.get(self.index(offset)).map_or(0, |entry| entry.written);
        (written.saturating_sub(inside).min(part), part)
    }

    /// Up to `count` zones from the one that holds `offset` on.
    pub(super) fn report(&self, offset: u64, count: u32) -> Vec<Zone> {
        let first = self.index(offset).min(self.entries.len());
        let zones = self.entries[first..].iter().zip(first as u64..).take(count as usize);
        let zone = zones.map(|(entry, index)| {
            let len = self.limits.zone_bytes;
            let start = index * len;
            Zone {
                start,
                len,
                capacity: match entry.kind {
                    ZoneKind::Conventional => len,
                    ZoneKind::Sequential => self.capacity,
                },
                write_pointer: match entry.state {
                    ZoneState::NoWritePointer | ZoneState::Full => start + len,
                    _ => start + entry.written,
                },
                kind: entry.kind,
                state: entry.state,
            }
        });
        zone.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ZONE: u64 = 65536;

    fn table(max_open: u32, max_active: u32) -> Table {
        let limits = Zoned { zone_bytes: ZONE, max_open, max_active, max_append_bytes: ZONE };
        Table::new(limits, 8, 2, ZONE / 2)
    }

    fn states(table: &Table) -> Vec<ZoneState> {
        table.report(0, 100).iter().map(|zone| zone.state).collect()
    }

    fn state(table: &Table, zone: u64) -> ZoneState {
        table.report(zone * ZONE, 1)[0].state
    }

    #[test]
    fn a_zone_goes_through_its_states() {
        use ZoneState::*;
        let mut t = table(0, 0);
        assert_eq!(states(&t)[..3], [NoWritePointer, NoWritePointer, Empty]);
        let z = 2 * ZONE;
        t.write(z, 4096).unwrap();
        assert_eq!(state(&t, 2), ImplicitlyOpen);
        t.open(z).unwrap();
        assert_eq!(state(&t, 2), ExplicitlyOpen);
        t.write(z + 4096, 4096).unwrap();
        assert_eq!(state(&t, 2), ExplicitlyOpen, "a write does not make it implicit");
        t.close(z).unwrap();
        t.close(z).unwrap();
        assert_eq!(state(&t, 2), Closed);
        assert_eq!(t.append(z, 4096), Ok(z + 8192));
        assert_eq!(state(&t, 2), ImplicitlyOpen);
        assert_eq!(t.append(z, ZONE / 2), Err(Errno::EIO), "more than there is room for");
        assert_eq!(t.append(z, ZONE / 2 - 12288), Ok(z + 12288));
        assert_eq!(state(&t, 2), Full);
        assert_eq!((t.open, t.active), (0, 0));
        for refused in [t.open(z), t.close(z), t.write(z + ZONE / 2, 512)] {
            assert_eq!(refused, Err(Errno::EIO));
        }
        t.finish(z).unwrap();
        assert_eq!(t.reset(z), Ok(z..z + ZONE));
        assert_eq!(state(&t, 2), Empty);
        t.open(z).unwrap();
        t.close(z).unwrap();
        assert_eq!(state(&t, 2), Empty, "nothing was written to it");
        assert_eq!(t.close(z), Err(Errno::EIO));
    }

    #[test]
    fn writes_go_to_the_write_pointer_and_conventional_zones_take_them_anywhere() {
        let mut t = table(0, 0);
        assert_eq!(t.write(2 * ZONE + 512, 512), Err(Errno::EIO));
        t.write(2 * ZONE, 512).unwrap();
        assert_eq!(t.write(2 * ZONE, 512), Err(Errno::EIO));
        assert_eq!(t.write(2 * ZONE + 512, 0), Err(Errno::EIO), "nothing is no write");
        t.write(ZONE + 1024, 512).unwrap();
        assert_eq!(t.write(2 * ZONE - 512, 1024), Err(Errno::EIO), "over the zone's end");
        for refused in [t.open(0), t.close(0), t.finish(0), t.reset(0).map(drop)] {
            assert_eq!(refused, Err(Errno::EIO), "a conventional zone has no states");
        }
        assert_eq!(t.append(0, 512), Err(Errno::EIO));
        assert_eq!(t.append(3 * ZONE + 512, 512), Err(Errno::EIO), "not a zone's start");
    }

    #[test]
    fn an_open_zone_too_many_closes_an_implicit_one_or_is_refused() {
        let mut t = table(2, 4);
        t.write(2 * ZONE, 512).unwrap();
        t.open(3 * ZONE).unwrap();
        t.open(4 * ZONE).unwrap();
        assert_eq!(state(&t, 2), ZoneState::Closed, "it made room");
        assert_eq!(t.write(5 * ZONE, 512), Err(Errno::ETOOMANYREFS));
        assert_eq!(state(&t, 5), ZoneState::Empty, "a refused write changes nothing");
        assert_eq!(t.open(2 * ZONE), Err(Errno::ETOOMANYREFS));
        t.finish(3 * ZONE).unwrap();
        t.write(5 * ZONE, 512).unwrap();
        t.close(4 * ZONE).unwrap();
        assert_eq!(t.active, 2, "the closed one was empty");
    }

    #[test]
    fn an_active_zone_too_many_is_refused() {
        let mut t = table(0, 2);
        t.write(2 * ZONE, 512).unwrap();
        t.close(2 * ZONE).unwrap();
        t.write(3 * ZONE, 512).unwrap();
        assert_eq!(t.append(4 * ZONE, 512), Err(Errno::EOVERFLOW));
        assert_eq!(t.open(4 * ZONE), Err(Errno::EOVERFLOW));
        t.write(2 * ZONE + 512, 512).unwrap();
        t.finish(2 * ZONE).unwrap();
        t.open(4 * ZONE).unwrap();
        assert_eq!(t.reset_all(), 2 * ZONE..8 * ZONE);
        assert_eq!((t.open, t.active), (0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]
        #[test]
        fn counts_and_limits_hold_whatever_is_done(
            steps in prop::collection::vec((0u64..8, 0u8..7, 1u64..40), 1..60)
        ) {
            let mut t = table(2, 3);
            for (zone, what, len) in steps {
                let start = zone * ZONE;
                let wp = t.report(start, 1)[0].write_pointer;
                let _ = match what {
                    0 => t.write(wp.min(start + ZONE - 512), len * 512),
                    1 => t.append(start, len * 512).map(drop),
                    2 => t.open(start),
                    3 => t.close(start),
                    4 => t.finish(start),
                    5 => t.reset(start).map(drop),
                    _ => t.write(start + 512 * len, 512),
                };
                let all = t.report(0, 8);
                let open = all.iter().filter(|z| z.state.is_open()).count();
                let active = all.iter().filter(|z| z.state.is_active()).count();
                prop_assert_eq!((open as u32, active as u32), (t.open, t.active));
                prop_assert!(open <= 2 && active <= 3);
                for zone in all {
                    if zone.state == ZoneState::Empty {
                        prop_assert_eq!(zone.write_pointer, zone.start);
                    }
                    if zone.state == ZoneState::Closed {
                        prop_assert!(zone.write_pointer > zone.start);
                        prop_assert!(zone.write_pointer < zone.start + zone.capacity);
                    }
                }
            }
        }
    }
}
