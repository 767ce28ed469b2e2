//! Another size for a disk that is in use.

use std::sync::PoisonError;

use super::life::{Life, Phase};
use super::running::Device;
use crate::control::Features;
use crate::error::{Error, ErrorKind, Result};

const ATTEMPT: &str = "resize the device";

impl Device {
    /// Gives the disk another size in bytes, a multiple of the logical block size. Its users see it at once;
    /// a file system on it has to be told (`resize2fs`), before the disk shrinks and after it has grown.
    ///
    /// The backend has to serve the larger of the two sizes while this is under way. Requests beyond the
    /// end of a disk that shrank may still be on their way to it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] from drivers without [`UPDATE_SIZE`](Features::UPDATE_SIZE) (before Linux
    /// 6.16) and for zoned disks, [`ErrorKind::InvalidParameter`] for a size that no disk has, [`ErrorKind::WrongState`] if the
    /// device is ending; [`ErrorKind::WouldDeadlock`] on one of its own threads.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        self.life().resize(bytes)
    }
}

impl Life {
    fn resize(&self, bytes: u64) -> Result<()> {
        self.check_process(ATTEMPT)?;
        // A stop keeps the driver's lock while it waits for requests that this very thread may have.
        self.check_thread(ATTEMPT)?;
        let fail = |kind| Error::new(kind, ATTEMPT).on_device(self.info.id);
        // The driver knows the command on every device, also on one that was added without the flag.
        let wanted = Features::UPDATE_SIZE;
        if !self.control.features().is_some_and(|f| f.contains(wanted)) {
            let since = wanted.since().unwrap_or_default();
            return Err(fail(ErrorKind::Unsupported)
                .because(format!("the kernel's driver lacks {wanted} (since Linux {since})")));
        }
        if bytes == 0 {
            return Err(
                fail(ErrorKind::InvalidParameter).because("a disk of no bytes is of no use")
            );
        }
        // Of two resizes the later one is what is remembered. The parameters themselves are not locked across the command:
        // who asks for the size may be what the driver waits for.
        let _one_at_a_time = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let params = self.params.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if params.zoned().is_some() {
            return Err(fail(ErrorKind::Unsupported)
                .because("the kernel does not look for other zones on a disk that is in use"));
        }
        let resized =
            params.to_builder().capacity(bytes).build().map_err(|e| e.on_device(self.info.id))?;
        if self.lock().phase != Phase::Live {
            return Err(fail(ErrorKind::WrongState).because("it is ending, or has ended"));
        }
        self.control.update_size(self.info.id, bytes)?;
        *self.params.lock().unwrap_or_else(PoisonError::into_inner) = resized;
        Ok(())
    }
}
