//! Which version this is.

use std::ffi::c_char;

/// The version as text, without the NUL that C wants.
const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

const fn number(text: &str) -> u32 {
    let (bytes, mut at, mut value) = (text.as_bytes(), 0, 0);
    while at < bytes.len() {
        value = value * 10 + (bytes[at] - b'0') as u32;
        at += 1;
    }
    value
}

const VERSION: u32 = number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
    | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
    | number(env!("CARGO_PKG_VERSION_PATCH"));

/// The version of the library that runs, to be compared with UBLK_RS_VERSION, the header's: MAJOR << 16 | MINOR << 8 |
/// PATCH. Never blocks.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_version() -> u32 {
    VERSION
}

/// The version of the library that runs, as text. Lives for ever. Never blocks.
#[unsafe(no_mangle)]
pub extern "C" fn ublk_rs_version_text() -> *const c_char {
    TEXT.as_ptr().cast()
}
