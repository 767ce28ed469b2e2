//! Every control command as one function.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use super::features::Features;
use super::info::{AddDevice, DeviceInfo};
use super::node::{self, Places};
use super::params::DeviceParams;
use super::pool::{Answer, Heard, Undo, Work};
use super::wait::Wait;
use super::{Control, CpuSet, Encoding, Inner, answer, holders, params_wire, rules};
use crate::error::{Errno, Error, ErrorKind, Result};
use crate::uapi::bytes::{bytes_of, from_prefix};
use crate::uapi::{
    UBLK_FEATURES_LEN, ublk_params, ublk_shmem_buf_reg, ublksrv_ctrl_cmd, ublksrv_ctrl_dev_info,
};
use crate::uring::sqe::ControlCommand as C;

/// Bytes of the CPU bitmap that GET_QUEUE_AFFINITY fills: the kernel's largest NR_CPUS is 8192.
const CPU_BYTES: usize = 8192 / 8;

/// Makes what takes a success back.
type UndoCall = Box<dyn FnOnce(&Answer, Sender) -> Work + Send>;

/// A command about one device.
struct Call {
    command: C,
    id: u32,
    data: u64,
    payload: Vec<u8>,
    with_path: bool,
    heard: Option<Heard>,
    undo: Option<UndoCall>,
}

impl Call {
    fn new(command: C, id: u32) -> Self {
        let payload = Vec::new();
        Call { command, id, data: 0, payload, with_path: false, heard: None, undo: None }
    }

    fn data(mut self, data: u64) -> Self {
        self.data = data;
        self
    }

    fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    fn with_path(mut self) -> Self {
        self.with_path = true;
        self
    }

    /// Has somebody hear of a success on the control thread, whether or not its caller still waits.
    fn heard(mut self, heard: impl FnOnce(u32) + Send + 'static) -> Self {
        self.heard = Some(Box::new(|answer| {
            if let Ok(result) = u32::try_from(answer.result) {
                heard(result);
            }
        }));
        self
    }

    /// What takes a success back whose caller has given up.
    fn undone_by(mut self, undo: impl FnOnce(&Answer, Sender) -> Work + Send + 'static) -> Self {
        self.undo = Some(Box::new(undo));
        self
    }
}

/// What makes a command of a call.
struct Sender {
    places: Places,
    encoding: Encoding,
    /// As the call that is undone.
    with_path: bool,
}

impl Sender {
    fn work(self, call: Call) -> Work {
        let mut header = ublksrv_ctrl_cmd {
            dev_id: call.id,
            queue_id: u16::MAX,
            data: [call.data],
            ..Default::default()
        };
        let mut memory = Vec::new();
        if call.with_path {
            memory.extend_from_slice(self.places.char_device(call.id).as_os_str().as_bytes());
            memory.push(0);
            header.dev_path_len = memory.len() as u16;
        }
        memory.extend_from_slice(&call.payload);
        let encoding = self.encoding;
        let undo = call.undo.map(|undo| -> Undo { Box::new(|answer| undo(answer, self)) });
        Work { command: call.command, encoding, header, memory, heard: call.heard, undo }
    }
}

impl Inner {
    fn work(&self, call: Call) -> Work {
        let (places, encoding) = (self.places.clone(), self.encoding);
        Sender { places, encoding, with_path: call.with_path }.work(call)
    }

    /// The kernel's answer, its errno made an error; the memory is the payload alone.
    fn call(&self, call: Call, wait: &Wait) -> Result<Answer> {
        let (command, id) = (call.command, call.id);
        let work = self.work(call);
        let path_len = usize::from(work.header.dev_path_len);
        let mut answer = self.pool.run(work, wait)?;
        if let Some(errno) = Errno::from_result(answer.result) {
            let device = (command != C::GetFeatures && id != u32::MAX).then_some(id);
            if errno == Errno::ENOENT && path_len > 0 {
                rules::node_is_there(command, id, &self.places)?;
            }
            return Err(answer::error(command, device, errno, self.features, self.encoding));
        }
        answer.memory.drain(..path_len);
        Ok(answer)
    }

