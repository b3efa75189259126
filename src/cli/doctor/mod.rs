//! `coldspark doctor`: can this host run VMs, how fast, and what to do about what is missing.
//!
//! Every check looks or measures by itself and makes one [`Finding`]; none changes anything. Of the jail a worker tells that is started for it.

#![forbid(unsafe_code)]

mod jail;
mod kvm;
mod system;

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::output;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// It does not work.
    Fail,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// What one check found.
#[derive(Debug)]
struct Finding {
    name: &'static str,
    level: Level,
    found: String,
    /// What to do; empty if nothing.
    advice: String,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), advice: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, level: Level::Warn, found: found.into(), advice: advice.into() }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, level: Level::Fail, found: found.into(), advice: advice.into() }
    }
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut findings = kvm::check();
    findings.extend(system::check());
    findings.push(jail::check());
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Fail);
    if arguments.json {
        let list: Vec<_> = findings
            .iter()
            .map(|finding| {
                json!({
                    "name": finding.name,
                    "level": finding.level.name(),
                    "found": finding.found,
                    "advice": finding.advice,
                })
            })
            .collect();
        output::json(&json!({ "verdict": worst.name(), "findings": list }))?;
    } else {
        output::print(&text(&findings, worst))?;
    }
    Ok(if worst == Level::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(findings: &[Finding], worst: Level) -> String {
    let mut text = String::new();
    for finding in findings {
        text.push_str(&format!("{:<5} {:<18} {}\n", finding.level.name(), finding.name, finding.found));
        if !finding.advice.is_empty() {
            text.push_str(&format!("{:<24} -> {}\n", "", finding.advice));
        }
    }
    text.push_str(match worst {
        Level::Ok => "\nThis host is ready. Try: coldspark demo\n",
        Level::Warn => "\nThis host works, with the limits above. Try: coldspark demo\n",
        Level::Fail => "\nThis host cannot run coldspark until what fails above is put right.\n",
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_outweighs_warnings_and_brings_its_advice() {
        let findings = [Finding::ok("a", "1"), Finding::fail("b", "2", "do it"), Finding::warn("c", "3", "")];
        let worst = findings.iter().map(|finding| finding.level).max().unwrap();
        assert_eq!(worst, Level::Fail);
        let text = text(&findings, worst);
        assert!(text.contains("fail  b") && text.contains("-> do it") && text.contains("cannot run"));
    }
}
