//! A disk in memory, used once, and the proof that it leaves nothing.

use ublk_core::{Builder, Device};

use super::{Client, Held, Ram, SOON, no_devices};

pub(crate) fn ram() -> Builder {
    Builder::new(1 << 20, Ram::new(1 << 20)).queue_depth(8)
}

/// After a warm-up, so that what the first device of a process makes for good does not count.
pub(crate) fn nothing_is_left_by(run: impl FnOnce()) {
    ram().start().unwrap().stop(SOON).unwrap();
    no_devices();
    let before = Held::now();
    run();
    before.is_again();
    no_devices();
}

pub(crate) fn write_and_read(disk: &Device) {
    let client = Client::open(disk.path());
    let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(client.write(4096, &data).unwrap(), data.len());
    assert_eq!(client.read(4096, data.len()).unwrap(), data);
}
