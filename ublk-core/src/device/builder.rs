//! What a device is to be, before it exists.

use std::sync::Arc;
use std::time::Duration;

use super::running::Running;
use super::start::Added;
use crate::backend::{AsyncBackend, Backend, Capabilities, QueueHandler};
use crate::control::{
    AddDevice, CancelToken, Control, DeviceParams, Discard, FeatureRequest, Features, Integrity,
    ParamsBuilder, SegmentLimits, Zoned,
};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::Backing;
use crate::uapi;
use crate::worker::attendant::{Attendant, Unattended};
use crate::worker::path::DataPath;
use crate::worker::pool::Workers;
use crate::worker::serve::{Async, Inline, Pool, Pooled};
use crate::worker::turn::HandlerFactory;

/// Who answers the requests.
pub(crate) trait Service: Send + Sync {
    /// Starts what the service needs besides the workers.
    fn start(&self, threads: usize, name: &str) -> Result<Option<Arc<Pool>>>;
    /// Makes the handler of a queue.
    fn handler(&self, queue: u16, pool: Option<&Arc<Pool>>) -> HandlerFactory;
    /// Whether a pool of threads makes sense.
    fn blocks(&self) -> bool;
}

struct Blocking<B>(Arc<B>);

impl<B: Backend> Service for Blocking<B> {
    fn start(&self, threads: usize, name: &str) -> Result<Option<Arc<Pool>>> {
        match threads {
            0 => Ok(None),
            n => Pool::start(Arc::clone(&self.0), n, name).map(Some),
        }
    }
    fn handler(&self, _queue: u16, pool: Option<&Arc<Pool>>) -> HandlerFactory {
        match pool {
            Some(pool) => {
                let pool = Arc::clone(pool);
                Box::new(move || Box::new(Pooled(pool)))
            }
            None => {
                let backend = Arc::clone(&self.0);
                Box::new(move || Box::new(Inline(backend)))
            }
        }
    }
    fn blocks(&self) -> bool {
        true
    }
}

struct Asynchronous<B>(Arc<B>);

impl<B: AsyncBackend> Service for Asynchronous<B> {
    fn start(&self, _threads: usize, _name: &str) -> Result<Option<Arc<Pool>>> {
        Ok(None)
    }
    fn handler(&self, _queue: u16, _pool: Option<&Arc<Pool>>) -> HandlerFactory {
        let backend = Arc::clone(&self.0);
        Box::new(move || Box::new(Async(backend)))
    }
    fn blocks(&self) -> bool {
        false
    }
}

struct Raw<F>(Arc<F>);

impl<F, H> Service for Raw<F>
where
    F: Fn(u16) -> H + Send + Sync + 'static,
    H: QueueHandler,
{
    fn start(&self, _threads: usize, _name: &str) -> Result<Option<Arc<Pool>>> {
        Ok(None)
    }
    fn handler(&self, queue: u16, _pool: Option<&Arc<Pool>>) -> HandlerFactory {
        let make = Arc::clone(&self.0);
        Box::new(move || Box::new(make(queue)))
    }
    fn blocks(&self) -> bool {
        false
    }
}

/// Describes a device and its backend; [`start`](Self::start) makes it.
///
/// What the backend is [able to do](Capabilities) decides what the disk advertises: no `WRITE`, a read-only
/// disk; no `FLUSH`, no volatile cache; and so on.
///
/// ```no_run
/// use std::time::Duration;
/// use ublk_core::{Builder, targets::Mem};
///
/// # fn main() -> ublk_core::Result<()> {
/// let disk = Builder::new(1 << 30, Mem::new(1 << 30)).queues(2).queue_depth(64).start()?;
/// println!("{}", disk.path().display());
/// disk.stop(Duration::from_secs(10))?;
/// # Ok(())
/// # }
/// ```
#[must_use]
pub struct Builder {
    pub(super) params: ParamsBuilder,
    pub(super) service: Box<dyn Service>,
    pub(super) capabilities: Capabilities,
    pub(super) read_only: bool,
    discard: Option<Discard>,
    pub(super) zoned: Option<Zoned>,
    pub(super) integrity: Option<Integrity>,
    max_write_zeroes: Option<u64>,
    pub(super) features: FeatureRequest,
    id: Option<u32>,
    pub(super) fingerprint: u64,
    pub(super) force: bool,
    pub(super) threads: usize,
    pub(super) workers: Option<Workers>,
    pub(super) workers_per_queue: u16,
    pub(super) attendant: Arc<dyn Attendant>,
    pub(super) pin: bool,
    pub(super) backing: Backing,
    pub(super) data_path: DataPath,
    descriptor_bytes: u16,
    pub(super) many_unprivileged: bool,
    pub(super) start_timeout: Duration,
    pub(super) cancel: CancelToken,
}

