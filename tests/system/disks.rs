//! Disks: what survives a killed VM, several at once, files that are shared and files that are not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];
/// What one message to the embedded guest can carry: less than 1 MiB.
const PIECE_SECTORS: u64 = 2047;
const PIECE_BYTES: usize = PIECE_SECTORS as usize * 512;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("disks/written-flushed-killed-read-again", NEEDS, 400, killed),
        trial("disks/three-of-every-kind", NEEDS, 60, every_kind),
        trial("disks/a-file-under-two-overlays", NEEDS, 90, two_overlays),
    ]
}

fn with_disks(disks: &[(&Path, DiskMode)]) -> CreateVmRequest {
    let file = |(path, mode): &(&Path, DiskMode)| DiskFile {
        path: path.to_string_lossy().into_owned(),
        mode: (*mode).into(),
    };
    CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        disks: disks.iter().map(file).collect(),
        ..Default::default()
    }
}

/// Bytes that nothing but `seed` and `piece` decides.
fn bytes(seed: u64, piece: u64) -> Vec<u8> {
    let mut bytes = vec![0; PIECE_BYTES];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&piece.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

async fn write(
    client: &mut Client,
    vm: &str,
    disk: u32,
    first_sector: u64,
    data: Vec<u8>,
) -> anyhow::Result<()> {
    ask!(client, vm, DiskWrite(DiskWriteOp { disk, first_sector, data: data.into(), flush: false }));
    Ok(())
}

async fn flush(client: &mut Client, vm: &str, disk: u32) -> anyhow::Result<()> {
    let nothing = Vec::new().into();
    ask!(client, vm, DiskWrite(DiskWriteOp { disk, first_sector: 0, data: nothing, flush: true }));
    Ok(())
}

async fn read(client: &mut Client, vm: &str, disk: u32, first_sector: u64) -> anyhow::Result<Vec<u8>> {
    let op = DiskReadOp { disk, first_sector, sectors: PIECE_SECTORS as u32 };
    Ok(ask!(client, vm, DiskRead(op)).data.to_vec())
}

/// Threads of a VM's worker that carry disk requests out.
fn disk_threads(vm: &Vm) -> anyhow::Result<usize> {
    let mut count = 0;
    for task in fs::read_dir(format!("/proc/{}/task", vm.worker_pid))? {
        count += usize::from(fs::read_to_string(task?.path().join("comm"))?.starts_with("disk"));
    }
    Ok(count)
}

pub fn new_file(stage: &Stage, name: &str, bytes: u64) -> anyhow::Result<PathBuf> {
    let path = stage.logs.join(name);
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// Kills the worker and waits until its VM has ended.
async fn kill(client: &mut Client, vm: &Vm) -> anyhow::Result<()> {
    let pid = i32::try_from(vm.worker_pid)?;
    ensure!(pid > 1);
    // SAFETY: plain kill of a worker that this trial's daemon started.
    ensure!(unsafe { libc::kill(pid, libc::SIGKILL) } == 0);
    eventually("the VM ends", 10, async || Ok(client.vm(&vm.id).await?.state() == VmState::Exited)).await
}

/// 1 GiB written and flushed by the guest, the VM killed, then read again: from the file, and by another VM.
async fn killed(stage: Stage) -> anyhow::Result<()> {
    let pieces: u64 = if host::in_rig() { 16 } else { (1 << 30) / PIECE_BYTES as u64 + 1 };
    let disk_bytes = (pieces * PIECE_BYTES as u64).next_multiple_of(1 << 20);
    let path = new_file(&stage, "disk.raw", disk_bytes)?;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let request = || with_disks(&[(&path, DiskMode::Persist)]);
    let vm = client.boot(request()).await?.vm;
    for piece in 0..pieces {
        write(&mut client, &vm.id, 0, piece * PIECE_SECTORS, bytes(1, piece)).await?;
    }
    flush(&mut client, &vm.id, 0).await?;
    // Written, not flushed: still in the file when only the VM dies.
    write(&mut client, &vm.id, 0, 0, bytes(2, 0)).await?;
    expect_status(
        "a disk that another VM writes",
        client.boot(request()).await.map(|_| ()),
        &[Code::FailedPrecondition],
    )?;
    expect_status(
        "a snapshot of a disk that goes on changing",
        client.snapshot(&vm.id, "").await,
        &[Code::FailedPrecondition],
    )?;
    kill(&mut client, &vm).await?;

    let file = File::open(&path)?;
    let expected = |piece| if piece == 0 { bytes(2, 0) } else { bytes(1, piece) };
    let mut on_disk = vec![0; PIECE_BYTES];
    for piece in 0..pieces {
        file.read_exact_at(&mut on_disk, piece * PIECE_BYTES as u64)?;
        ensure!(on_disk == expected(piece), "piece {piece} of the file");
    }
    let again = client.boot(request()).await.context("the next VM of the same disk")?.vm;
    for piece in 0..pieces {
        let read = read(&mut client, &again.id, 0, piece * PIECE_SECTORS).await?;
        ensure!(read == expected(piece), "piece {piece} as the next VM reads it");
    }
    client.delete_vm(&again.id).await?;
    // Deleting a VM frees the lock at once.
    let last = client.boot(request()).await.context("after deleting")?.vm;
    client.delete_vm(&last.id).await?;
    fs::remove_file(path)?;
    Ok(())
}

/// An image's disk, then one that persists, one that is read-only and one with an overlay, all in one VM.
async fn every_kind(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    client.import_embedded("guest", vec![vec![0; 2 << 20]]).await?;
    let (persist, read_only, overlay) = (
        new_file(&stage, "persist.raw", 4 << 20)?,
        new_file(&stage, "read-only.raw", 8 << 20)?,
        new_file(&stage, "overlay.raw", 16 << 20)?,
    );
    let request = CreateVmRequest {
        source: Some(Source::Image("guest".into())),
        ..with_disks(&[
            (&persist, DiskMode::Persist),
            (&read_only, DiskMode::ReadOnly),
            (&overlay, DiskMode::Overlay),
        ])
    };
    let vm = client.boot(request).await?.vm;
    for (disk, mib) in [(0, 2), (1, 4), (2, 8), (3, 16)] {
        let info = ask!(&mut client, &vm.id, DiskInfo(DiskInfoOp { disk }));
        ensure!(
            info.disks == 4 && info.sectors == mib * 2048 && info.read_only == (disk == 2),
            "disk {disk}: {info:?}"
        );
        ensure!(info.serial.contains(&format!("coldspark-{disk}")), "disk {disk}: {info:?}");
    }
    for disk in [0, 1, 3] {
        write(&mut client, &vm.id, disk, 1, bytes(disk.into(), 0)).await?;
        flush(&mut client, &vm.id, disk).await?;
    }
    let refused = DiskWriteOp { disk: 2, first_sector: 0, data: vec![1; 512].into(), flush: false };
    let request = AgentCallRequest {
        vm: vm.id.clone(),
        timeout_ms: 0,
        op: Some(agent_call_request::Op::DiskWrite(refused)),
    };
    ensure!(client.agent.call(request).await.is_err(), "a read-only disk took a write");
    for disk in [0, 1, 3] {
        ensure!(read(&mut client, &vm.id, disk, 1).await? == bytes(disk.into(), 0), "disk {disk}");
    }
    kill(&mut client, &vm).await?;
    let mut content = fs::read(&persist)?;
    ensure!(content[512..512 + PIECE_BYTES] == bytes(1, 0)[..], "the persistent disk");
    content[512..512 + PIECE_BYTES].fill(0);
    ensure!(content.iter().all(|byte| *byte == 0), "the persistent disk, elsewhere");
    for path in [&read_only, &overlay] {
        ensure!(fs::read(path)?.iter().all(|byte| *byte == 0), "{} was written to", path.display());
    }
    Ok(())
}

/// Two VMs on one file write to overlays of their own; a snapshot of one keeps what the file was.
async fn two_overlays(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let path = new_file(&stage, "shared.raw", 4 << 20)?;
    let file = File::options().write(true).open(&path)?;
    file.write_all_at(&bytes(7, 0), 512)?;
    let request = || with_disks(&[(&path, DiskMode::Overlay)]);
    let (one, two) = (client.boot(request()).await?.vm, client.boot(request()).await?.vm);
    write(&mut client, &one.id, 0, 4000, vec![1; 512]).await?;
    write(&mut client, &two.id, 0, 4000, vec![2; 512]).await?;
    let third = with_disks(&[(&path, DiskMode::Persist)]);
    expect_status(
        "writing what others read",
        client.boot(third).await.map(|_| ()),
        &[Code::FailedPrecondition],
    )?;
    let snapshot = client.snapshot(&one.id, "kept").await?;
    client.delete_vm(&one.id).await?;
    client.delete_vm(&two.id).await?;
    // The file is its owner's again; the snapshot has what it was.
    file.write_all_at(&vec![0xff; PIECE_BYTES], 512)?;
    let clone = client.clone_vms("kept", 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);
    // Threads for disks come with the first request, not with the restore.
    ensure!(disk_threads(&clone)? == 0, "a clone that asked nothing of its disk has threads for it");
    ensure!(
        read(&mut client, &clone.id, 0, 1).await? == bytes(7, 0),
        "the snapshot's disk changed with the file"
    );
    ensure!(disk_threads(&clone)? > 0);
    let own = ask!(&mut client, &clone.id, DiskRead(DiskReadOp { disk: 0, first_sector: 4000, sectors: 1 }));
    ensure!(own.data.iter().all(|byte| *byte == 1), "the clone lost what its source had written");
    ensure!(client.verify(&snapshot.id).await? > 0);
    Ok(())
}
