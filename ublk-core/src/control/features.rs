//! Feature flags: what a kernel offers, what a device was granted, and how one is asked for.
//!
//! The driver drops flags that it does not know and says nothing (`ublk_ctrl_add_dev`), and it
//! forces some on and clears others. So features are asked of the kernel before a device exists,
//! and compared with what was granted after.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Not, Sub};

use crate::error::{Error, ErrorKind, Result};
use crate::uapi;

/// A set of features of a driver or device (`UBLK_F_*`).
///
/// Bits that this crate does not know are kept, so that a newer kernel's answer is not falsified.
///
/// ```
/// use ublk_core::control::Features;
/// let features = Features::USER_COPY | Features::ZONED;
/// assert!(features.contains(Features::ZONED));
/// assert_eq!(features.to_string(), "USER_COPY ZONED");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

struct Known {
    flag: Features,
    name: &'static str,
    since: &'static str,
}

macro_rules! features {
    ($($name:ident = $flag:ident, $since:literal, $doc:literal;)*) => {
        impl Features {
            $(
                #[doc = concat!($doc, " Since Linux ", $since, ".")]
                pub const $name: Features = Features(uapi::$flag);
            )*
        }
        const KNOWN: &[Known] = &[
            $(Known { flag: Features::$name, name: stringify!($name), since: $since },)*
        ];
    };
}

// The versions are upstream's: the release that first offered the feature, which of SUPPORT_ZERO_COPY is later than
// its number. IO_DESC_SIZE is given the first release that we have seen it in.
features! {
    SUPPORT_ZERO_COPY = UBLK_F_SUPPORT_ZERO_COPY, "6.15", "Requests' pages can be registered with a ring.";
    URING_CMD_COMP_IN_TASK = UBLK_F_URING_CMD_COMP_IN_TASK, "6.0", "Requests arrive through task work; forced on by current drivers.";
    NEED_GET_DATA = UBLK_F_NEED_GET_DATA, "6.0", "The server names a WRITE's buffer when the request arrives.";
    USER_RECOVERY = UBLK_F_USER_RECOVERY, "6.1", "The disk outlives its server; I/O waits for the next one.";
    USER_RECOVERY_REISSUE = UBLK_F_USER_RECOVERY_REISSUE, "6.1", "With USER_RECOVERY: requests that a dead server held are sent to the next one.";
    UNPRIVILEGED_DEV = UBLK_F_UNPRIVILEGED_DEV, "6.3", "The device belongs to an unprivileged user.";
    CMD_IOCTL_ENCODE = UBLK_F_CMD_IOCTL_ENCODE, "6.4", "Commands are ioctl numbers; forced on by current drivers.";
    USER_COPY = UBLK_F_USER_COPY, "6.5", "Data moves by pread and pwrite on the device node.";
    ZONED = UBLK_F_ZONED, "6.6", "The disk is zoned.";
    USER_RECOVERY_FAIL_IO = UBLK_F_USER_RECOVERY_FAIL_IO, "6.13", "With USER_RECOVERY: I/O fails while there is no server.";
    UPDATE_SIZE = UBLK_F_UPDATE_SIZE, "6.16", "The disk can be resized.";
    AUTO_BUF_REG = UBLK_F_AUTO_BUF_REG, "6.16", "The driver registers requests' pages by itself.";
    QUIESCE = UBLK_F_QUIESCE, "6.16", "With USER_RECOVERY: the device can be taken from a live server.";
    PER_IO_DAEMON = UBLK_F_PER_IO_DAEMON, "6.16", "Each tag may have its own thread; forced on by current drivers, except with BATCH_IO.";
    BUF_REG_OFF_DAEMON = UBLK_F_BUF_REG_OFF_DAEMON, "6.17", "Any thread may register a request's pages; forced on by current drivers.";
    BATCH_IO = UBLK_F_BATCH_IO, "7.0", "Requests and results travel in arrays.";
    INTEGRITY = UBLK_F_INTEGRITY, "7.0", "Requests may carry integrity metadata.";
    SAFE_STOP_DEV = UBLK_F_SAFE_STOP_DEV, "7.0", "The device can be stopped only if unused; forced on by current drivers.";
    NO_AUTO_PART_SCAN = UBLK_F_NO_AUTO_PART_SCAN, "7.0", "The kernel does not look for partitions when the disk appears.";
    SHMEM_ZC = UBLK_F_SHMEM_ZC, "7.1", "Memory shared with clients is used without a copy.";
    IO_DESC_SIZE = UBLK_F_IO_DESC_SIZE, "7.3", "Descriptors have a chosen size.";
}