    /// As [`call`](Self::call), with the path if the options ask for paths and the device is an
    /// unprivileged one: of the others the driver takes the path for the payload.
    fn call_device(&self, mut call: Call, wait: &Wait) -> Result<Answer> {
        if self.device_paths && !call.with_path {
            let info = self.info_by_path(call.id)?;
            call.with_path = Features::from_bits(info.flags).contains(Features::UNPRIVILEGED_DEV);
        }
        let (command, id, with_path) = (call.command, call.id, call.with_path);
        self.call(call, wait).map_err(|e| match (e.errno(), e.kind()) {
            // What the driver does not do at all it does not do with a path either.
            (_, ErrorKind::Unsupported) => e,
            (Some(Errno::EINVAL), _) if !with_path && self.is_unprivileged(id) => {
                rules::wants_its_path(command, id)
            }
            _ => e,
        })
    }

    /// Whether a device is one of those about which the driver takes no command without a path. No, if the caller may
    /// not ask.
    fn is_unprivileged(&self, id: u32) -> bool {
        let flags = self.info_by_path(id).map(|info| Features::from_bits(info.flags));
        flags.is_ok_and(|flags| flags.contains(Features::UNPRIVILEGED_DEV))
    }

    fn info_by_path(&self, id: u32) -> Result<ublksrv_ctrl_dev_info> {
        let room = bytes_of(&ublksrv_ctrl_dev_info::default()).to_vec();
        let call = Call::new(C::GetDevInfo2, id).payload(&room).with_path();
        let answer = self.call(call, &Wait::for_(self.patience))?;
        Ok(from_prefix(&answer.memory))
    }

    fn call_device_soon(&self, call: Call) -> Result<Answer> {
        self.call_device(call, &Wait::for_(self.patience))
    }

    fn call_soon(&self, call: Call) -> Result<Answer> {
        self.call(call, &Wait::for_(self.patience))
    }
}

/// GET_FEATURES, before there is a [`Control`] to ask through.
pub(super) fn ask_features(inner: &Inner) -> Result<Features> {
    // The id is ignored by drivers that know the command; those that do not must not find a device.
    let call = Call::new(C::GetFeatures, u32::MAX).payload(&[0; UBLK_FEATURES_LEN]);
    let answer = inner.call_soon(call)?;
    Ok(Features::from_bits(from_prefix(&answer.memory)))
}

/// The deletion of a device that nobody waits for any more. An unprivileged one first has to be given to its owner by
/// udev: until then the driver takes no command about it.
fn undo_add(answer: &Answer, sender: Sender) -> Work {
    const PATIENCE: Duration = Duration::from_secs(5);
    let info: ublksrv_ctrl_dev_info = from_prefix(&answer.memory);
    let mut call = Call::new(C::DelDev, info.dev_id);
    call.with_path = Features::from_bits(info.flags).contains(Features::UNPRIVILEGED_DEV);
    if call.with_path {
        // Who may open it may delete it. If that does not come to be, the deletion says what is missing.
        let _ = node::open_char_device(&sender.places, call.id, &Wait::for_(PATIENCE));
    }
    sender.work(call)
}

/// Commands. Where no [`Wait`] is taken, the wait is bounded by
/// [`ControlOptions::patience`](super::ControlOptions::patience).
///
/// Besides what is listed, every one can fail with [`ErrorKind::NoSuchDevice`],
/// [`ErrorKind::PermissionDenied`], [`ErrorKind::TimedOut`], [`ErrorKind::Cancelled`],
/// [`ErrorKind::Forked`] and, if a control thread cannot be made, [`ErrorKind::TooMany`].
impl Control {
    /// GET_FEATURES: asks the driver now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] from drivers before Linux 6.5.
    pub fn get_features(&self) -> Result<Features> {
        ask_features(&self.0)
    }

