//! What a disk is to be, from `key=value` words.

use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;

use ublk_core::control::{Discard, Features};
use ublk_core::{Builder, Capabilities};

/// A disk's keys and values:
///
/// * `target=` `null`, `mem`, `file` (with `path=`, `direct=1`, `every_write=1`), `stripe` (the same, with `path=A,B,C` and
///   `chunk=` bytes), `fault` (`over=` one of these), `cache` (memory behind a
///   write cache, with faults), `test` ([`Faulty`](crate::faulty::Faulty), with `caps=WRITE,FLUSH`),
///   or `zoned` (with `zone=` bytes, `conventional=`, `zone_capacity=`, `max_open=`, `max_active=`)
/// * `via=` `own` (the target's own builder), `backend`, `async` or `handler`: the library's trait
/// * `count=`: how many such disks; `workers=`: of a pool that the disks of the process share
/// * `contents=NAME`: disks of one name share what they hold, also one after the other
/// * `hold_at=` `added` or `starting`: where the start stops until the next line on stdin
/// * and the builder's own, see [`tune`](Self::tune)
#[derive(Clone, Debug)]
pub(crate) struct Options(HashMap<String, String>);

const KEYS: &[&str] = &[
    "target",
    "via",
    "count",
    "workers",
    "contents",
    "hold_at",
    "over",
    "path",
    "chunk",
    "direct",
    "every_write",
    "caps",
    "size",
    "queues",
    "depth",
    "block",
    "max_io",
    "threads",
    "id",
    "read_only",
    "rotational",
    "discard",
    "require",
    "prefer",
    "forbid",
    "start_timeout_ms",
    "pin",
    "huge_pages",
    "populate",
    "data",
    "descriptor",
    "zone",
    "conventional",
    "zone_capacity",
    "max_open",
    "max_active",
    "lanes",
];

impl Options {
    pub(crate) fn parse(words: &str) -> Result<Self, String> {
        let mut options = HashMap::new();
        for word in words.split_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                return Err(format!("{word:?} is not key=value"));
            };
            if !KEYS.contains(&key) {
                return Err(format!("no key {key:?}"));
            }
            options.insert(key.to_owned(), value.to_owned());
        }
        Ok(Options(options))
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        debug_assert!(KEYS.contains(&key));
        self.0.get(key).map(String::as_str)
    }

    pub(crate) fn number<T: FromStr>(&self, key: &str) -> Result<Option<T>, String> {
        match self.text(key) {
            None => Ok(None),
            Some(text) => {
                text.parse().map(Some).map_err(|_| format!("{key}={text} is no number that fits"))
            }
        }
    }

    pub(crate) fn is_on(&self, key: &str) -> bool {
        self.text(key) == Some("1")
    }

    pub(crate) fn size(&self) -> Result<u64, String> {
        Ok(self.number("size")?.unwrap_or(64 << 20))
    }

    pub(crate) fn capabilities(&self) -> Result<Capabilities, String> {
        let all = [
            ("WRITE", Capabilities::WRITE),
            ("FLUSH", Capabilities::FLUSH),
            ("FUA", Capabilities::FUA),
            ("DISCARD", Capabilities::DISCARD),
            ("WRITE_ZEROES", Capabilities::WRITE_ZEROES),
        ];
        let Some(text) = self.text("caps") else {
            return Ok(all.iter().fold(Capabilities::NONE, |sum, (_, c)| sum | *c));
        };
        let mut sum = Capabilities::NONE;
        for name in text.split(',').filter(|n| !n.is_empty()) {
            let known = all.iter().find(|(n, _)| *n == name);
            sum = sum | known.ok_or_else(|| format!("no capability {name}"))?.1;
        }
        Ok(sum)
    }

    fn features(&self, key: &str) -> Result<Features, String> {
        let mut sum = Features::NONE;
        for name in self.text(key).unwrap_or("").split(',').filter(|n| !n.is_empty()) {
            let known = Features::known().iter().find(|f| f.name() == Some(name));
            sum |= known.ok_or_else(|| format!("no feature {name}"))?;
        }
        Ok(sum)
    }

    /// The builder's own options: `queues`, `depth`, `block`, `max_io`, `threads`, `id`, `read_only`,
    /// `rotational`, `discard=ALIGNMENT:GRANULARITY:MAX`, `require`, `prefer`, `forbid` (names of features),
    /// `pin=0`, `huge_pages`, `populate`, `start_timeout_ms`, `data` (a data path), `descriptor` (bytes), `lanes` (workers of a queue).
    pub(crate) fn tune(&self, mut builder: Builder) -> Result<Builder, String> {
        if let Some(queues) = self.number("queues")? {
            builder = builder.queues(queues);
        }
        if let Some(depth) = self.number("depth")? {
            builder = builder.queue_depth(depth);
        }
        if let Some(block) = self.number("block")? {
            builder = builder.logical_block_size(block);
        }
        if let Some(bytes) = self.number("max_io")? {
            builder = builder.max_io_bytes(bytes);
        }
        if let Some(threads) = self.number("threads")? {
            builder = builder.threads(threads);
        }
        if let Some(id) = self.number("id")? {
            builder = builder.id(id);
        }
        if let Some(path) = self.text("data") {
            builder = builder.data_path(path.parse().map_err(|e: ublk_core::Error| e.to_string())?);
        }
        if let Some(workers) = self.number("lanes")? {
            builder = builder.workers_per_queue(workers);
        }
        if let Some(bytes) = self.number("descriptor")? {
            builder = builder.descriptor_bytes(bytes);
        }
        if let Some(text) = self.text("discard") {
            let numbers: Vec<u64> = text.split(':').filter_map(|n| n.parse().ok()).collect();
            let [alignment, granularity, max_bytes] = numbers[..] else {
                return Err(format!("discard={text} is not ALIGNMENT:GRANULARITY:MAX"));
            };
            let (alignment, granularity) = (alignment as u32, granularity as u32);
            builder =
                builder.discard(Discard { alignment, granularity, max_bytes, max_segments: 1 });
        }
        if let Some(ms) = self.number("start_timeout_ms")? {
            builder = builder.start_timeout(Duration::from_millis(ms));
        }
        Ok(builder
            .read_only(self.is_on("read_only"))
            .rotational(self.is_on("rotational"))
            .huge_pages(self.is_on("huge_pages"))
            .populate(self.is_on("populate"))
            .pin(self.text("pin") != Some("0"))
            .require(self.features("require")?)
            .prefer(self.features("prefer")?)
            .forbid(self.features("forbid")?))
    }
}
