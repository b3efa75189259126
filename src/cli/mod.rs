//! The command line. One file per subcommand; each is gRPC calls that any client can make, or starts the service.
//!
//! Output is for people unless `--json` is given. Errors are one line on stderr and a non-zero exit code. A closed
//! stdout (`| head`) ends a command quietly.

mod bench;
mod demo;
mod doctor;
mod image;
mod output;
mod private;
mod run;
mod serve;
mod snapshot;
mod tiny;
mod units;
mod vm;

use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::api::client::{self, Client};

/// FreeBSD virtual machines that start in about a millisecond: cold boot once, snapshot, clone on demand.
#[derive(Debug, Parser)]
#[command(name = "coldspark", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service on a Unix socket. For now its VMs end with it.
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
    /// See it work: cold boot, snapshot, clones that answer, checked and timed. Needs nothing but /dev/kvm.
    #[command(after_help = demo::EXAMPLES)]
    Demo(demo::Arguments),
    /// Boot a kernel, run one command on its console and end with its status: for kernel developers' loops.
    #[command(after_help = run::EXAMPLES)]
    Run(run::Arguments),
    /// Measure.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Look at this host: can it run VMs, how fast, and what to do about what is missing.
    #[command(
        after_help = "Example:\n  coldspark doctor\n\nExit code 1 if something fails that coldspark cannot do without."
    )]
    Doctor(doctor::Arguments),
}

/// Where the service is.
#[derive(Debug, Clone, Args)]
struct SocketArgument {
    /// The service's Unix socket [default: $XDG_RUNTIME_DIR/coldspark.sock, for root /run/coldspark.sock]
    #[arg(long, env = "COLDSPARK_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl SocketArgument {
    fn path(&self) -> anyhow::Result<PathBuf> {
        if let Some(path) = &self.socket {
            return Ok(path.clone());
        }
        // SAFETY: geteuid has no preconditions and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            return Ok("/run/coldspark.sock".into());
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(folder) if !folder.is_empty() => Ok(PathBuf::from(folder).join("coldspark.sock")),
            _ => anyhow::bail!("XDG_RUNTIME_DIR is not set: name the service's socket with --socket"),
        }
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        Ok(client::connect(&self.path()?).await?)
    }
}

/// Parses the command line and runs the subcommand.
pub fn main() -> ExitCode {
    // Not worth a command line parser: it is started for every VM.
    if std::env::args_os().nth(1).is_some_and(|word| word == "worker") {
        let die_with_parent = std::env::args_os().skip(2).any(|word| word == "--die-with-parent");
        return crate::worker::main(die_with_parent);
    }
    let command = Cli::parse().command;
    let result = match command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Image(command) => run(image::run(command)),
        Command::Vm(command) => run(vm::run(command)),
        Command::Snapshot(command) => run(snapshot::run(command)),
        Command::Demo(arguments) => run(demo::run(arguments)),
        Command::Run(arguments) => run(run::run(arguments)),
        Command::Bench(command) => run(bench::run(command)),
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
    use super::*;
    use clap::CommandFactory;

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
