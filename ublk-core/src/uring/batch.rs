//! Entries of batch commands: one for many tags (`UBLK_F_BATCH_IO`).
//!
//! They carry what the `io-uring` crate's command does not: the multishot flag and a group of buffers.

use io_uring::{opcode, squeue};

use super::sqe::Target;
use crate::uapi::{self, bytes::bytes_of, ublk_batch_io, ublk_elem_header};

/// Bytes that a fetch delivers at once, at most (`MAX_NR_TAG` in the driver).
pub(crate) const FETCH_BYTES: usize = 256;

/// What the elements of a queue's batches look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Tag and result.
    Plain,
    /// And the address of the tag's buffer.
    Address,
    /// And the place where the driver registers the next request's pages.
    AutoRegister,
    /// As `Plain`, and where a zone append went.
    Zoned,
    /// As `AutoRegister`, and where a zone append went.
    AutoRegisterZoned,
}

impl Layout {
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Layout::Plain | Layout::AutoRegister => size_of::<ublk_elem_header>(),
            Layout::Address | Layout::Zoned | Layout::AutoRegisterZoned => {
                size_of::<ublk_elem_header>() + size_of::<u64>()
            }
        }
    }

    const fn flags(self) -> u16 {
        match self {
            Layout::Plain => 0,
            Layout::Address => uapi::UBLK_BATCH_F_HAS_BUF_ADDR,
            Layout::AutoRegister => uapi::UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK,
            Layout::Zoned => uapi::UBLK_BATCH_F_HAS_ZONE_LBA,
            Layout::AutoRegisterZoned => {
                uapi::UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK | uapi::UBLK_BATCH_F_HAS_ZONE_LBA
            }
        }
    }

    pub(crate) const fn registers(self) -> bool {
        matches!(self, Layout::AutoRegister | Layout::AutoRegisterZoned)
    }

    /// Appends an element. `buffer` is an address or a place in the table of buffers, as the layout wants it;
    /// `append` the sector that a zone append went to.
    pub(crate) fn put(
        self,
        elements: &mut Vec<u8>,
        tag: u16,
        result: i32,
        buffer: u64,
        append: u64,
    ) {
        let index = if self.registers() { buffer as u16 } else { 0 };
        elements.extend_from_slice(bytes_of(&ublk_elem_header { tag, buf_index: index, result }));
        match self {
            Layout::Plain | Layout::AutoRegister => {}
            Layout::Address => elements.extend_from_slice(&buffer.to_ne_bytes()),
            Layout::Zoned | Layout::AutoRegisterZoned => {
                elements.extend_from_slice(&append.to_ne_bytes());
            }
        }
    }

    /// The tag of an element.
    pub(crate) fn tag(self, element: &[u8]) -> u16 {
        u16::from_ne_bytes([element[0], element[1]])
    }
}

/// Batch commands of one queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchCommands {
    target: Target,
    queue: u16,
    layout: Layout,
}

impl BatchCommands {
    pub(crate) const fn new(target: Target, queue: u16, layout: Layout) -> Self {
        BatchCommands { target, queue, layout }
    }

    pub(crate) const fn layout(&self) -> Layout {
        self.layout
    }

    /// Offers the elements' tags to the kernel. It reads them when it takes the entry.
    pub(crate) fn prepare(&self, elements: &[u8]) -> squeue::Entry {
        self.with_elements(uapi::UBLK_U_IO_PREP_IO_CMDS, elements)
    }

    /// Commits the elements' results and offers their tags again. The kernel reads them when it takes the entry.
    pub(crate) fn commit(&self, elements: &[u8]) -> squeue::Entry {
        self.with_elements(uapi::UBLK_U_IO_COMMIT_IO_CMDS, elements)
    }

    fn with_elements(&self, op: u32, elements: &[u8]) -> squeue::Entry {
        let size = self.layout.bytes();
        let command = ublk_batch_io {
            q_id: self.queue,
            flags: self.layout.flags(),
            nr_elem: (elements.len() / size) as u16,
            elem_bytes: size as u8,
            ..Default::default()
        };
        self.entry(op, &command, Some(elements.as_ptr() as u64))
    }

    /// Has the kernel deliver tags of requests, in buffers of a group, until it says otherwise.
    pub(crate) fn fetch(&self, group: u16) -> squeue::Entry {
        let command = ublk_batch_io {
            q_id: self.queue,
            elem_bytes: size_of::<u16>() as u8,
            ..Default::default()
        };
        let entry = self
            .entry(uapi::UBLK_U_IO_FETCH_IO_CMDS, &command, None)
            .flags(squeue::Flags::BUFFER_SELECT);
        multishot(entry, group)
    }