impl Features {
    /// No feature.
    pub const NONE: Features = Features(0);

    /// From `UBLK_F_*` bits, known or not.
    pub const fn from_bits(bits: u64) -> Self {
        Features(bits)
    }

    /// The `UBLK_F_*` bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Every feature that this crate knows.
    pub fn known() -> Self {
        KNOWN.iter().fold(Features::NONE, |all, known| all | known.flag)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` are here.
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any of `other` is here.
    pub const fn intersects(self, other: Features) -> bool {
        self.0 & other.0 != 0
    }

    /// Each feature by itself, lowest bit first.
    pub fn iter(self) -> impl Iterator<Item = Features> {
        (0..64).map(|bit| Features(1 << bit)).filter(move |&one| self.contains(one))
    }

    /// The kernel's name of a single known feature, without `UBLK_F_`.
    pub fn name(self) -> Option<&'static str> {
        KNOWN.iter().find(|known| known.flag == self).map(|known| known.name)
    }

    /// The Linux version that brought a single known feature.
    pub fn since(self) -> Option<&'static str> {
        KNOWN.iter().find(|known| known.flag == self).map(|known| known.since)
    }

    fn with_versions(self) -> String {
        let one = |f: Features| match f.since() {
            Some(since) => format!("{f} (since Linux {since})"),
            None => f.to_string(),
        };
        self.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl BitOr for Features {
    type Output = Features;
    fn bitor(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

impl BitOrAssign for Features {
    fn bitor_assign(&mut self, other: Features) {
        self.0 |= other.0;
    }
}

impl BitAnd for Features {
    type Output = Features;
    fn bitand(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }
}

impl Sub for Features {
    type Output = Features;
    /// What is in `self` and not in `other`.
    fn sub(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }
}

impl Not for Features {
    type Output = Features;
    fn not(self) -> Features {
        Features(!self.0)
    }
}

impl FromIterator<Features> for Features {
    fn from_iter<I: IntoIterator<Item = Features>>(features: I) -> Self {
        features.into_iter().fold(Features::NONE, |all, one| all | one)
    }
}

impl std::str::FromStr for Features {
    type Err = Error;

    /// Names as [`Display`](fmt::Display) writes them, separated by blanks, commas or `|`, in any
    /// case.
    fn from_str(text: &str) -> Result<Self> {
        let words = text.split([' ', ',', '|']).filter(|word| !word.is_empty());
        words
            .map(|word| {
                let found = KNOWN.iter().find(|known| known.name.eq_ignore_ascii_case(word));
                found.map(|known| known.flag).ok_or_else(|| {
                    Error::new(ErrorKind::InvalidParameter, format!("find the feature \"{word}\""))
                        .because("no ublk feature has this name")
                })
            })
            .collect()
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        for (n, one) in self.iter().enumerate() {
            if n > 0 {
                f.write_str(" ")?;
            }
            match one.name() {
                Some(name) => f.write_str(name)?,
                None => write!(f, "bit{}", one.0.trailing_zeros())?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}

/// What a device has to have, would like to have and must not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureRequest {
    /// Without one of these there is no device.
    pub require: Features,
    /// Asked for where the kernel offers them and no rule excludes them.
    pub prefer: Features,
    /// With one of these there is no device.
    pub forbid: Features,
}

/// A combination that the driver refuses, or from which it drops something in silence.
struct Rule {
    broken: fn(Features) -> bool,
    text: &'static str,
}

const ONLY_WITH_RECOVERY: Features =
    Features(uapi::UBLK_F_USER_RECOVERY_REISSUE | uapi::UBLK_F_USER_RECOVERY_FAIL_IO);
const BY_PAGES: Features = Features(uapi::UBLK_F_SUPPORT_ZERO_COPY | uapi::UBLK_F_AUTO_BUF_REG);

const RULES: &[Rule] = &[
    Rule {
        broken: |f| f.intersects(ONLY_WITH_RECOVERY) && !f.contains(Features::USER_RECOVERY),
        text: "USER_RECOVERY_REISSUE and USER_RECOVERY_FAIL_IO need USER_RECOVERY",
    },
    Rule {
        broken: |f| f.contains(ONLY_WITH_RECOVERY),
        text: "USER_RECOVERY_REISSUE and USER_RECOVERY_FAIL_IO exclude each other",
    },
    Rule {
        broken: |f| f.contains(Features::QUIESCE) && !f.contains(Features::USER_RECOVERY),
        text: "QUIESCE needs USER_RECOVERY",
    },
    Rule {
        broken: |f| {
            f.contains(Features::UNPRIVILEGED_DEV)
                && f.intersects(Features::USER_RECOVERY | ONLY_WITH_RECOVERY)
        },
        text: "an UNPRIVILEGED_DEV cannot be recovered",
    },
    Rule {
        broken: |f| {
            f.contains(Features::UNPRIVILEGED_DEV) && f.intersects(Features::USER_COPY | BY_PAGES)
        },
        text: "an UNPRIVILEGED_DEV excludes USER_COPY, SUPPORT_ZERO_COPY and AUTO_BUF_REG",
    },
    Rule {
        broken: |f| {
            f.contains(Features::ZONED)
                && !f.intersects(Features::USER_COPY | Features::SUPPORT_ZERO_COPY)
        },
        text: "ZONED needs USER_COPY or SUPPORT_ZERO_COPY",
    },
    Rule {
        broken: |f| f.contains(Features::INTEGRITY) && !f.contains(Features::USER_COPY),
        text: "INTEGRITY needs USER_COPY",
    },
    Rule {
        broken: |f| {
            f.contains(Features::NEED_GET_DATA)
                && f.intersects(Features::USER_COPY | BY_PAGES | Features::BATCH_IO)
        },
        text: "NEED_GET_DATA is dropped with USER_COPY, SUPPORT_ZERO_COPY, AUTO_BUF_REG and BATCH_IO",
    },
    Rule {
        broken: |f| f.contains(Features::BATCH_IO | Features::PER_IO_DAEMON),
        text: "PER_IO_DAEMON is dropped with BATCH_IO",
    },
];

fn broken_rule(features: Features) -> Option<&'static str> {
    RULES.iter().find(|rule| (rule.broken)(features)).map(|rule| rule.text)
}

impl FeatureRequest {
    /// Only `require`.
    pub fn require(features: Features) -> Self {
        FeatureRequest { require: features, ..Default::default() }
    }

    /// With these preferred as well.
    #[must_use]
    pub fn prefer(mut self, features: Features) -> Self {
        self.prefer |= features;
        self
    }

    /// With these forbidden as well.
    #[must_use]
    pub fn forbid(mut self, features: Features) -> Self {
        self.forbid |= features;
        self
    }

    /// The flags to ask for, given what the driver offers; nothing is created yet. A driver that
    /// cannot say what it offers (before Linux 6.5) is given `None`, and [`check`](Self::check)
    /// then decides.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameter`] if the request contradicts itself or a rule of the driver,
    /// [`ErrorKind::Unsupported`] if the driver lacks a required feature.
    pub fn negotiate(&self, offered: Option<Features>) -> Result<Features> {
        let both = self.require & self.forbid;
        if !both.is_empty() {
            return Err(refused(ErrorKind::InvalidParameter)
                .because(format!("{both} cannot be both required and forbidden")));
        }
        if let Some(rule) = broken_rule(self.require) {
            return Err(refused(ErrorKind::InvalidParameter)
                .because(format!("{rule} (required: {})", self.require)));
        }
        if let Some(offered) = offered {
            let missing = self.require - offered;
            if !missing.is_empty() {
                return Err(refused(ErrorKind::Unsupported)
                    .because(format!("the kernel's driver lacks {}", missing.with_versions())));
            }
        }
        let possible = (self.prefer - self.forbid) & offered.unwrap_or(!Features::NONE);
        // Last what the others drop, so that one preference does not keep two away.
        let order = (possible - Features::NEED_GET_DATA)
            .iter()
            .chain((possible & Features::NEED_GET_DATA).iter());
        Ok(order.fold(self.require, |have, one| match broken_rule(have | one) {
            None => have | one,
            Some(_) => have,
        }))
    }

