//! Wrong input of every kind: the standard code, a sentence, nothing half-published, nothing published lost.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::client::{Client, ImageFiles, ask, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

const ANYWHERE: &[Need] = &[];
const KVM: &[Need] = &[Need::Kvm];
const MOUNT: &[Need] = &[Need::Kvm, Need::Mount];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("bad-input/images", ANYWHERE, 60, images),
        trial("bad-input/image-cut-off", ANYWHERE, 60, image_cut_off),
        trial("bad-input/names-that-are-unknown", ANYWHERE, 30, unknown_names),
        trial("bad-input/machines", KVM, 60, machines),
        trial("bad-input/kernels", KVM, 60, kernels),
        trial("bad-input/little-memory", KVM, 60, little_memory),
        trial("bad-input/full-disk", MOUNT, 180, full_disk),
    ];
    for (name, damage, code) in DAMAGES {
        trials.push(trial(format!("bad-input/damaged/{name}"), KVM, 120, move |stage| {
            damaged(stage, *damage, *code)
        }));
    }
    trials
}

fn spec(name: &str) -> ImageSpec {
    ImageSpec { name: name.into(), ..Default::default() }
}

/// Some kernel's bytes; what they are does not matter until a VM boots.
fn some_kernel() -> ImageFiles {
    ImageFiles { kernel: Some(vec![0x90; 4096]), ..Default::default() }
}

async fn images(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let invalid = &[Code::InvalidArgument];
    expect_status("no kernel", client.import(spec("a"), ImageFiles::default()).await, invalid)?;
    let too_long = "n".repeat(65);
    for name in ["", "../up", "a/b", "-dash", ".dot", "with space", "nul\0", &too_long] {
        expect_status(&format!("name {name:?}"), client.import(spec(name), some_kernel()).await, invalid)?;
    }
    let disk = |bytes| ImageFiles { disks: vec![vec![7; bytes]], ..some_kernel() };
    let with_disk = ImageSpec { disks: vec![DiskSettings::default()], ..spec("a") };
    expect_status("a truncated disk", client.import(with_disk.clone(), disk(1000)).await, invalid)?;
    expect_status(
        "a disk that is not there",
        client.import(with_disk.clone(), some_kernel()).await,
        invalid,
    )?;
    expect_status("a disk too many", client.import(spec("a"), disk(512)).await, invalid)?;
    let longer = ImageSpec { disks: vec![DiskSettings { bytes: 1024, ..Default::default() }], ..spec("a") };
    expect_status("a disk that ends early", client.import(longer, disk(512)).await, invalid)?;
    let longer = ImageSpec { kernel_bytes: 5000, ..spec("a") };
    expect_status("a kernel that ends early", client.import(longer, some_kernel()).await, invalid)?;
    let nine = ImageSpec { disks: vec![DiskSettings::default(); 9], ..spec("a") };
    let files = ImageFiles { disks: vec![vec![0; 512]; 9], ..some_kernel() };
    expect_status("nine disks", client.import(nine, files).await, invalid)?;
    let module = ImageFiles { module: Some(vec![1; 100]), ..some_kernel() };
    expect_status("a module that the spec does not have", client.import(spec("a"), module).await, invalid)?;
    let missing = ImageSpec { module: ModuleKind::Initrd.into(), ..spec("a") };
    expect_status("a module that is not there", client.import(missing, some_kernel()).await, invalid)?;
    let embedded = ImageSpec { embedded: true, ..spec("a") };
    expect_status("a kernel for the embedded guest", client.import(embedded, some_kernel()).await, invalid)?;
    let nothing = client.images.import_image(tokio_stream::iter(Vec::new())).await;
    expect_status("an import without a message", nothing, invalid)?;
    let first = import_image_request::Message::Chunk(FileChunk {
        file: Some(file_chunk::File::Kernel(true)),
        data: vec![0; 10].into(),
        zeros: 0,
    });
    let chunk_first = tokio_stream::iter([ImportImageRequest { message: Some(first) }]);
    expect_status("a chunk before the spec", client.images.import_image(chunk_first).await, invalid)?;

    // Nothing of all that stayed.
    let list = client.images.list_images(ListImagesRequest::default()).await?.into_inner();
    ensure!(list.images.is_empty(), "{:?}", list.images);

    client.import(with_disk, disk(1024)).await.context("a good image")?;
    expect_status(
        "the same name again",
        client.import(spec("a"), some_kernel()).await,
        &[Code::AlreadyExists],
    )?;
    let image = client.images.get_image(GetImageRequest { name: "a".into() }).await?.into_inner();
    ensure!(
        image.disks.len() == 1 && image.disks[0].bytes == 1024 && image.kernel_bytes == 4096,
        "{image:?}"
    );
    client.images.delete_image(DeleteImageRequest { name: "a".into() }).await?;
    expect_status(
        "an image that is gone",
        client.images.get_image(GetImageRequest { name: "a".into() }).await,
        &[Code::NotFound],
    )?;
    Ok(())
}

