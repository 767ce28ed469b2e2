//! A zoned disk in memory: `zoned_disk SIZE_IN_BYTES ZONE_IN_BYTES`, both powers of two.
//!
//! Its first zone takes writes anywhere, the others at their write pointers only, and four of them may be open at a time.
//! At the end of stdin it says what each zone holds, and stops the disk. `blkzone report`, zonefs, btrfs and f2fs know
//! what to do with one. A backend of your own has `report_zones`, `append` and `zone_action`, see `ublk_core::Backend`.

use std::error::Error;
use std::io;
use std::time::Duration;

use ublk_core::targets::ZonedMem;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [size, zone] = &args[..] else { return Err("SIZE_IN_BYTES ZONE_IN_BYTES".into()) };
    let mem =
        ZonedMem::options().conventional(1).max_open(4).create(size.parse()?, zone.parse()?)?;
    let disk = mem.builder().start()?;
    println!("{}", disk.path().display());
    io::copy(&mut io::stdin(), &mut io::sink())?;
    disk.stop(Duration::from_secs(30))?;
    for zone in mem.zones() {
        let written = zone.write_pointer.saturating_sub(zone.start);
        println!("{:#x}: {:?}, {:?}, {written} bytes", zone.start, zone.kind, zone.state);
    }
    Ok(())
}
