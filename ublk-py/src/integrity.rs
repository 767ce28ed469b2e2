//! Integrity metadata as Python describes it: `ublk.Integrity`.

use std::fmt::Display;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use ublk_core::control::{Checksum, Integrity};

/// Its fields, by their names.
#[derive(FromPyObject)]
pub(crate) struct Described {
    metadata_size: i64,
    interval: i64,
    checksum: String,
    pi_offset: i64,
    tag_size: i64,
    reference_tags: bool,
    capable: bool,
}

fn fit<T: TryFrom<i64> + Display>(name: &str, value: i64, most: T) -> PyResult<T> {
    T::try_from(value)
        .map_err(|_| PyValueError::new_err(format!("{name}={value}: from 0 to {most}")))
}

impl Described {
    pub(crate) fn read(self) -> PyResult<Integrity> {
        let checksum = match self.checksum.as_str() {
            "none" => Checksum::None,
            "ip" => Checksum::Ip,
            "t10dif" => Checksum::T10Dif,
            "nvme" => Checksum::Nvme,
            other => {
                return Err(PyValueError::new_err(format!(
                    "checksum={other:?}: \"none\", \"ip\", \"t10dif\" or \"nvme\""
                )));
            }
        };
        Ok(Integrity {
            metadata_size: fit("metadata_size", self.metadata_size, u8::MAX)?,
            interval: fit("interval", self.interval, u32::MAX)?,
            checksum,
            pi_offset: fit("pi_offset", self.pi_offset, u8::MAX)?,
            tag_size: fit("tag_size", self.tag_size, u8::MAX)?,
            reference_tags: self.reference_tags,
            capable: self.capable,
        })
    }
}
