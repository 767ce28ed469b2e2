//! Submission queue entries for every ublk command.
//!
//! A command is the file (`/dev/ublk-control` or `/dev/ublkcN`), a number (`cmd_op`, SQE bytes 8 to
//! 11) and a struct at byte 48: 32 bytes for control, which needs 128-byte entries, 16 for I/O. The
//! driver reads nothing else of the entry, save `addr` with automatic buffer registration and in
//! batch commands; in particular it never reads `len`. Batch commands, whose fetch needs the
//! multishot flag that the `io-uring` crate lacks, get a file of their own beside this one.

use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types};

use crate::uapi::{self, bytes::bytes_of, ublk_auto_buf_reg, ublksrv_ctrl_cmd, ublksrv_io_cmd};

/// How the driver is told which command is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As ioctl numbers: every driver since Linux 6.4.
    #[default]
    Ioctl,
    /// As bare numbers: drivers before 6.4, and later ones built with
    /// `CONFIG_BLKDEV_UBLK_LEGACY_OPCODES`. Commands that are younger than the ioctl numbers have
    /// no bare one and are sent as ioctl.
    Legacy,
}

/// The file that a command goes to.
#[allow(dead_code, reason = "the data paths other than copying come with their own strategies")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// A file descriptor.
    Fd(types::Fd),
    /// An index in the ring's table of registered files.
    Fixed(types::Fixed),
}

macro_rules! control_commands {
    ($($variant:ident = $ioctl:ident, $legacy:expr, $verb:literal;)*) => {
        /// A control command, as [`crate::control::Control::outstanding`] and errors name it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ControlCommand {
            $(#[doc = concat!("`", stringify!($ioctl), "`: ", $verb, ".")] $variant,)*
        }

        impl ControlCommand {
            /// Every command.
            pub const ALL: &[ControlCommand] = &[$(ControlCommand::$variant),*];

            pub(crate) const fn cmd_op(self, encoding: Encoding) -> u32 {
                let (ioctl, legacy): (u32, Option<u32>) = match self {
                    $(ControlCommand::$variant => (uapi::$ioctl, $legacy),)*
                };
                match (encoding, legacy) {
                    (Encoding::Legacy, Some(number)) => number,
                    _ => ioctl,
                }
            }

            /// What the command does, as errors word it ("start the device").
            pub const fn verb(self) -> &'static str {
                match self {
                    $(ControlCommand::$variant => $verb,)*
                }
            }
        }
    };
}

control_commands! {
    AddDev = UBLK_U_CMD_ADD_DEV, Some(uapi::UBLK_CMD_ADD_DEV), "add the device";
    DelDev = UBLK_U_CMD_DEL_DEV, Some(uapi::UBLK_CMD_DEL_DEV), "delete the device";
    DelDevAsync = UBLK_U_CMD_DEL_DEV_ASYNC, None, "delete the device without waiting";
    StartDev = UBLK_U_CMD_START_DEV, Some(uapi::UBLK_CMD_START_DEV), "start the device";
    StopDev = UBLK_U_CMD_STOP_DEV, Some(uapi::UBLK_CMD_STOP_DEV), "stop the device";
    TryStopDev = UBLK_U_CMD_TRY_STOP_DEV, None, "stop the unused device";
    SetParams = UBLK_U_CMD_SET_PARAMS, Some(uapi::UBLK_CMD_SET_PARAMS), "set the device's parameters";
    GetParams = UBLK_U_CMD_GET_PARAMS, Some(uapi::UBLK_CMD_GET_PARAMS), "read the device's parameters";
    GetDevInfo = UBLK_U_CMD_GET_DEV_INFO, Some(uapi::UBLK_CMD_GET_DEV_INFO), "read the device's state";
    GetDevInfo2 = UBLK_U_CMD_GET_DEV_INFO2, Some(uapi::UBLK_CMD_GET_DEV_INFO2), "read the device's state by its path";
    GetQueueAffinity = UBLK_U_CMD_GET_QUEUE_AFFINITY, Some(uapi::UBLK_CMD_GET_QUEUE_AFFINITY), "read the queue's CPUs";
    GetFeatures = UBLK_U_CMD_GET_FEATURES, None, "read the driver's features";
    StartUserRecovery = UBLK_U_CMD_START_USER_RECOVERY, Some(uapi::UBLK_CMD_START_USER_RECOVERY), "begin to recover the device";
    EndUserRecovery = UBLK_U_CMD_END_USER_RECOVERY, Some(uapi::UBLK_CMD_END_USER_RECOVERY), "finish recovering the device";
    UpdateSize = UBLK_U_CMD_UPDATE_SIZE, None, "resize the device";
    QuiesceDev = UBLK_U_CMD_QUIESCE_DEV, None, "quiesce the device";
    RegBuf = UBLK_U_CMD_REG_BUF, None, "register a shared buffer";
    UnregBuf = UBLK_U_CMD_UNREG_BUF, None, "unregister a shared buffer";
}

