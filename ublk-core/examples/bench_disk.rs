//! The disks that `make bench` measures: `bench_disk KIND [KEY=VALUE ...]`, of kind `null`, `mem` or `file`.
//!
//! Keys: `size` (bytes), `queues`, `depth`, `data` (a data path), `batch=1`, `path` (of a file, made if it is not
//! there), `count` (so many disks, on two shared workers).
//!
//! Prints one line, `/dev/ublkbN`, when the disk (the last one) can be used, and serves it until SIGINT, SIGTERM or the end of its
//! stdin. Then it waits until nobody uses the disk, half a minute at most, and ends with a failure if somebody does.

use std::collections::HashMap;
use std::io::Read;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ublk_core::control::Features;
use ublk_core::targets::{File, Mem, Null};
use ublk_core::{Builder, ErrorKind, Running, Workers};

const POLITELY: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(description) = Description::from(&args) else {
        eprintln!(
            "usage: bench_disk null|mem|file [size=N] [queues=N] [depth=N] [data=PATH] [batch=1] [path=FILE] [count=N]"
        );
        return ExitCode::from(2);
    };
    match serve(&description) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench_disk: {e}");
            ExitCode::FAILURE
        }
    }
}

struct Description {
    kind: String,
    keys: HashMap<String, String>,
    size: u64,
    count: usize,
}

impl Description {
    fn from(args: &[String]) -> Option<Self> {
        let keys = args.get(1..)?.iter().map(|arg| arg.split_once('='));
        let keys = keys.map(|pair| pair.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let keys: HashMap<_, _> = keys.collect::<Option<_>>()?;
        let known = ["size", "queues", "depth", "data", "batch", "path", "count"];
        if !keys.keys().all(|key| known.contains(&key.as_str())) {
            return None;
        }
        let size = keys.get("size").map_or(Ok(1 << 30), |n| n.parse()).ok()?;
        let count = keys.get("count").map_or(Ok(1), |n| n.parse()).ok()?;
        Some(Description { kind: args.first()?.clone(), keys, size, count })
    }

    fn number<T: FromStr>(&self, key: &str, otherwise: T) -> ublk_core::Result<T> {
        match self.keys.get(key) {
            None => Ok(otherwise),
            Some(text) => text.parse().map_err(|_| wrong(format!("{key}={text} is no number"))),
        }
    }

    fn builder(&self) -> ublk_core::Result<Builder> {
        let builder = match self.kind.as_str() {
            "null" => Null::new().builder(self.size),
            "mem" => Mem::new(self.size).builder(),
            "file" => {
                let path = self.keys.get("path").ok_or_else(|| wrong("a file needs a path"))?;
                File::options().create(self.size).open(path)?.builder()
            }
            kind => return Err(wrong(format!("no kind {kind:?}"))),
        };
        let builder =
            builder.queues(self.number("queues", 1)?).queue_depth(self.number("depth", 128)?);
        let builder = match self.keys.get("data") {
            Some(path) => builder.data_path(path.parse()?),
            None => builder,
        };
        Ok(match self.keys.contains_key("batch") {
            true => builder.require(Features::BATCH_IO),
            false => builder,
        })
    }

    fn start(&self) -> ublk_core::Result<Vec<Running>> {
        if self.count == 1 {
            return Ok(vec![self.builder()?.start()?]);
        }
        let workers = Workers::new(2)?;
        (0..self.count).map(|_| self.builder()?.workers(&workers).start()).collect()
    }
}

fn wrong(cause: impl Into<String>) -> ublk_core::Error {
    let error = ublk_core::Error::new(ErrorKind::InvalidParameter, "describe the disk");
    error.because(cause.into())
}

fn serve(description: &Description) -> ublk_core::Result<()> {
    // Before there is any other thread: all inherit it.
    let signals = block_signals();
    let disks = description.start()?;
    if let Some(last) = disks.last() {
        println!("{}", last.path().display());
    }
    let (sender, end) = mpsc::channel();
    let also = sender.clone();
    thread::spawn(move || {
        let mut number = 0;
        // SAFETY: both pointers are to live variables of the right types.
        unsafe { libc::sigwait(&signals, &mut number) };
        also.send(())
    });
    thread::spawn(move || {
        let mut input = [0; 512];
        while std::io::stdin().read(&mut input).is_ok_and(|n| n > 0) {}
        sender.send(())
    });
    // Neither sender ends before it has sent.
    let _ = end.recv();
    for disk in disks {
        disk.stop(POLITELY)?;
    }
    Ok(())
}

/// Keeps SIGINT and SIGTERM from ending the process, so that they can be waited for.
fn block_signals() -> libc::sigset_t {
    // SAFETY: a sigset_t is plain data, which sigemptyset initialises; all pointers are to live variables.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}
