//! A disk that goes and a device that stays: back from running to added.
//!
//! STOP removes the disk and leaves the device. Whether the driver starts it again depends on what it does when
//! `/dev/ublkcN` is closed. Linux 7.3 forgets the former fetches then, with or without a disk
//! (`ublk_ch_release_work_fn`). Older drivers do so only while there is a disk, or not at all, and refuse the
//! next fetches. No feature says which; so a driver is believed to restart devices if it has the youngest
//! feature that was seen together with this.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::life::{Ending, Life, PATIENCE, Phase};
use super::stop::Manner;
use crate::control::{DeviceInfo, DeviceParams, Features, Wait};
use crate::error::{Error, ErrorKind, Result};

const ATTEMPT: &str = "halt the device";
/// Comes with drivers that start a device again.
const TOKEN: Features = Features::IO_DESC_SIZE;

impl Life {
    /// Stops the disk when nobody uses it, and leaves the device to the caller, who gets what it is by now.
    pub(super) fn halt(&self, wait: &Wait) -> Result<(DeviceInfo, DeviceParams)> {
        self.check_process(ATTEMPT)?;
        self.check_thread(ATTEMPT)?;
        let fail = |kind| Error::new(kind, ATTEMPT).on_device(self.info.id);
        if !self.control.features().is_some_and(|f| f.contains(TOKEN)) {
            return Err(fail(ErrorKind::Unsupported)
                .because(format!(
                    "the kernel's driver starts no device a second time (since Linux {}, by all that is known)",
                    TOKEN.since().unwrap_or_default()
                ))
                .remedy_is("stop it, and make a new one"));
        }
        {
            let mut state = self.lock();
            if state.phase != Phase::Live || state.has_failed() {
                return Err(fail(ErrorKind::WrongState).because("it is ending, or has ended"));
            }
            state.phase = Phase::Ending;
        }
        // Not by TRY_STOP: after that only the privileged may open the disk, for as long as the device lives.
        if let Err(error) = self.stop_when_free(wait, false) {
            self.resume();
            return Err(error);
        }
        let mut leftovers = Vec::new();
        self.remove_disk(wait, &mut leftovers);
        self.release(PATIENCE, &mut leftovers);
        // Without a disk the driver waits for nobody.
        if leftovers.is_empty()
            && let Err(error) = self.unshare_all(Instant::now() + PATIENCE)
        {
            leftovers.push(error.to_string());
        }
        let failure = self.failure();
        if failure.is_some() || !leftovers.is_empty() {
            let ending = if failure.is_some() { Ending::Failed } else { Ending::Stopped };
            self.set_ended(ending);
            self.delete(Manner::Forced, &mut leftovers);
            return Err(failure.unwrap_or_else(|| {
                fail(ErrorKind::TimedOut)
                    .because(format!("it was stopped and deleted: {}", leftovers.join("; ")))
            }));
        }
        // By whoever has it next; not by handles that somebody keeps.
        self.lock().deleted = true;
        self.set_ended(Ending::Stopped);
        // A resize that the driver has done may not have been remembered yet.
        drop(self.resizing.lock().unwrap_or_else(PoisonError::into_inner));
        let params = self.params.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut info = self.info.clone();
        info.capacity = Some(params.capacity());
        Ok((info, params))
    }
}

/// Repeats what the driver refuses until the last reference to the former disk is gone, which a stop does not
/// wait for.
pub(super) fn once_the_old_disk_is_gone(mut set: impl FnMut() -> Result<()>) -> Result<()> {
    const STEP: Duration = Duration::from_millis(5);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match set() {
            Err(e) if e.kind() == ErrorKind::WrongState && Instant::now() < deadline => {
                std::thread::sleep(STEP);
            }
            done => return done,
        }
    }
}
