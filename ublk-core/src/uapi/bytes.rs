//! Kernel structs as bytes and back.
//!
//! The invariant of this module: a type is [`Plain`] only if it is `repr(C)` and each byte of it
//! belongs to an integer, so that no byte is uninitialised and every bit pattern is a value.
//! Outside of the integers below, the `plain!` macro is the only way to become one, and it makes
//! the compiler check both.

pub(crate) mod sealed {
    /// Keeps [`super::Plain`] to this crate.
    #[allow(unreachable_pub)]
    pub trait Sealed {}
}

/// A type whose bytes are all initialised and for which all bytes are valid.
///
/// # Safety
///
/// The type has no padding, no pointer and no invalid bit pattern.
pub unsafe trait Plain: Copy + Default + sealed::Sealed + 'static {}

macro_rules! plain_integers {
    ($($ty:ty),*) => {$(
        impl sealed::Sealed for $ty {}
        // SAFETY: an integer, or an array of bytes or of one u64, has no padding and no invalid
        // value.
        unsafe impl Plain for $ty {}
    )*};
}
plain_integers!(u8, u16, u32, u64, i32, [u8; 2], [u8; 4], [u8; 5], [u8; 20], [u8; 24], [u64; 1]);

/// The size of a field and, by its bound, the proof that the field is plain.
pub(crate) const fn plain_field<S, T: Plain>(_: fn(&S) -> &T) -> usize {
    size_of::<T>()
}

/// Declares a `repr(C)` struct to be [`Plain`]; does not compile if a field is missing from the
/// list or not plain itself, or if there are bytes between the fields.
macro_rules! plain {
    ($name:ident { $($field:ident),* $(,)? }) => {
        const _: () = {
            let _: fn($name) = |$name { $($field: _),* }| {};
            let fields = 0 $(+ $crate::uapi::bytes::plain_field(|s: &$name| &s.$field))*;
            assert!(fields == size_of::<$name>(), "the struct has padding");
        };
        impl $crate::uapi::bytes::sealed::Sealed for $name {}
        // SAFETY: the constant above proves that the fields cover the struct and are plain.
        unsafe impl $crate::uapi::bytes::Plain for $name {}
    };
}
pub(crate) use plain;

/// The bytes of a value.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `value` is valid for reads of its size, all of whose bytes `Plain` promises to be
    // initialised, and is borrowed, hence not written, for as long as the slice lives.
    unsafe { core::slice::from_raw_parts((value as *const T).cast(), size_of::<T>()) }
}

/// The bytes of a value, to be overwritten.
pub fn bytes_of_mut<T: Plain>(value: &mut T) -> &mut [u8] {
    // SAFETY: as in `bytes_of`, the borrow is exclusive, and whatever is written is a value by
    // `Plain`.
    unsafe { core::slice::from_raw_parts_mut((value as *mut T).cast(), size_of::<T>()) }
}

/// The value that `bytes` begins with, wherever it lies; bytes that are missing count as zero, as
/// they do for a kernel that knows a shorter struct.
pub fn from_prefix<T: Plain>(bytes: &[u8]) -> T {
    let mut value = T::default();
    let room = bytes_of_mut(&mut value);
    let len = room.len().min(bytes.len());
    room[..len].copy_from_slice(&bytes[..len]);
    room[len..].fill(0);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uapi::{ublk_params, ublksrv_io_cmd};

    #[test]
    fn bytes_and_back() {
        let cmd = ublksrv_io_cmd { q_id: 1, tag: 2, result: -5, addr: 0x1122_3344_5566_7788 };
        let bytes = bytes_of(&cmd);
        assert_eq!(bytes.len(), 16);
        assert_eq!(bytes[..2], 1u16.to_ne_bytes());
        assert_eq!(bytes[4..8], (-5i32).to_ne_bytes());
        assert_eq!(from_prefix::<ublksrv_io_cmd>(bytes), cmd);
    }

    #[test]
    fn a_short_input_is_filled_with_zeroes_and_a_long_one_cut() {
        let params: ublk_params = from_prefix(&[0xff; 64]);
        assert_eq!(params.len, u32::MAX);
        assert_eq!(params.integrity, Default::default());
        assert_eq!(from_prefix::<u16>(&[1, 0, 9]), u16::from_ne_bytes([1, 0]));
    }
}