/// A caller who cancels in the middle of an import has not ended it: a part of a disk never becomes an image.
async fn image_cut_off(stage: Stage) -> anyhow::Result<()> {
    const TIMES: usize = 30;
    const PIECE: usize = 512 << 10;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let message = |message| ImportImageRequest { message: Some(message) };
    for n in 0..TIMES {
        let (messages, stream) = mpsc::channel(1);
        let importing = {
            let mut images = client.images.clone();
            tokio::spawn(async move { images.import_image(ReceiverStream::new(stream)).await })
        };
        let disk = ImageSpec { disks: vec![DiskSettings::default()], ..spec(&format!("part-{n}")) };
        messages.send(message(import_image_request::Message::Spec(disk))).await?;
        for file in [file_chunk::File::Kernel(true), file_chunk::File::Disk(0), file_chunk::File::Disk(0)] {
            let chunk = FileChunk { file: Some(file), data: vec![7; PIECE].into(), zeros: 0 };
            messages.send(message(import_image_request::Message::Chunk(chunk))).await?;
        }
        // What `messages` sends has not ended when the call is cancelled.
        importing.abort();
        ensure!(importing.await.is_err_and(|error| error.is_cancelled()), "it answered");
        drop(messages);
    }
    // Answered after all that was before it on this connection.
    client.import(spec("whole"), some_kernel()).await?;
    eventually("the parts are gone", 20, async || {
        let list = client.images.clone().list_images(ListImagesRequest::default()).await?.into_inner();
        let names: Vec<_> = list.images.into_iter().map(|image| image.name).collect();
        ensure!(names == ["whole"], "half an image was kept: {names:?}");
        let kept = fs::read_dir(daemon.data.join("images"))?.collect::<Result<Vec<_>, _>>()?;
        Ok(kept.into_iter().filter(|file| file.file_name() != ".lock").count() == 1)
    })
    .await
}

async fn unknown_names(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let missing = &[Code::NotFound];
    for name in
        ["nobody", "snap-000000000000", "vm-000000000000", "../../etc/passwd", "", "a\0b", &"x".repeat(5000)]
    {
        let what = |call: &str| format!("{call} of {:?}", name.chars().take(20).collect::<String>());
        let clone = client.clone_vms(name, 1, MemoryMode::Mapped, Identity::Managed).await;
        expect_status(&what("clone"), clone, missing)?;
        expect_status(&what("verify"), client.verify(name).await, missing)?;
        let delete = client.snapshots.delete_snapshot(DeleteSnapshotRequest { snapshot: name.into() }).await;
        expect_status(&what("delete snapshot"), delete, missing)?;
        let get = client.snapshots.get_snapshot(GetSnapshotRequest { snapshot: name.into() }).await;
        expect_status(&what("get snapshot"), get, missing)?;
        expect_status(&what("get"), client.vm(name).await, missing)?;
        expect_status(&what("delete"), client.delete_vm(name).await, missing)?;
        expect_status(&what("snapshot"), client.snapshot(name, "s").await, missing)?;
        let image = client.images.delete_image(DeleteImageRequest { name: name.into() }).await;
        expect_status(&what("delete image"), image, missing)?;
        expect_status(&what("boot"), client.boot_image(name, 1, BootProtocol::Unspecified).await, missing)?;
    }
    Ok(())
}

