//! What can be said of a device before it starts: one table, which programs can list, too.

use std::ffi::{CStr, CString, c_char};
use std::time::Duration;

use ublk_core::control::{Checksum, Discard, Features, Integrity, SegmentLimits, Zoned};
use ublk_core::{Builder, Capabilities, DataPath, Result, Workers};

use crate::boundary::invalid;

/// A number without a sign; as text in decimal, or hexadecimal after 0x, with K, M, G or T for 1024 and its powers.
pub const UBLK_RS_TYPE_NUMBER: u32 = 1;
/// Yes or no; as text yes, no, true, false, on, off, 1, 0.
pub const UBLK_RS_TYPE_BOOL: u32 = 2;
/// Text.
pub const UBLK_RS_TYPE_TEXT: u32 = 3;
/// UBLK_RS_FEATURE_* together, a number; as text their names with commas between.
pub const UBLK_RS_TYPE_FEATURES: u32 = 4;

pub(crate) struct Spec {
    pub(crate) name: &'static CStr,
    pub(crate) kind: u32,
    pub(crate) default: &'static CStr,
    pub(crate) doc: &'static CStr,
}

macro_rules! options {
    ($($id:ident = $name:literal, $kind:ident, $default:literal, $doc:literal;)*) => {
        /// An option, by its place in the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Id { $($id),* }

        /// All of them, in the order of [`Id`].
        pub(crate) const OPTIONS: &[Spec] = &[$(Spec { name: $name, kind: $kind, default: $default, doc: $doc }),*];
    };
}
use UBLK_RS_TYPE_BOOL as BOOL;
use UBLK_RS_TYPE_FEATURES as FEATURES;
use UBLK_RS_TYPE_NUMBER as NUMBER;
use UBLK_RS_TYPE_TEXT as TEXT;

