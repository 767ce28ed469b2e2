//! The ready-made backends, by their names. A new one is a line in the table and an arm of [`Target::builder`].

use std::ffi::{CStr, c_char};

use ublk_core::targets::{File, Mem, Null, Stripe, SyncPolicy, ZonedMem};
use ublk_core::{Builder, Result};

use crate::boundary::invalid;
use crate::options::{Config, Id};

const ATTEMPT: &str = "describe the device";

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Null,
    Mem,
    File,
    ZonedMem,
    Stripe,
}

const TARGETS: &[(Target, &CStr, &CStr)] = &[
    (Target::Null, c"null", c"answers every request at once and keeps nothing: for measuring"),
    (Target::Mem, c"mem", c"keeps what was written in memory, integrity metadata too"),
    (
        Target::File,
        c"file",
        c"a regular file or another block device: path, create, direct, sync_writes",
    ),
    (
        Target::ZonedMem,
        c"zoned-mem",
        c"a zoned disk in memory: zone_bytes and the other options of zones",
    ),
    (
        Target::Stripe,
        c"stripe",
        c"several regular files or block devices as one disk (RAID 0): paths, chunk_bytes, create, direct, sync_writes",
    ),
];

impl Target {
    pub(crate) fn find(name: &str, attempt: &'static str) -> Result<Self> {
        let found = TARGETS.iter().find(|(_, known, _)| known.to_bytes() == name.as_bytes());
        found.map(|(target, ..)| *target).ok_or_else(|| {
            let names: Vec<_> = TARGETS.iter().map(|(_, name, _)| name.to_string_lossy()).collect();
            invalid(attempt, format!("{name:?} is none of {}", names.join(", ")))
        })
    }

    /// What the options make of it. One that is to have zones or metadata and cannot is refused by the start: a disk
    /// without them is not what was asked for.
    pub(crate) fn builder(self, config: &Config) -> Result<Builder> {
        let mut builder = self.made(config)?;
        if self != Target::ZonedMem
            && let Some(zoned) = config.zoned()?
        {
            builder = builder.zoned(zoned);
        }
        if self != Target::Mem
            && let Some(integrity) = config.integrity()?
        {
            builder = builder.integrity(integrity);
        }
        Ok(builder)
    }

    fn made(self, config: &Config) -> Result<Builder> {
        let size = || {
            config
                .number(Id::Size)
                .ok_or_else(|| invalid(ATTEMPT, "this target needs a size: set the option size"))
        };
        let block = config.fit(Id::LogicalBlockSize)?;
        let with_block = |builder: Builder| match block {
            Some(block) => builder.logical_block_size(block),
            None => builder,
        };
        let sync = match config.is(Id::SyncWrites) {
            true => SyncPolicy::EveryWrite,
            false => SyncPolicy::OnFlush,
        };
        match self {
            Target::Null => Ok(with_block(Null::new().builder(size()?))),
            Target::Mem => Ok(with_block(match config.integrity()? {
                Some(integrity) => Mem::with_metadata(size()?, integrity).builder(),
                None => Mem::new(size()?).builder(),
            })),
            Target::ZonedMem => {
                let Some(zoned) = config.zoned()? else {
                    return Err(invalid(ATTEMPT, "a zoned disk needs zone_bytes"));
                };
                let mut options = ZonedMem::options()
                    .conventional(config.fit(Id::ConventionalZones)?.unwrap_or(0))
                    .max_open(zoned.max_open)
                    .max_active(zoned.max_active)
                    .max_append_bytes(zoned.max_append_bytes);
                if let Some(bytes) = config.number(Id::ZoneCapacity) {
                    options = options.zone_capacity(bytes);
                }
                Ok(with_block(options.create(size()?, zoned.zone_bytes)?.builder()))
            }
            Target::File => {
                let path = config
                    .text(Id::File)
                    .ok_or_else(|| invalid(ATTEMPT, "the target file needs a path"))?;
                let mut options = File::options()
                    .read_only(config.is(Id::ReadOnly))
                    .direct(config.is(Id::Direct))
                    .sync(sync);
                if config.is(Id::Create) {
                    options = options.create(size()?);
                }
                if let Some(block) = block {
                    options = options.logical_block_size(block);
                }
                Ok(options.open(path)?.builder())
            }
            Target::Stripe => {
                let paths = config
                    .text(Id::Paths)
                    .ok_or_else(|| invalid(ATTEMPT, "the target stripe needs paths"))?;
                let mut options = Stripe::options()
                    .read_only(config.is(Id::ReadOnly))
                    .direct(config.is(Id::Direct))
                    .sync(sync);
                if let Some(bytes) = config.number(Id::Chunk) {
                    options = options.chunk(bytes);
                }
                if config.is(Id::Create) {
                    options = options.create(size()?);
                }
                if let Some(block) = block {
                    options = options.logical_block_size(block);
                }
                let members = paths.split('\n').filter(|path| !path.is_empty());
                Ok(options.open(members)?.builder())
            }
        }
    }
}

/// How many ready-made backends there are. Those of this version keep their index in later ones.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_target_count() -> usize {
    TARGETS.len()
}

/// The name of the ready-made backend with this index, for ublk_rs_device_new_target(); NULL beyond the last one. Lives
/// for ever.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_target_name(index: usize) -> *const c_char {
    TARGETS.get(index).map_or(std::ptr::null(), |(_, name, _)| name.as_ptr())
}

/// What the ready-made backend with this index does, in a line; NULL beyond the last one. Lives for ever.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_target_doc(index: usize) -> *const c_char {
    TARGETS.get(index).map_or(std::ptr::null(), |(_, _, doc)| doc.as_ptr())
}