/// Machines that cannot be made.
async fn machines(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let embedded =
        || CreateVmRequest { source: Some(Source::Embedded(true)), vcpus: 1, ..Default::default() };
    let invalid = &[Code::InvalidArgument];
    let too_much = &[Code::InvalidArgument, Code::ResourceExhausted];
    let cases = [
        ("no source", CreateVmRequest { source: None, ..embedded() }, invalid.as_slice()),
        ("33 vCPUs", CreateVmRequest { vcpus: 33, ..embedded() }, invalid),
        ("4 billion vCPUs", CreateVmRequest { vcpus: u32::MAX, ..embedded() }, invalid),
        ("too little memory", CreateVmRequest { memory_bytes: 2 << 20, ..embedded() }, invalid),
        ("odd memory", CreateVmRequest { memory_bytes: (64 << 20) + 4096, ..embedded() }, invalid),
        ("64 TiB of memory", CreateVmRequest { memory_bytes: 64 << 40, ..embedded() }, too_much),
        ("all memory there is", CreateVmRequest { memory_bytes: !((2 << 20) - 1), ..embedded() }, too_much),
        ("a long command line", CreateVmRequest { command_line: "a=b ".repeat(1000), ..embedded() }, invalid),
        ("a bad name", CreateVmRequest { name: "no spaces".into(), ..embedded() }, invalid),
        ("a device's port", CreateVmRequest { ready: port(0x3f8), ..embedded() }, invalid),
        ("port 65536", CreateVmRequest { ready: port(65536), ..embedded() }, invalid),
        ("a wrong kind of machine", CreateVmRequest { hardware: 77, ..embedded() }, invalid),
        ("a wrong protocol number", CreateVmRequest { protocol: 77, ..embedded() }, invalid),
        ("two hours", CreateVmRequest { ready_timeout_ms: 7_200_000, ..embedded() }, invalid),
    ];
    for (what, request, codes) in cases {
        expect_status(what, client.boot(request).await.map(|_| ()), codes)?;
    }
    let vm =
        client.boot(CreateVmRequest { name: "taken".into(), memory_bytes: 64 << 20, ..embedded() }).await?.vm;
    let same = CreateVmRequest { name: "taken".into(), memory_bytes: 64 << 20, ..embedded() };
    expect_status("a name that is taken", client.boot(same).await.map(|_| ()), &[Code::AlreadyExists])?;
    client.snapshot(&vm.id, "base").await?;
    expect_status("a snapshot's name again", client.snapshot(&vm.id, "base").await, &[Code::AlreadyExists])?;
    let clones = client.clone_vms("base", 65, MemoryMode::Mapped, Identity::Managed).await;
    expect_status("65 clones", clones, invalid)?;
    ensure!(client.list_vms().await?.len() == 1, "only the good VM should be there");

    // What the agent refuses.
    let refused = [
        ("pages outside the arena", agent_call_request::Op::Hash(HashOp { first_page: u64::MAX, pages: 2 })),
        ("a disk that is not there", agent_call_request::Op::DiskInfo(DiskInfoOp { disk: 3 })),
    ];
    for (what, op) in refused {
        let request = AgentCallRequest { vm: vm.id.clone(), timeout_ms: 0, op: Some(op) };
        expect_status(what, client.agent.call(request).await, invalid)?;
    }
    let no_op = AgentCallRequest { vm: vm.id.clone(), timeout_ms: 0, op: None };
    expect_status("no operation", client.agent.call(no_op).await, invalid)?;
    let echo = ask!(&mut client, &vm.id, Echo(EchoOp { data: b"unharmed".to_vec().into() }));
    ensure!(echo.data[..] == b"unharmed"[..]);
    Ok(())
}