/// A builder's description, checked.
pub(super) struct Plan {
    pub(super) params: DeviceParams,
    add: AddDevice,
    /// What is best for the backend, where the driver has it.
    favourite: Features,
}

impl Plan {
    /// What to ask of a driver that offers these features.
    pub(super) fn add(&self, offered: Option<Features>) -> AddDevice {
        let mut add = self.add.clone();
        // All of a data path or nothing: a part of its features would be another path.
        if offered.is_some_and(|offered| offered.contains(self.favourite)) {
            add.features.require |= self.favourite;
        }
        add
    }
}

/// Bytes of a request's descriptor, unless IO_DESC_SIZE says otherwise.
const DESCRIPTOR: u16 = size_of::<uapi::ublksrv_io_desc>() as u16;

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident: $ty:ty;)*) => {
        impl Builder {
            $($(#[$doc])* pub fn $name(mut self, $name: $ty) -> Self {
                self.params = self.params.$name($name);
                self
            })*
        }
    };
}

params! {
    /// Hardware queues, 1 to 4096; the driver clamps them to the number of CPUs. Default 1.
    queues: u16;
    /// Tags of each queue: requests that can be in progress, 1 to 4096. Default 128.
    queue_depth: u16;
    /// Bytes of the largest request: a multiple of the page size, at most 32 MiB. Default 512 KiB. Each tag
    /// has a buffer of this size, whose memory is used only as far as requests touch it.
    max_io_bytes: u32;
    /// Bytes of a logical block: a power of two from 512 to the page size. Default 512.
    logical_block_size: u32;
    /// Bytes of a physical block: a power of two from the logical block size to 256 MiB. Default 4096.
    physical_block_size: u32;
    /// Bytes of the smallest I/O that is not slow: a power of two. Default the physical block size.
    io_min: u32;
    /// Bytes of the best I/O: a power of two. Default the physical block size.
    io_opt: u32;
    /// Whether the disk seeks. Default no.
    rotational: bool;
    /// Bytes that the memory of direct I/O is aligned to: a power of two from 2 to the page size. A
    /// requirement: drivers before Linux 6.15 do not know it. Default the kernel's choice.
    dma_alignment: u32;
    /// Limits of memory segments. A requirement: drivers before Linux 6.15 do not know them.
    segments: SegmentLimits;
}

impl Builder {
    /// A disk of `size` bytes, a multiple of the logical block size, served by blocking calls.
    pub fn new(size: u64, backend: impl Backend) -> Self {
        let capabilities = backend.capabilities();
        Self::with_service(size, capabilities, Box::new(Blocking(Arc::new(backend))))
    }

    /// A disk of `size` bytes served by futures on the workers' rings.
    pub fn new_async(size: u64, backend: impl AsyncBackend) -> Self {
        let capabilities = backend.capabilities();
        Self::with_service(size, capabilities, Box::new(Asynchronous(Arc::new(backend))))
    }

