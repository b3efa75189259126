//! Images from disks as people have them: partitioned, compressed, with the kernel inside. The disks are made here; the
//! kernel on them is the embedded test guest's.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, ensure};
use coldspark::agent::testguest::TEST_GUEST;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

use crate::client::{Client, ImageFiles, ask, expect_status};
use crate::daemon::{Daemon, program};
use crate::disk_images::{self, BOOT, UFS, ZFS};
use crate::host::Need;
use crate::trial::{Stage, trial};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 24 * MIB;
const ANYWHERE: &[Need] = &[];
const KVM: &[Need] = &[Need::Kvm];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("images/kernel-on-the-disk", KVM, 120, kernel_on_the_disk),
        trial("images/refused", ANYWHERE, 60, refused),
        trial("images/disk-files-refused", KVM, 60, disk_files_refused),
        trial("images/pull", KVM, 120, pull),
        trial("images/with-agent", ANYWHERE, 60, with_agent),
    ]
}

/// A disk with a boot partition and a UFS with these files.
pub fn gpt_disk(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES as usize];
    let wanted: [disk_images::Wanted<'_>; 2] =
        [(&BOOT, MIB, MIB, "boot0"), (&UFS, 4 * MIB, 16 * MIB, "rootfs")];
    disk_images::put(&mut disk, &disk_images::gpt(DISK_BYTES, &wanted));
    disk_images::put(&mut disk, &[(4 * MIB, disk_images::ufs2(16 * MIB, "rootfs", files))]);
    disk
}

/// The disk of a system whose kernel is the embedded test guest.
pub fn bootable_disk() -> Vec<u8> {
    gpt_disk(&[("/boot/kernel/kernel", TEST_GUEST), ("/etc/fstab", b"/dev/ufs/rootfs / ufs rw 1 1\n")])
}

