//! A client of a disk that says which errno each of its calls met.
//!
//! `client DISK direct|buffered CALL...`, where a call is `read:OFFSET:LENGTH`, `write:OFFSET:LENGTH[:BYTE]`,
//! `dsync:OFFSET:LENGTH[:BYTE]` (a write with `RWF_DSYNC`) or `fsync`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use serde_json::{Value, json};

use crate::report::wrong;

/// The most that a call transfers.
const LARGEST: usize = 8 << 20;

pub(crate) fn run(disk: &str, manner: &str, calls: &[String]) -> Result<Value, Value> {
    let flags = if manner == "direct" { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(disk);
    let file = file.map_err(|e| wrong(format!("{disk}: {e}")))?;
    let mut memory = vec![0; LARGEST + 4096];
    // Direct I/O wants aligned memory; a page is enough for every disk.
    let start = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[start..][..LARGEST];
    let answers: Result<Vec<Value>, Value> = calls.iter().map(|c| one(&file, buffer, c)).collect();
    Ok(json!({"calls": answers?}))
}

fn one(file: &File, buffer: &mut [u8], call: &str) -> Result<Value, Value> {
    let words: Vec<&str> = call.split(':').collect();
    let number = |i: usize| words.get(i).map_or(Ok(0xa5), |w| w.parse::<u64>());
    let (Ok(offset), Ok(len), Ok(byte)) = (number(1), number(2), number(3)) else {
        return Err(wrong(format!("{call} is no call")));
    };
    let buffer = &mut buffer[..len as usize];
    let result = match words[0] {
        "read" => transfer(file, buffer, offset, None),
        "write" | "dsync" => {
            buffer.fill(byte as u8);
            transfer(file, buffer, offset, Some(words[0] == "dsync"))
        }
        "fsync" => file.sync_all().map(|()| 0),
        _ => return Err(wrong(format!("{call} is no call"))),
    };
    Ok(match result {
        Ok(done) if words[0] == "read" => json!({
            "errno": 0,
            "done": done,
            "first": buffer[0],
            "same": buffer.iter().all(|b| *b == buffer[0]),
        }),
        Ok(done) => json!({"errno": 0, "done": done}),
        Err(e) => json!({"errno": e.raw_os_error()}),
    })
}

/// One system call: what it transferred is for the test to judge. `write` says whether it is to be durable.
fn transfer(file: &File, buffer: &mut [u8], offset: u64, write: Option<bool>) -> io::Result<usize> {
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let (fd, offset) = (file.as_raw_fd(), offset as i64);
    // SAFETY: the vector is of one live buffer, which is ours alone during the call.
    let done = unsafe {
        match write {
            None => libc::preadv2(fd, &part, 1, offset, 0),
            Some(durable) => {
                libc::pwritev2(fd, &part, 1, offset, if durable { libc::RWF_DSYNC } else { 0 })
            }
        }
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