    /// A disk of `size` bytes whose requests go to handlers as they are; `make(queue)` is called on each
    /// queue's worker.
    ///
    /// ```no_run
    /// use ublk_core::{Builder, Capabilities, Errno, QueueContext, Request};
    ///
    /// let disk = Builder::with_handlers(1 << 20, Capabilities::WRITE, |_queue| {
    ///     |request: Request, _: &mut QueueContext<'_>| {
    ///         std::thread::spawn(move || request.complete(Ok::<(), Errno>(())));
    ///     }
    /// });
    /// ```
    pub fn with_handlers<F, H>(size: u64, capabilities: Capabilities, make: F) -> Self
    where
        F: Fn(u16) -> H + Send + Sync + 'static,
        H: QueueHandler,
    {
        Self::with_service(size, capabilities, Box::new(Raw(Arc::new(make))))
    }

    fn with_service(size: u64, capabilities: Capabilities, service: Box<dyn Service>) -> Self {
        Builder {
            params: DeviceParams::builder(size),
            service,
            capabilities,
            read_only: false,
            discard: None,
            zoned: None,
            integrity: None,
            max_write_zeroes: None,
            features: FeatureRequest::default(),
            id: None,
            fingerprint: 0,
            force: false,
            threads: 0,
            workers: None,
            workers_per_queue: 1,
            attendant: Arc::new(Unattended),
            pin: true,
            backing: Backing::default(),
            data_path: DataPath::Auto,
            descriptor_bytes: DESCRIPTOR,
            many_unprivileged: false,
            start_timeout: Duration::from_secs(30),
            cancel: CancelToken::new(),
        }
    }

    /// The device's number, below 2^20. Default: the lowest that is free.
    pub fn id(mut self, id: u32) -> Self {
        self.id = Some(id);
        self
    }

    /// What tells this backend's data from another's, for instance a hash of the path of its file: the
    /// kernel keeps it with the device, and [`recover`](Self::recover) refuses a device whose fingerprint
    /// is another. Default 0.
    pub fn fingerprint(mut self, fingerprint: u64) -> Self {
        self.fingerprint = fingerprint;
        self
    }

    /// Has [`recover`](Self::recover) take over a device also if its fingerprint is another. Default no.
    pub fn force(mut self, force: bool) -> Self {
        self.force = force;
        self
    }

    /// A read-only disk, also if the backend can write.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Leaves out what the backend could do: without [`FLUSH`](Capabilities::FLUSH), for instance, the disk has no
    /// volatile cache, and no FUA either.
    pub fn without(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = self.capabilities.without(capabilities);
        if !self.capabilities.contains(Capabilities::FLUSH) {
            self.capabilities = self.capabilities.without(Capabilities::FUA);
        }
        self
    }

    /// How discards are limited, for a backend that takes them. Default: granules of one logical block.
    pub fn discard(mut self, discard: Discard) -> Self {
        self.discard = Some(discard);
        self
    }

    /// The zones, of a backend with [`Capabilities::ZONED`], which needs them. The data path is
    /// [`DataPath::UserCopy`] then, unless another one is chosen; `Copy` and `NeedGetData` cannot be.
    pub fn zoned(mut self, zoned: Zoned) -> Self {
        self.zoned = Some(zoned);
        self
    }

    /// The metadata that is kept beside the data, of a backend with [`Capabilities::INTEGRITY`], which needs it. The
    /// data path is [`DataPath::UserCopy`] then, unless another one is chosen; `Copy` and `NeedGetData` cannot be.
    pub fn integrity(mut self, integrity: Integrity) -> Self {
        self.integrity = Some(integrity);
        self
    }

    /// Bytes of the largest write of zeroes, for a backend that takes them: a multiple of the logical
    /// block size. Default: the most that a request can say.
    pub fn max_write_zeroes_bytes(mut self, bytes: u64) -> Self {
        self.max_write_zeroes = Some(bytes);
        self
    }

    /// Features without which there is to be no device.
    ///
    /// With [`UNPRIVILEGED_DEV`](Features::UNPRIVILEGED_DEV) the device belongs to the calling user, who needs no
    /// privilege to make it, serve it, use it and delete it. The driver gives it to callers without CAP_SYS_ADMIN
    /// only; it copies the data, cannot be recovered, and needs the udev rules that `docs/unprivileged.md` describes.
    pub fn require(mut self, features: Features) -> Self {
        self.features.require |= features;
        self
    }

