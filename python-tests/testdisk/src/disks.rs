//! The disks of this process, from their options to their end.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Mutex;

use serde_json::{Value, json};
use ublk_core::control::Control;
use ublk_core::targets::{
    Fault, Faults, File, FileOptions, Mem, Null, OnWorker, Power, Stripe, StripeOptions,
    SyncPolicy, WriteCache, ZonedMem, ZonedOptions,
};
use ublk_core::{Builder, Device, Running, SharedBuffer, Workers};

use crate::faulty::Faulty;
use crate::options::Options;
use crate::report;

/// A disk, as long as it is served, and what stays of it.
pub(crate) struct Disk {
    pub(crate) device: Device,
    pub(crate) running: Option<Running>,
    pub(crate) mem: Option<Mem>,
    pub(crate) faulty: Option<Faulty>,
    pub(crate) faults: Option<Faults>,
    pub(crate) power: Option<Power>,
    /// With its clients.
    pub(crate) shared: Vec<SharedBuffer>,
}

#[derive(Default)]
pub(crate) struct Disks {
    pub(crate) all: Vec<Disk>,
    contents: HashMap<String, Mem>,
    pools: HashMap<usize, Workers>,
}

struct Parts {
    builder: Builder,
    mem: Option<Mem>,
    faulty: Option<Faulty>,
    faults: Option<Faults>,
    power: Option<Power>,
}

impl Parts {
    fn only(builder: Builder) -> Self {
        Parts { builder, mem: None, faulty: None, faults: None, power: None }
    }
}

impl Disks {
    /// Starts the disks that the options describe; none is left if one of them fails.
    pub(crate) fn start(&mut self, words: &str) -> Result<Value, Value> {
        let options = Options::parse(words).map_err(report::wrong)?;
        let count = options.number("count").map_err(report::wrong)?.unwrap_or(1);
        let mut started = Vec::new();
        for _ in 0..count {
            started.push(self.start_one(&options)?);
        }
        let ready: Vec<_> = started.iter().map(|disk| report::device(&disk.device)).collect();
        self.all.extend(started);
        Ok(json!({"ready": ready}))
    }

    pub(crate) fn start_one(&mut self, options: &Options) -> Result<Disk, Value> {
        let Parts { builder, mem, faulty, faults, power } = self.parts(options)?;
        let mut builder = options.tune(builder).map_err(report::wrong)?;
        if let Some(count) = options.number("workers").map_err(report::wrong)? {
            builder = builder.workers(self.pool(count)?);
        }
        let running = match options.text("hold_at") {
            Some("added") => held_when_added(builder)?,
            _ => builder.start().map_err(|e| report::error(&e))?,
        };
        Ok(Disk {
            device: running.handle(),
            running: Some(running),
            mem,
            faulty,
            faults,
            power,
            shared: Vec::new(),
        })
    }

    fn pool(&mut self, count: usize) -> Result<&Workers, Value> {
        match self.pools.entry(count) {
            Entry::Occupied(there) => Ok(there.into_mut()),
            Entry::Vacant(place) => {
                Ok(place.insert(Workers::new(count).map_err(|e| report::error(&e))?))
            }
        }
    }

    fn mem(&mut self, options: &Options) -> Result<Mem, String> {
        let new = Mem::new(options.size()?);
        Ok(match options.text("contents") {
            Some(name) => self.contents.entry(name.to_owned()).or_insert(new).clone(),
            None => new,
        })
    }

    fn parts(&mut self, options: &Options) -> Result<Parts, Value> {
        let size = options.size().map_err(report::wrong)?;
        let only = Parts::only;
        Ok(match (options.text("target").unwrap_or("mem"), options.text("via").unwrap_or("own")) {
            ("null", "own") => only(Null::new().builder(size)),
            ("null", "backend") => only(Builder::new(size, Null::new())),
            ("mem", via @ ("own" | "backend")) => {
                let mem = self.mem(options).map_err(report::wrong)?;
                let builder = match via {
                    "own" => mem.builder(),
                    _ => Builder::new(size, mem.clone()),
                };
                Parts { mem: Some(mem), ..only(builder) }
            }
            ("file", "own") => only(open_file(options)?.builder()),
            ("stripe", "own") => only(stripe(options)?.builder()),
            ("cache", "own") => {
                let mem = self.mem(options).map_err(report::wrong)?;
                let cache = WriteCache::new(mem.clone());
                let power = Some(cache.power());
                let fault = Fault::new(OnWorker(cache));
                let faults = Some(fault.faults());
                let builder = Builder::new_async(size, fault);
                Parts { mem: Some(mem), faults, power, ..only(builder) }
            }
            ("fault", via) => self.fault(options, via)?,
            ("zoned", "own") => {
                let (zones, zone) = zones(options).map_err(report::wrong)?;
                only(zones.create(size, zone).map_err(|e| report::error(&e))?.builder())
            }
            ("test", via) => {
                let mem = self.mem(options).map_err(report::wrong)?;
                let able = options.capabilities().map_err(report::wrong)?;
                let faulty = Faulty::new(mem.clone(), able);
                let theirs = faulty.clone();
                let fault = Fault::new(faulty.clone());
                // A handler has the requests themselves to misbehave with.
                let faults = matches!(via, "backend" | "async").then(|| fault.faults());
                let builder = match via {
                    "backend" => Builder::new(size, fault),
                    "async" => Builder::new_async(size, fault),
                    "handler" | "own" if options.text("hold_at") == Some("starting") => {
                        Builder::with_handlers(size, able, move |queue| {
                            report::say(&json!({"stage": "starting", "queue": queue}));
                            wait_for_a_line();
                            theirs.clone()
                        })
                    }
                    "handler" | "own" => {
                        Builder::with_handlers(size, able, move |_| theirs.clone())
                    }
                    other => return Err(report::wrong(format!("no via={other}"))),
                };
                Parts { mem: Some(mem), faulty: Some(faulty), faults, ..only(builder) }
            }
            (target, via) => {
                return Err(report::wrong(format!("no target={target} via={via}")));
            }
        })
    }

