//! The library's errors speak of its builder and its methods; here they say the same in Python's words.

/// What the library says, and what it is called in Python. The longer ones come first where one is in another.
const WORDS: &[(&str, &str)] = &[
    ("use Builder::allow_many_unprivileged", "use allow_many_unprivileged=True"),
    (
        "make a device of your own: require(Features::UNPRIVILEGED_DEV)",
        "make a device of your own: unprivileged=True",
    ),
    ("is asked for by Builder::data_path", "is asked for by data_path="),
    ("ZONED is asked for by Builder::zoned", "ZONED is asked for by zoned="),
    (
        "a backend with ZONED needs to know its zones: Builder::zoned",
        "a backend with report_zones() needs to know its zones: zoned=",
    ),
    (
        "zones are for a backend with the capability ZONED",
        "zoned= is for a backend with report_zones(), or with handle()",
    ),
    (
        "a backend with INTEGRITY needs to know its metadata: Builder::integrity",
        "a backend with INTEGRITY needs to know its metadata: integrity=",
    ),
    ("INTEGRITY is asked for by Builder::integrity", "INTEGRITY is asked for by integrity="),
    ("set them first (Control::set_params)", "set them first"),
    ("and these are to be said: Builder::zoned", "and these are to be said: zoned="),
    ("require the feature when the device is built", "use require=[\"SHMEM_ZC\"]"),
    ("recover the device first (Builder::recover)", "recover the device first (ublk.recover)"),
    (
        "make it anew of its file (SharedBuffer::from_memfd)",
        "make it anew of its file (SharedBuffer.from_fd)",
    ),
    ("open the driver with ControlOptions::device_paths(true)", "have it done by who serves it"),
    (", or say where it is (ControlOptions::dev_dir)", ""),
    (", or ask for Encoding::Ioctl", ""),
    ("delete it (Control::delete)", "delete it (ublk.delete)"),
    ("use stop_force to pull it", "use stop_force() to pull it"),
    (
        "require it of the builder; QUIESCE then comes by itself",
        "make it with recovery=\"wait\" or \"reissue\"; QUIESCE then comes by itself",
    ),
    (
        "add it with USER_RECOVERY alone, or with USER_RECOVERY_REISSUE",
        "make it with recovery=\"wait\" or \"reissue\"",
    ),
    (
        "add it with USER_RECOVERY_REISSUE, or use a newer kernel",
        "make it with recovery=\"reissue\", or use a newer kernel",
    ),
    (
        "a backend with FUA needs FLUSH: the kernel knows",
        "fua= needs a flush(), and a cache: the kernel knows",
    ),
    (
        "recover it with the backend that it was made for, or force it",
        "recover it with the backend that it was made for, or use force=True",
    ),
    (
        "drop that capability, or prefer the feature where either kind of device will do",
        "drop that capability, or use prefer=[\"UNPRIVILEGED_DEV\"] where either kind of device will do",
    ),
    ("a discard limit is for", "trim_granularity= and max_trim_size= are for"),
    ("a limit of writes of zeroes is for", "max_zero_size= is for"),
    ("leave discard out instead", "leave max_trim_size out instead"),
    ("the largest I/O is", "max_io_size is"),
    ("the queue depth is", "depth is"),
    ("there must be 1 to the queue depth", "there must be 1 to the depth"),
    ("BATCH_IO needs a queue depth of", "BATCH_IO needs a depth of"),
    ("the logical block size is", "block_size is"),
    ("the physical block size is", "physical_block_size is"),
    ("the minimal I/O size is", "io_min is"),
    ("the optimal I/O size is", "io_opt is"),
    ("the DMA alignment is", "dma_alignment is"),
    ("the discard granularity is", "trim_granularity is"),
    ("the largest discard is", "max_trim_size is"),
    ("the largest WRITE_ZEROES is", "max_zero_size is"),
    ("the capacity is", "size is"),
    ("open it without `direct`", "open it without direct=True"),
    ("have it created with a size", "have it made by create="),
    ("open it read-only", "use read_only=True"),
];

/// A text of the library's as a user of the Python package reads it.
pub(crate) fn pythonic(text: &str) -> String {
    WORDS.iter().fold(text.to_owned(), |text, (theirs, ours)| text.replace(theirs, ours))
}
