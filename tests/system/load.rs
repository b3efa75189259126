//! A snapshot with everything under way: disk requests, a TCP connection, timers and four busy vCPUs; the source and its clones finish
//! all of it with the right sums.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::disks::new_file;
use crate::host::Need;
use crate::linux::shell;
use crate::network::guests::Guest;
use crate::tap::{Echo, Tap};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::Userfault, Need::LinuxGuest, Need::Tap];
const VCPUS: u32 = 4;
/// Passes of the two writers over the disk, and how much each of them writes in a pass.
const PASSES: usize = 3;
const HALF_BYTES: u64 = 1 << 20;
/// What each CPU sums, and how often.
const SUMMED_BYTES: u64 = 1 << 20;
const SUMS: usize = 8;
const TICKS: usize = 120;

pub fn trials() -> Vec<Trial> {
    vec![trial("load/snapshot-with-everything-under-way", NEEDS, 200, under_way)]
}

/// In each pass two writers fill a half of the disk each, past the page cache and at the same time; then the disk is read back and
/// summed beside what was to be written.
fn writers() -> String {
    let text = |half: u64| format!("yes \"pass $p half {half}\" | head -c {HALF_BYTES}");
    let writer = |half: u64| {
        let seek = half * HALF_BYTES / 32768;
        format!(
            "({}) | dd of=/dev/vdb bs=32k seek={seek} iflag=fullblock oflag=direct 2>/dev/null &",
            text(half)
        )
    };
    format!(
        "(for p in $(seq {PASSES}); do {} {} wait; sync; \
         echo $(dd if=/dev/vdb bs=32k iflag=direct 2>/dev/null | md5sum) $( ({}; {}) | md5sum); \
         done; echo over $(cut -d' ' -f1 /proc/uptime)) >/tmp/passes 2>&1 &",
        writer(0),
        writer(1),
        text(0),
        text(1)
    )
}

/// Each CPU sums the same bytes again and again.
fn sums() -> String {
    format!(
        "for c in 0 1 2 3; do (for k in $(seq {SUMS}); do taskset -c $c sh -c 'yes sum | head -c {SUMMED_BYTES} | md5sum'; done; \
         echo over $(cut -d' ' -f1 /proc/uptime)) >/tmp/sums.$c 2>&1 & done"
    )
}

/// When each tick came, in seconds of uptime.
fn ticks() -> String {
    format!(
        "(for t in $(seq {TICKS}); do usleep 100000; cut -d' ' -f1 /proc/uptime; done; \
         echo over $(cut -d' ' -f1 /proc/uptime)) >/tmp/ticks 2>&1 &"
    )
}

async fn uptime(console: &mut Console) -> anyhow::Result<f64> {
    Ok(shell(console, "cut -d' ' -f1 /proc/uptime").await?.parse()?)
}

/// The lines of a file whose last one is `over UPTIME`, without that; it came after `snapshot`.
async fn finished(
    console: &mut Console,
    who: &str,
    file: &str,
    snapshot: f64,
) -> anyhow::Result<Vec<String>> {
    eventually(&format!("{who} finishes {file}"), 120, async || {
        Ok(shell(console, &format!("tail -n 1 {file}")).await?.starts_with("over "))
    })
    .await?;
    let text = shell(console, &format!("cat {file}")).await?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let over = lines.pop().unwrap_or_default();
    let at: f64 =
        over.trim_start_matches("over ").parse().with_context(|| format!("{who}, {file}: {over:?}"))?;
    ensure!(at > snapshot, "{who}: {file} was over at {at}, before the snapshot at {snapshot}");
    Ok(lines)
}

/// All that was under way at the snapshot has come to its right end. `sum` is that of what the CPUs sum.
async fn expect_all(console: &mut Console, who: &str, snapshot: f64, sum: &str) -> anyhow::Result<()> {
    let passes = finished(console, who, "/tmp/passes", snapshot).await?;
    ensure!(passes.len() == PASSES, "{who}: {passes:?}");
    for line in &passes {
        let words: Vec<&str> = line.split_whitespace().collect();
        ensure!(words.len() == 4 && words[0].len() == 32 && words[0] == words[2], "{who}: {line}");
    }
    for cpu in 0..VCPUS {
        let sums = finished(console, who, &format!("/tmp/sums.{cpu}"), snapshot).await?;
        ensure!(
            sums.len() == SUMS && sums.iter().all(|line| line == sum),
            "{who}, CPU {cpu}: {sums:?}, not {sum}"
        );
    }
    let ticks = finished(console, who, "/tmp/ticks", snapshot).await?;
    let ticks = ticks.iter().map(|tick| tick.parse()).collect::<Result<Vec<f64>, _>>()?;
    ensure!(ticks.len() == TICKS, "{who}: {} ticks", ticks.len());
    ensure!(ticks.is_sorted() && ticks[0] < snapshot, "{who}: at {snapshot} in {ticks:?}");
    let faults = shell(console, "dmesg | grep -ciE 'I/O error|BUG:|Oops|hung task'").await?;
    ensure!(faults == "0", "{who}: its kernel complained {faults} times");
    Ok(())
}

