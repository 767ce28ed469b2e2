//! A disk in memory, in 20 lines: `ramdisk [SIZE_IN_BYTES]`.

use std::{io, sync::RwLock};
use ublk_core::{Backend, Builder, Capabilities, RequestFlags};

struct Ram(RwLock<Vec<u8>>);

impl Backend for Ram {
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        buf.copy_from_slice(&self.0.read().unwrap()[offset as usize..][..buf.len()]);
        Ok(buf.len())
    }
    fn write(&self, data: &[u8], offset: u64, _: RequestFlags) -> io::Result<usize> {
        self.0.write().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(data.len())
    }
}

fn main() -> ublk_core::Result<()> {
    let size = std::env::args().nth(1).map_or(64 << 20, |s| s.parse().expect("a size in bytes"));
    let disk = Builder::new(size, Ram(RwLock::new(vec![0; size as usize]))).start()?;
    println!("{}", disk.path().display());
    disk.wait()?;
    Ok(())
}