fn port(port: u32) -> Option<ReadyPoint> {
    Some(ReadyPoint { at: Some(ready_point::At::Port(port)) })
}

/// Files that are no kernels.
async fn kernels(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    // An ELF, but a program: this one.
    let mut program = fs::read(std::env::current_exe()?)?;
    program.truncate(1 << 20);
    let mut elf_header_only = program.clone();
    elf_header_only.truncate(64);
    let cases = [
        ("zeros", vec![0; 1 << 16]),
        ("one byte", vec![0x7f]),
        ("text", b"#!/bin/sh\necho this is no kernel\n".to_vec()),
        ("an ELF header and nothing behind it", elf_header_only),
        ("a program", program),
    ];
    for (what, kernel) in cases {
        let name = what.replace(' ', "-");
        // A kernel may be looked at when it is imported, or when it is booted: the code is the same.
        let imported =
            client.import(spec(&name), ImageFiles { kernel: Some(kernel), ..Default::default() }).await;
        match imported {
            Err(status) => expect_status::<()>(what, Err(status), &[Code::InvalidArgument])?,
            Ok(_) => {
                let boot = client.boot_image(&name, 1, BootProtocol::Unspecified).await;
                expect_status(what, boot, &[Code::InvalidArgument])?
            }
        };
    }
    ensure!(client.list_vms().await?.iter().all(|vm| vm.state() == VmState::Exited), "a VM stayed");
    Ok(())
}

// --- damaged snapshots ---

type Damage = fn(&Path) -> anyhow::Result<()>;

/// Ways to damage a published snapshot's folder, and the code of cloning or verifying it afterwards.
const DAMAGES: &[(&str, Damage, Code)] = &[
    ("manifest-flipped", |folder| flip(&folder.join("manifest.json"), 0.5), Code::DataLoss),
    ("manifest-empty", |folder| truncate(&folder.join("manifest.json"), 0.0), Code::DataLoss),
    ("manifest-half", |folder| truncate(&folder.join("manifest.json"), 0.5), Code::DataLoss),
    ("manifest-missing", |folder| remove(&folder.join("manifest.json")), Code::DataLoss),
    ("state-flipped", |folder| flip(&folder.join("state.bin"), 0.5), Code::DataLoss),
    ("state-truncated", |folder| truncate(&folder.join("state.bin"), 0.9), Code::DataLoss),
    ("state-missing", |folder| remove(&folder.join("state.bin")), Code::DataLoss),
    ("memory-flipped", |folder| flip(&folder.join("memory.img"), 0.25), Code::DataLoss),
    ("memory-truncated", |folder| truncate(&folder.join("memory.img"), 0.5), Code::DataLoss),
    ("memory-missing", |folder| remove(&folder.join("memory.img")), Code::DataLoss),
    ("feature-missing", needs_another_cpu, Code::FailedPrecondition),
    ("vendor-other", needs_another_vendor, Code::FailedPrecondition),
];

fn flip(file: &Path, at: f64) -> anyhow::Result<()> {
    let mut bytes = fs::read(file)?;
    let index = ((bytes.len() as f64 * at) as usize).min(bytes.len() - 1);
    bytes[index] ^= 0x10;
    Ok(fs::write(file, bytes)?)
}

fn truncate(file: &Path, to: f64) -> anyhow::Result<()> {
    let file = fs::OpenOptions::new().write(true).open(file)?;
    let length = (file.metadata()?.len() as f64 * to) as u64;
    Ok(file.set_len(length)?)
}

fn remove(file: &Path) -> anyhow::Result<()> {
    Ok(fs::remove_file(file)?)
}

