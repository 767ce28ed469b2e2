//! What the driver of this kernel has. A test that needs more says so to the rig in a line: that it has not run, or
//! what it has seen refused. Both are in the README's table.

use ublk_core::control::{Control, Features};
use ublk_core::{Error, ErrorKind};

use super::no_devices;

pub(crate) fn offered() -> Features {
    Control::open().unwrap().features().unwrap()
}

fn words(features: Features) -> Vec<String> {
    let one = |f: Features| format!("{f} (since Linux {})", f.since().unwrap());
    features.iter().map(one).collect()
}

/// Whether the driver lacks some of these. A test that then returns has not run.
pub(crate) fn lacks(features: Features) -> bool {
    let missing = words(features - offered());
    if !missing.is_empty() {
        println!("\nnot run: the driver lacks {}", missing.join(", "));
    }
    !missing.is_empty()
}

/// Asserts that this was refused, by its name and before anything existed, because the driver lacks it.
#[track_caller]
pub(crate) fn refused(error: &Error, feature: Features) {
    assert!(!offered().contains(feature), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    for name in words(feature) {
        assert!(error.to_string().contains(&name), "{error}");
        println!("\nrefused: {name}");
    }
    no_devices();
}
