//! Integrity metadata of a disk: what is kept beside its data, and what the kernel does with it.

use super::params::{Checked, Fields, SECTOR, rule};
use crate::uapi;

/// The checksum in protection information.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Checksum {
    /// None: the metadata is opaque, and the kernel neither makes nor verifies it.
    #[default]
    None,
    /// IP's, in 8 bytes of T10 protection information.
    Ip,
    /// T10 DIF's CRC of 16 bits, in 8 bytes of T10 protection information.
    T10Dif,
    /// NVMe's CRC of 64 bits, in 16 bytes of protection information.
    Nvme,
}

impl Checksum {
    /// Bytes of the protection information.
    pub const fn tuple_size(self) -> u8 {
        match self {
            Checksum::None => 0,
            Checksum::Ip | Checksum::T10Dif => 8,
            Checksum::Nvme => 16,
        }
    }

    pub(super) fn to_uapi(self) -> u8 {
        match self {
            Checksum::None => uapi::LBMD_PI_CSUM_NONE,
            Checksum::Ip => uapi::LBMD_PI_CSUM_IP,
            Checksum::T10Dif => uapi::LBMD_PI_CSUM_CRC16_T10DIF,
            Checksum::Nvme => uapi::LBMD_PI_CSUM_CRC64_NVME,
        }
    }

    pub(super) fn from_uapi(csum: u8) -> Self {
        match csum {
            uapi::LBMD_PI_CSUM_IP => Checksum::Ip,
            uapi::LBMD_PI_CSUM_CRC16_T10DIF => Checksum::T10Dif,
            uapi::LBMD_PI_CSUM_CRC64_NVME => Checksum::Nvme,
            _ => Checksum::None,
        }
    }
}

/// Metadata that a disk keeps beside its data (`UBLK_F_INTEGRITY`, since Linux 7.0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Integrity {
    /// Bytes of metadata for each interval, not 0.
    pub metadata_size: u8,
    /// Bytes of data that one piece of metadata is for: a power of two from 512 to the logical block size.
    pub interval: u32,
    /// The checksum of the protection information in it, which the kernel makes for writes and verifies for reads.
    pub checksum: Checksum,
    /// Where in each piece of metadata the protection information starts; it has to fit.
    pub pi_offset: u8,
    /// Bytes of the application's tag, for those who look at `/sys/block/*/integrity`.
    pub tag_size: u8,
    /// Whether the protection information counts blocks, which needs a checksum.
    pub reference_tags: bool,
    /// Whether the server itself makes and verifies protection information, for those who look at
    /// `/sys/block/*/integrity`.
    pub capable: bool,
}

impl Integrity {
    /// Protection information of this checksum and nothing else, for each interval.
    pub const fn protection(checksum: Checksum, interval: u32) -> Self {
        Integrity {
            metadata_size: checksum.tuple_size(),
            interval,
            checksum,
            pi_offset: 0,
            tag_size: 0,
            reference_tags: !matches!(checksum, Checksum::None),
            capable: false,
        }
    }

    /// Bytes of metadata for a range of `bytes`.
    pub const fn metadata_bytes(&self, bytes: u64) -> u64 {
        // Not 0 on any device; of no use, but no reason to panic, where it is.
        let intervals = match bytes.checked_div(self.interval as u64) {
            Some(intervals) => intervals,
            None => 0,
        };
        intervals * self.metadata_size as u64
    }

    pub(super) fn to_uapi(self) -> uapi::ublk_param_integrity {
        let flag = |on, flag| if on { flag } else { 0 };
        uapi::ublk_param_integrity {
            flags: flag(self.capable, uapi::LBMD_PI_CAP_INTEGRITY)
                | flag(self.reference_tags, uapi::LBMD_PI_CAP_REFTAG),
            interval_exp: self.interval.trailing_zeros() as u8,
            metadata_size: self.metadata_size,
            pi_offset: self.pi_offset,
            csum_type: self.checksum.to_uapi(),
            tag_size: self.tag_size,
            ..Default::default()
        }
    }

    pub(super) fn from_uapi(p: &uapi::ublk_param_integrity) -> Self {
        Integrity {
            metadata_size: p.metadata_size,
            interval: 1u32.checked_shl(p.interval_exp.into()).unwrap_or(0),
            checksum: Checksum::from_uapi(p.csum_type),
            pi_offset: p.pi_offset,
            tag_size: p.tag_size,
            reference_tags: p.flags & uapi::LBMD_PI_CAP_REFTAG != 0,
            capable: p.flags & uapi::LBMD_PI_CAP_INTEGRITY != 0,
        }
    }

    pub(super) fn check(&self, fields: &Fields) -> Checked {
        let block = fields.logical_block_size;
        let interval = self.interval;
        rule(
            interval.is_power_of_two() && u64::from(interval) >= SECTOR && interval <= block,
            || {
                format!(
                    "the interval of integrity metadata is a power of two from {SECTOR} to the logical block size \
                     ({block}), not {interval} bytes"
                )
            },
        )?;
        rule(self.metadata_size > 0, || "integrity metadata has at least 1 byte, not 0".into())?;
        let tuple = self.checksum.tuple_size();
        rule(u16::from(self.pi_offset) + u16::from(tuple) <= self.metadata_size.into(), || {
            format!(
                "protection information of {tuple} bytes at {} does not fit {} bytes of metadata",
                self.pi_offset, self.metadata_size
            )
        })?;
        rule(!self.reference_tags || self.checksum != Checksum::None, || {
            "reference tags need a checksum".into()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::DeviceParams;

    #[test]
    fn every_rule_has_words() {
        let good = Integrity::protection(Checksum::T10Dif, 512);
        let build = |integrity| {
            DeviceParams::builder(1 << 20).logical_block_size(4096).integrity(integrity).build()
        };
        assert_eq!(build(good).unwrap().integrity(), Some(good));
        for (bad, words) in [
            (Integrity { interval: 8192, ..good }, "from 512 to the logical block size (4096)"),
            (Integrity { interval: 0, ..good }, "not 0 bytes"),
            (Integrity { interval: 1536, ..good }, "a power of two"),
            (Integrity { metadata_size: 0, ..good }, "at least 1 byte"),
            (Integrity { pi_offset: 1, ..good }, "8 bytes at 1 does not fit 8"),
            (Integrity { pi_offset: 255, ..good }, "does not fit"),
            (Integrity { checksum: Checksum::Nvme, ..good }, "16 bytes at 0 does not fit 8"),
            (Integrity { checksum: Checksum::None, ..good }, "reference tags need a checksum"),
        ] {
            let e = build(bad).unwrap_err();
            assert!(e.to_string().contains(words), "{e}");
        }
    }

    #[test]
    fn the_kernels_struct_says_the_same() {
        for checksum in [Checksum::None, Checksum::Ip, Checksum::T10Dif, Checksum::Nvme] {
            let integrity = Integrity {
                metadata_size: 64,
                interval: 4096,
                checksum,
                pi_offset: 40,
                tag_size: 3,
                reference_tags: checksum != Checksum::None,
                capable: true,
            };
            assert_eq!(Integrity::from_uapi(&integrity.to_uapi()), integrity);
            assert_eq!(integrity.metadata_bytes(65536), 1024);
        }
    }
}
