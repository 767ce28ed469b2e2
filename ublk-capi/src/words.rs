//! The library's errors speak of its builder and its methods; here they say the same in C's words.

/// What the library says, and what it is called in C. The longer ones come first where one is in another.
const WORDS: &[(&str, &str)] = &[
    ("use Builder::allow_many_unprivileged", "set the option allow_many_unprivileged"),
    (
        "make a device of your own: require(Features::UNPRIVILEGED_DEV)",
        "make a device of your own: the option require with UNPRIVILEGED_DEV",
    ),
    ("is asked for by Builder::data_path", "is asked for by the option data_path"),
    ("ZONED is asked for by Builder::zoned", "ZONED is asked for by the option zone_bytes"),
    (
        "a backend with ZONED needs to know its zones: Builder::zoned",
        "a backend with report_zones needs to know its zones: the option zone_bytes",
    ),
    (
        "zones are for a backend with the capability ZONED",
        "zone_bytes is for a backend with report_zones, or with submit",
    ),
    (
        "INTEGRITY is asked for by Builder::integrity",
        "INTEGRITY is asked for by the option integrity_metadata_size",
    ),
    (
        "a backend with INTEGRITY needs to know its metadata: Builder::integrity",
        "a backend with INTEGRITY needs to know its metadata: the option integrity_metadata_size",
    ),
    (
        "metadata is for a backend with the capability INTEGRITY",
        "integrity_metadata_size is for a backend with submit, and for the target mem",
    ),
    ("set them first (Control::set_params)", "set them first"),
    ("and these are to be said: Builder::zoned", "and these are to be said: the option zone_bytes"),
    ("require the feature when the device is built", "set the option require to SHMEM_ZC"),
    (
        "recover the device first (Builder::recover)",
        "recover the device first (ublk_rs_device_recover)",
    ),
    ("make it anew of its file (SharedBuffer::from_memfd)", "share its file again"),
    ("open the driver with ControlOptions::device_paths(true)", "have it done by who serves it"),
    (", or say where it is (ControlOptions::dev_dir)", ""),
    (", or ask for Encoding::Ioctl", ""),
    ("delete it (Control::delete)", "delete it (ublk_rs_control_delete)"),
    (
        "open another Control in the child",
        "open the driver again in the child (ublk_rs_control_open)",
    ),
    ("use stop_force to pull it", "use ublk_rs_device_stop_force to pull it"),
    (
        "require it of the builder; QUIESCE then comes by itself",
        "set the option require to USER_RECOVERY; QUIESCE then comes by itself",
    ),
    (
        "add it with USER_RECOVERY alone, or with USER_RECOVERY_REISSUE",
        "set the option require to USER_RECOVERY, with USER_RECOVERY_REISSUE or without",
    ),
    (
        "add it with USER_RECOVERY_REISSUE, or use a newer kernel",
        "set the option require to USER_RECOVERY,USER_RECOVERY_REISSUE, or use a newer kernel",
    ),
    (
        "a backend with FUA needs FLUSH: the kernel knows",
        "fua needs a backend with flush: the kernel knows",
    ),
    (
        "recover it with the backend that it was made for, or force it",
        "recover it with the backend that it was made for, or set the option force",
    ),
    (
        "drop that capability, or prefer the feature where either kind of device will do",
        "leave that out, or set the option prefer where either kind of device will do",
    ),
    ("leave discard out instead", "leave discard_max_bytes out instead"),
    ("the queue depth is", "queue_depth is"),
    ("the logical block size is", "logical_block_size is"),
    ("the physical block size is", "physical_block_size is"),
    ("the minimal I/O size is", "io_min is"),
    ("the optimal I/O size is", "io_opt is"),
    ("the DMA alignment is", "dma_alignment is"),
    ("the discard granularity is", "discard_granularity is"),
    ("the largest discard is", "discard_max_bytes is"),
    ("the largest WRITE_ZEROES is", "write_zeroes_max_bytes is"),
    ("the largest I/O is", "max_io_bytes is"),
    ("open it without `direct`", "leave the option direct out"),
    ("have it created with a size", "set the options create and size"),
    ("open it read-only", "set the option read_only"),
];

/// A text of the library's as a user of the C library reads it.
pub(crate) fn of_c(text: &str) -> String {
    WORDS.iter().fold(text.to_owned(), |text, (theirs, ours)| text.replace(theirs, ours))
}