    /// ADD_DEV: creates a device and its `/dev/ublkcN`. The answer is what the driver granted, and
    /// binding: it clamps the queues to the number of CPUs and may add features.
    ///
    /// Features are negotiated: what the driver lacks of the required ones is refused before
    /// anything exists, and a device that was granted something else than required is deleted
    /// again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] naming the feature, [`ErrorKind::InvalidParameter`],
    /// [`ErrorKind::IdTaken`], [`ErrorKind::TooMany`].
    pub fn add_dev(&self, request: &AddDevice) -> Result<DeviceInfo> {
        request.check()?;
        let asked = request.features.negotiate(self.0.features)?;
        let info = request.to_uapi(asked);
        let call = Call::new(C::AddDev, info.dev_id).payload(bytes_of(&info)).undone_by(undo_add);
        let answer = self.0.call_soon(call)?;
        let granted = DeviceInfo::from_uapi(&from_prefix(&answer.memory));
        if let Err(e) = request.features.check(granted.features) {
            if let Err(undo) = self.del_dev(granted.id, &Wait::for_(self.0.patience)) {
                tracing::error!(
                    device = granted.id,
                    "a device that is not as required stays: {undo}"
                );
            }
            return Err(e.on_device(granted.id));
        }
        Ok(granted)
    }

    /// DEL_DEV: stops the device if need be, removes it and waits until its number is free, that is
    /// until nobody has its nodes open, mapped or mounted.
    ///
    /// # Errors
    ///
    /// When the wait is over first, the kernel still finishes on its own; see
    /// [`outstanding`](Self::outstanding).
    pub fn del_dev(&self, id: u32, wait: &Wait) -> Result<()> {
        self.0.call_device(Call::new(C::DelDev, id), wait).map(drop)
    }

    /// DEL_DEV_ASYNC: as [`del_dev`](Self::del_dev), without the wait for the number.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] from drivers that do not know it and, always, on unprivileged
    /// devices.
    pub fn del_dev_async(&self, id: u32, wait: &Wait) -> Result<()> {
        self.0.call_device(Call::new(C::DelDevAsync, id), wait).map(drop)
    }

    /// START_DEV: waits until every tag of every queue has been fetched and creates `/dev/ublkbN`.
    /// `server_pid` is the process that opened `/dev/ublkcN`.
    ///
    /// When the wait is over first, the command is taken back from the kernel, which may take two
    /// seconds more, and the device is as before. The thread that waits here must not be one that
    /// fetches or serves: older drivers (6.12) read the partition table before they answer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongState`] if the device is live or was stopped with `/dev/ublkcN` open,
    /// [`ErrorKind::InvalidParameter`] without parameters, with the wrong process, or if the backend of a zoned disk
    /// reports zones that the kernel does not take.
    pub fn start_dev(&self, id: u32, server_pid: i32, wait: &Wait) -> Result<()> {
        rules::server(C::StartDev, id, server_pid)?;
        // What cannot be asked for is left to the driver to refuse.
        if let Ok(params) = self.get_raw_params(id) {
            rules::startable(id, &params)?;
        }
        let started = self.0.call_device(Call::new(C::StartDev, id).data(server_pid as u64), wait);
        started.map(drop).map_err(|e| match e.errno() {
            Some(errno @ (Errno::EEXIST | Errno::EINVAL | Errno::ENODEV)) => {
                match self.get_raw_info(id) {
                    Ok(info) => rules::not_started(e, errno, server_pid, &info),
                    Err(_) => e,
                }
            }
            _ => e,
        })
    }

    /// STOP_DEV: removes `/dev/ublkbN` once its requests and its writeback are done, and ends the
    /// server's commands with `ENODEV`. Nothing happens to a dead device.
    ///
    /// The server has to go on serving meanwhile. The kernel does not give this command back: when
    /// the wait is over first it goes on on its own.
    ///
    /// # Errors
    ///
    /// None of its own.
    pub fn stop_dev(&self, id: u32, wait: &Wait) -> Result<()> {
        self.0.call_device(Call::new(C::StopDev, id), wait).map(drop)
    }

    /// TRY_STOP_DEV: as [`stop_dev`](Self::stop_dev) if nobody has the disk open. Once it succeeded
    /// the disk cannot be opened without CAP_SYS_ADMIN, also when the device is started again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if somebody has it open, [`ErrorKind::WrongState`] if there is no disk,
    /// [`ErrorKind::Unsupported`] from drivers without SAFE_STOP_DEV.
    pub fn try_stop_dev(&self, id: u32, wait: &Wait) -> Result<()> {
        let stopped = self.0.call_device(Call::new(C::TryStopDev, id), wait).map(drop);
        stopped.map_err(|e| match e.kind() {
            ErrorKind::Busy => match holders::sentence(&self.holders(id)) {
                found if found.is_empty() => e,
                found => e.because(format!("somebody has the disk open: {found}")),
            },
            _ => self.without_disk(id, e),
        })
    }

