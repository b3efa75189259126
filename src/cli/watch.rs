//! `coldspark watch`: what happens, a line each.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::SocketArgument;
use super::output;
use super::units;
use crate::api::proto;
use crate::api::proto::happening::Change;
use crate::api::proto::watch_event::Event;

pub const EXAMPLES: &str = "Examples:\n  coldspark watch\n  coldspark watch vm snapshot --existing --json\n\nEnds with the service, or with Ctrl-C.";

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Only these
    #[arg(value_enum)]
    kinds: Vec<Kind>,
    /// First tell what there is
    #[arg(long)]
    existing: bool,
    /// VMs too that stand ready in pools
    #[arg(short, long)]
    all: bool,
    /// Print JSON, an object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Vm,
    Snapshot,
    Image,
    Pool,
    Function,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let kind = |kind: &Kind| match kind {
        Kind::Vm => proto::Kind::Vm,
        Kind::Snapshot => proto::Kind::Snapshot,
        Kind::Image => proto::Kind::Image,
        Kind::Pool => proto::Kind::Pool,
        Kind::Function => proto::Kind::Function,
    };
    let request = proto::WatchRequest {
        kinds: arguments.kinds.iter().map(|one| kind(one).into()).collect(),
        existing: arguments.existing,
        ready_in_pools: arguments.all,
    };
    let mut events = arguments.socket.connect().await?.events.watch(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        let Some(event) = event.event else { continue };
        output::line(&match arguments.json {
            true => value(&event).to_string(),
            false => output::shown(&line(&event)),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn value(event: &Event) -> serde_json::Value {
    match event {
        Event::Synced(_) => json!({ "synced": true }),
        Event::Lost(lost) => json!({ "lost": lost }),
        Event::Happening(event) => json!({
            "unix_ms": event.unix_ms,
            "kind": kind(event),
            "change": change(event),
            "id": event.id,
            "name": event.name,
            "state": state(event),
            "exit_reason": event.exit_reason,
            "ready_in_pool": event.ready_in_pool,
            "problem": event.problem,
            "problem_reason": event.problem_reason,
        }),
    }
}

fn line(event: &Event) -> String {
    match event {
        Event::Synced(_) => "that is all there is".to_owned(),
        Event::Lost(lost) => format!("{lost} events are lost"),
        Event::Happening(event) => {
            let problem = match event.problem.as_str() {
                "" => String::new(),
                why => format!(" cannot be kept ready: {why}"),
            };
            let of_vm = match (state(event).as_str(), event.exit_reason.as_str()) {
                ("", _) => String::new(),
                (state, "") => format!(" {state}"),
                (state, why) => format!(" {state}: {why}"),
            };
            let name = if event.name.is_empty() || event.name == event.id { "" } else { &event.name };
            format!(
                "{} {:8} {:7} {} {name}{of_vm}{problem}",
                units::time_of_day(event.unix_ms),
                kind(event),
                change(event),
                event.id
            )
        }
    }
}

fn kind(event: &proto::Happening) -> String {
    event.kind().as_str_name().trim_start_matches("KIND_").to_ascii_lowercase()
}

fn change(event: &proto::Happening) -> &'static str {
    match event.change() {
        Change::Unspecified => "",
        Change::Exists => "exists",
        Change::Made => "made",
        Change::Changed => "changed",
        Change::Gone => "gone",
    }
}

/// A VM's, as `vm ls` spells it.
fn state(event: &proto::Happening) -> String {
    match event.state() {
        proto::VmState::Unspecified => String::new(),
        state => state.as_str_name().trim_start_matches("VM_STATE_").to_ascii_lowercase(),
    }
}