/// Changes the manifest and sums it again, as a snapshot of another machine would be.
fn edit_manifest(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) -> anyhow::Result<()> {
    let mut manifest = serde_json::from_slice(&fs::read(folder.join("manifest.json"))?)?;
    edit(&mut manifest);
    let json = serde_json::to_vec_pretty(&manifest)?;
    fs::write(folder.join("manifest.json"), &json)?;
    let sum_file = folder.join("manifest.b3");
    let line = fs::read_to_string(&sum_file)?;
    let (_, name) = line.split_at(64);
    Ok(fs::write(sum_file, format!("{}{name}", blake3::hash(&json).to_hex()))?)
}

fn needs_another_cpu(folder: &Path) -> anyhow::Result<()> {
    edit_manifest(folder, |manifest| {
        manifest["cpu"]["features"].as_array_mut().expect("features").push("avx9000".into());
    })
}

fn needs_another_vendor(folder: &Path) -> anyhow::Result<()> {
    edit_manifest(folder, |manifest| manifest["cpu"]["vendor"] = "MissingVndor".into())
}

/// Two snapshots; one is damaged. It is refused by name, the other one works, the daemon lives.
async fn damaged(stage: Stage, damage: Damage, code: Code) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    let good = client.snapshot(&vm.id, "good").await?;
    let bad = client.snapshot(&vm.id, "bad").await?;
    // A daemon that is up has files open: damage is what the next one finds.
    daemon.stop().await?;
    damage(&daemon.data.join("snapshots").join(&bad.id)).context("doing the damage")?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;

    // Memory is not read again at each clone: verify finds it.
    if code == Code::DataLoss {
        let message = expect_status("verify", client.verify(&bad.id).await, &[Code::DataLoss])?;
        ensure!(message.contains(&bad.id), "the message should name the snapshot: {message}");
    }
    let clone = client.clone_vms(&bad.id, 2, MemoryMode::Mapped, Identity::Managed).await;
    let only_verify_sees_it = clone.is_ok();
    if only_verify_sees_it {
        let manifest_and_state_are_whole = client.list_snapshots().await?.damaged.is_empty();
        ensure!(manifest_and_state_are_whole && code == Code::DataLoss, "a damaged snapshot was cloned");
        let memory = daemon.data.join("snapshots").join(&bad.id).join("memory.img");
        ensure!(fs::metadata(memory)?.len() > 0, "a snapshot without memory was cloned");
    } else {
        let message = expect_status("clone", clone, &[code])?;
        if code == Code::FailedPrecondition {
            ensure!(
                message.contains("avx9000") || message.contains("MissingVndor"),
                "what is missing? {message}"
            );
        }
    }
    let living = client.list_vms().await?.iter().filter(|vm| vm.state() != VmState::Exited).count();
    ensure!(living <= 2 + usize::from(only_verify_sees_it) * 2, "failed clones stayed: {living}");

    works(&mut client, &good.id).await.context("the undamaged snapshot")?;
    client
        .snapshots
        .delete_snapshot(DeleteSnapshotRequest { snapshot: bad.id.clone() })
        .await
        .context("deleting it")?;
    let list = client.list_snapshots().await?;
    ensure!(list.damaged.is_empty() && list.snapshots.len() == 1, "{list:?}");
    ensure!(daemon.is_alive()?);
    Ok(())
}

async fn works(client: &mut Client, snapshot: &str) -> anyhow::Result<()> {
    client.verify(snapshot).await?;
    let clone = client.clone_vms(snapshot, 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);
    let echo = ask!(client, &clone.id, Echo(EchoOp { data: b"whole".to_vec().into() }));
    ensure!(echo.data[..] == b"whole"[..]);
    Ok(())
}

// --- a full disk ---