options! {
    Size = c"size", NUMBER, c"", c"bytes of the disk, a multiple of the logical block size";
    Number = c"id", NUMBER, c"", c"the device's number, below 2^20; by default the lowest that is free";
    Queues = c"queues", NUMBER, c"1", c"hardware queues, 1 to 4096; the driver clamps them to the number of CPUs";
    QueueDepth = c"queue_depth", NUMBER, c"128", c"tags of each queue, 1 to 4096: requests that can be in progress";
    MaxIoBytes = c"max_io_bytes", NUMBER, c"512K", c"bytes of the largest request, a multiple of the page size up to 32M";
    LogicalBlockSize = c"logical_block_size", NUMBER, c"512", c"bytes of a logical block, a power of two from 512 to the page size";
    PhysicalBlockSize = c"physical_block_size", NUMBER, c"4096", c"bytes of a physical block, a power of two from the logical block size to 256M";
    IoMin = c"io_min", NUMBER, c"4096", c"bytes of the smallest I/O that is not slow, a power of two";
    IoOpt = c"io_opt", NUMBER, c"4096", c"bytes of the best I/O, a power of two";
    Rotational = c"rotational", BOOL, c"no", c"whether the disk seeks";
    DmaAlignment = c"dma_alignment", NUMBER, c"", c"bytes that the memory of direct I/O is aligned to, a power of two from 2 to the page size (since Linux 6.15)";
    SegmentBoundary = c"segment_boundary_mask", NUMBER, c"", c"no segment crosses a multiple of this plus one; goes with segment_max_bytes and segment_max_count (since Linux 6.15)";
    SegmentBytes = c"segment_max_bytes", NUMBER, c"", c"bytes of the largest segment, at least 4096";
    SegmentCount = c"segment_max_count", NUMBER, c"", c"most segments of a request";
    ReadOnly = c"read_only", BOOL, c"no", c"a read-only disk, also if the backend can write";
    Fua = c"fua", BOOL, c"no", c"the backend honours UBLK_RS_FLAG_FUA by itself; needs flush";
    Writable = c"writable", BOOL, c"yes", c"of a backend with submit: it takes writes";
    Flush = c"flush", BOOL, c"no", c"of a backend with submit: it has a volatile cache and takes flushes";
    Discards = c"discard", BOOL, c"no", c"of a backend with submit: it takes discards";
    WriteZeroes = c"write_zeroes", BOOL, c"no", c"of a backend with submit: it writes zeroes without being sent them";
    DiscardGranularity = c"discard_granularity", NUMBER, c"", c"bytes of a granule of discards; by default a logical block";
    DiscardAlignment = c"discard_alignment", NUMBER, c"0", c"bytes from the disk's start to the first granule";
    DiscardBytes = c"discard_max_bytes", NUMBER, c"", c"bytes of the largest discard; by default what a request can say";
    WriteZeroesBytes = c"write_zeroes_max_bytes", NUMBER, c"", c"bytes of the largest write of zeroes; by default what a request can say";
    Require = c"require", FEATURES, c"", c"features without which there is to be no device";
    Prefer = c"prefer", FEATURES, c"", c"features to be asked for where the kernel has them";
    Forbid = c"forbid", FEATURES, c"", c"features with which there is to be no device";
    Fingerprint = c"fingerprint", NUMBER, c"0", c"tells this backend's data from another's: a recovery refuses a device that has another";
    Force = c"force", BOOL, c"no", c"recover a device also if its fingerprint is another";
    Threads = c"threads", NUMBER, c"0", c"threads that make the calls of the backend, up to 1024, so that a slow one does not stall its queue; 0: the workers";
    WorkersPerQueue = c"workers_per_queue", NUMBER, c"1", c"workers that share each queue, 1 to the queue depth (since Linux 6.16)";
    Pin = c"pin", BOOL, c"yes", c"run each queue's worker only on the CPUs whose I/O comes by that queue";
    Populate = c"populate", BOOL, c"no", c"fault all buffers in at the start, and keep their memory when the device is idle";
    HugePages = c"huge_pages", BOOL, c"no", c"allow transparent huge pages for the buffers, and keep their memory when the device is idle";
    Path = c"data_path", TEXT, c"auto", c"how data moves: auto, copy, need-get-data, user-copy, zero-copy or auto-buf-reg";
    DescriptorBytes = c"descriptor_bytes", NUMBER, c"24", c"bytes of a request's descriptor, 24 to 256, a multiple of 8";
    ManyUnprivileged = c"allow_many_unprivileged", BOOL, c"no", c"serve more than one unprivileged device in this process";
    StartTimeout = c"start_timeout_ms", NUMBER, c"30000", c"milliseconds that a start or a recovery may take";
    Dispatch = c"dispatch", BOOL, c"no", c"call the backend from ublk_rs_device_dispatch only, for programs with an event loop of their own";
    ZoneBytes = c"zone_bytes", NUMBER, c"", c"of a zoned disk: bytes from one zone's start to the next one's, a power of two";
    ZoneMaxOpen = c"zone_max_open", NUMBER, c"0", c"of a zoned disk: most open zones; 0 for no limit";
    ZoneMaxActive = c"zone_max_active", NUMBER, c"0", c"of a zoned disk: most active zones; 0 for no limit";
    ZoneAppendBytes = c"zone_max_append_bytes", NUMBER, c"512K", c"of a zoned disk: bytes of the largest append";
    MetadataSize = c"integrity_metadata_size", NUMBER, c"", c"bytes of integrity metadata for each interval, 1 to 255; of a backend with submit, and of the target mem (since Linux 7.0)";
    MetadataInterval = c"integrity_interval", NUMBER, c"512", c"bytes of data that one piece of metadata is for";
    MetadataChecksum = c"integrity_checksum", TEXT, c"none", c"checksum that the kernel makes and verifies: none, ip, t10dif or nvme";
    MetadataOffset = c"integrity_pi_offset", NUMBER, c"0", c"where in each piece of metadata the protection information starts";
    MetadataTag = c"integrity_tag_size", NUMBER, c"0", c"bytes of the application's tag";
    MetadataReference = c"integrity_reference_tags", BOOL, c"no", c"the protection information counts blocks, which needs a checksum";
    MetadataCapable = c"integrity_capable", BOOL, c"no", c"the server makes and verifies protection information itself, for those who ask sysfs";
    File = c"path", TEXT, c"", c"of the target file: the file or block device";
    Create = c"create", BOOL, c"no", c"of the targets file and stripe: make sparse files for size bytes where there are none";
    Direct = c"direct", BOOL, c"no", c"of the targets file and stripe: go past the page cache";
    SyncWrites = c"sync_writes", BOOL, c"no", c"of the targets file and stripe: every write is durable before it is answered";
    ConventionalZones = c"zone_conventional", NUMBER, c"0", c"of the target zoned-mem: how many zones take writes anywhere";
    ZoneCapacity = c"zone_capacity", NUMBER, c"", c"of the target zoned-mem: bytes that each sequential zone holds; by default all";
    Paths = c"paths", TEXT, c"", c"of the target stripe: the files or block devices in their order, with newlines between";
    Chunk = c"chunk_bytes", NUMBER, c"512K", c"of the target stripe: bytes that go to one before it is the next one's turn, a multiple of the logical block size; the same each time";
}