    /// Features to be asked for where the kernel has them. [`QUIESCE`](Features::QUIESCE), which
    /// [`Running::hand_over`] works best with, is preferred by itself with
    /// [`USER_RECOVERY`](Features::USER_RECOVERY), unless that comes with
    /// [`USER_RECOVERY_FAIL_IO`](Features::USER_RECOVERY_FAIL_IO).
    pub fn prefer(mut self, features: Features) -> Self {
        self.features.prefer |= features;
        self
    }

    /// Features with which there is to be no device.
    pub fn forbid(mut self, features: Features) -> Self {
        self.features.forbid |= features;
        self
    }

    /// Threads that make the blocking calls, up to 1024, so that a slow one does not stall its queue. Default
    /// 0: the workers make them.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Serves the queues by the workers of a pool. Default: a worker for each queue.
    pub fn workers(mut self, workers: &Workers) -> Self {
        self.workers = Some(workers.clone());
        self
    }

    /// Workers that share each queue, 1 to the queue depth. Default 1.
    ///
    /// More than one spread the requests of few queues over more CPUs, which takes a driver with
    /// [`PER_IO_DAEMON`](Features::PER_IO_DAEMON): each worker serves its share of a queue's tags. With
    /// [`BATCH_IO`](Features::BATCH_IO) each takes what has come when it is free; that goes with data paths on which
    /// the driver does not copy.
    pub fn workers_per_queue(mut self, workers: u16) -> Self {
        self.workers_per_queue = workers;
        self
    }

    /// Has somebody stand around the device's own workers. Those of [`workers`](Self::workers) have an attendant of
    /// their own. Default: nobody.
    pub fn attendant(mut self, attendant: Arc<dyn Attendant>) -> Self {
        self.attendant = attendant;
        self
    }

    /// Whether each queue's worker runs only on the CPUs whose I/O comes by that queue (as far as this
    /// process may use them). Default yes; a pool's workers are never pinned.
    pub fn pin(mut self, pin: bool) -> Self {
        self.pin = pin;
        self
    }

    /// Faults all buffers in at the start, and keeps their memory when the device is idle. Default no.
    pub fn populate(mut self, populate: bool) -> Self {
        self.backing.populate = populate;
        self
    }

    /// Allows transparent huge pages for the buffers, and keeps their memory when the device is idle. Default
    /// no.
    pub fn huge_pages(mut self, huge_pages: bool) -> Self {
        self.backing.huge_pages = huge_pages;
        self
    }

    /// How the data of requests moves. Default [`DataPath::Auto`]; what it came to says
    /// [`Device::data_path`](crate::Device::data_path).
    pub fn data_path(mut self, path: DataPath) -> Self {
        self.data_path = path;
        self
    }

    /// Bytes of each request's descriptor in the memory that the kernel shares with the server: 24 to 256, a multiple
    /// of 8. Other than 24, the default, it requires [`Features::IO_DESC_SIZE`], and is of use only with a driver that
    /// has something to say there.
    pub fn descriptor_bytes(mut self, bytes: u16) -> Self {
        self.descriptor_bytes = bytes;
        self
    }

    /// Whether this process may serve more than one unprivileged device. Default no: for a request that takes longer
    /// than the block layer's timeout (30 seconds) the driver kills the whole process. The library answers such a
    /// request before, but cannot where a backend keeps a worker itself.
    pub fn allow_many_unprivileged(mut self, allow: bool) -> Self {
        self.many_unprivileged = allow;
        self
    }

    /// How long the start may take, from the first command to the usable disk. Default 30 seconds.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Has a token end the start, or the [takeover](Self::recover), from another thread: what has come up by then is
    /// taken down, requests that the backend holds are answered in its place, and the call returns
    /// [`ErrorKind::Cancelled`]. Once the call has returned the token does nothing any more.
    pub fn cancelled_by(mut self, token: &CancelToken) -> Self {
        self.cancel = token.clone();
        self
    }

