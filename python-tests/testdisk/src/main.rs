//! Disks for the tests on real kernels.
//!
//! ```text
//! ublk-testdisk serve [key=value ...]     serves disks and obeys commands on stdin, see `commands`
//! ublk-testdisk delete ID                 stops and deletes a device, whoever made it
//! ublk-testdisk list                      the devices that the driver knows
//! ublk-testdisk client DISK ...           uses a disk, see `client`
//! ```
//!
//! Answers are JSON, one object a line. The keys of a disk are fields of [`options::Options`].

mod client;
mod commands;
mod counts;
mod disks;
mod faults;
mod faulty;
mod options;
mod report;
mod rules;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use ublk_core::control::{Control, Wait};

use report::say;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let answer = match args.split_first().map(|(verb, rest)| (verb.as_str(), rest)) {
        Some(("serve", options)) => return commands::serve(&options.join(" ")),
        Some(("delete", [id])) => delete(id),
        Some(("list", [])) => list(),
        Some(("client", [disk, manner, calls @ ..])) => client::run(disk, manner, calls),
        _ => Err(report::wrong(
            "usage: ublk-testdisk serve [key=value ...] | delete ID | list | client",
        )),
    };
    match answer {
        Ok(answer) => {
            say(&answer);
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&error);
            ExitCode::FAILURE
        }
    }
}

fn delete(id: &str) -> Result<Value, Value> {
    let id = id.parse().map_err(|_| report::wrong("the id is a number"))?;
    let deleted = Control::open().and_then(|c| c.delete(id, &Wait::for_(Duration::from_secs(20))));
    deleted.map(|()| json!({"deleted": id})).map_err(|e| report::error(&e))
}

fn list() -> Result<Value, Value> {
    let devices = Control::open().and_then(|c| c.list()).map_err(|e| report::error(&e))?;
    let devices: Vec<_> = devices
        .iter()
        .map(|d| json!({"id": d.id, "state": d.state.to_string(), "pid": d.server_pid}))
        .collect();
    Ok(json!({"devices": devices}))
}