const ATTEMPT: &str = "set an option";

/// What an option was set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Number(u64),
    Bool(bool),
    Text(String),
}

/// The options of a device, as far as they were set.
#[derive(Clone)]
pub(crate) struct Config {
    values: Vec<Option<Value>>,
    pub(crate) workers: Option<Workers>,
}

fn find(name: &str) -> Result<usize> {
    let found = OPTIONS.iter().position(|spec| spec.name.to_bytes() == name.as_bytes());
    found.ok_or_else(|| invalid(ATTEMPT, format!("there is no option {name:?}")))
}

fn show(text: &CStr) -> &str {
    text.to_str().unwrap_or_default()
}

fn number(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        b'G' | b'g' => (&text[..text.len() - 1], 1 << 30),
        b'T' | b't' => (&text[..text.len() - 1], 1 << 40),
        _ => (text, 1),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    value.ok()?.checked_mul(factor)
}

fn parse(spec: &Spec, text: &str) -> Result<Value> {
    let wrong =
        |what: &str| invalid(ATTEMPT, format!("{}: {text:?} is not {what}", show(spec.name)));
    match spec.kind {
        NUMBER => number(text).map(Value::Number).ok_or_else(|| wrong("a number")),
        BOOL => match text {
            "yes" | "true" | "on" | "1" => Ok(Value::Bool(true)),
            "no" | "false" | "off" | "0" => Ok(Value::Bool(false)),
            _ => Err(wrong("yes or no")),
        },
        FEATURES => match text {
            "" => Ok(Value::Number(0)),
            _ => text.parse::<Features>().map(|features| Value::Number(features.bits())),
        },
        _ => Ok(Value::Text(text.to_owned())),
    }
}

impl Config {
    pub(crate) fn new() -> Self {
        Config { values: vec![None; OPTIONS.len()], workers: None }
    }

    pub(crate) fn set_number(&mut self, name: &str, value: u64) -> Result<()> {
        let at = find(name)?;
        self.values[at] = Some(match OPTIONS[at].kind {
            NUMBER | FEATURES => Value::Number(value),
            BOOL if value <= 1 => Value::Bool(value == 1),
            _ => return Err(invalid(ATTEMPT, format!("{name} takes text"))),
        });
        Ok(())
    }

    pub(crate) fn set_text(&mut self, name: &str, text: &str) -> Result<()> {
        let at = find(name)?;
        self.values[at] = Some(parse(&OPTIONS[at], text)?);
        Ok(())
    }

    /// What the option is, as text: what it was set to, or its default.
    pub(crate) fn get(&self, name: &str) -> Result<CString> {
        let at = find(name)?;
        Ok(match &self.values[at] {
            None => OPTIONS[at].default.to_owned(),
            Some(Value::Number(n)) if OPTIONS[at].kind == FEATURES => {
                crate::error::c_string(&Features::from_bits(*n).to_string())
            }
            Some(Value::Number(n)) => crate::error::c_string(&n.to_string()),
            Some(Value::Bool(yes)) => if *yes { c"yes" } else { c"no" }.to_owned(),
            Some(Value::Text(text)) => crate::error::c_string(text),
        })
    }

    pub(crate) fn set(&mut self, id: Id, value: Value) {
        self.values[id as usize] = Some(value);
    }

    pub(crate) fn number(&self, id: Id) -> Option<u64> {
        match self.values[id as usize] {
            Some(Value::Number(n)) => Some(n),
            _ => None,
        }
    }

    /// A number that has to fit.
    pub(crate) fn fit<T: TryFrom<u64>>(&self, id: Id) -> Result<Option<T>> {
        let Some(value) = self.number(id) else { return Ok(None) };
        T::try_from(value).map(Some).map_err(|_| {
            let name = show(OPTIONS[id as usize].name);
            invalid(ATTEMPT, format!("{name}: {value} is too large"))
        })
    }

    pub(crate) fn flag(&self, id: Id) -> Option<bool> {
        match self.values[id as usize] {
            Some(Value::Bool(yes)) => Some(yes),
            _ => None,
        }
    }

    pub(crate) fn is(&self, id: Id) -> bool {
        self.flag(id).unwrap_or(false)
    }

