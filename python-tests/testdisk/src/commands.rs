//! The commands that a test sends while its disks are served: JSON, one object a line.
//!
//! ```text
//! {"cmd": "start", "options": "key=value ..."}      more disks; {"ready": [...]}
//! {"cmd": "stats"}                                  {"stats": {...}, "backend": {...}, "faults": {...}, "used": bytes}
//! {"cmd": "stop", "within": s, "force": bool}       {"stopped": {...}} or {"error": ...}: then it goes on
//! {"cmd": "arm", "action": ..., ...}  {"cmd": "heal"}  {"cmd": "release"}      see `faults` and `rules`
//! {"cmd": "seed", "seed": n}                        of the faults
//! {"cmd": "wait", "within": s}                      how it ended, if it has
//! {"cmd": "cycle", "times": n, "options": "..."}    starts and stops disks
//! {"cmd": "features"}                               what the driver offers
//! {"cmd": "cut", "probability": p, "seed": n}  {"cmd": "restore"}             the power of a write cache
//! {"cmd": "share", "bytes": n}                      memory that the disk's clients share; {"path": what they map}
//! {"cmd": "process"}                                threads, descriptors, mappings, memory
//! {"cmd": "exit"}                                   stops all by force and ends; so does the end of stdin
//! ```
//!
//! `"id"` says which disk; without it, the one that was started last.

use std::io::BufRead;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ublk_core::control::{Control, Features};
use ublk_core::targets::Power;
use ublk_core::{Device, SharedBuffer};

use crate::disks::{Disk, Disks};
use crate::faults;
use crate::options::Options;
use crate::report::{self, say};

/// How long disks are given at the end.
fn last() -> Duration {
    // Said by the rig: how much slower than usual this machine is.
    let scale = std::env::var("UBLK_TIMESCALE").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(5).mul_f64(scale.unwrap_or(1.0f64).clamp(1.0, 100.0))
}

pub(crate) fn serve(options: &str) -> ExitCode {
    load_driver();
    let mut disks = Disks::default();
    if options.is_empty() {
        say(&json!({"ready": []}));
    } else {
        match disks.start(options) {
            Ok(ready) => say(&ready),
            Err(error) => {
                say(&error);
                return ExitCode::FAILURE;
            }
        }
    }
    // Not locked for good: a start that is held reads as well.
    let mut line = String::new();
    while std::io::stdin().lock().read_line(&mut line).is_ok_and(|n| n > 0) {
        let command: Value = serde_json::from_str(&line).unwrap_or_default();
        line.clear();
        if command["cmd"] == "exit" {
            break;
        }
        match obey(&mut disks, &command) {
            Ok(answer) | Err(answer) => say(&answer),
        }
    }
    let mut left = Vec::new();
    for disk in disks.all.iter_mut() {
        if let Some(running) = disk.running.take() {
            match running.stop_force(last()) {
                Ok(stopped) => left.extend(stopped.leftovers),
                Err(failed) => left.push(failed.error.to_string()),
            }
        }
    }
    say(&json!({"bye": true, "leftovers": left}));
    ExitCode::SUCCESS
}

/// The first test on a machine finds it without; starting a program for it each time would cost more.
fn load_driver() {
    if !Path::new("/dev/ublk-control").exists() {
        // If it fails, the start says so.
        let _ = Command::new("modprobe").arg("ublk_drv").status();
    }
}

fn obey(disks: &mut Disks, command: &Value) -> Result<Value, Value> {
    match command["cmd"].as_str().unwrap_or("") {
        "start" => disks.start(command["options"].as_str().unwrap_or("")),
        "cycle" => cycle(disks, command),
        "process" => Ok(report::process()),
        "features" => features(),
        "stats" => find(disks, command).map(|disk| stats(disk)),
        "stop" => {
            let stopped = stop(find(disks, command)?, command)?;
            // What a handle keeps would look like a leak. A test backend may still hold requests.
            disks.all.retain(|disk| {
                disk.running.is_some() || disk.faulty.is_some() || disk.faults.is_some()
            });
            Ok(stopped)
        }
        "wait" => {
            let ended = find(disks, command)?.device.wait_timeout(seconds(command));
            let ended = ended.map_err(|e| report::error(&e))?;
            Ok(json!({"ended": ended.map(|e| format!("{e:?}"))}))
        }
        "cut" => {
            let power = power(disks, command)?;
            let probability = command["probability"].as_f64().unwrap_or(0.0);
            let lost = power.cut_some(probability, command["seed"].as_u64().unwrap_or(0));
            let lost = lost.map_err(|e| report::error(&e))?;
            Ok(json!({"lost": lost.lost, "survived": lost.survived}))
        }
        "restore" => {
            power(disks, command)?.restore();
            Ok(json!({}))
        }
        "share" => {
            let disk = find(disks, command)?;
            let shared = share(&disk.device, command["bytes"].as_u64().unwrap_or(0));
            let buffer = shared.map_err(|e| report::error(&e))?;
            let fd = buffer.as_file().as_raw_fd();
            disk.shared.push(buffer);
            Ok(json!({"path": format!("/proc/{}/fd/{fd}", std::process::id())}))
        }
        "arm" => arm(find(disks, command)?, command).map_err(report::wrong),
        "seed" => {
            let faults = find(disks, command)?.faults.as_ref();
            let faults = faults.ok_or_else(|| report::wrong("it has no faults"))?;
            faults.seed(command["seed"].as_u64().unwrap_or(0));
            Ok(json!({}))
        }
        "heal" => {
            let disk = find(disks, command)?;
            disk.faults.iter().for_each(|faults| faults.clear());
            disk.faulty.iter().for_each(|faulty| faulty.rules().heal());
            Ok(json!({}))
        }
        "release" => {
            let disk = find(disks, command)?;
            let went_on = disk.faults.as_ref().map_or(0, |faults| faults.release());
            let (answered, late) = disk.faulty.as_ref().map_or((0, 0), |f| f.release());
            Ok(json!({"answered": went_on + answered, "late": late}))
        }
        other => Err(report::wrong(format!("no command {other:?}"))),
    }
}

