//! Nodes whose owner and mode a test changes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

/// The node of the driver.
pub(crate) const CONTROL: &str = "/dev/ublk-control";

/// Owner and mode of a node as they were: they are again when this is dropped, so that the next test in this machine
/// finds what a system has.
pub(crate) struct AsItWas {
    path: &'static str,
    owner: (u32, u32),
    mode: u32,
}

impl AsItWas {
    pub(crate) fn of(path: &'static str) -> Self {
        let now = Path::new(path).metadata().unwrap();
        AsItWas { path, owner: (now.uid(), now.gid()), mode: now.mode() & 0o7777 }
    }
}

impl Drop for AsItWas {
    fn drop(&mut self) {
        let _ = chown(self.path, Some(self.owner.0), Some(self.owner.1));
        let _ = fs::set_permissions(self.path, fs::Permissions::from_mode(self.mode));
    }
}
