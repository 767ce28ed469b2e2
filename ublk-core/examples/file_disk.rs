//! A file as a disk: `file_disk PATH SIZE_IN_BYTES`.
//!
//! Makes the file, sparse, if there is none; one that is there keeps its size. Prints one line, `/dev/ublkbN`,
//! when the disk can be used, and serves it until SIGINT, SIGTERM or the end of its stdin. As long as somebody
//! uses the disk then, it says who and goes on; a second signal takes the disk from them.

use std::io::Read;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use ublk_core::targets::File;
use ublk_core::{ErrorKind, Running};

/// How long a stop waits for the users of the disk before it names them.
const POLITELY: Duration = Duration::from_secs(2);

enum Event {
    Signal,
    EndOfInput,
    /// Somebody else has stopped the disk, or it failed.
    Ended,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, size] = &args[..] else { return usage("two arguments, please") };
    let Ok(size) = size.parse() else { return usage("the size is a number of bytes") };
    match serve(path, size) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("file_disk: {e}");
            ExitCode::FAILURE
        }
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("file_disk: {why}\nusage: file_disk PATH SIZE_IN_BYTES");
    ExitCode::from(2)
}

fn serve(path: &str, size: u64) -> ublk_core::Result<()> {
    // Before there is any other thread: all inherit it.
    let signals = block_signals();
    let disk = File::options().create(size).open(path)?.builder().start()?;
    println!("{}", disk.path().display());
    for warning in disk.warnings() {
        eprintln!("file_disk: {warning}");
    }
    let (sender, events) = mpsc::channel();
    watch(&disk, signals, &sender);
    // The senders outlive us: none of them ends before it has sent.
    if let Ok(Event::Ended) = events.recv() {
        return disk.wait().map(drop);
    }
    stop(disk, &events)
}

fn stop(mut disk: Running, events: &Receiver<Event>) -> ublk_core::Result<()> {
    let mut told = String::new();
    loop {
        let failed = match disk.stop(POLITELY) {
            Ok(_) => return Ok(()),
            Err(failed) => failed,
        };
        if failed.error.kind() != ErrorKind::Busy {
            return Err(failed.error);
        }
        let text = failed.error.to_string();
        if text != told {
            eprintln!("file_disk: {text}; waiting for that (a second signal forces it)");
            told = text;
        }
        disk = failed.device;
        if events.try_iter().any(|event| matches!(event, Event::Signal)) {
            disk.stop_force(POLITELY)?;
            return Ok(());
        }
    }
}

/// Everything that can end the disk, as events.
fn watch(disk: &Running, signals: libc::sigset_t, sender: &Sender<Event>) {
    let to = sender.clone();
    thread::spawn(move || {
        loop {
            let mut number = 0;
            // SAFETY: both pointers are to live variables of the right types.
            let waited = unsafe { libc::sigwait(&signals, &mut number) };
            if waited != 0 || to.send(Event::Signal).is_err() {
                return;
            }
        }
    });
    let to = sender.clone();
    thread::spawn(move || {
        let mut input = [0; 512];
        while std::io::stdin().read(&mut input).is_ok_and(|n| n > 0) {}
        to.send(Event::EndOfInput)
    });
    let (to, disk) = (sender.clone(), disk.handle());
    thread::spawn(move || {
        // Why it ended is asked again by who receives the event.
        let _ = disk.wait();
        to.send(Event::Ended)
    });
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
