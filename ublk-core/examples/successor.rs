//! A disk that changes its server while it is used: `successor FILE SIZE_IN_BYTES [ID]`.
//!
//! Without an ID it serves FILE as a disk that outlives its server. With one it is the next server of that device: it
//! waits until the present one hands the disk over, or has died, and goes on where that stopped. Whoever uses the disk,
//! a mounted file system for instance, waits for a moment and sees no error.
//!
//! The line `next` on stdin has it hand the disk over (Linux 6.16); at the end of stdin it stops the disk.

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use ublk_core::control::{Control, Features};
use ublk_core::targets::File;
use ublk_core::{Builder, ErrorKind, Running};

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, size, id @ ..] = &args[..] else { return Err("FILE SIZE_IN_BYTES [ID]".into()) };
    let size = size.parse()?;
    let disk = match id {
        [] => describe(path, size)?.start()?,
        [id, ..] => succeed(path, size, id.parse()?)?,
    };
    println!("{}", disk.path().display());
    for line in io::stdin().lines() {
        if line? == "next" {
            disk.hand_over(PATIENCE)?;
            println!("handed over");
            return Ok(());
        }
    }
    disk.stop(PATIENCE)?;
    Ok(())
}

/// Each server describes the same disk. The fingerprint keeps another one's data from being taken for it.
fn describe(path: &str, size: u64) -> ublk_core::Result<Builder> {
    let file = File::options().create(size).open(path)?;
    Ok(file.builder().fingerprint(0x5ec0_11d5).require(Features::USER_RECOVERY))
}

/// A recovery waits two seconds for a server that lives, and is Busy then.
fn succeed(path: &str, size: u64, id: u32) -> ublk_core::Result<Running> {
    let control = Control::open()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match describe(path, size)?.recover(id, &control) {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < deadline => {}
            done => return done,
        }
    }
}