    /// Whether the driver may make it an unprivileged device.
    pub(super) fn may_be_unprivileged(&self) -> bool {
        (self.features.require | self.features.prefer).contains(Features::UNPRIVILEGED_DEV)
    }

    /// What a kernel that is younger than this library may have: it could change how requests or data move.
    pub(super) fn unknown(features: Features) -> Features {
        features - Features::known()
    }

    /// Whether a device with these features would tell clients wrong places of their appends: Linux 7.3 takes the
    /// place out of a batch when the request has been completed already, by the end of its registered pages.
    pub(super) fn misplaces_appends(&self, features: Features) -> bool {
        self.zoned.is_some() && features.contains(Features::BATCH_IO | Features::AUTO_BUF_REG)
    }

    /// The features that are asked for on any driver.
    pub(super) fn request(&self) -> FeatureRequest {
        self.request_of(self.features.require.contains(Features::BATCH_IO))
    }

    /// The features that a device has to have which works in batches, or which does not.
    pub(super) fn request_of(&self, batched: bool) -> FeatureRequest {
        let mut features = self.features;
        features.require |= self.data_path.features();
        if self.zoned.is_some() {
            // An append's answer travels where the address of a tag's buffer would.
            features.require |= Features::ZONED | Features::USER_COPY;
        }
        if self.integrity.is_some() {
            // Metadata moves by the device's file alone.
            features.require |= Features::INTEGRITY | Features::USER_COPY;
        }
        if self.descriptor_bytes != DESCRIPTOR {
            features.require |= Features::IO_DESC_SIZE;
        }
        if self.workers_per_queue > 1 && !batched {
            features.require |= Features::PER_IO_DAEMON;
        }
        features.prefer = features.prefer & Features::known();
        features
    }