fn share(device: &Device, bytes: u64) -> ublk_core::Result<SharedBuffer> {
    let buffer = SharedBuffer::new(bytes)?;
    device.share(&buffer).map(|_| buffer)
}

fn features() -> Result<Value, Value> {
    let control = Control::open().map_err(|e| report::error(&e))?;
    let offered = control.features().unwrap_or_default();
    Ok(json!({"features": offered.iter().filter_map(Features::name).collect::<Vec<_>>()}))
}

fn seconds(command: &Value) -> Duration {
    Duration::from_secs_f64(command["within"].as_f64().unwrap_or(10.0))
}

fn find<'a>(disks: &'a mut Disks, command: &Value) -> Result<&'a mut Disk, Value> {
    let found = match command["id"].as_u64() {
        // The last of that number: it may have been used again.
        Some(id) => disks.all.iter_mut().rev().find(|d| u64::from(d.device.id()) == id),
        None => disks.all.last_mut(),
    };
    found.ok_or_else(|| report::wrong("no such disk"))
}

fn power<'a>(disks: &'a mut Disks, command: &Value) -> Result<&'a Power, Value> {
    find(disks, command)?.power.as_ref().ok_or_else(|| report::wrong("it is no target=cache"))
}

fn arm(disk: &mut Disk, command: &Value) -> Result<Value, String> {
    let by_call = command["action"] == "short";
    match (&disk.faults, &disk.faulty) {
        (Some(faults), _) if !by_call => {
            faults.add(faults::rule(command)?).map_err(|e| e.to_string())?;
        }
        (_, Some(faulty)) => faulty.rules().arm(command)?,
        _ => return Err("it cannot do that".to_owned()),
    }
    Ok(json!({}))
}

fn stats(disk: &Disk) -> Value {
    json!({
        "stats": report::stats(&disk.device.stats()),
        "backend": disk.faulty.as_ref().map(|f| f.report()),
        "faults": disk.faults.as_ref().map(faults::report),
        "unflushed": disk.power.as_ref().map(|power| power.unflushed()),
        "used": disk.mem.as_ref().map(|m| m.used()),
    })
}

fn stop(disk: &mut Disk, command: &Value) -> Result<Value, Value> {
    let running = disk.running.take().ok_or_else(|| report::wrong("it was stopped already"))?;
    let (within, began) = (seconds(command), Instant::now());
    let stopped = match command["force"].as_bool() {
        Some(true) => running.stop_force(within),
        _ => running.stop(within),
    };
    let secs = began.elapsed().as_secs_f64();
    match stopped {
        Ok(stopped) => Ok(json!({
            "stopped": {
                "ending": format!("{:?}", stopped.ending),
                "leftovers": stopped.leftovers,
                "stats": report::stats(&stopped.stats),
            },
            "secs": secs,
        })),
        Err(failed) => {
            disk.running = Some(failed.device);
            let mut answer = report::error(&failed.error);
            answer["secs"] = json!(secs);
            Err(answer)
        }
    }
}

fn cycle(disks: &mut Disks, command: &Value) -> Result<Value, Value> {
    let words = command["options"].as_str().unwrap_or("");
    let options = Options::parse(words).map_err(report::wrong)?;
    let (times, began) = (command["times"].as_u64().unwrap_or(1), Instant::now());
    let mut slowest = Duration::ZERO;
    for _ in 0..times {
        let mut disk = disks.start_one(&options)?;
        if let Some(running) = disk.running.take() {
            let stopping = Instant::now();
            let stopped = running.stop(seconds(command));
            slowest = slowest.max(stopping.elapsed());
            let stopped = stopped.map_err(|failed| report::error(&failed.error))?;
            if !stopped.leftovers.is_empty() {
                return Err(report::wrong(format!("leftovers: {:?}", stopped.leftovers)));
            }
        }
    }
    let secs = began.elapsed().as_secs_f64();
    Ok(json!({"cycled": times, "secs": secs, "slowest_stop": slowest.as_secs_f64()}))
}
