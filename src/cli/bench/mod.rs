//! `coldspark bench`: what it takes here.

mod host;
mod restore;

use std::process::ExitCode;

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Time from a clone's request to its first answer, beside the least that KVM takes
    #[command(
        after_help = "Example:\n  coldspark bench restore --n 200 --json\n\nUse a release build on a host with nothing else to do."
    )]
    Restore(restore::Arguments),
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Restore(arguments) => restore::run(arguments).await,
    }
}