    /// Checks what can be checked without the kernel.
    pub(super) fn plan(&self) -> Result<Plan> {
        let invalid = |cause: String| {
            Err(Error::new(ErrorKind::InvalidParameter, "describe the device").because(cause))
        };
        let caps = self.capabilities;
        if caps.contains(Capabilities::FUA) && !caps.contains(Capabilities::FLUSH) {
            return invalid(
                "a backend with FUA needs FLUSH: the kernel knows FUA only on a disk with a \
                            volatile cache"
                    .into(),
            );
        }
        if self.threads > 1024 {
            return invalid(format!("{} threads are more than 1024", self.threads));
        }
        if self.threads > 0 && !self.service.blocks() {
            return invalid("threads are for a backend with blocking calls".into());
        }
        let asked = Self::unknown(self.features.require);
        if !asked.is_empty() {
            return Err(Error::new(ErrorKind::Unsupported, "describe the device")
                .because(format!("this version of the library cannot serve {asked}")));
        }
        if (self.features.require | self.features.prefer).contains(Features::ZONED) {
            return invalid("ZONED is asked for by Builder::zoned".into());
        }
        match (self.zoned, caps.contains(Capabilities::ZONED)) {
            (Some(_), false) => {
                return invalid("zones are for a backend with the capability ZONED".into());
            }
            (None, true) => {
                return invalid(
                    "a backend with ZONED needs to know its zones: Builder::zoned".into(),
                );
            }
            (Some(_), true) if self.read_only || !caps.contains(Capabilities::WRITE) => {
                return invalid("a zoned disk is for a backend that writes, not read-only".into());
            }
            _ => {}
        }
        if (self.features.require | self.features.prefer).contains(Features::INTEGRITY) {
            return invalid("INTEGRITY is asked for by Builder::integrity".into());
        }
        match (self.integrity, caps.contains(Capabilities::INTEGRITY)) {
            (Some(_), false) => {
                return invalid("metadata is for a backend with the capability INTEGRITY".into());
            }
            (None, true) => {
                return invalid(
                    "a backend with INTEGRITY needs to know its metadata: Builder::integrity"
                        .into(),
                );
            }
            (Some(_), true) if self.service.blocks() => {
                return invalid(
                    "metadata is for an AsyncBackend or QueueHandler, which see the request".into(),
                );
            }
            _ => {}
        }
        let apart = self.zoned.is_some() || self.integrity.is_some();
        if apart && matches!(self.data_path, DataPath::Copy | DataPath::NeedGetData) {
            return invalid(format!(
                "the data of a disk with zones or metadata cannot move by {}: use user-copy, zero-copy or auto-buf-reg",
                self.data_path
            ));
        }
        if self.misplaces_appends(self.features.require | self.data_path.features()) {
            return Err(Error::new(ErrorKind::Unsupported, "describe the device")
                .because("with BATCH_IO and auto-buf-reg the driver tells clients wrong places of appends")
                .remedy_is("use user-copy or zero-copy, or leave BATCH_IO out"));
        }
        if self.features.require.contains(Features::UNPRIVILEGED_DEV) {
            let recovery = Features::USER_RECOVERY
                | Features::USER_RECOVERY_REISSUE
                | Features::USER_RECOVERY_FAIL_IO;
            let asked = self.features.require & recovery;
            if !asked.is_empty() {
                return invalid(format!(
                    "an UNPRIVILEGED_DEV cannot be recovered: the driver does not grant it {asked}"
                ));
            }
            if !self.data_path.is_copied_by_driver() && self.data_path != DataPath::Auto {
                return invalid(format!(
                    "an UNPRIVILEGED_DEV excludes {}: on such a device the driver copies the data",
                    self.data_path.features()
                ));
            }
        }
        let by_path = (self.features.require | self.features.prefer) & DataPath::all_features();
        if !by_path.is_empty() {
            return invalid(format!("{by_path} is asked for by Builder::data_path"));
        }
        if !(24..=256).contains(&self.descriptor_bytes) || !self.descriptor_bytes.is_multiple_of(8)
        {
            return invalid(format!(
                "descriptors of {} bytes: they have 24 to 256, a multiple of 8",
                self.descriptor_bytes
            ));
        }
        if self.data_path == DataPath::NeedGetData
            && self.features.require.contains(Features::SHMEM_ZC)
        {
            // `ublk_get_data` overwrites what says where the data is, and it is not copied either.
            return invalid(
                "the data path need-get-data excludes SHMEM_ZC: the driver forgets where a write's data lies \
                 in shared memory when it is told of a buffer"
                    .into(),
            );
        }
        let lanes = self.workers_per_queue;
        self.check_lanes(
            self.params.build()?.queue_depth(),
            self.features.require.contains(Features::BATCH_IO),
            self.data_path,
        )?;
        // The driver's queue of arrived tags is a `kfifo`, which has two places at least.
        let too_shallow = self.params.build()?.queue_depth() < 2;
        if too_shallow && self.features.require.contains(Features::BATCH_IO) {
            return invalid("BATCH_IO needs a queue depth of at least 2".into());
        }
        let write = caps.contains(Capabilities::WRITE) && !self.read_only;
        let mut params = self
            .params
            .clone()
            .read_only(!write)
            .volatile_cache(write && caps.contains(Capabilities::FLUSH))
            .fua(write && caps.contains(Capabilities::FUA));
        if let Some(zoned) = self.zoned {
            params = params.zoned(zoned);
        }
        if let Some(integrity) = self.integrity {
            params = params.integrity(integrity);
        }
        // Checked once to know the block size that the defaults below rest on.
        let block = params.build()?.logical_block_size();
        if write && caps.contains(Capabilities::DISCARD) {
            params = params.discard(self.discard.unwrap_or(Discard::granules_of(block)));
        } else if self.discard.is_some() {
            return invalid("a discard limit is for a backend that takes discards".into());
        }
        if write && caps.contains(Capabilities::WRITE_ZEROES) {
            let most = Discard::granules_of(block).max_bytes;
            params = params.max_write_zeroes_bytes(self.max_write_zeroes.unwrap_or(most));
        } else if self.max_write_zeroes.is_some() {
            return invalid("a limit of writes of zeroes is for a backend that takes them".into());
        }
        let params = params.build()?;
        let mut features = self.request();
        if too_shallow || lanes > 1 || self.misplaces_appends(features.require | Features::BATCH_IO)
        {
            features.prefer = features.prefer - Features::BATCH_IO;
        }
        if self.data_path == DataPath::NeedGetData {
            features.prefer = features.prefer - Features::SHMEM_ZC;
        }
        // All it does is to permit the command that a handover needs.
        let asked = features.require | features.prefer;
        if asked.contains(Features::USER_RECOVERY)
            && !asked.contains(Features::USER_RECOVERY_FAIL_IO)
        {
            features.prefer |= Features::QUIESCE;
        }
        let mut add = AddDevice::new(&params).id(self.id).features(features);
        add.server_flags = self.fingerprint;
        add.io_desc_size = self.descriptor_bytes;
        let best = DataPath::AutoBufReg.features();
        let wanted = self.data_path == DataPath::Auto
            && caps.contains(Capabilities::FIXED_BUFFERS)
            && !self.may_be_unprivileged()
            && !features.forbid.intersects(best)
            && !self.misplaces_appends(features.require | features.prefer | best);
        let favourite = if wanted { best } else { Features::NONE };
        if !wanted {
            features = self.with_a_way_to_shared_memory(features)?;
            add.features = features;
        }
        Ok(Plan { params, add, favourite })
    }

