//! `coldspark token`: bearer tokens for callers from other hosts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use clap::Subcommand;

use super::output;
use crate::api::auth::{Role, tokens};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a token, and show it once. The service keeps a digest only.
    #[command(after_help = "Examples:
  coldspark token new --role run --name ci                            # prints the token, and the line for the file
  coldspark token new --role run --name ci --append /etc/coldspark/tokens > ci.token

A service reads its token file again on SIGHUP.")]
    New {
        /// What its bearer may do: read (look), run (also make, use and end VMs and snapshots), admin (everything)
        #[arg(long, value_enum)]
        role: Role,
        /// Whose it is, for logs; no two lines of a file have the same
        #[arg(long, value_name = "NAME")]
        name: String,
        /// How many days it is good [default: for ever]
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: Option<u32>,
        /// Add the line to this file, and print the token alone
        #[arg(long, value_name = "FILE")]
        append: Option<PathBuf>,
    },
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    let Command::New { role, name, days, append } = command;
    let made = tokens::make(role, &name, days, SystemTime::now()).map_err(anyhow::Error::msg)?;
    match append {
        Some(path) => {
            tokens::append(&path, &made.line).with_context(|| format!("cannot write {}", path.display()))?;
            output::line(&made.token)?;
        }
        None => {
            output::note("Give this to the caller; it cannot be shown again:");
            output::line(&made.token)?;
            output::note("Add this line to the service's token file (--tokens), and send it SIGHUP:");
            output::line(&made.line)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
