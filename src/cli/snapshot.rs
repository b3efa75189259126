//! `coldspark snapshot`: what is in the store.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use serde_json::{Value, json};

use super::output::{self, Shape, Table};
use super::{SocketArgument, units};
use crate::api::client::all_pages;
use crate::api::proto;
use crate::fleet::snapshots::signing::SigningKey;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List snapshots
    #[command(after_help = "Example:\n  coldspark snapshot ls --json")]
    Ls {
        #[command(flatten)]
        socket: SocketArgument,
        #[command(flatten)]
        shape: Shape,
    },
    /// Remove snapshots; clones that run keep working
    #[command(after_help = "Example:\n  coldspark snapshot rm base")]
    Rm {
        #[command(flatten)]
        socket: SocketArgument,
        /// Ids or names
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
    /// Read all of a snapshot and compare it with its sums and its signature
    #[command(after_help = "Example:\n  coldspark snapshot verify base")]
    Verify {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        snapshot: String,
    },
    /// Keys with which a service signs snapshots
    #[command(subcommand)]
    Key(KeyCommand),
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key: its secret goes into a new file, its line for --trusted-keys is printed
    #[command(after_help = "Example:
  coldspark snapshot key new --name build-1 signing.key >> trusted-keys
  coldspark serve --sign-key signing.key                # signs what it makes
  coldspark serve --trusted-keys trusted-keys           # uses only what was signed so")]
    New {
        /// What it is called
        #[arg(long, value_name = "NAME")]
        name: String,
        /// Where its secret goes; it must not be there yet
        file: PathBuf,
    },
    /// Print a key's line for --trusted-keys
    #[command(after_help = "Example:\n  coldspark snapshot key show signing.key")]
    Show {
        /// The file of its secret
        file: PathBuf,
    },
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ls { socket, shape } => list(&socket, shape).await?,
        Command::Rm { socket, snapshots } => {
            let mut client = socket.connect().await?.snapshots;
            for snapshot in snapshots {
                client.delete_snapshot(proto::DeleteSnapshotRequest { snapshot: snapshot.clone() }).await?;
                output::line(&snapshot)?;
            }
        }
        Command::Verify { socket, snapshot } => {
            let mut client = socket.connect().await?.snapshots;
            let request = proto::VerifySnapshotRequest { snapshot: snapshot.clone() };
            let verified = client.verify_snapshot(request).await?.into_inner();
            output::line(&format!(
                "{snapshot}: sound, {} compared, {}",
                units::bytes(verified.verified_bytes),
                signer(verified.signature.as_ref())
            ))?;
        }
        Command::Key(KeyCommand::New { name, file }) => {
            output::line(&new_key(&name, &file)?.trusted_line())?;
            output::note(&format!(
                "the secret is in {}; the line above is for --trusted-keys",
                file.display()
            ));
        }
        Command::Key(KeyCommand::Show { file }) => output::line(&SigningKey::read(&file)?.trusted_line())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a key's file, for this user alone, and reads it again.
fn new_key(name: &str, file: &Path) -> anyhow::Result<SigningKey> {
    let line = SigningKey::generate(name).map_err(anyhow::Error::msg)?;
    let mut open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    let written = writeln!(open, "{line}").and_then(|()| open.sync_all());
    if written.is_err() {
        // Half a key is none; what cannot be removed is refused when it is read.
        let _ = fs::remove_file(file);
    }
    written.with_context(|| format!("cannot write {}", file.display()))?;
    Ok(SigningKey::read(file)?)
}

/// Who has signed it, in words.
fn signer(signature: Option<&proto::Signature>) -> String {
    match signature {
        None => "not signed".to_owned(),
        Some(signature) if !signature.problem.is_empty() => format!("WRONGLY signed: {}", signature.problem),
        Some(signature) => {
            let trusted = if signature.trusted { ", who is trusted" } else { "" };
            match signature.name.is_empty() {
                true => format!("signed by {}", signature.key),
                false => format!("signed by {} ({}){trusted}", signature.name, signature.key),
            }
        }
    }
}

/// The same in a word.
fn signed_by(signature: Option<&proto::Signature>) -> String {
    /// Enough of a key to tell it from others.
    const KEY_CHARS: usize = 24;
    match signature {
        None => "-".to_owned(),
        Some(signature) if !signature.problem.is_empty() => "WRONG".to_owned(),
        Some(signature) if !signature.name.is_empty() => signature.name.clone(),
        Some(signature) => signature.key.chars().take(KEY_CHARS).collect(),
    }
}

async fn list(socket: &SocketArgument, shape: Shape) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.snapshots;
    let mut damaged = Vec::new();
    let snapshots = all_pages(async |page_token| {
        let request = proto::ListSnapshotsRequest { page_token, page_size: 0 };
        let list = client.list_snapshots(request).await?.into_inner();
        damaged.extend(list.damaged);
        Ok((list.snapshots, list.next_page_token))
    })
    .await?;
    if shape.quiet {
        return Ok(output::lines(snapshots.iter().map(|one| one.id.as_str()))?);
    }
    if shape.json {
        let damaged = damaged.iter().map(|one| json!({ "id": one.id, "reason": one.reason }));
        output::json(&json!({
            "snapshots": snapshots.iter().map(value).collect::<Vec<_>>(),
            "damaged": damaged.collect::<Vec<_>>(),
        }))?;
        return Ok(());
    }
    let mut table =
        Table::new(&["ID", "NAME", "GUEST", "VCPUS", "MEMORY", "ON DISK", "AGENT", "SIGNED BY", "AGE"]);
    for one in &snapshots {
        table.row([
            one.id.clone(),
            one.name.clone(),
            one.origin.clone(),
            one.vcpus.to_string(),
            units::bytes(one.memory_bytes),
            units::bytes(one.stored_bytes),
            if one.agent { "yes" } else { "no" }.to_owned(),
            signed_by(one.signature.as_ref()),
            units::ago(one.created_unix_ms),
        ]);
    }
    output::print(&table.text())?;
    for one in &damaged {
        output::note(&format!("damaged: {}: {}", one.id, one.reason));
    }
    Ok(())
}

/// A snapshot as JSON.
pub fn value(one: &proto::Snapshot) -> Value {
    json!({
        "id": one.id,
        "name": one.name,
        "created_unix_ms": one.created_unix_ms,
        "parent": one.parent,
        "origin": one.origin,
        "vcpus": one.vcpus,
        "memory_bytes": one.memory_bytes,
        "stored_bytes": one.stored_bytes,
        "protocol": protocol_name(one.protocol),
        "agent": one.agent,
        "disks": one.disks,
        "cpu_vendor": one.cpu_vendor,
        "tsc_khz": one.tsc_khz,
        "signature": one.signature.as_ref().map(|signature| json!({
            "key": signature.key,
            "name": signature.name,
            "trusted": signature.trusted,
            "problem": signature.problem,
        })),
        "working_set": one.working_set.as_ref().map(|set| json!({
            "recordings": set.recordings,
            "learnt": set.learnt,
            "touched_bytes": set.touched_bytes,
            "written_bytes": set.written_bytes,
            "folded_bytes": set.folded_bytes,
            "read_again": set.read_again,
        })),
    })
}

/// A boot protocol as the command line spells it.
pub fn protocol_name(number: i32) -> &'static str {
    match proto::BootProtocol::try_from(number) {
        Ok(proto::BootProtocol::Freebsd) => "freebsd",
        Ok(proto::BootProtocol::Pvh) => "pvh",
        Ok(proto::BootProtocol::Linux) => "linux",
        _ => "unknown",
    }
}
