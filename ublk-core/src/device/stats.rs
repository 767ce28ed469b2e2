//! What a device counts, as snapshots.

use std::time::Duration;

use crate::request::Op;
use crate::sys::clock::Stamp;
use crate::worker::meter::{Latency, Meter};

/// One kind of operation of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpStats {
    /// Requests that ended, well or not.
    pub completed: u64,
    /// Bytes of those that ended well: data read, written or appended; 0 for the other operations.
    pub bytes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
    /// How long they took from their arrival at the server to their commit.
    pub latency: Latency,
}

impl OpStats {
    fn merge(&mut self, other: &OpStats) {
        self.completed += other.completed;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.latency.merge(&other.latency);
    }
}

/// One queue, or all queues of a device together, since the start.
///
/// Always on: a request costs a few stores on memory that its worker alone writes; the clock is read when a
/// turn of the worker brings requests and when it takes results back, not for each request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStats {
    /// Reads.
    pub read: OpStats,
    /// Writes.
    pub write: OpStats,
    /// Flushes.
    pub flush: OpStats,
    /// Discards.
    pub discard: OpStats,
    /// Writes of zeroes.
    pub write_zeroes: OpStats,
    /// Appends to zones.
    pub zone_append: OpStats,
    /// Reports of zones.
    pub zone_report: OpStats,
    /// Zones that were opened, closed, finished or reset.
    pub zone_action: OpStats,
    /// Requests that are with the backend now.
    pub in_flight: u32,
    /// How long the oldest of them has been there.
    pub oldest: Option<Duration>,
    /// Requests that were dropped without an answer, by a panic for instance.
    pub dropped: u64,
    /// Panics of the backend.
    pub panics: u64,
    /// Requests that a stop took from their holders.
    pub revoked: u64,
    /// Requests that were refused because the device was ending.
    pub refused: u64,
    /// Commands that the kernel did not accept. Anything but 0 is a defect.
    pub rejected: u64,
    /// Requests whose pages the ring did not take, so that their data was copied: of the data paths
    /// [`ZeroCopy`](crate::DataPath::ZeroCopy) and [`AutoBufReg`](crate::DataPath::AutoBufReg).
    pub unregistered: u64,
    /// Requests whose data lay in memory that clients [share](super::Device::share): what did not was copied.
    pub shared: u64,
}

impl QueueStats {
    /// From the numbers of queues and what their workers have counted, the workers of a queue next to each other.
    pub(crate) fn by_queue<'a>(
        meters: impl Iterator<Item = (u16, &'a Meter)>,
        now: Stamp,
    ) -> Vec<Self> {
        let mut all: Vec<(u16, Self)> = Vec::new();
        for (number, meter) in meters {
            let stats = Self::of(meter, now);
            match all.last_mut().filter(|(last, _)| *last == number) {
                Some((_, sum)) => sum.merge(&stats),
                None => all.push((number, stats)),
            }
        }
        all.into_iter().map(|(_, stats)| stats).collect()
    }

    fn of(meter: &Meter, now: Stamp) -> Self {
        let op = |op| {
            let m = meter.op(op);
            OpStats {
                completed: m.completed.get(),
                bytes: m.bytes.get(),
                errors: m.errors.get(),
                latency: m.latency(),
            }
        };
        let (in_flight, oldest) = meter.in_flight(now);
        QueueStats {
            read: op(Op::Read),
            write: op(Op::Write),
            flush: op(Op::Flush),
            discard: op(Op::Discard),
            write_zeroes: op(Op::WriteZeroes),
            zone_append: op(Op::ZoneAppend),
            zone_report: op(Op::ReportZones),
            zone_action: op(Op::ZoneOpen),
            in_flight,
            oldest,
            dropped: meter.dropped.get(),
            panics: meter.panics.get(),
            revoked: meter.revoked.get(),
            refused: meter.refused.get(),
            rejected: meter.rejected.get(),
            unregistered: meter.unregistered.get(),
            shared: meter.shared.get(),
        }
    }

    fn merge(&mut self, other: &QueueStats) {
        self.read.merge(&other.read);
        self.write.merge(&other.write);
        self.flush.merge(&other.flush);
        self.discard.merge(&other.discard);
        self.write_zeroes.merge(&other.write_zeroes);
        self.zone_append.merge(&other.zone_append);
        self.zone_report.merge(&other.zone_report);
        self.zone_action.merge(&other.zone_action);
        self.in_flight += other.in_flight;
        self.oldest = self.oldest.max(other.oldest);
        self.dropped += other.dropped;
        self.panics += other.panics;
        self.revoked += other.revoked;
        self.refused += other.refused;
        self.rejected += other.rejected;
        self.unregistered += other.unregistered;
        self.shared += other.shared;
    }

    /// Requests that ended, of every kind.
    pub fn completed(&self) -> u64 {
        let data = [&self.read, &self.write, &self.flush, &self.discard, &self.write_zeroes];
        let zones = [&self.zone_append, &self.zone_report, &self.zone_action];
        data.iter().chain(&zones).map(|op| op.completed).sum()
    }
}

/// A device's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceStats {
    /// One entry a queue.
    pub queues: Vec<QueueStats>,
    /// Panics of the backend on the threads of its pool, which belong to no queue.
    pub pool_panics: u64,
    /// How often the device's workers entered the kernel. Workers of a pool count for all their devices.
    pub enters: u64,
    /// How often another thread had to wake one of them to hand a result over.
    pub wake_ups: u64,
}

impl DeviceStats {
    /// The queues together.
    pub fn total(&self) -> QueueStats {
        let mut total = QueueStats::default();
        for queue in &self.queues {
            total.merge(queue);
        }
        total
    }
}