/// A small tmpfs, unmounted at the end.
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    pub fn mount(bytes: u64) -> anyhow::Result<SmallDisk> {
        let folder = tempfile::Builder::new().prefix("coldspark-small-").tempdir()?;
        let target = CString::new(folder.path().as_os_str().as_encoded_bytes())?;
        let options = CString::new(format!("size={bytes},mode=755"))?;
        // SAFETY: all four strings are NUL-terminated and outlive the call.
        let failed = unsafe {
            libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
        } != 0;
        let error = std::io::Error::last_os_error();
        ensure!(!failed, "mounting a tmpfs: {error}");
        Ok(SmallDisk(folder))
    }

    pub fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Ok(target) = CString::new(self.0.path().as_os_str().as_encoded_bytes()) {
            // SAFETY: a NUL-terminated path. Detached, because a dying worker may still hold files there.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// A snapshot that does not fit fails whole; the VM and what was published before go on, and once there is room the
/// same request works.
async fn full_disk(stage: Stage) -> anyhow::Result<()> {
    let disk = SmallDisk::mount(100 << 20)?;
    fs::create_dir(disk.data())?;
    let mut daemon = Daemon::start_at(&stage, &disk.data()).await?;
    let mut client = daemon.client().await?;
    let small = client.boot_embedded(32 << 20).await?;
    let published = client.snapshot(&small.id, "published").await.context("the one that fits")?;
    let vm = client.boot_embedded(256 << 20).await?;
    let hello = ask!(&mut client, &vm.id, Hello(HelloOp {}));
    // 160 MiB of data in memory: more than the disk has.
    let pages = 160 << 8;
    let touch = TouchOp {
        first_page: hello.arena_bytes / 4096 - pages,
        pages,
        stride: 1,
        seed: 3,
        mode: TouchMode::Fill.into(),
    };
    ask!(&mut client, &vm.id, Touch(touch));
    for _ in 0..2 {
        let message = expect_status(
            "a snapshot that does not fit",
            client.snapshot(&vm.id, "too-large").await,
            &[Code::ResourceExhausted],
        )?;
        ensure!(!message.contains("os error") || message.len() > 30, "{message}");
        // The VM goes on, and knows what it knew.
        ensure!(client.vm(&vm.id).await?.state() == VmState::Ready);
        let check = CheckOp { first_page: touch.first_page, pages, stride: 1, seed: 3, mode: touch.mode };
        ensure!(ask!(&mut client, &vm.id, Check(check)).bad_pages == 0);
        let list = client.list_snapshots().await?;
        ensure!(list.snapshots.len() == 1 && list.damaged.is_empty(), "{list:?}");
        let entries: Vec<_> = fs::read_dir(disk.data().join("snapshots"))?
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .map(|entry| entry.file_name())
            .collect();
        ensure!(entries.len() == 1, "something half-made stayed: {entries:?}");
    }
    let image = ImageFiles { kernel: Some(vec![1; 120 << 20]), ..Default::default() };
    let import = client.import(spec("too-large"), image).await;
    expect_status("an image that does not fit", import, &[Code::ResourceExhausted])?;
    ensure!(client.images.list_images(ListImagesRequest::default()).await?.into_inner().images.is_empty());
    works(&mut client, &published.id).await.context("the published snapshot")?;
    ensure!(daemon.is_alive()?);
    Ok(())
}

/// With nearly all of the host's memory kept free no VM is started, and a program can tell why.
async fn little_memory(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start_with(&stage, &["--memory-reserve".into(), "1T".into()]).await?;
    let mut client = daemon.client().await?;
    let request = CreateVmRequest { source: Some(Source::Embedded(true)), ..Default::default() };
    let refused = match client.boot(request).await {
        Ok(_) => bail!("a VM was started"),
        Err(status) => status,
    };
    ensure!(
        refused.code() == Code::ResourceExhausted && refused.message().contains("--memory-reserve"),
        "{refused}"
    );
    let details = refused.get_error_details();
    let info = details.error_info().context("no ErrorInfo")?;
    ensure!(info.reason == "LITTLE_MEMORY" && info.metadata["reserve_mib"] == "1048576", "{info:?}");
    ensure!(details.retry_info().is_some(), "it may pass, and nothing says so");
    ensure!(client.list_vms().await?.is_empty());
    Ok(())
}