pub fn xz(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

fn gzip(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Runs the program against a daemon.
pub async fn cli(daemon: &Daemon, words: &[&str]) -> anyhow::Result<Output> {
    let mut command = tokio::process::Command::new(program());
    Ok(command.args(words).env("COLDSPARK_SOCKET", daemon.socket()).output().await?)
}

fn file(stage: &Stage, name: &str, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    let path = stage.logs.join(name);
    fs::write(&path, bytes)?;
    Ok(path)
}

async fn import(daemon: &Daemon, name: &str, path: &Path) -> anyhow::Result<(bool, String)> {
    let output = cli(daemon, &["image", "import", "--name", name, &path.to_string_lossy()]).await?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Imported by the program in every form, shown what was found, booted: the guest has the disk that was imported.
async fn kernel_on_the_disk(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let disk = bootable_disk();
    let with_gzip = gpt_disk(&[("/boot/kernel/kernel.gz", &gzip(TEST_GUEST)?)]);
    let forms = [
        ("raw", "disk.raw", disk.clone(), &disk),
        ("xz", "disk.raw.xz", xz(&disk)?, &disk),
        ("zstd", "disk.raw.zst", zstd::stream::encode_all(&disk[..], 1)?, &disk),
        ("gzip", "disk.raw.gz", gzip(&disk)?, &disk),
        ("kernel-gz", "kernel-gz.raw", with_gzip.clone(), &with_gzip),
    ];
    for (name, file_name, bytes, disk) in &forms {
        let path = file(&stage, file_name, bytes)?;
        let (imported, said) = import(&daemon, name, &path).await?;
        ensure!(imported, "{name}: {said}");
        for words in ["/boot/kernel/kernel", "p2", "GPT", "rootfs", file_name] {
            ensure!(said.contains(words), "{name}: nothing about {words}: {said}");
        }
        let image = client.images.get_image(GetImageRequest { name: (*name).into() }).await?.into_inner();
        ensure!(image.kernel_bytes == TEST_GUEST.len() as u64, "{name}: {image:?}");
        ensure!(image.disks.len() == 1 && image.disks[0].bytes == DISK_BYTES, "{name}: {image:?}");
        let vm = client.boot_image(name, 1, BootProtocol::Unspecified).await.with_context(|| *name)?;
        for first_sector in [1, 4 * 2048 + 128, DISK_BYTES / 512 - 1] {
            let op = DiskReadOp { disk: 0, first_sector, sectors: 1 };
            let read = ask!(&mut client, &vm.id, DiskRead(op)).data;
            let at = first_sector as usize * 512;
            ensure!(read[..] == disk[at..at + 512], "{name}: sector {first_sector}");
        }
        client.delete_vm(&vm.id).await?;
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Disks that can be of no use, by gRPC and by the program: the code, the file's name, what and what to do.
async fn refused(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let mut arm = TEST_GUEST.to_vec();
    arm[18] = 183;
    let good = bootable_disk();
    let flipped = |at: &[usize]| {
        let mut disk = good.clone();
        at.iter().for_each(|at| disk[*at] ^= 1);
        disk
    };
    let end = good.len();
    let mut outside = vec![0; DISK_BYTES as usize];
    let wanted: [disk_images::Wanted<'_>; 1] = [(&UFS, 4 * MIB, 64 * MIB, "")];
    disk_images::put(&mut outside, &disk_images::gpt(DISK_BYTES, &wanted));
    let mut zfs = vec![0; DISK_BYTES as usize];
    let wanted: [disk_images::Wanted<'_>; 1] = [(&ZFS, 4 * MIB, 8 * MIB, "")];
    disk_images::put(&mut zfs, &disk_images::gpt(DISK_BYTES, &wanted));
    let cases: [(&str, Vec<u8>, &str); 10] = [
        ("no-bytes.raw", vec![], "empty"),
        ("odd.raw", good[..1000].to_vec(), "multiple of 512"),
        ("headers.raw", flipped(&[512 + 56, end - 512 + 56]), "damaged in both copies"),
        ("entries.raw", flipped(&[1024 + 20, end - 33 * 512 + 20]), "damaged in both copies"),
        ("outside.raw", outside, "partition p1 lies outside the disk"),
        ("truncated.raw", good[..end / 2].to_vec(), "it was truncated"),
        ("arm.raw", gpt_disk(&[("/boot/kernel/kernel", &arm)]), "aarch64"),
        ("none.raw", gpt_disk(&[("/etc/motd", b"hello")]), "no /boot/kernel/kernel"),
        ("zfs.raw", zfs, "ZFS"),
        ("blank.raw", vec![0; 1 << 20], "no partition table and no UFS"),
    ];
    for (name, bytes, says) in &cases {
        let path = file(&stage, name, bytes)?;
        let (imported, said) = import(&daemon, "refused", &path).await?;
        ensure!(!imported && said.contains(says) && said.contains(name), "{name}: {said}");
        fs::remove_file(path)?;
        let disk = DiskSettings { name: (*name).into(), ..Default::default() };
        let spec =
            ImageSpec { name: "refused".into(), disks: vec![disk], find_kernel: true, ..Default::default() };
        let files = ImageFiles { disks: vec![bytes.clone()], ..Default::default() };
        let message = expect_status(name, client.import(spec, files).await, &[Code::InvalidArgument])?;
        ensure!(message.contains(name), "{name}: {message}");
    }
    // One copy of the table is enough.
    let path = file(&stage, "one-copy.raw", &flipped(&[512 + 56]))?;
    let (imported, said) = import(&daemon, "one-copy", &path).await?;
    ensure!(imported && said.contains("gpart recover"), "{said}");
    let (imported, said) = import(&daemon, "refused", Path::new("no-such-file.raw")).await?;
    ensure!(!imported && said.contains("no-such-file.raw"), "{said}");
    // Kernels for others, whole.
    for (name, kernel, says) in [("arm", arm.clone(), "aarch64"), ("arm-gz", gzip(&arm)?, "aarch64")] {
        let path = file(&stage, name, &kernel)?;
        let output =
            cli(&daemon, &["image", "import", "refused", "--kernel", &path.to_string_lossy()]).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains(says), "{name}: {said}");
    }
    two_kernels(&mut client).await?;
    let images = client.images.list_images(ListImagesRequest::default()).await?.into_inner().images;
    ensure!(images.len() == 1 && images[0].name == "one-copy", "{images:?}");
    Ok(())
}

/// A kernel that comes although it was to be found, and chunks that are both data and zeros.
async fn two_kernels(client: &mut Client) -> anyhow::Result<()> {
    let spec = ImageSpec { name: "refused".into(), find_kernel: true, ..Default::default() };
    let files = ImageFiles { kernel: Some(vec![0; 512]), ..Default::default() };
    expect_status("a kernel too many", client.import(spec.clone(), files).await, &[Code::InvalidArgument])?;
    let both = ImageSpec { embedded: true, ..spec.clone() };
    expect_status("two kernels", client.import(both, ImageFiles::default()).await, &[Code::InvalidArgument])?;
    let chunk = |data: &[u8], zeros| ImportImageRequest {
        message: Some(import_image_request::Message::Chunk(FileChunk {
            file: Some(file_chunk::File::Disk(0)),
            data: data.to_vec().into(),
            zeros,
        })),
    };
    let spec = ImageSpec { disks: vec![DiskSettings::default()], ..spec };
    for (what, chunk) in [("data and zeros", chunk(b"x", 1)), ("an endless disk", chunk(b"", u64::MAX))] {
        let first = ImportImageRequest { message: Some(import_image_request::Message::Spec(spec.clone())) };
        let sent = client.images.import_image(tokio_stream::iter([first, chunk])).await;
        expect_status(what, sent, &[Code::InvalidArgument])?;
    }
    Ok(())
}

/// Disks by path that are none.
async fn disk_files_refused(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let cases: [(&str, Option<Vec<u8>>, &str); 5] = [
        ("no-bytes.raw", Some(vec![]), "no bytes"),
        ("odd.raw", Some(vec![1; 1000]), "multiple of 512"),
        ("packed.raw", Some(xz(&[1; 5000])?), "xz"),
        ("missing.raw", None, "no such file"),
        ("truncated.raw", Some(bootable_disk()[..8 << 20].to_vec()), "it was truncated"),
    ];
    for (name, bytes, says) in cases {
        let path = stage.logs.join(name);
        if let Some(bytes) = bytes {
            fs::write(&path, bytes)?;
        }
        for mode in [DiskMode::Overlay, DiskMode::ReadOnly, DiskMode::Persist] {
            let disk = DiskFile { path: path.to_string_lossy().into_owned(), mode: mode.into() };
            let request = CreateVmRequest {
                source: Some(create_vm_request::Source::Embedded(true)),
                vcpus: 1,
                memory_bytes: 64 << 20,
                disks: vec![disk],
                ..Default::default()
            };
            let refused = client.boot(request).await.map(|_| ());
            let message = expect_status(name, refused, &[Code::InvalidArgument])?;
            ensure!(message.contains(says) && message.contains(name), "{name}: {message}");
        }
    }
    let nine = CreateVmRequest {
        source: Some(create_vm_request::Source::Embedded(true)),
        disks: vec![DiskFile { path: "/dev/null".into(), mode: 0 }; 9],
        ..Default::default()
    };
    expect_status("nine disks", client.boot(nine).await.map(|_| ()), &[Code::InvalidArgument])?;
    ensure!(client.list_vms().await?.is_empty());
    Ok(())
}

const RELEASE_FOLDER: &str = "/releases/VM-IMAGES/15.1-RELEASE/amd64/Latest";
const RELEASE_FILE: &str = "FreeBSD-15.1-RELEASE-amd64-ufs.raw.xz";

/// A mirror of one release: its list of checksums with `sum` in it, and its disk image. The first connection for the image
/// breaks off in the middle. What it was asked goes into `asked`.
async fn mirror(image: Vec<u8>, sum: String, asked: Arc<Mutex<Vec<String>>>) -> anyhow::Result<String> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let base = format!("http://{}", listener.local_addr()?);
    let list = format!("SHA256 ({RELEASE_FILE}) = {sum}\n").into_bytes();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => break,
                }
            }
            let head = String::from_utf8_lossy(&head).to_lowercase();
            let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
            let range = head.lines().find_map(|line| line.strip_prefix("range: bytes=")?.strip_suffix('-'));
            let from: usize = range.and_then(|from| from.parse().ok()).unwrap_or(0);
            let (status, body, more) = if path.ends_with("/checksum.sha256") {
                ("200 OK", &list[..], String::new())
            } else if path == format!("{RELEASE_FOLDER}/{RELEASE_FILE}").to_lowercase() {
                let more = format!("Content-Range: bytes {from}-{}/{}\r\n", image.len() - 1, image.len());
                let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
                (status, &image[from..], if range.is_some() { more } else { String::new() })
            } else {
                ("404 Not Found", &b""[..], String::new())
            };
            let length = body.len();
            let first = {
                let mut asked = asked.lock().unwrap_or_else(|poison| poison.into_inner());
                asked.push(format!("{path} from {from}"));
                asked.iter().filter(|path| path.contains("ufs.raw.xz")).count() == 1
            };
            let cut = if first && path.ends_with("ufs.raw.xz") { length / 2 } else { length };
            let answer =
                format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n");
            // Whoever has gone away wants no answer.
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.write_all(&body[..cut]).await;
        }
    });
    Ok(base)
}

