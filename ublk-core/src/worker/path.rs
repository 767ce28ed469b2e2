//! How the data of requests moves between the kernel and this process: the choice.

use std::fmt;
use std::str::FromStr;

use crate::control::Features;
use crate::error::{Error, ErrorKind};

/// How the data of a device's requests moves.
///
/// Every backend works with every path. Which is the fastest depends on what it does with the data: one that looks
/// at every byte is best served by `Copy`; one that passes whole requests on to files or sockets by operations of
/// its worker's [`Ring`](crate::Ring) saves the copy with `AutoBufReg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataPath {
    /// `AutoBufReg` for backends that declare [`FIXED_BUFFERS`](crate::Capabilities::FIXED_BUFFERS), where the kernel
    /// has it and the process has its privilege; `UserCopy` for other disks that share memory with clients and can be
    /// recovered ([`Device::share`](crate::Device::share)); `Copy` for all others.
    #[default]
    Auto,
    /// The driver copies a write's data to the tag's buffer before the request arrives, and a read's from there
    /// when it is completed. Every driver has it.
    Copy,
    /// As `Copy`, but the driver asks for the buffer when a write has come ([`Features::NEED_GET_DATA`]).
    NeedGetData,
    /// The server copies, by `pread` and `pwrite` on the device's file, from and to wherever it likes
    /// ([`Features::USER_COPY`]): [`Request::put`](crate::Request::put) takes its data straight to the client.
    UserCopy,
    /// The worker's ring reads and writes the client's pages, which are registered with it at a request's first
    /// operation ([`Features::SUPPORT_ZERO_COPY`], and `USER_COPY` for whoever looks at the data).
    ZeroCopy,
    /// As `ZeroCopy`, registered by the driver as requests arrive ([`Features::AUTO_BUF_REG`]). Where it could not,
    /// the request's data moves as with `UserCopy`.
    AutoBufReg,
}

impl DataPath {
    /// What a device with these features does.
    pub(crate) fn of(features: Features) -> Self {
        const ORDER: [(Features, DataPath); 4] = [
            (Features::AUTO_BUF_REG, DataPath::AutoBufReg),
            (Features::SUPPORT_ZERO_COPY, DataPath::ZeroCopy),
            (Features::USER_COPY, DataPath::UserCopy),
            (Features::NEED_GET_DATA, DataPath::NeedGetData),
        ];
        let found = ORDER.into_iter().find(|(feature, _)| features.contains(*feature));
        found.map_or(DataPath::Copy, |(_, path)| path)
    }

    /// The features that a device needs for it.
    pub(crate) fn features(self) -> Features {
        match self {
            DataPath::Auto | DataPath::Copy => Features::NONE,
            DataPath::NeedGetData => Features::NEED_GET_DATA,
            DataPath::UserCopy => Features::USER_COPY,
            DataPath::ZeroCopy => Features::SUPPORT_ZERO_COPY | Features::USER_COPY,
            DataPath::AutoBufReg => Features::AUTO_BUF_REG | Features::USER_COPY,
        }
    }

    /// Every feature that has a part in some path.
    pub(crate) fn all_features() -> Features {
        DataPath::ZeroCopy.features() | DataPath::AutoBufReg.features() | Features::NEED_GET_DATA
    }

    /// Whether the driver moves the data to and from the tags' buffers.
    pub(crate) fn is_copied_by_driver(self) -> bool {
        matches!(self, DataPath::Auto | DataPath::Copy | DataPath::NeedGetData)
    }

    /// Whether requests' pages are registered with the worker's ring.
    pub(crate) fn registers(self) -> bool {
        matches!(self, DataPath::ZeroCopy | DataPath::AutoBufReg)
    }
}

const NAMES: [(DataPath, &str); 6] = [
    (DataPath::Auto, "auto"),
    (DataPath::Copy, "copy"),
    (DataPath::NeedGetData, "need-get-data"),
    (DataPath::UserCopy, "user-copy"),
    (DataPath::ZeroCopy, "zero-copy"),
    (DataPath::AutoBufReg, "auto-buf-reg"),
];

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(path, _)| path == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

/// By the name that [`Display`](fmt::Display) gives: `user-copy`, for instance.
impl FromStr for DataPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(path, _)| *path).ok_or_else(|| {
            let names: Vec<_> = NAMES.iter().map(|(_, name)| *name).collect();
            Error::new(ErrorKind::InvalidParameter, "choose a data path")
                .because(format!("{text:?} is none of {}", names.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_back_from_its_features() {
        for path in [
            DataPath::Copy,
            DataPath::NeedGetData,
            DataPath::UserCopy,
            DataPath::ZeroCopy,
            DataPath::AutoBufReg,
        ] {
            assert_eq!(DataPath::of(path.features()), path);
            assert_eq!(path.to_string().parse::<DataPath>().unwrap(), path);
        }
    }

    #[test]
    fn a_path_that_is_none_is_refused_with_the_names() {
        let e = "quick".parse::<DataPath>().unwrap_err();
        assert!(e.to_string().contains("auto, copy, need-get-data, user-copy"), "{e}");
    }
}
