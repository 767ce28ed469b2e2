//! The kernel interface.
