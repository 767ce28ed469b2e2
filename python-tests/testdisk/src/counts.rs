//! What a test backend has seen.

use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};
use ublk_core::{Op, RequestFlags};

/// Ranges that are kept; a test that makes more looks at the counters.
const RANGES: usize = 1000;

#[derive(Default)]
struct Seen {
    ops: [u64; 5],
    bytes: [u64; 5],
    fua: u64,
    largest: u64,
    discards: Vec<Value>,
    zeroes: Vec<Value>,
}

#[derive(Default)]
pub(crate) struct Counts(Mutex<Seen>);

const NAMES: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

fn index(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        Op::WriteZeroes => 4,
        _ => unreachable!("the library has grown an operation"),
    }
}

impl Counts {
    pub(crate) fn note(&self, op: Op, offset: u64, len: u64, flags: RequestFlags) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.ops[index(op)] += 1;
        seen.bytes[index(op)] += len;
        seen.fua += u64::from(flags.fua());
        match op {
            Op::Read | Op::Write => seen.largest = seen.largest.max(len),
            Op::Discard if seen.discards.len() < RANGES => seen.discards.push(json!([offset, len])),
            Op::WriteZeroes if seen.zeroes.len() < RANGES => {
                seen.zeroes.push(json!([offset, len, flags.no_unmap()]));
            }
            _ => {}
        }
    }

    pub(crate) fn report(&self) -> Value {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut report = json!({
            "fua": seen.fua,
            "largest": seen.largest,
            "discards": seen.discards,
            "zeroes": seen.zeroes,
        });
        for (i, name) in NAMES.iter().enumerate() {
            report[name] = json!(seen.ops[i]);
            report[format!("{name}_bytes")] = json!(seen.bytes[i]);
        }
        report
    }
}
