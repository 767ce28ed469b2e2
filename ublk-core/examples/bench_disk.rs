//! The disks that `make bench` measures: `bench_disk null|mem SIZE_IN_BYTES [QUEUES [DEPTH]]`.
//!
//! Prints one line, `/dev/ublkbN`, when the disk can be used, and serves it until SIGINT, SIGTERM or the end of its
//! stdin. Then it waits until nobody uses the disk, half a minute at most, and ends with a failure if somebody does.

use std::io::Read;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ublk_core::targets::{Mem, Null};

const POLITELY: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(builder) = describe(&args) else {
        eprintln!("usage: bench_disk null|mem SIZE_IN_BYTES [QUEUES [DEPTH]]");
        return ExitCode::from(2);
    };
    match serve(builder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench_disk: {e}");
            ExitCode::FAILURE
        }
    }
}

fn describe(args: &[String]) -> Option<ublk_core::Builder> {
    let size = args.get(1)?.parse().ok()?;
    let builder = match args.first()?.as_str() {
        "null" => Null::new().builder(size),
        "mem" => Mem::new(size).builder(),
        _ => return None,
    };
    let queues = args.get(2).map_or(Ok(1), |n| n.parse()).ok()?;
    let depth = args.get(3).map_or(Ok(128), |n| n.parse()).ok()?;
    (args.len() <= 4).then(|| builder.queues(queues).queue_depth(depth))
}

fn serve(builder: ublk_core::Builder) -> ublk_core::Result<()> {
    // Before there is any other thread: all inherit it.
    let signals = block_signals();
    let disk = builder.start()?;
    println!("{}", disk.path().display());
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
    disk.stop(POLITELY)?;
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
