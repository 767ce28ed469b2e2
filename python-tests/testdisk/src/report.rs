//! Answers to tests: JSON, one object a line.

use std::fs;
use std::io::Write;

use serde_json::{Value, json};
use ublk_core::{Device, DeviceStats, Error, OpStats, QueueStats};

/// Prints a line, whole, at once.
pub(crate) fn say(answer: &Value) {
    let mut out = std::io::stdout().lock();
    // A test that does not listen any more has ended.
    let _ = writeln!(out, "{answer}").and_then(|()| out.flush());
}

pub(crate) fn wrong(text: impl Into<String>) -> Value {
    json!({"error": {"kind": "Usage", "text": text.into(), "errno": null, "holders": []}})
}

pub(crate) fn error(e: &Error) -> Value {
    let holders: Vec<_> = e.holders().iter().map(ToString::to_string).collect();
    json!({"error": {
        "kind": format!("{:?}", e.kind()),
        "text": e.to_string(),
        "errno": e.errno().map(|e| e.raw()),
        "holders": holders,
    }})
}

pub(crate) fn device(device: &Device) -> Value {
    let info = device.info();
    let features: Vec<_> = device.features().iter().map(|f| f.to_string()).collect();
    json!({
        "id": device.id(),
        "path": device.path(),
        "queues": info.queues,
        "depth": info.queue_depth,
        "max_io": info.max_io_bytes,
        "features": features,
        "warnings": device.warnings(),
    })
}

fn op(stats: &OpStats) -> Value {
    json!({"completed": stats.completed, "bytes": stats.bytes, "errors": stats.errors})
}

fn queue(stats: &QueueStats) -> Value {
    json!({
        "read": op(&stats.read),
        "write": op(&stats.write),
        "flush": op(&stats.flush),
        "discard": op(&stats.discard),
        "write_zeroes": op(&stats.write_zeroes),
        "zone_append": op(&stats.zone_append),
        "zone_report": op(&stats.zone_report),
        "zone_action": op(&stats.zone_action),
        "in_flight": stats.in_flight,
        "oldest_ms": stats.oldest.map(|age| age.as_millis() as u64),
        "dropped": stats.dropped,
        "panics": stats.panics,
        "revoked": stats.revoked,
        "refused": stats.refused,
        "rejected": stats.rejected,
        "unregistered": stats.unregistered,
        "shared": stats.shared,
    })
}

pub(crate) fn stats(stats: &DeviceStats) -> Value {
    let mut report = queue(&stats.total());
    report["queues"] = stats.queues.iter().map(queue).collect();
    report["pool_panics"] = json!(stats.pool_panics);
    report["enters"] = json!(stats.enters);
    report
}

/// What this process has of everything that could leak.
pub(crate) fn process() -> Value {
    // What the allocator keeps of memory that was freed is no leak.
    // SAFETY: takes a number, and gives pages to the system in which nothing is allocated.
    unsafe { libc::malloc_trim(0) };
    let count = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let statm = text("/proc/self/statm");
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    let names: Vec<_> = fs::read_dir("/proc/self/task")
        .map(|tasks| tasks.flatten().map(|t| fs::read_to_string(t.path().join("comm"))).collect())
        .unwrap_or_default();
    let names: Vec<_> = names.into_iter().flatten().map(|n: String| n.trim().to_owned()).collect();
    let fds: Vec<_> = fs::read_dir("/proc/self/fd")
        .map(|fds| fds.flatten().filter_map(|f| fs::read_link(f.path()).ok()).collect())
        .unwrap_or_default();
    json!({
        "threads": count("/proc/self/task"),
        "thread_names": names,
        "fds": fds.len(),
        "fd_names": fds,
        "maps": text("/proc/self/maps").lines().count(),
        "rss_kib": pages * 4,
    })
}