    /// Whether what the driver granted is what the request demands.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if a required feature was not granted or a forbidden one was.
    pub fn check(&self, granted: Features) -> Result<()> {
        let missing = self.require - granted;
        if missing.contains(Features::UNPRIVILEGED_DEV) {
            return Err(refused(ErrorKind::Unsupported)
                .because("the driver gives UNPRIVILEGED_DEV only to callers without CAP_SYS_ADMIN")
                .remedy_is(
                    "drop that capability, or prefer the feature where either kind of device will do",
                ));
        }
        if !missing.is_empty() {
            return Err(refused(ErrorKind::Unsupported)
                .because(format!("the driver did not grant {}", missing.with_versions())));
        }
        let forced = self.forbid & granted;
        if !forced.is_empty() {
            return Err(refused(ErrorKind::Unsupported)
                .because(format!("the driver forces {forced} on, which was forbidden")));
        }
        Ok(())
    }
}

fn refused(kind: ErrorKind) -> Error {
    Error::new(kind, "agree on the device's features")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINUX_6_12: Features = Features(0x1fe);
    const LINUX_7_3: Features = Features(0x1f_ffff);

    #[test]
    fn the_table_is_complete_and_in_order() {
        assert_eq!(Features::known(), LINUX_7_3);
        assert!(KNOWN.windows(2).all(|w| w[0].flag.0 < w[1].flag.0));
    }

    #[test]
    fn names_are_written_and_read() {
        assert_eq!(Features::NONE.to_string(), "none");
        let odd = Features::from_bits(1 << 63 | uapi::UBLK_F_ZONED);
        assert_eq!(odd.to_string(), "ZONED bit63");
        for feature in Features::known().iter() {
            assert_eq!(feature.to_string().to_lowercase().parse::<Features>().unwrap(), feature);
        }
        assert!("USER_COPY,nonsense".parse::<Features>().is_err());
        let two = Features::USER_COPY | Features::ZONED;
        assert_eq!("USER_COPY | zoned".parse::<Features>().unwrap(), two);
    }

    #[test]
    fn a_missing_feature_is_named_with_its_version() {
        let request = FeatureRequest::require(Features::BATCH_IO | Features::USER_COPY);
        let error = request.negotiate(Some(LINUX_6_12)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(error.cause().unwrap(), "the kernel's driver lacks BATCH_IO (since Linux 7.0)");
        assert!(request.negotiate(Some(LINUX_7_3)).is_ok());
    }

    #[test]
    fn every_rule_can_be_broken_and_names_itself() {
        use Features as F;
        for (features, words) in [
            (F::USER_RECOVERY_REISSUE, "need USER_RECOVERY"),
            (
                F::USER_RECOVERY | F::USER_RECOVERY_REISSUE | F::USER_RECOVERY_FAIL_IO,
                "exclude each other",
            ),
            (F::QUIESCE, "QUIESCE needs"),
            (F::UNPRIVILEGED_DEV | F::USER_RECOVERY, "cannot be recovered"),
            (F::UNPRIVILEGED_DEV | F::AUTO_BUF_REG, "excludes USER_COPY"),
            (F::ZONED, "ZONED needs"),
            (F::INTEGRITY | F::SUPPORT_ZERO_COPY, "INTEGRITY needs"),
            (F::NEED_GET_DATA | F::BATCH_IO, "NEED_GET_DATA is dropped"),
            (F::PER_IO_DAEMON | F::BATCH_IO, "PER_IO_DAEMON is dropped"),
        ] {
            let error = FeatureRequest::require(features).negotiate(Some(LINUX_7_3)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidParameter);
            assert!(error.cause().unwrap().contains(words), "{error}");
        }
    }

    #[test]
    fn every_feature_that_linux_6_12_lacks_is_refused_with_the_release_that_brought_it() {
        let releases = "SUPPORT_ZERO_COPY 6.15, USER_RECOVERY_FAIL_IO 6.13, UPDATE_SIZE 6.16, \
                        AUTO_BUF_REG 6.16, QUIESCE 6.16, PER_IO_DAEMON 6.16, \
                        BUF_REG_OFF_DAEMON 6.17, BATCH_IO 7.0, INTEGRITY 7.0, SAFE_STOP_DEV 7.0, \
                        NO_AUTO_PART_SCAN 7.0, SHMEM_ZC 7.1, IO_DESC_SIZE 7.3";
        let mut named = Features::NONE;
        for (name, release) in releases.split(", ").map(|pair| pair.split_once(' ').unwrap()) {
            let feature: Features = name.parse().unwrap();
            named |= feature;
            // What the rules demand besides.
            let with = match feature {
                Features::QUIESCE | Features::USER_RECOVERY_FAIL_IO => Features::USER_RECOVERY,
                Features::INTEGRITY => Features::USER_COPY,
                _ => Features::NONE,
            };
            let request = FeatureRequest::require(feature | with);
            let error = request.negotiate(Some(LINUX_6_12)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            let cause = format!("the kernel's driver lacks {name} (since Linux {release})");
            assert_eq!(error.cause().unwrap(), cause);
        }
        assert_eq!(named, LINUX_7_3 - LINUX_6_12);
    }

    /// Every set of up to three features: we refuse what the driver refuses or does not grant whole, and
    /// nothing else.
    #[test]
    fn what_the_driver_would_refuse_or_drop_is_refused_first() {
        let all: Vec<_> = LINUX_7_3.iter().collect();
        let (mut taken, mut refused) = (0, 0);
        for (a, b, c) in (0..all.len())
            .flat_map(|a| (a..all.len()).map(move |b| (a, b)))
            .flat_map(|(a, b)| (b..all.len()).map(move |c| (a, b, c)))
        {
            let asked = all[a] | all[b] | all[c];
            let granted = driver_7_3(asked.bits(), false);
            let whole = granted.is_some_and(|g| Features(g).contains(asked));
            let ours = FeatureRequest::require(asked).negotiate(Some(LINUX_7_3));
            assert_eq!(ours.is_ok(), whole, "{asked}: {ours:?}");
            if let Err(error) = ours {
                assert_eq!(error.kind(), ErrorKind::InvalidParameter);
                assert!(error.cause().unwrap().contains(&asked.to_string()), "{error}");
                refused += 1;
            } else {
                taken += 1;
            }
        }
        assert!(taken > 300 && refused > 300, "{taken} {refused}");
    }

    #[test]
    fn what_was_granted_is_compared() {
        let request =
            FeatureRequest::require(Features::USER_RECOVERY | Features::USER_RECOVERY_FAIL_IO)
                .forbid(Features::PER_IO_DAEMON);
        let error = request.check(Features::USER_RECOVERY).unwrap_err();
        assert!(error.cause().unwrap().contains("USER_RECOVERY_FAIL_IO (since Linux 6.13)"));
        let error = request.check(LINUX_7_3).unwrap_err();
        assert!(error.cause().unwrap().contains("forces PER_IO_DAEMON on"));
        assert!(request.check(request.require).is_ok());
        let contradiction = FeatureRequest::require(Features::ZONED).forbid(Features::ZONED);
        assert_eq!(contradiction.negotiate(None).unwrap_err().kind(), ErrorKind::InvalidParameter);
    }

    #[test]
    fn a_preference_gives_way() {
        let request =
            FeatureRequest::default().prefer(Features::NEED_GET_DATA | Features::USER_COPY);
        assert_eq!(request.negotiate(Some(LINUX_6_12)).unwrap(), Features::USER_COPY);
        let request = FeatureRequest::default().prefer(Features::QUIESCE | Features::BATCH_IO);
        assert_eq!(request.negotiate(Some(LINUX_7_3)).unwrap(), Features::BATCH_IO);
        assert_eq!(request.negotiate(Some(LINUX_6_12)).unwrap(), Features::NONE);
    }

    /// The driver's own words, `ublk_ctrl_add_dev` of 7.3: `None` for EINVAL, else what it grants.
    fn driver_7_3(mut f: u64, admin: bool) -> Option<u64> {
        use uapi::*;
        if admin {
            f &= !UBLK_F_UNPRIVILEGED_DEV;
        }
        let recovery = f
            & (UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_USER_RECOVERY_FAIL_IO);
        let fine = [
            0,
            UBLK_F_USER_RECOVERY,
            UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
            UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
        ];
        if !fine.contains(&recovery) || (f & UBLK_F_QUIESCE != 0 && f & UBLK_F_USER_RECOVERY == 0) {
            return None;
        }
        if f & UBLK_F_UNPRIVILEGED_DEV != 0 {
            f &= !(UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE);
            if f & (UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG) != 0 {
                return None;
            }
        }
        if f & UBLK_F_INTEGRITY != 0 && f & UBLK_F_USER_COPY == 0 {
            return None;
        }
        f &= LINUX_7_3.0;
        f |= UBLK_F_CMD_IOCTL_ENCODE
            | UBLK_F_URING_CMD_COMP_IN_TASK
            | UBLK_F_PER_IO_DAEMON
            | UBLK_F_BUF_REG_OFF_DAEMON
            | UBLK_F_SAFE_STOP_DEV;
        if f & UBLK_F_BATCH_IO != 0 {
            f &= !(UBLK_F_PER_IO_DAEMON | UBLK_F_NEED_GET_DATA);
        }
        if f & (UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG) != 0 {
            f &= !UBLK_F_NEED_GET_DATA;
        }
        if f & UBLK_F_ZONED != 0 && f & (UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY) == 0 {
            return None;
        }
        Some(f)
    }

    proptest! {
        #[test]
        fn the_driver_takes_what_was_negotiated(require in 0u64..1 << 21, prefer in 0u64..1 << 21) {
            let request = FeatureRequest::require(Features(require)).prefer(Features(prefer));
            match request.negotiate(Some(LINUX_7_3)) {
                Ok(asked) => {
                    let granted = driver_7_3(asked.bits(), false);
                    prop_assert!(granted.is_some(), "{asked} is refused");
                    prop_assert!(request.check(Features(granted.unwrap())).is_ok());
                }
                Err(e) => {
                    prop_assert_eq!(e.kind(), ErrorKind::InvalidParameter);
                    let granted = driver_7_3(require, false);
                    prop_assert!(granted.is_none_or(|g| g & require != require), "{e}");
                }
            }
        }
    }
}
