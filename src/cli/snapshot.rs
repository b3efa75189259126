//! `coldspark snapshot`: what is in the store.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::{Value, json};

use super::output::{self, Shape, Table};
use super::{SocketArgument, units};
use crate::api::client::all_pages;
use crate::api::proto;

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
    /// Read all of a snapshot and compare it with its sums
    #[command(after_help = "Example:\n  coldspark snapshot verify base")]
    Verify {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        snapshot: String,
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
            output::line(&format!("{snapshot}: sound, {} compared", units::bytes(verified.verified_bytes)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
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
    let mut table = Table::new(&["ID", "NAME", "GUEST", "VCPUS", "MEMORY", "ON DISK", "AGENT", "AGE"]);
    for one in &snapshots {
        table.row([
            one.id.clone(),
            one.name.clone(),
            one.origin.clone(),
            one.vcpus.to_string(),
            units::bytes(one.memory_bytes),
            units::bytes(one.stored_bytes),
            if one.agent { "yes" } else { "no" }.to_owned(),
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
