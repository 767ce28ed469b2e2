//! From the core's traits to the program's callbacks.

use std::io;
use std::sync::Arc;

use ublk_core::{
    Backend, Builder, Capabilities, Errno, Op, QueueContext, QueueHandler, Request, RequestFlags,
    Zone, ZoneAction,
};

use crate::backend::{self, Callbacks};
use crate::boundary;
use crate::device::{Device, ublk_rs_device};
use crate::inbox::Inbox;
use crate::table::Table;

/// Callbacks for single operations, on the workers or a pool of threads.
struct Calls {
    callbacks: Arc<Callbacks>,
    capabilities: Capabilities,
}

impl Backend for Calls {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.callbacks.read(buf, offset)?;
        Ok(buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> io::Result<usize> {
        self.callbacks.write(data, offset, flags.raw())?;
        Ok(data.len())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(self.callbacks.flush()?)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(self.callbacks.discard(offset, len)?)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> io::Result<()> {
        Ok(self.callbacks.write_zeroes(offset, len, flags.raw())?)
    }
    fn report_zones(&self, offset: u64, count: u32) -> io::Result<Vec<Zone>> {
        Ok(self.callbacks.report_zones(offset, count)?)
    }
    fn append(&self, data: &[u8], zone: u64, flags: RequestFlags) -> io::Result<u64> {
        Ok(self.callbacks.zone_append(data, zone, flags.raw())?)
    }
    fn zone_action(&self, action: ZoneAction, zone: u64) -> io::Result<()> {
        Ok(self.callbacks.zone_action(action, zone)?)
    }
}

/// Answers a request by callbacks for single operations.
pub(crate) fn call(callbacks: &Callbacks, mut request: Request) {
    let (offset, len, flags) = (request.offset(), request.len(), request.flags().raw());
    let done = match request.op() {
        Op::Read => callbacks.read(request.data_mut(), offset),
        Op::Write => callbacks.write(request.data(), offset, flags),
        Op::Flush => callbacks.flush(),
        Op::Discard => callbacks.discard(offset, len),
        Op::WriteZeroes => callbacks.write_zeroes(offset, len, flags),
        Op::ZoneAppend => match callbacks.zone_append(request.data(), offset, flags) {
            Ok(at) => {
                let _ = request.complete_append(at);
                return;
            }
            Err(errno) => Err(errno),
        },
        Op::ReportZones => match callbacks.report_zones(offset, request.zones()) {
            Ok(zones) => {
                let _ = request.complete_report(&zones);
                return;
            }
            Err(errno) => Err(errno),
        },
        op => match op.zone_action() {
            Some(action) => callbacks.zone_action(action, offset),
            None => Err(Errno::EOPNOTSUPP),
        },
    };
    // Gone: the client was answered by a stop in the meantime.
    let _ = request.complete(done);
}

/// Gives requests to `submit`.
pub(crate) struct Submitter {
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) table: Arc<Table<Request>>,
    /// Keeps the handle's memory for a callback that outlives it.
    pub(crate) device: Arc<Device>,
}

impl Submitter {
    #[inline]
    pub(crate) fn submit(&self, request: Request) {
        let io = backend::describe(&request);
        let number = self.table.insert(io.queue, io.tag, request);
        let device = Arc::as_ptr(&self.device).cast::<ublk_rs_device>().cast_mut();
        if let Err(errno) = self.callbacks.submit(device, number, &io)
            // Stale: it was completed all the same.
            && let Ok(request) = self.table.take(number)
        {
            let _ = request.complete(Err::<(), _>(errno));
        }
    }
}

impl QueueHandler for Submitter {
    fn handle(&mut self, request: Request, _context: &mut QueueContext<'_>) {
        self.submit(request);
    }
}

/// Leaves requests to the program's event loop.
struct Forwarder(Arc<Inbox>);

impl Forwarder {
    fn new(inbox: &Arc<Inbox>) -> Self {
        inbox.queue_begins();
        Forwarder(Arc::clone(inbox))
    }
}

impl QueueHandler for Forwarder {
    fn handle(&mut self, request: Request, _context: &mut QueueContext<'_>) {
        self.0.push(request);
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.0.queue_ends();
    }
}

/// A builder of a disk that is served by the program.
pub(crate) fn builder(
    device: &Arc<Device>,
    callbacks: &Arc<Callbacks>,
    inbox: Option<&Arc<Inbox>>,
    size: u64,
    depth: usize,
    capabilities: Capabilities,
) -> Builder {
    let table = Arc::clone(device.table());
    if let Some(inbox) = inbox {
        let inbox = Arc::clone(inbox);
        return Builder::with_handlers(size, capabilities, move |queue| {
            table.prepare(queue, depth);
            Forwarder::new(&inbox)
        });
    }
    if !callbacks.submits() {
        let callbacks = Arc::clone(callbacks);
        return Builder::new(size, Calls { callbacks, capabilities });
    }
    let (callbacks, device) = (Arc::clone(callbacks), Arc::clone(device));
    Builder::with_handlers(size, capabilities, move |queue| {
        table.prepare(queue, depth);
        // This is a worker: of the program it runs nothing but callbacks.
        boundary::stay_inside();
        Submitter {
            callbacks: Arc::clone(&callbacks),
            table: Arc::clone(&table),
            device: Arc::clone(&device),
        }
    })
}
