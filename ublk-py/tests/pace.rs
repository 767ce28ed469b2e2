//! The tests of what needs no interpreter: an extension module cannot be linked to a program.

#[path = "../src/pace.rs"]
#[allow(dead_code, reason = "the rest of the module uses it")]
mod pace;