    pub(crate) fn text(&self, id: Id) -> Option<&str> {
        match &self.values[id as usize] {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// What a backend with submit can do.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let all = [
            (self.flag(Id::Writable).unwrap_or(true), Capabilities::WRITE),
            (self.is(Id::Flush), Capabilities::FLUSH),
            (self.is(Id::Discards), Capabilities::DISCARD),
            (self.is(Id::WriteZeroes), Capabilities::WRITE_ZEROES),
            (self.number(Id::ZoneBytes).is_some(), Capabilities::ZONED),
            (self.number(Id::MetadataSize).is_some(), Capabilities::INTEGRITY),
        ];
        let there = all.into_iter().filter(|(there, _)| *there);
        there.fold(Capabilities::NONE, |caps, (_, one)| caps | one)
    }

    fn segments(&self) -> Result<Option<SegmentLimits>> {
        let all = (
            self.number(Id::SegmentBoundary),
            self.fit(Id::SegmentBytes)?,
            self.fit(Id::SegmentCount)?,
        );
        match all {
            (None, None, None) => Ok(None),
            (Some(boundary_mask), Some(max_size), Some(max_count)) => {
                Ok(Some(SegmentLimits { boundary_mask, max_size, max_count }))
            }
            _ => Err(invalid(
                ATTEMPT,
                "segment_boundary_mask, segment_max_bytes and segment_max_count go together",
            )),
        }
    }

    fn discard(&self) -> Result<Option<Discard>> {
        let (granularity, bytes) =
            (self.fit(Id::DiscardGranularity)?, self.number(Id::DiscardBytes));
        let alignment = self.fit(Id::DiscardAlignment)?;
        if granularity.is_none() && bytes.is_none() && alignment.is_none() {
            return Ok(None);
        }
        let block = self.fit(Id::LogicalBlockSize)?.unwrap_or(512);
        let mut discard = Discard::granules_of(granularity.unwrap_or(block));
        discard.alignment = alignment.unwrap_or(0);
        if let Some(bytes) = bytes {
            discard.max_bytes = bytes;
        }
        Ok(Some(discard))
    }

    /// The zones, of a zoned disk.
    pub(crate) fn zoned(&self) -> Result<Option<Zoned>> {
        let Some(zone_bytes) = self.number(Id::ZoneBytes) else { return Ok(None) };
        Ok(Some(Zoned {
            zone_bytes,
            max_open: self.fit(Id::ZoneMaxOpen)?.unwrap_or(0),
            max_active: self.fit(Id::ZoneMaxActive)?.unwrap_or(0),
            max_append_bytes: self
                .number(Id::ZoneAppendBytes)
                .unwrap_or((512 << 10).min(zone_bytes)),
        }))
    }

    /// The metadata, of a disk that has any.
    pub(crate) fn integrity(&self) -> Result<Option<Integrity>> {
        let Some(metadata_size) = self.fit(Id::MetadataSize)? else { return Ok(None) };
        let checksum = match self.text(Id::MetadataChecksum).unwrap_or("none") {
            "none" => Checksum::None,
            "ip" => Checksum::Ip,
            "t10dif" => Checksum::T10Dif,
            "nvme" => Checksum::Nvme,
            other => {
                return Err(invalid(
                    ATTEMPT,
                    format!("integrity_checksum: {other:?} is none of none, ip, t10dif, nvme"),
                ));
            }
        };
        Ok(Some(Integrity {
            metadata_size,
            interval: self.fit(Id::MetadataInterval)?.unwrap_or(512),
            checksum,
            pi_offset: self.fit(Id::MetadataOffset)?.unwrap_or(0),
            tag_size: self.fit(Id::MetadataTag)?.unwrap_or(0),
            reference_tags: self.is(Id::MetadataReference),
            capable: self.is(Id::MetadataCapable),
        }))
    }