/// The entry of a control command.
pub(crate) fn control(
    control: RawFd,
    command: ControlCommand,
    encoding: Encoding,
    header: &ublksrv_ctrl_cmd,
) -> squeue::Entry128 {
    let mut payload = [0u8; 80];
    payload[..size_of::<ublksrv_ctrl_cmd>()].copy_from_slice(bytes_of(header));
    opcode::UringCmd80::new(types::Fd(control), command.cmd_op(encoding)).cmd(payload).build()
}

/// What travels in the address field of a fetch or commit.
#[allow(dead_code, reason = "the data paths other than copying come with their own strategies")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TagBuffer {
    /// None: user copy, zero copy, or a buffer that NEED_GET_DATA names later.
    None,
    /// The tag's buffer; also what a READ's data is copied from when it is committed.
    Address(u64),
    /// Where a zone append went, in sectors; with a commit only.
    ZoneAppend(u64),
    /// Where the driver registers the next request's pages; and where a zone append went, or 0.
    AutoRegister { place: ublk_auto_buf_reg, append: u64 },
}

/// Entries of the commands of one tag at a time, for one `/dev/ublkcN`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoCommands {
    target: Target,
    encoding: Encoding,
}

#[allow(dead_code, reason = "the data paths other than copying come with their own strategies")]
impl IoCommands {
    pub(crate) const fn new(target: Target, encoding: Encoding) -> Self {
        IoCommands { target, encoding }
    }

    pub(crate) const fn target(&self) -> Target {
        self.target
    }

    /// Offers a tag to the kernel before the device starts.
    pub(crate) fn fetch(&self, q_id: u16, tag: u16, buffer: TagBuffer) -> squeue::Entry {
        let op = self.op(uapi::UBLK_U_IO_FETCH_REQ, uapi::UBLK_IO_FETCH_REQ);
        // The selftests pass -1 as the result of what has none.
        self.tag_command(op, q_id, tag, -1, buffer)
    }

    /// Commits a request's result, in bytes or a negated errno, and offers its tag again.
    pub(crate) fn commit_and_fetch(
        &self,
        q_id: u16,
        tag: u16,
        result: i32,
        buffer: TagBuffer,
    ) -> squeue::Entry {
        let op = self.op(uapi::UBLK_U_IO_COMMIT_AND_FETCH_REQ, uapi::UBLK_IO_COMMIT_AND_FETCH_REQ);
        self.tag_command(op, q_id, tag, result, buffer)
    }

    /// Names the buffer that a WRITE's data is to be copied into.
    pub(crate) fn need_get_data(&self, q_id: u16, tag: u16, address: u64) -> squeue::Entry {
        let op = self.op(uapi::UBLK_U_IO_NEED_GET_DATA, uapi::UBLK_IO_NEED_GET_DATA);
        self.tag_command(op, q_id, tag, -1, TagBuffer::Address(address))
    }

    /// Puts a request's pages into the ring's buffer table at `index`.
    pub(crate) fn register_io_buf(&self, q_id: u16, tag: u16, index: u16) -> squeue::Entry {
        let buffer = TagBuffer::Address(index.into());
        self.tag_command(uapi::UBLK_U_IO_REGISTER_IO_BUF, q_id, tag, 0, buffer)
    }

    /// Takes a request's pages out of the ring's buffer table at `index`.
    pub(crate) fn unregister_io_buf(&self, q_id: u16, tag: u16, index: u16) -> squeue::Entry {
        let buffer = TagBuffer::Address(index.into());
        self.tag_command(uapi::UBLK_U_IO_UNREGISTER_IO_BUF, q_id, tag, 0, buffer)
    }

