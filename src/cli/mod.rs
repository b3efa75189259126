//! The command line. One file per subcommand; each is gRPC calls that any client can make, or starts the service.
//!
//! Output is for people unless `--json` is given. Errors are one line on stderr and a non-zero exit code. A closed
//! stdout (`| head`) ends a command quietly.

mod agent;
mod bench;
mod config;
mod demo;
mod doctor;
mod function;
mod image;
mod limits;
mod manual;
mod notify;
mod output;
mod pool;
mod private;
mod run;
mod serve;
mod service;
mod snapshot;
mod stdin;
mod tiny;
mod token;
mod top;
mod units;
mod vm;
mod watch;

use std::future::Future;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use service::SocketArgument;

/// FreeBSD virtual machines that start in about a millisecond: cold boot once, snapshot, clone on demand.
#[derive(Debug, Parser)]
#[command(name = "coldspark", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service: on a Unix socket, and with --listen on a TCP port too. Its VMs end when it is stopped, and outlive it when it is killed.
    #[command(after_help = "Example:\n  coldspark serve --data-dir /var/lib/coldspark")]
    Serve(serve::Arguments),
    /// Import, list and remove images: what can be cold-booted.
    #[command(subcommand)]
    Image(image::Command),
    /// Create, clone, list and use VMs.
    #[command(subcommand)]
    Vm(vm::Command),
    /// List, verify and remove snapshots.
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Keep clones ready, and take them.
    #[command(subcommand)]
    Pool(pool::Command),
    /// Run commands in fresh clones: deploy once, invoke on demand.
    #[command(subcommand)]
    Function(function::Command),
    /// The agent for FreeBSD guests: put it into a guest.
    #[command(subcommand)]
    Agent(agent::Command),
    /// Tell what is made, changed and gone, as it happens.
    #[command(after_help = watch::EXAMPLES)]
    Watch(watch::Arguments),
    /// See it work: cold boot, snapshot, clones that answer, checked and timed. Needs nothing but /dev/kvm.
    #[command(after_help = demo::EXAMPLES)]
    Demo(demo::Arguments),
    /// Boot a kernel, run one command on its console and end with its status: for kernel developers' loops.
    #[command(after_help = run::EXAMPLES)]
    Run(run::Arguments),
    /// Watch the service: VMs, clones, pools and functions, what they do and how long it takes.
    #[command(after_help = top::EXAMPLES)]
    Top(top::Arguments),
    /// Measure.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Check and show the settings of the service.
    #[command(subcommand)]
    Config(config::Command),
    /// Make bearer tokens for callers from other hosts.
    #[command(subcommand)]
    Token(token::Command),
    /// Look at this host: can it run VMs, how fast, and what to do about what is missing.
    #[command(
        after_help = "Example:\n  coldspark doctor\n\nExit code 1 if something fails that coldspark cannot do without."
    )]
    Doctor(doctor::Arguments),
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  coldspark completions bash > /etc/bash_completion.d/coldspark")]
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the manual pages, one for each command.
    #[command(after_help = "Example:\n  coldspark man /usr/local/share/man/man1")]
    Man {
        #[arg(value_name = "FOLDER")]
        folder: std::path::PathBuf,
    },
}

/// Parses the command line and runs the subcommand.
pub fn main() -> ExitCode {
    // Not worth a command line parser: it may be started for every VM.
    if std::env::args_os().nth(1).is_some_and(|word| word == "worker") {
        return crate::worker::main(crate::worker::Setting::of(std::env::args_os().skip(2)));
    }
    let command = Cli::parse().command;
    let result = match command {
        Command::Serve(_) => config::with_file().and_then(serve::run),
        Command::Image(command) => run(image::run(command)),
        Command::Vm(command) => run(vm::run(command)),
        Command::Snapshot(command) => run(snapshot::run(command)),
        Command::Pool(command) => run(pool::run(command)),
        Command::Function(command) => run(function::run(command)),
        Command::Agent(command) => agent::run(command),
        Command::Watch(arguments) => run(watch::run(arguments)),
        Command::Demo(arguments) => run(demo::run(arguments)),
        Command::Run(arguments) => run(run::run(arguments)),
        Command::Top(arguments) => run(top::run(arguments)),
        Command::Bench(command) => run(bench::run(command)),
        Command::Config(command) => config::run(command),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { folder } => manual::pages(&folder),
        Command::Token(command) => token::run(command),
        Command::Doctor(arguments) => doctor::run(arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => output::failed(&error),
    }
}

/// Runs a command that is one client.
fn run(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(command);
    // Reading stdin cannot be cancelled; do not wait for it.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                let path = format!("{path} {}", sub.get_name());
                if sub.has_subcommands() {
                    walk(sub, &path);
                } else {
                    let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                    assert!(help.contains(sub.get_name()), "{path} has no example: {help}");
                }
            }
        }
        walk(&Cli::command(), "coldspark");
    }
}
