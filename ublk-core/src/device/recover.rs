//! Taking over a disk whose server is gone.
//!
//! A disk with USER_RECOVERY outlives its server: the driver quiesces it (or fails its I/O) when the
//! server's `/dev/ublkcN` is released. The next server announces itself (START_USER_RECOVERY), opens, maps and
//! fetches as at a start, and lets I/O flow (END_USER_RECOVERY). Nothing on this way deletes or stops the
//! device: a recovery that fails, or is killed, leaves it to the next.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::builder::Builder;
use super::life::{Ending, Life, PATIENCE, Phase, from_now};
use super::mend;
use super::running::Running;
use super::start::{Rise, Way};
use crate::backend::Capabilities;
use crate::control::{
    CancelToken, Control, DeviceInfo, DeviceParams, DeviceState, Features, SECTOR, Wait,
};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork::OwnFd;

const ATTEMPT: &str = "recover the device";
/// How long a server that seems to live is given: one that was killed is found alive until it has been
/// taken apart.
const GRACE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);

fn unprivileged(id: u32) -> Error {
    Error::new(ErrorKind::Unsupported, ATTEMPT)
        .on_device(id)
        .because("it is an UNPRIVILEGED_DEV, and the driver lets none of these be recovered")
        .remedy_is("delete it and add it again")
}

impl Builder {
    /// Takes over a device whose server is gone: one that was added with
    /// [`USER_RECOVERY`](Features::USER_RECOVERY).
    ///
    /// The disk stays as it is: queues, depth, block sizes, limits and features are the kernel's, and what the
    /// builder says of them does not count. But the size has to be the same (the present one, if the disk was
    /// resized), as has the [`fingerprint`](Self::fingerprint); a logical block size other than the default
    /// and required features are compared; and the backend has to be able to do what the disk advertises. So
    /// does its volatile cache: to a disk without one no flushes are sent.
    ///
    /// A former server that is just ending is waited for until [`start_timeout`](Self::start_timeout). Drivers
    /// before 6.16 need up to 30 seconds to notice a server's end if it had a request on every tag of a
    /// queue.
    ///
    /// If this fails, the device is as before and can be recovered again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSuchDevice`]; [`ErrorKind::Busy`] while its server lives; [`ErrorKind::WrongState`] if it
    /// was added without USER_RECOVERY or has no disk; [`ErrorKind::InvalidParameter`] if it is not the
    /// device that the builder describes; [`ErrorKind::Unsupported`] for features that this library does
    /// not serve, and with [`workers`](Self::workers): the queues of a recovery that fails could not be taken
    /// back from a shared worker.
    pub fn recover(self, id: u32, control: &Control) -> Result<Running> {
        self.plan()?;
        if self.workers.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, ATTEMPT)
                .on_device(id)
                .because("a recovered device needs workers of its own"));
        }
        if self.features.require.contains(Features::UNPRIVILEGED_DEV) {
            return Err(unprivileged(id));
        }
        let deadline = from_now(self.start_timeout);
        // Of an unprivileged device the driver answers this command only.
        let info = control.get_dev_info(id).or_else(|e| match e.kind() {
            ErrorKind::PermissionDenied | ErrorKind::InvalidParameter => control.get_dev_info2(id),
            _ => Err(e),
        })?;
        if info.features.contains(Features::UNPRIVILEGED_DEV) {
            return Err(unprivileged(id));
        }
        // Those of a device that was never started may be missing.
        check_state(&info)?;
        let params = params_of(control, id, deadline)?;
        self.fits(&info, &params).map_err(|e| e.on_device(id))?;
        let char_device = take(control, id, deadline, &self.cancel)?;
        let mut info = control.get_dev_info(id)?;
        info.capacity = Some(params.capacity());
        let pool = self.service.start(self.threads, &format!("ublk{id}-pool"))?;
        let life = Life::new(
            control.clone(),
            info,
            params,
            PathBuf::from(format!("/dev/ublkb{id}")),
            pool,
            false,
            char_device,
        );
        life.warn_of_memory_that_nobody_knows();
        let rise = Rise { builder: &self, info: &life.info, way: Way::Recover };
        match rise.bring_up(&life, deadline) {
            Ok(()) => Ok(Running::new(life, self)),
            Err(error) => {
                life.undo_recovery();
                Err(rise.cancelled(error))
            }
        }
    }

    /// Whether the device is the one that is described here.
    fn fits(&self, info: &DeviceInfo, params: &DeviceParams) -> Result<()> {
        let other =
            |cause: String| Err(Error::new(ErrorKind::InvalidParameter, ATTEMPT).because(cause));
        let alien = Self::unknown(info.features);
        if !alien.is_empty() {
            return Err(Error::new(ErrorKind::Unsupported, ATTEMPT)
                .because(format!("the device has {alien}, which this library cannot serve")));
        }
        self.serves(info)?;
        if info.server_flags != self.fingerprint && !self.force {
            return Err(Error::new(ErrorKind::InvalidParameter, ATTEMPT)
                .because(format!(
                    "it is another backend's: its fingerprint is {:#x}, this one's {:#x}",
                    info.server_flags, self.fingerprint
                ))
                .remedy_is("recover it with the backend that it was made for, or force it"));
        }
        let (asked, default) = (self.params.build()?, DeviceParams::builder(SECTOR).build()?);
        if params.capacity() != asked.capacity() {
            return other(format!(
                "the disk has {} bytes, not {}",
                params.capacity(),
                asked.capacity()
            ));
        }
        let (block, said) = (params.logical_block_size(), asked.logical_block_size());
        if said != default.logical_block_size() && said != block {
            return other(format!("the disk's logical blocks have {block} bytes, not {said}"));
        }
        let write = self.capabilities.contains(Capabilities::WRITE) && !self.read_only;
        let can = |capability| write && self.capabilities.contains(capability);
        let lacks = |what: &str| other(format!("the disk {what}, the backend cannot"));
        if !params.read_only() && !write {
            return lacks("can be written");
        }
        if params.integrity() != self.integrity {
            return other(format!(
                "the disk's metadata is {:?}, not {:?}",
                params.integrity(),
                self.integrity
            ));
        }
        if params.zoned() != self.zoned {
            return other(format!(
                "the disk's zones are {:?}, not {:?}",
                params.zoned(),
                self.zoned
            ));
        }
        if params.fua() && !can(Capabilities::FUA) {
            return lacks("takes FUA writes");
        }
        if params.discard().is_some() && !can(Capabilities::DISCARD) {
            return lacks("takes discards");
        }
        if params.max_write_zeroes_bytes() > 0 && !can(Capabilities::WRITE_ZEROES) {
            return lacks("takes writes of zeroes");
        }
        if !params.read_only() && params.volatile_cache() != can(Capabilities::FLUSH) {
            return other(format!(
                "the disk {} a volatile cache, the backend {}",
                if params.volatile_cache() { "has" } else { "has not" },
                if params.volatile_cache() { "has not" } else { "has" }
            ));
        }
        Ok(())
    }
}