async fn under_way(stage: Stage) -> anyhow::Result<()> {
    let tap = Tap::new([10, 79, 0, 1])?;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let image = Guest::Linux.import(&mut client).await?;
    let path = new_file(&stage, "load.raw", 2 * HALF_BYTES)?;
    let request = CreateVmRequest {
        source: Some(Source::Image(image)),
        vcpus: VCPUS,
        disks: vec![DiskFile { path: path.to_string_lossy().into_owned(), mode: DiskMode::Overlay.into() }],
        networks: vec![NetworkInterface { link: Some(Link::Tap(tap.name.clone())), ..Default::default() }],
        ..Default::default()
    };
    let vm = client.boot(request).await?.vm;
    let mut source = client.console(&vm.id).await?;
    Guest::Linux.wait_ready(&mut source).await?;
    Guest::Linux.address(&mut source, tap.guest(), None).await?;
    let sum = shell(&mut source, &format!("yes sum | head -c {SUMMED_BYTES} | md5sum")).await?;

    let echo = Echo::listen(tap.address)?;
    Guest::Linux.start_echo(&mut source, &echo, tap.address).await?;
    // It goes on until it is told enough, which is after the snapshot.
    let (returned, enough) = (Arc::clone(&echo.returned), Arc::clone(&echo.enough));
    let transfer = tokio::spawn(echo.run(u64::MAX));
    for work in [writers(), sums(), ticks()] {
        source.type_line(&work).await?;
        source.expect(crate::linux::PROMPT).await?;
    }
    eventually("everything is under way", 60, async || {
        let begun = shell(&mut source, "cat /tmp/passes /tmp/sums.0 | wc -l; wc -l </tmp/ticks").await?;
        let mut counts = begun.lines().map(|line| line.trim().parse::<usize>().unwrap_or(0));
        let (work, ticks) = (counts.next().unwrap_or(0), counts.next().unwrap_or(0));
        Ok(work >= 1 && ticks >= 3 && returned.load(Ordering::Relaxed) > 0)
    })
    .await?;
    let at = uptime(&mut source).await?;
    let before = returned.load(Ordering::Relaxed);
    let snapshot = client.snapshot(&vm.id, "busy").await?.id;
    eventually("the transfer goes on", 60, async || {
        ensure!(!transfer.is_finished(), "the transfer broke");
        Ok(returned.load(Ordering::Relaxed) > before + (256 << 10))
    })
    .await?;
    enough.store(true, Ordering::Relaxed);
    transfer.await?.context("the source's transfer, through the snapshot")?;
    expect_all(&mut source, "the source", at, &sum).await?;
    ensure!(fs::read(&path)?.iter().all(|byte| *byte == 0), "the file under the overlays was written to");
    client.delete_vm(&vm.id).await?;

    for (n, mode) in [MemoryMode::Mapped, MemoryMode::Userfault, MemoryMode::Mapped].into_iter().enumerate() {
        let who = format!("clone {n}, {mode:?}");
        // Without a link, or the peer of the source's connection would be asked for things that it has had.
        let clone =
            client.clone_vms(&snapshot, 1, mode, Identity::Unmanaged).await.with_context(|| who.clone())?;
        let mut console = client.console(&clone[0].id).await?;
        ensure!(!Guest::Linux.link_up(&mut console).await?, "{who}: a link that is up without a link");
        ensure!(Guest::Linux.echoes(&mut console).await?, "{who}: its connection was not under way");
        expect_all(&mut console, &who, at, &sum).await?;
        client.delete_vm(&clone[0].id).await?;
    }
    ensure!(fs::read(&path)?.iter().all(|byte| *byte == 0), "the file under the overlays was written to");
    Ok(())
}