    /// SET_PARAMS, read back: the driver drops sections that it does not know and reports success.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] naming the section that was dropped, [`ErrorKind::WrongState`] if
    /// the device has or had a disk, [`ErrorKind::InvalidParameter`] for what the device was not added for: larger
    /// requests, metadata without [`INTEGRITY`](Features::INTEGRITY), zones without [`ZONED`](Features::ZONED) or none
    /// with it.
    pub fn set_params(&self, id: u32, params: &DeviceParams) -> Result<()> {
        self.set_raw_params(id, &params.to_uapi())
    }

    /// [`set_params`](Self::set_params) with the kernel's struct. It is compared with the device, and otherwise left to
    /// the driver to check.
    ///
    /// # Errors
    ///
    /// As [`set_params`](Self::set_params), and [`ErrorKind::InvalidParameter`].
    pub fn set_raw_params(&self, id: u32, params: &ublk_params) -> Result<()> {
        // What cannot be asked for is left to the driver to refuse.
        if let Ok(info) = self.get_raw_info(id) {
            rules::settable(params, &info, self.0.features)?;
        }
        self.0.call_device_soon(Call::new(C::SetParams, id).payload(bytes_of(params)))?;
        let taken = self.get_raw_params(id)?;
        params_wire::check_taken(params, &taken).map_err(|e| e.on_device(id))
    }

    /// GET_PARAMS.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongState`] if none were set, [`ErrorKind::InvalidParameter`] if they are none
    /// that [`DeviceParams`] can express.
    pub fn get_params(&self, id: u32) -> Result<DeviceParams> {
        let params = self.get_raw_params(id)?;
        DeviceParams::from_uapi(&params, &self.get_raw_info(id)?)
    }

    /// GET_PARAMS as the kernel's struct, device numbers included.
    ///
    /// # Errors
    ///
    /// None of its own.
    pub fn get_raw_params(&self, id: u32) -> Result<ublk_params> {
        let asked = ublk_params { len: size_of::<ublk_params>() as u32, ..Default::default() };
        let answer =
            self.0.call_device_soon(Call::new(C::GetParams, id).payload(bytes_of(&asked)))?;
        Ok(from_prefix(&answer.memory))
    }

    /// GET_DEV_INFO.
    ///
    /// # Errors
    ///
    /// None of its own.
    pub fn get_dev_info(&self, id: u32) -> Result<DeviceInfo> {
        let mut info = DeviceInfo::from_uapi(&self.get_raw_info(id)?);
        info.capacity = self.0.places.capacity(id);
        Ok(info)
    }

    fn get_raw_info(&self, id: u32) -> Result<ublksrv_ctrl_dev_info> {
        if self.0.device_paths {
            return self.0.info_by_path(id);
        }
        let room = bytes_of(&ublksrv_ctrl_dev_info::default()).to_vec();
        let answer = self.0.call_device_soon(Call::new(C::GetDevInfo, id).payload(&room))?;
        Ok(from_prefix(&answer.memory))
    }

    /// GET_DEV_INFO2: as [`get_dev_info`](Self::get_dev_info), permitted to whoever may read
    /// `/dev/ublkcN`, if the device is an unprivileged one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] from drivers before Linux 6.3.
    pub fn get_dev_info2(&self, id: u32) -> Result<DeviceInfo> {
        let mut info = DeviceInfo::from_uapi(&self.0.info_by_path(id)?);
        info.capacity = self.0.places.capacity(id);
        Ok(info)
    }

    /// GET_QUEUE_AFFINITY: the CPUs whose I/O goes to this queue.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] if the device has no such queue.
    pub fn get_queue_affinity(&self, id: u32, queue: u16) -> Result<CpuSet> {
        let call = Call::new(C::GetQueueAffinity, id).data(queue.into()).payload(&[0; CPU_BYTES]);
        let answer = self.0.call_device_soon(call).map_err(|e| match e.errno() {
            Some(Errno::EINVAL) => match self.get_raw_info(id) {
                Ok(info) if queue >= info.nr_hw_queues => rules::no_such_queue(e, &info),
                _ => e,
            },
            _ => e,
        });
        let answer = answer.map_err(|e| e.on_queue(queue))?;
        Ok(CpuSet::from_words(answer.memory.chunks_exact(8).map(from_prefix)))
    }