    /// One of the others with faults.
    fn fault(&mut self, options: &Options, via: &str) -> Result<Parts, Value> {
        let size = options.size().map_err(report::wrong)?;
        let (builder, faults) = match (options.text("over").unwrap_or("mem"), via) {
            ("mem", via @ ("own" | "backend")) => {
                let mem = self.mem(options).map_err(report::wrong)?;
                match via {
                    "own" => {
                        let fault = Fault::new(OnWorker(mem));
                        let faults = fault.faults();
                        (fault.builder(), faults)
                    }
                    _ => {
                        let fault = Fault::new(mem);
                        let faults = fault.faults();
                        (Builder::new(size, fault), faults)
                    }
                }
            }
            ("null", "own") => {
                let fault = Fault::new(OnWorker(Null::new()));
                let faults = fault.faults();
                (fault.builder(size), faults)
            }
            ("file", "own") => {
                let fault = Fault::new(open_file(options)?);
                let faults = fault.faults();
                (fault.builder(), faults)
            }
            ("stripe", "own") => {
                let fault = Fault::new(stripe(options)?);
                let faults = fault.faults();
                (fault.builder(), faults)
            }
            (over, via) => return Err(report::wrong(format!("no faults over={over} via={via}"))),
        };
        Ok(Parts { faults: Some(faults), ..Parts::only(builder) })
    }
}

fn zones(options: &Options) -> Result<(ZonedOptions, u64), String> {
    let mut zones = ZonedMem::options();
    if let Some(count) = options.number("conventional")? {
        zones = zones.conventional(count);
    }
    if let Some(bytes) = options.number("zone_capacity")? {
        zones = zones.zone_capacity(bytes);
    }
    if let Some(count) = options.number("max_open")? {
        zones = zones.max_open(count);
    }
    if let Some(count) = options.number("max_active")? {
        zones = zones.max_active(count);
    }
    Ok((zones, options.number("zone")?.unwrap_or(4 << 20)))
}

fn file(options: &Options) -> Result<FileOptions, String> {
    let mut file = File::options()
        .direct(options.is_on("direct"))
        .read_only(options.is_on("read_only"))
        .create(options.size()?);
    if options.is_on("every_write") {
        file = file.sync(SyncPolicy::EveryWrite);
    }
    if let Some(block) = options.number("block")? {
        file = file.logical_block_size(block);
    }
    Ok(file)
}

fn open_file(options: &Options) -> Result<File, Value> {
    let file = file(options).map_err(report::wrong)?;
    let path = options.text("path").unwrap_or_default();
    file.open(path).map_err(|e| report::error(&e))
}

/// Its members are `path=`, separated by commas.
fn stripe(options: &Options) -> Result<Stripe, Value> {
    let stripe = stripe_options(options).map_err(report::wrong)?;
    let members =
        options.text("path").unwrap_or_default().split(',').filter(|path| !path.is_empty());
    stripe.open(members).map_err(|e| report::error(&e))
}

fn stripe_options(options: &Options) -> Result<StripeOptions, String> {
    let mut stripe = Stripe::options()
        .direct(options.is_on("direct"))
        .read_only(options.is_on("read_only"))
        .create(options.size()?);
    if let Some(bytes) = options.number("chunk")? {
        stripe = stripe.chunk(bytes);
    }
    if options.is_on("every_write") {
        stripe = stripe.sync(SyncPolicy::EveryWrite);
    }
    if let Some(block) = options.number("block")? {
        stripe = stripe.logical_block_size(block);
    }
    Ok(stripe)
}

fn held_when_added(builder: Builder) -> Result<Running, Value> {
    let started = Control::open().and_then(|control| {
        let added = builder.add(&control)?;
        report::say(&json!({"stage": "added", "id": added.id()}));
        wait_for_a_line();
        added.start()
    });
    started.map_err(|e| report::error(&e))
}

/// One thread at a time reads: the main thread waits for the start while a worker is held.
fn wait_for_a_line() {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let mut line = String::new();
    // The end of the input ends the wait as well.
    let _ = std::io::stdin().read_line(&mut line);
}
