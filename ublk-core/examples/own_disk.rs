//! A disk of an ordinary user, in memory: `own_disk SIZE_IN_BYTES`, not as root.
//!
//! It takes what docs/unprivileged.md has the administrator do once: the group `ublk` and a udev rule. At the end of stdin
//! it stops the disk.

use std::error::Error;
use std::io;
use std::time::Duration;

use ublk_core::control::Features;
use ublk_core::targets::Mem;

fn main() -> Result<(), Box<dyn Error>> {
    let size = std::env::args().nth(1).ok_or("SIZE_IN_BYTES")?.parse()?;
    // Without this line the driver wants root; with it, it refuses root.
    let disk = Mem::new(size).builder().require(Features::UNPRIVILEGED_DEV).start()?;
    println!("{}", disk.path().display());
    io::copy(&mut io::stdin(), &mut io::sink())?;
    disk.stop(Duration::from_secs(30))?;
    Ok(())
}