    /// START_USER_RECOVERY: begins to serve a device whose former server is gone.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] while the former server, or a process that it forked, has `/dev/ublkcN`
    /// open, [`ErrorKind::WrongState`] if the device cannot be recovered.
    pub fn start_user_recovery(&self, id: u32) -> Result<()> {
        if let Ok(info) = self.get_raw_info(id) {
            rules::recoverable(C::StartUserRecovery, &info)?;
        }
        self.0.call_device_soon(Call::new(C::StartUserRecovery, id)).map(drop)
    }

    /// END_USER_RECOVERY: waits until every tag has been fetched again and lets I/O flow. When the
    /// wait is over first, the command is taken back.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongState`] if the device is not being recovered, [`ErrorKind::InvalidParameter`] with the wrong
    /// process.
    pub fn end_user_recovery(&self, id: u32, server_pid: i32, wait: &Wait) -> Result<()> {
        rules::server(C::EndUserRecovery, id, server_pid)?;
        if let Ok(info) = self.get_raw_info(id) {
            rules::recoverable(C::EndUserRecovery, &info)?;
        }
        let call = Call::new(C::EndUserRecovery, id).data(server_pid as u64);
        self.0.call_device(call, wait).map(drop)
    }

    /// UPDATE_SIZE: resizes a live disk, in bytes. The driver does not compare the size with the
    /// logical block size; this does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] if the size is not a multiple of the logical block size,
    /// [`ErrorKind::WrongState`] if there is no disk, [`ErrorKind::Unsupported`] from drivers
    /// without UPDATE_SIZE and for zoned disks, whose zones the kernel does not look for again.
    pub fn update_size(&self, id: u32, capacity: u64) -> Result<()> {
        let params = self.get_raw_params(id)?;
        rules::resizable(id, &params)?;
        let block = 1u64 << params.basic.logical_bs_shift.min(63);
        if !capacity.is_multiple_of(block.max(super::SECTOR)) || capacity > i64::MAX as u64 {
            return Err(Error::new(ErrorKind::InvalidParameter, C::UpdateSize.verb())
                .on_device(id)
                .because(format!(
                    "the capacity is a multiple of the logical block size ({block}) below 2^63 bytes, not {capacity}"
                )));
        }
        self.0
            .call_device_soon(Call::new(C::UpdateSize, id).data(capacity / super::SECTOR))
            .map(drop)
    }

    /// QUIESCE_DEV: takes a live, recoverable device from its server. `idle_ms` bounds the driver's
    /// own wait for idle tags, 0 for no bound.
    ///
    /// Drivers up to 7.3 do not see a queue whose tags are all with the server: repeat this once
    /// requests have drained.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if requests stay with the server, [`ErrorKind::WrongState`] without a
    /// disk, [`ErrorKind::Unsupported`] without QUIESCE.
    pub fn quiesce_dev(&self, id: u32, idle_ms: u64, wait: &Wait) -> Result<()> {
        let call = Call::new(C::QuiesceDev, id).data(idle_ms);
        self.0.call_device(call, wait).map(drop).map_err(|e| self.without_disk(id, e))
    }

    /// The driver says ENODEV both for a device without a disk and for no device.
    fn without_disk(&self, id: u32, error: Error) -> Error {
        if error.errno() != Some(Errno::ENODEV) {
            return error;
        }
        match self.get_raw_info(id) {
            Err(e) if e.kind() == ErrorKind::NoSuchDevice => answer::error(
                C::GetDevInfo,
                Some(id),
                Errno::ENODEV,
                self.0.features,
                self.0.encoding,
            ),
            _ => error,
        }
    }

