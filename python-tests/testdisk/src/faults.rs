//! Rules of the library's `Fault` target, from a test's words.

use std::time::Duration;

use serde_json::{Value, json};
use ublk_core::targets::{Action, Faults, Rule};
use ublk_core::{Errno, Op};

/// `action` with `errno`, or `ms` and `most_ms`; `op` (names, separated by commas), `from`, `to`, `probability`, `every`,
/// `skip` and `times` say which requests.
pub(crate) fn rule(command: &Value) -> Result<Rule, String> {
    let number = |key: &str| command[key].as_u64();
    let action = match command["action"].as_str().unwrap_or("") {
        "error" => {
            let errno = number("errno").and_then(|n| Errno::new(n as i32));
            Action::Error(errno.ok_or("an errno is 1 to 4095")?)
        }
        "delay" => {
            let least = number("ms").unwrap_or(1);
            let most = number("most_ms").unwrap_or(least);
            Action::Delay { least: Duration::from_millis(least), most: Duration::from_millis(most) }
        }
        "drop" => Action::Drop,
        "hold" => Action::Hold,
        "panic" => Action::Panic,
        "abort" => Action::Abort,
        other => return Err(format!("no action {other:?}")),
    };
    let mut rule = Rule::new(action).every(number("every").unwrap_or(1));
    if let Some(names) = command["op"].as_str() {
        rule = rule.ops(names.split(',').map(op).collect::<Result<Vec<_>, _>>()?);
    }
    if number("from").is_some() || number("to").is_some() {
        rule = rule.range(number("from").unwrap_or(0)..number("to").unwrap_or(u64::MAX));
    }
    if let Some(probability) = command["probability"].as_f64() {
        rule = rule.probability(probability);
    }
    if let Some(times) = number("times") {
        rule = rule.limit(times);
    }
    Ok(rule.skip(number("skip").unwrap_or(0)))
}

pub(crate) fn op(name: &str) -> Result<Op, String> {
    Ok(match name {
        "read" => Op::Read,
        "write" => Op::Write,
        "flush" => Op::Flush,
        "discard" => Op::Discard,
        "write_zeroes" => Op::WriteZeroes,
        other => return Err(format!("no operation {other}")),
    })
}

pub(crate) fn report(faults: &Faults) -> Value {
    let injected = faults.injected();
    let rules: Vec<_> = faults
        .rules()
        .iter()
        .map(|status| json!({"seen": status.seen, "applied": status.applied}))
        .collect();
    json!({
        "errors": injected.errors,
        "delays": injected.delays,
        "delayed_ms": injected.delayed.as_millis() as u64,
        "drops": injected.drops,
        "holds": injected.holds,
        "panics": injected.panics,
        "held": faults.held(),
        "rules": rules,
    })
}