/// A release from a mirror: the download breaks and goes on, the checksum decides, and the image boots.
async fn pull(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let packed = xz(&bootable_disk())?;
    let sum = ring::digest::digest(&ring::digest::SHA256, &packed);
    let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let downloads = stage.logs.join("downloads");
    let pull = async |mirror: &str, more: &[&str]| -> anyhow::Result<(bool, String)> {
        let downloads = downloads.to_string_lossy();
        let mut words = vec!["image", "pull", "freebsd-15.1", "--mirror", mirror, "--downloads", &downloads];
        words.extend_from_slice(more);
        let output = cli(&daemon, &words).await?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };

    let asked = Arc::default();
    let wrong = mirror(packed.clone(), "b".repeat(64), Arc::clone(&asked)).await?;
    let (done, said) = pull(&wrong, &[]).await?;
    ensure!(!done && said.contains("checksum") && said.contains(RELEASE_FILE), "{said}");
    ensure!(client.images.list_images(ListImagesRequest::default()).await?.into_inner().images.is_empty());

    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let good = mirror(packed.clone(), sum, Arc::clone(&asked)).await?;
    let (done, said) = pull(&good, &["--ready-agent", "--memory", "64M"]).await?;
    ensure!(done && said.contains("/boot/kernel/kernel on p2"), "{said}");
    let resumed = format!("{} from {}", RELEASE_FILE.to_lowercase(), packed.len() / 2);
    let seen = asked.lock().unwrap_or_else(|poison| poison.into_inner()).clone();
    ensure!(seen.iter().any(|line| line.ends_with(&resumed)), "{resumed} was not asked for: {seen:?}");
    ensure!(fs::read_dir(&downloads)?.count() == 0, "the download stayed");
    let request = CreateVmRequest {
        source: Some(create_vm_request::Source::Image("freebsd-15-1".into())),
        ..Default::default()
    };
    let vm = client.boot(request).await.context("booting what was pulled")?.vm;
    let info = ask!(&mut client, &vm.id, DiskInfo(DiskInfoOp { disk: 0 }));
    ensure!(info.sectors == DISK_BYTES / 512, "{info:?}");

    let (done, said) = pull(&good, &[]).await?;
    ensure!(!done && said.contains("freebsd-15-1"), "an image of that name is there: {said}");
    let (done, said) = pull("ftp://nowhere", &["--name", "other"]).await?;
    ensure!(!done && said.contains("https://"), "{said}");
    Ok(())
}

/// The agent's disk is one more disk of the image, the guest's commands name it, and nothing is left in the temporary folder.
async fn with_agent(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let disk = file(&stage, "data.img", &[7; 4096])?;
    let words = ["image", "import", "fb", "--embedded", "--with-agent", "--disk"];
    let path = disk.to_str().context("a path in UTF-8")?;
    let output = cli(&daemon, &[&words[..], &[path]].concat()).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.contains("tar -xpf /dev/vtbd1 -C /"), "{said}");
    let image = client.images.get_image(GetImageRequest { name: "fb".into() }).await?.into_inner();
    let agent = image.disks.get(1).context("no second disk")?;
    ensure!(image.disks.len() == 2 && agent.read_only && agent.bytes == 1 << 20, "{:?}", image.disks);
    let left = std::fs::read_dir(std::env::temp_dir())?.flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("coldspark-agent-")).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
