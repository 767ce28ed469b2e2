//! What a device has counted, as plain structs.

use std::ffi::c_int;

use ublk_core::{OpStats, QueueStats};

use crate::boundary::{entry, fill_sized, invalid};
use crate::device::{Device, ublk_rs_device};
use crate::error::ublk_rs_error;

/// One kind of operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ublk_rs_op_stats {
    /// Requests that ended, well or not.
    pub completed: u64,
    /// Bytes of those that ended well: data read, written or appended.
    pub bytes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
    /// Nanoseconds within which half of them ended, from their arrival at the server to their commit; 0 without any.
    pub p50_ns: u64,
    /// The same, for 99 of 100.
    pub p99_ns: u64,
    /// The same, for 999 of 1000.
    pub p999_ns: u64,
    /// The same, for all.
    pub max_ns: u64,
    /// 0.
    pub reserved: u64,
}

/// A queue, or all queues of a device together, since the start. Counting is always on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ublk_rs_stats {
    /// sizeof (struct ublk_rs_stats), set by the program.
    pub size: usize,
    /// Reads.
    pub read: ublk_rs_op_stats,
    /// Writes.
    pub write: ublk_rs_op_stats,
    /// Flushes.
    pub flush: ublk_rs_op_stats,
    /// Discards.
    pub discard: ublk_rs_op_stats,
    /// Writes of zeroes.
    pub write_zeroes: ublk_rs_op_stats,
    /// Appends to zones.
    pub zone_append: ublk_rs_op_stats,
    /// Reports of zones.
    pub zone_report: ublk_rs_op_stats,
    /// Zones that were opened, closed, finished or reset.
    pub zone_action: ublk_rs_op_stats,
    /// Requests that are with the backend now.
    pub in_flight: u64,
    /// Nanoseconds that the oldest of them has been there.
    pub oldest_ns: u64,
    /// Requests that were dropped without an answer.
    pub dropped: u64,
    /// Requests that a stop took from the program.
    pub revoked: u64,
    /// Requests that were refused because the device was ending.
    pub refused: u64,
    /// Commands that the kernel did not accept. Anything but 0 is a defect.
    pub rejected: u64,
    /// Requests whose pages the ring did not take, so that their data was copied.
    pub unregistered: u64,
    /// How often the workers entered the kernel; of the whole device only.
    pub enters: u64,
    /// How often another thread had to wake one of them to hand a result over; of the whole device only.
    pub wake_ups: u64,
    /// Requests whose data lay in memory that clients share.
    pub shared: u64,
}

/// All queues together.
pub const UBLK_RS_ALL_QUEUES: u32 = u32::MAX;

fn op(stats: &OpStats) -> ublk_rs_op_stats {
    let within = |q| {
        let time = stats.latency.quantile(q).unwrap_or_default();
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    };
    ublk_rs_op_stats {
        completed: stats.completed,
        bytes: stats.bytes,
        errors: stats.errors,
        p50_ns: within(0.5),
        p99_ns: within(0.99),
        p999_ns: within(0.999),
        max_ns: within(1.0),
        reserved: 0,
    }
}

fn plain(stats: &QueueStats, enters: u64, wake_ups: u64) -> ublk_rs_stats {
    let oldest = stats.oldest.unwrap_or_default();
    ublk_rs_stats {
        size: 0,
        read: op(&stats.read),
        write: op(&stats.write),
        flush: op(&stats.flush),
        discard: op(&stats.discard),
        write_zeroes: op(&stats.write_zeroes),
        zone_append: op(&stats.zone_append),
        zone_report: op(&stats.zone_report),
        zone_action: op(&stats.zone_action),
        in_flight: stats.in_flight.into(),
        oldest_ns: u64::try_from(oldest.as_nanos()).unwrap_or(u64::MAX),
        dropped: stats.dropped,
        revoked: stats.revoked,
        refused: stats.refused,
        rejected: stats.rejected,
        unregistered: stats.unregistered,
        enters,
        wake_ups,
        shared: stats.shared,
    }
}

/// Says what the device has counted since it was started, also after its end.
///
/// Never blocks. Any thread.
///
/// @param device  the device
/// @param queue   the queue; UBLK_RS_ALL_QUEUES
/// @param stats   where to, with its size set
/// @param error   NULL, or where to say what went wrong
/// @return 0; -EINVAL for a queue that is none, a size that is none, NULL; -EBADFD before the start
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ublk_rs_device_stats(
    device: *const ublk_rs_device,
    queue: u32,
    stats: *mut ublk_rs_stats,
    error: *mut ublk_rs_error,
) -> c_int {
    const ATTEMPT: &str = "read the device's statistics";
    entry(error, || {
        // SAFETY: the program's promise about its handle.
        let core = unsafe { Device::of(device, ATTEMPT) }?.core(ATTEMPT)?;
        let counted = core.stats();
        let value = match queue {
            UBLK_RS_ALL_QUEUES => plain(&counted.total(), counted.enters, counted.wake_ups),
            queue => match counted.queues.get(queue as usize) {
                Some(one) => plain(one, 0, 0),
                None => return Err(invalid(ATTEMPT, format!("there is no queue {queue}"))),
            },
        };
        // SAFETY: the program's promise about its struct, which begins with a size.
        unsafe { fill_sized(stats, value, ATTEMPT, "stats") }
    })
}