/// Refuses what will not be recoverable however long one waits.
fn check_state(info: &DeviceInfo) -> Result<()> {
    let wrong =
        |cause| Err(Error::new(ErrorKind::WrongState, ATTEMPT).on_device(info.id).because(cause));
    if !info.features.contains(Features::USER_RECOVERY) {
        return wrong("it was added without USER_RECOVERY");
    }
    match info.state {
        DeviceState::Dead => wrong("it has no disk: it was never started, or was stopped"),
        _ => Ok(()),
    }
}

/// The disk's parameters. Drivers before 6.16 that are just noticing a server's end keep the device's lock for as
/// long as requests take to time out, which is longer than a command is usually waited for.
fn params_of(control: &Control, id: u32, deadline: Instant) -> Result<DeviceParams> {
    loop {
        match control.get_params(id) {
            Err(e) if e.kind() == ErrorKind::TimedOut && Instant::now() < deadline => {}
            params => return params,
        }
    }
}

/// Opens the device once its former server is gone and the driver ready for another.
fn take(control: &Control, id: u32, deadline: Instant, cancel: &CancelToken) -> Result<OwnFd> {
    let patience = Instant::now() + GRACE;
    let mut mended = !mend::is_needed(control);
    loop {
        let info = control.get_dev_info(id)?;
        check_state(&info)?;
        let now = Instant::now();
        if info.state == DeviceState::Live
            && now >= patience
            && let Some(pid) = info.server_pid.filter(|&pid| is_alive(pid))
        {
            return Err(Error::new(ErrorKind::Busy, ATTEMPT)
                .on_device(id)
                .because(format!("process {pid} serves it")));
        }
        match try_take(control, &info, &mut mended) {
            Err(e) if e.kind() == ErrorKind::Busy && cancel.is_cancelled() => {
                return Err(Error::new(ErrorKind::Cancelled, ATTEMPT)
                    .on_device(id)
                    .because("the caller has given it up")
                    .with_source(e));
            }
            Err(e) if e.kind() == ErrorKind::Busy && now < deadline => std::thread::sleep(POLL),
            taken => return taken,
        }
    }
}

fn try_take(control: &Control, info: &DeviceInfo, mended: &mut bool) -> Result<OwnFd> {
    let at_once = Wait::for_(Duration::ZERO);
    if info.state == DeviceState::Live {
        return Err(Error::new(ErrorKind::Busy, ATTEMPT)
            .on_device(info.id)
            .because("the driver has not finished with its former server"));
    }
    if !*mended {
        let file = control.open_char_device(info.id, &at_once)?;
        mend::complete_fetches(control, info, file)?;
        *mended = true;
    }
    control.start_user_recovery(info.id)?;
    // Another recovery may come first; then the whole turn is its.
    control.open_char_device(info.id, &at_once)
}

/// Whether a process is there and has not ended. If it cannot be seen, it is not.
fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The name, in parentheses, may contain anything.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

impl Life {
    /// After a failed recovery: everything but the device, which the driver quiesces again.
    fn undo_recovery(&self) {
        self.lock().phase = Phase::Ending;
        self.wait_answered(Instant::now() + PATIENCE);
        self.let_go(true);
        // A handle of it that somebody kept must not delete what is the next server's.
        self.lock().deleted = true;
        self.set_ended(Ending::Failed);
    }
}