    const fn op(&self, ioctl: u32, legacy: u32) -> u32 {
        match self.encoding {
            Encoding::Ioctl => ioctl,
            Encoding::Legacy => legacy,
        }
    }

    #[inline]
    fn tag_command(
        &self,
        op: u32,
        q_id: u16,
        tag: u16,
        result: i32,
        buffer: TagBuffer,
    ) -> squeue::Entry {
        let (addr, sqe_addr) = match buffer {
            TagBuffer::None => (0, None),
            TagBuffer::Address(addr) | TagBuffer::ZoneAppend(addr) => (addr, None),
            TagBuffer::AutoRegister { place, append } => {
                (append, Some(uapi::ublk_auto_buf_reg_to_sqe_addr(&place)))
            }
        };
        let mut cmd = [0u8; 16];
        cmd.copy_from_slice(bytes_of(&ublksrv_io_cmd { q_id, tag, result, addr }));
        match self.target {
            Target::Fd(fd) => opcode::UringCmd16::new(fd, op).cmd(cmd).addr(sqe_addr),
            Target::Fixed(index) => opcode::UringCmd16::new(index, op).cmd(cmd).addr(sqe_addr),
        }
        .build()
    }
}

/// An entry's bytes, for a ring of somebody else's.
pub(crate) fn raw_entry(entry: &squeue::Entry) -> [u8; 64] {
    const { assert!(size_of::<squeue::Entry>() == 64) };
    // SAFETY: `entry` is 64 bytes long (checked above), repr(C) around the kernel's struct, and the crate builds it from a
    // zeroed one, so that all are initialised.
    unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uapi::bytes::from_prefix;

    // An entry is a repr(C) struct around the kernel's, whose Debug shows the fields but not the
    // bytes.
    fn raw<const N: usize, E>(entry: &E) -> [u8; N] {
        assert_eq!(size_of::<E>(), N);
        // SAFETY: `entry` is `N` bytes long, and the crate builds it from a zeroed struct, so that
        // all are initialised.
        unsafe { std::ptr::from_ref(entry).cast::<[u8; N]>().read() }
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        from_prefix(&bytes[at..])
    }

    #[test]
    fn the_16_byte_command_sits_at_bytes_48_to_63_of_a_64_byte_entry() {
        let io = IoCommands::new(Target::Fd(types::Fd(9)), Encoding::Ioctl);
        let sqe: [u8; 64] = raw(&io.commit_and_fetch(3, 500, -5, TagBuffer::Address(0xAABB_CCDD)));
        assert_eq!(sqe[0], uapi::IORING_OP_URING_CMD);
        assert_eq!(sqe[1], 0, "flags");
        assert_eq!(word(&sqe, 4), 9, "fd");
        assert_eq!(word(&sqe, 8), 0xC010_7521, "cmd_op");
        assert_eq!(word(&sqe, 12), 0, "pad");
        assert_eq!(sqe[16..24], [0; 8], "addr");
        assert_eq!(word(&sqe, 24), 0, "len is never read and left zero");
        assert_eq!(word(&sqe, 28), 0, "uring_cmd_flags");
        let cmd: ublksrv_io_cmd = from_prefix(&sqe[48..]);
        assert_eq!(cmd, ublksrv_io_cmd { q_id: 3, tag: 500, result: -5, addr: 0xAABB_CCDD });
    }

    #[test]
    fn a_fetch_is_0xc0107520_and_0x20_in_the_old_encoding() {
        let op = |encoding| {
            let io = IoCommands::new(Target::Fd(types::Fd(0)), encoding);
            word(&raw::<64, _>(&io.fetch(0, 0, TagBuffer::None)), 8)
        };
        assert_eq!(op(Encoding::Ioctl), 0xC010_7520);
        assert_eq!(op(Encoding::Legacy), 0x20);
    }

    #[test]
    fn user_data_is_the_callers() {
        let io = IoCommands::new(Target::Fd(types::Fd(0)), Encoding::Ioctl);
        let entry = io.need_get_data(1, 2, 0x1000).user_data(0x1122_3344_5566_7788);
        let sqe: [u8; 64] = raw(&entry);
        assert_eq!(sqe[32..40], 0x1122_3344_5566_7788u64.to_ne_bytes());
        assert_eq!(word(&sqe, 8), 0xC010_7522);
    }

    #[test]
    fn a_registered_file_sets_the_flag() {
        let io = IoCommands::new(Target::Fixed(types::Fixed(7)), Encoding::Ioctl);
        let sqe: [u8; 64] = raw(&io.register_io_buf(1, 2, 33));
        assert_eq!(sqe[1], 1, "IOSQE_FIXED_FILE");
        assert_eq!(word(&sqe, 4), 7);
        assert_eq!(word(&sqe, 8), 0xC010_7523);
        assert_eq!(from_prefix::<ublksrv_io_cmd>(&sqe[48..]).addr, 33);
        let sqe: [u8; 64] = raw(&io.unregister_io_buf(1, 2, 33));
        assert_eq!(word(&sqe, 8), 0xC010_7524);
    }

    #[test]
    fn automatic_registration_travels_in_the_entrys_address() {
        let io = IoCommands::new(Target::Fd(types::Fd(0)), Encoding::Ioctl);
        let reg = ublk_auto_buf_reg {
            index: 5,
            flags: uapi::UBLK_AUTO_BUF_REG_FALLBACK,
            ..Default::default()
        };
        let auto = |append| TagBuffer::AutoRegister { place: reg, append };
        let sqe: [u8; 64] = raw(&io.commit_and_fetch(0, 1, 512, auto(88)));
        assert_eq!(sqe[16..24], 0x1_0005u64.to_ne_bytes());
        assert_eq!(from_prefix::<ublksrv_io_cmd>(&sqe[48..]).addr, 88, "both");
        let sqe: [u8; 64] = raw(&io.fetch(0, 1, auto(0)));
        assert_eq!(sqe[16..24], 0x1_0005u64.to_ne_bytes());
        assert_eq!(from_prefix::<ublksrv_io_cmd>(&sqe[48..]).addr, 0);
        let sqe: [u8; 64] = raw(&io.commit_and_fetch(0, 1, 512, TagBuffer::ZoneAppend(77)));
        assert_eq!(sqe[16..24], [0; 8]);
        assert_eq!(from_prefix::<ublksrv_io_cmd>(&sqe[48..]).addr, 77);
    }

    #[test]
    fn a_control_command_has_its_32_bytes_at_48_of_a_128_byte_entry() {
        let header = ublksrv_ctrl_cmd {
            dev_id: 7,
            queue_id: u16::MAX,
            len: 64,
            addr: 0x7fff_0000_1000,
            data: [42],
            dev_path_len: 12,
            ..Default::default()
        };
        let entry = control(5, ControlCommand::AddDev, Encoding::Ioctl, &header);
        let sqe: [u8; 128] = raw(&entry);
        assert_eq!(sqe[0], uapi::IORING_OP_URING_CMD);
        assert_eq!(word(&sqe, 4), 5);
        assert_eq!(word(&sqe, 8), 0xC020_7504);
        assert_eq!(from_prefix::<ublksrv_ctrl_cmd>(&sqe[48..]), header);
        assert_eq!(sqe[80..], [0; 48]);
    }

    #[test]
    fn control_commands_have_the_kernels_numbers() {
        let numbers: Vec<_> = ControlCommand::ALL
            .iter()
            .map(|c| (c.cmd_op(Encoding::Ioctl), c.cmd_op(Encoding::Legacy)))
            .collect();
        let expected = [
            (0xC020_7504, 0x04),
            (0xC020_7505, 0x05),
            (0x8020_7514, 0x8020_7514),
            (0xC020_7506, 0x06),
            (0xC020_7507, 0x07),
            (0xC020_7517, 0xC020_7517),
            (0xC020_7508, 0x08),
            (0x8020_7509, 0x09),
            (0x8020_7502, 0x02),
            (0x8020_7512, 0x12),
            (0x8020_7501, 0x01),
            (0x8020_7513, 0x8020_7513),
            (0xC020_7510, 0x10),
            (0xC020_7511, 0x11),
            (0xC020_7515, 0xC020_7515),
            (0xC020_7516, 0xC020_7516),
            (0xC020_7518, 0xC020_7518),
            (0xC020_7519, 0xC020_7519),
        ];
        assert_eq!(numbers, expected);
    }
}