    /// REG_BUF: shares memory of this process with the device, read-only if its flags say so.
    /// Returns the buffer's index. The driver freezes the disk for this: not from a thread that
    /// serves it.
    ///
    /// A registration that comes to be after its deadline is undone.
    ///
    /// The driver waits for the requests that are out, and keeps the device from every other command meanwhile. If the
    /// server goes in that time, they have nobody left who could answer them, and the device is lost until the machine
    /// starts again: make sure of the server. [`Device::share`](crate::Device::share) does.
    ///
    /// # Safety
    ///
    /// `buffer` names memory that stays mapped until it is unregistered or the device is gone, and
    /// that tolerates being written by clients of the disk at any time. If the wait ends first, it stays so until
    /// [`outstanding`](Self::outstanding) does not list the command any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] without SHMEM_ZC, [`ErrorKind::InvalidParameter`] for memory that
    /// is not whole pages, of at most 4 GiB in all, and for flags other than
    /// [`UBLK_SHMEM_BUF_READ_ONLY`](crate::uapi::UBLK_SHMEM_BUF_READ_ONLY), [`ErrorKind::WrongState`] if the device's
    /// server is gone, and until another has recovered it, [`ErrorKind::Io`] with `EEXIST` if a part of the memory is
    /// registered already.
    pub unsafe fn reg_buf(&self, id: u32, buffer: &ublk_shmem_buf_reg) -> Result<u32> {
        struct Nobody;
        impl Registrar for Nobody {
            fn registered(&self, _: u32) {}
            fn unregistered(&self, _: u32) {}
        }
        // SAFETY: the caller's promise.
        unsafe { self.reg_buf_for(id, buffer, Nobody) }
    }

    /// As [`reg_buf`](Self::reg_buf), with somebody who keeps the books, on the control thread.
    ///
    /// # Safety
    ///
    /// As [`reg_buf`](Self::reg_buf). It may be `registrar` that keeps the memory mapped while the command is under way:
    /// it is dropped when the driver has answered.
    pub(crate) unsafe fn reg_buf_for(
        &self,
        id: u32,
        buffer: &ublk_shmem_buf_reg,
        registrar: impl Registrar + 'static,
    ) -> Result<u32> {
        rules::shareable(id, buffer)?;
        self.check_served(C::RegBuf, id)?;
        let registrar = Arc::new(registrar);
        let theirs = Arc::clone(&registrar);
        let call = Call::new(C::RegBuf, id).payload(bytes_of(buffer));
        let call = call.heard(move |index| registrar.registered(index));
        let answer = self.0.call_device_soon(call.undone_by(move |answer, sender| {
            let index = answer.result.unsigned_abs();
            let mut call = Call::new(C::UnregBuf, id).data(index.into());
            call.with_path = sender.with_path;
            sender.work(call.heard(move |_| theirs.unregistered(index)))
        }))?;
        Ok(answer.result as u32)
    }

    /// UNREG_BUF: ends the sharing of the buffer with this index. Freezes the disk as
    /// [`reg_buf`](Self::reg_buf) does, with the same danger.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] without SHMEM_ZC, [`ErrorKind::InvalidParameter`] for an index above 65,535,
    /// [`ErrorKind::WrongState`] if the device's server is gone, [`ErrorKind::Io`] with `ENOENT` for an unknown index.
    pub fn unreg_buf(&self, id: u32, index: u32) -> Result<()> {
        self.unreg_buf_for(id, index, &Wait::for_(self.0.patience), || {})
    }

    /// As [`unreg_buf`](Self::unreg_buf), with somebody who hears of it on the control thread.
    pub(crate) fn unreg_buf_for(
        &self,
        id: u32,
        index: u32,
        wait: &Wait,
        unregistered: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        rules::index(id, index)?;
        self.check_served(C::UnregBuf, id)?;
        let call = Call::new(C::UnregBuf, id).data(index.into()).heard(|_| unregistered());
        self.0.call_device(call, wait).map(drop)
    }

    fn check_served(&self, command: C, id: u32) -> Result<()> {
        // What cannot be asked for is left to the driver to refuse.
        self.get_raw_info(id).map_or(Ok(()), |info| rules::served(command, &info))
    }

    /// How long commands without a [`Wait`] are waited for.
    pub(crate) fn patience(&self) -> Duration {
        self.0.patience
    }
}

/// Who keeps the books of a registration: hears of what the driver has done before the caller does, and also if that one
/// has given up.
pub(crate) trait Registrar: Send + Sync {
    fn registered(&self, index: u32);
    /// It was undone.
    fn unregistered(&self, index: u32);
}