    fn entry(&self, op: u32, command: &ublk_batch_io, addr: Option<u64>) -> squeue::Entry {
        let mut cmd = [0u8; 16];
        cmd.copy_from_slice(bytes_of(command));
        match self.target {
            Target::Fd(fd) => opcode::UringCmd16::new(fd, op).cmd(cmd).addr(addr),
            Target::Fixed(index) => opcode::UringCmd16::new(index, op).cmd(cmd).addr(addr),
        }
        .build()
    }
}

/// Sets the multishot flag and the group of buffers.
fn multishot(mut entry: squeue::Entry, group: u16) -> squeue::Entry {
    const { assert!(size_of::<squeue::Entry>() == 64) };
    let bytes = (&raw mut entry).cast::<[u8; 64]>();
    // SAFETY: an entry is a repr(C) struct around the kernel's `io_uring_sqe` of 64 bytes, all of which may have any
    // value; it is ours.
    let bytes = unsafe { &mut *bytes };
    bytes[28..32].copy_from_slice(&uapi::IORING_URING_CMD_MULTISHOT.to_ne_bytes());
    bytes[40..42].copy_from_slice(&group.to_ne_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use io_uring::types;

    use super::*;
    use crate::uapi::bytes::from_prefix;

    fn raw(entry: &squeue::Entry) -> [u8; 64] {
        // SAFETY: as in `multishot`.
        unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() }
    }

    #[test]
    fn a_fetch_is_multishot_and_names_its_group() {
        let commands = BatchCommands::new(Target::Fixed(types::Fixed(4)), 3, Layout::Address);
        let sqe = raw(&commands.fetch(0x1234));
        assert_eq!(sqe[0], uapi::IORING_OP_URING_CMD);
        assert_eq!(sqe[1], 1 | 1 << 5, "IOSQE_FIXED_FILE and IOSQE_BUFFER_SELECT");
        assert_eq!(sqe[8..12], 0xC010_7527u32.to_ne_bytes());
        assert_eq!(sqe[28..32], 2u32.to_ne_bytes());
        assert_eq!(sqe[40..42], 0x1234u16.to_ne_bytes());
        let command: ublk_batch_io = from_prefix(&sqe[48..]);
        assert_eq!(command, ublk_batch_io { q_id: 3, elem_bytes: 2, ..Default::default() });
    }

    #[test]
    fn elements_are_as_long_as_the_command_says() {
        for (layout, bytes, flags) in [
            (Layout::Plain, 8, 0),
            (Layout::Address, 16, 2),
            (Layout::AutoRegister, 8, 4),
            (Layout::Zoned, 16, 1),
            (Layout::AutoRegisterZoned, 16, 5),
        ] {
            let mut elements = Vec::new();
            layout.put(&mut elements, 7, -5, 0xABCD, 0x1234);
            layout.put(&mut elements, 9, 4096, 0xABCE, 0);
            assert_eq!(elements.len(), 2 * bytes);
            let first: ublk_elem_header = from_prefix(&elements);
            let index = if flags & 4 != 0 { 0xABCD } else { 0 };
            assert_eq!(first, ublk_elem_header { tag: 7, buf_index: index, result: -5 });
            assert_eq!(layout.tag(&elements[bytes..]), 9);
            if layout == Layout::Address {
                assert_eq!(elements[8..16], 0xABCDu64.to_ne_bytes());
            }
            if flags & 1 != 0 {
                assert_eq!(elements[8..16], 0x1234u64.to_ne_bytes());
            }
            let commands = BatchCommands::new(Target::Fd(types::Fd(4)), 1, layout);
            for (entry, op) in [
                (commands.prepare(&elements), 0xC010_7525u32),
                (commands.commit(&elements), 0xC010_7526),
            ] {
                let sqe = raw(&entry);
                assert_eq!(sqe[8..12], op.to_ne_bytes());
                assert_eq!(sqe[16..24], (elements.as_ptr() as u64).to_ne_bytes());
                let command: ublk_batch_io = from_prefix(&sqe[48..]);
                assert_eq!((command.nr_elem, command.elem_bytes), (2, bytes as u8));
                assert_eq!(command.flags, flags);
            }
        }
    }
}