    /// Says to a builder what was set. What was not stays as the builder has it.
    pub(crate) fn apply(&self, mut b: Builder, of_target: bool) -> Result<Builder> {
        macro_rules! say {
            ($($id:ident => $method:ident;)*) => {
                $(if let Some(value) = self.fit(Id::$id)? {
                    b = b.$method(value);
                })*
            };
        }
        say! {
            Number => id;
            Queues => queues;
            QueueDepth => queue_depth;
            MaxIoBytes => max_io_bytes;
            PhysicalBlockSize => physical_block_size;
            IoMin => io_min;
            IoOpt => io_opt;
            DmaAlignment => dma_alignment;
            Fingerprint => fingerprint;
            WriteZeroesBytes => max_write_zeroes_bytes;
            Threads => threads;
            WorkersPerQueue => workers_per_queue;
            DescriptorBytes => descriptor_bytes;
        }
        macro_rules! say_whether {
            ($($id:ident => $method:ident;)*) => {
                $(if let Some(value) = self.flag(Id::$id) {
                    b = b.$method(value);
                })*
            };
        }
        say_whether! {
            Rotational => rotational;
            ReadOnly => read_only;
            Force => force;
            Pin => pin;
            Populate => populate;
            HugePages => huge_pages;
            ManyUnprivileged => allow_many_unprivileged;
        }
        let features = |id| Features::from_bits(self.number(id).unwrap_or(0));
        b = b
            .require(features(Id::Require))
            .prefer(features(Id::Prefer))
            .forbid(features(Id::Forbid));
        if let Some(ms) = self.number(Id::StartTimeout) {
            b = b.start_timeout(Duration::from_millis(ms));
        }
        if let Some(path) = self.text(Id::Path) {
            b = b.data_path(path.parse::<DataPath>()?);
        }
        if let Some(limits) = self.segments()? {
            b = b.segments(limits);
        }
        if let Some(discard) = self.discard()? {
            b = b.discard(discard);
        }
        if !of_target {
            if let Some(block) = self.fit(Id::LogicalBlockSize)? {
                b = b.logical_block_size(block);
            }
            if let Some(zoned) = self.zoned()? {
                b = b.zoned(zoned);
            }
            if let Some(integrity) = self.integrity()? {
                b = b.integrity(integrity);
            }
        }
        if let Some(workers) = &self.workers {
            b = b.workers(workers);
        }
        Ok(b)
    }
}

fn spec(index: usize) -> Option<&'static Spec> {
    OPTIONS.get(index)
}

/// How many options there are. Those of this version keep their index in later ones.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_option_count() -> usize {
    OPTIONS.len()
}

/// The name of the option with this index, below ublk_rs_option_count(); NULL beyond. Lives for ever.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_option_name(index: usize) -> *const c_char {
    spec(index).map_or(std::ptr::null(), |spec| spec.name.as_ptr())
}

/// What the option with this index takes: UBLK_RS_TYPE_*; 0 beyond the last one.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_option_type(index: usize) -> u32 {
    spec(index).map_or(0, |spec| spec.kind)
}

/// What the option with this index is if it is not set, as text; empty if that depends. NULL beyond the last one. Lives
/// for ever.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_option_default(index: usize) -> *const c_char {
    spec(index).map_or(std::ptr::null(), |spec| spec.default.as_ptr())
}

/// What the option with this index means, in a line, with units and range. NULL beyond the last one. Lives for ever.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_option_doc(index: usize) -> *const c_char {
    spec(index).map_or(std::ptr::null(), |spec| spec.doc.as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_core::control::DeviceParams;

    #[test]
    fn every_option_has_a_name_of_its_own_words_and_a_default_that_parses() {
        for (i, spec) in OPTIONS.iter().enumerate() {
            assert_eq!(find(show(spec.name)).unwrap(), i);
            assert!(!spec.doc.is_empty());
            if !spec.default.is_empty() {
                parse(spec, show(spec.default)).unwrap();
            }
        }
    }

    #[test]
    fn defaults_are_the_builders() {
        let (config, params) = (Config::new(), DeviceParams::builder(512).build().unwrap());
        let number_of = |name| number(config.get(name).unwrap().to_str().unwrap()).unwrap();
        assert_eq!(number_of("queues"), params.queues().into());
        assert_eq!(number_of("queue_depth"), params.queue_depth().into());
        assert_eq!(number_of("max_io_bytes"), params.max_io_bytes().into());
        assert_eq!(number_of("logical_block_size"), params.logical_block_size().into());
        assert_eq!(number_of("physical_block_size"), params.physical_block_size().into());
    }

    #[test]
    fn text_is_read_as_the_type_says() {
        let mut config = Config::new();
        config.set_text("size", "3G").unwrap();
        assert_eq!(config.number(Id::Size), Some(3 << 30));
        config.set_text("fingerprint", "0xff").unwrap();
        assert_eq!(config.number(Id::Fingerprint), Some(255));
        config.set_text("pin", "off").unwrap();
        assert_eq!(config.flag(Id::Pin), Some(false));
        config.set_text("require", "USER_COPY,QUIESCE").unwrap();
        let features = Features::USER_COPY | Features::QUIESCE;
        assert_eq!(config.number(Id::Require), Some(features.bits()));
        for (name, text) in [
            ("size", "much"),
            ("size", "99999999999T"),
            ("pin", "2"),
            ("require", "LUCK"),
            ("a", "b"),
        ] {
            let e = config.set_text(name, text).unwrap_err();
            assert_eq!(e.kind(), ublk_core::ErrorKind::InvalidParameter, "{name} {text}: {e}");
        }
    }
}