    /// A server does not know the memory that a former one has shared with clients, and the driver does not copy what is
    /// there: a disk that can be recovered needs another way to the data of its requests.
    fn with_a_way_to_shared_memory(&self, mut features: FeatureRequest) -> Result<FeatureRequest> {
        let both = Features::SHMEM_ZC | Features::USER_RECOVERY;
        let asked = features.require | features.prefer;
        if !asked.contains(both) || !DataPath::of(features.require).is_copied_by_driver() {
            return Ok(features);
        }
        let other = DataPath::UserCopy.features();
        if self.data_path == DataPath::Auto
            && !features.forbid.intersects(other)
            && !self.may_be_unprivileged()
        {
            features.require |= other;
        } else if features.require.contains(Features::SHMEM_ZC) {
            return Err(Error::new(ErrorKind::InvalidParameter, "describe the device")
                .because(
                    "SHMEM_ZC and USER_RECOVERY together exclude the data path copy: the driver does not copy what lies \
                     in shared memory, and a server that recovers the disk does not know that memory",
                )
                .remedy_is("use user-copy, zero-copy or auto-buf-reg"));
        } else {
            features.prefer = features.prefer - Features::SHMEM_ZC;
        }
        Ok(features)
    }

    /// Checks what can be checked without the kernel. What makes or takes over a device does that by itself.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] and [`ErrorKind::Unsupported`], which name the rule that was broken.
    pub fn check(&self) -> Result<()> {
        self.plan().map(drop)
    }

    /// Adds the device to the kernel.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] and [`ErrorKind::Unsupported`] before anything exists, and what
    /// [`Control::add_dev`] reports.
    #[allow(clippy::should_implement_trait)] // ADD_DEV: nobody takes it for arithmetic
    pub fn add(self, control: &Control) -> Result<Added> {
        let plan = self.plan()?;
        let control = match self.may_be_unprivileged() {
            true => control.with_device_paths(),
            false => control.clone(),
        };
        Added::new(self, plan, control)
    }

    /// Opens the driver, adds the device and starts it.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add), [`Control::open`] and [`Added::start`].
    pub fn start(self) -> Result<Running> {
        // Before the driver is asked for, so that a bad description is an error on any machine.
        self.plan()?;
        let control = match &self.workers {
            Some(workers) => workers.control()?,
            None => Control::open()?,
        };
        self.add(&control)?.start()
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("params", &self.params)
            .field("capabilities", &self.capabilities)
            .field("features", &self.features)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
