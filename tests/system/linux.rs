//! A real Linux kernel that nobody here wrote: Debian's, as it is, with a busybox initramfs.

use std::fs;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ImageFiles, console_pattern};
use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::LinuxGuest];
const NEEDS_USERFAULT: &[Need] = &[Need::Kvm, Need::KernelMode, Need::LinuxGuest, Need::Userfault];
/// The shell's prompt (tests/rig/linux-init).
const PROMPT: &str = "# ";
const CLONES: u32 = 3;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, protocol) in [("pvh", BootProtocol::Pvh), ("bzimage", BootProtocol::Linux)] {
        for (mode_name, mode) in [("mapped", MemoryMode::Mapped), ("userfault", MemoryMode::Userfault)] {
            let needs = if mode == MemoryMode::Userfault { NEEDS_USERFAULT } else { NEEDS };
            let name = format!("linux/{name}/2-vcpu/{mode_name}");
            trials.push(trial(name, needs, 60, move |stage| road(stage, protocol, mode)));
        }
    }
    trials
}

/// Runs a command in the guest's shell; returns what it printed.
async fn shell(console: &mut Console, command: &str) -> anyhow::Result<String> {
    // The marks are put together by the shell, so that the echo of the typed line does not hold them.
    console.ask(&format!("echo out''put:; {command}; echo :e''nd"), "output:").await?;
    let output = console.expect(":end").await.with_context(|| format!("running {command:?}"))?;
    console.expect(PROMPT).await?;
    Ok(output.replace('\r', "").trim().to_string())
}

async fn boot(client: &mut Client, protocol: BootProtocol) -> anyhow::Result<Vm> {
    let folder = host::linux_guest().map_err(anyhow::Error::msg)?;
    let kernel = if protocol == BootProtocol::Pvh { "vmlinux" } else { "bzImage" };
    let spec = ImageSpec {
        name: "linux".into(),
        module: ModuleKind::Initrd.into(),
        disks: vec![DiskSettings { read_only: false, ..Default::default() }],
        boot: Some(BootSettings {
            protocol: protocol.into(),
            command_line: "console=ttyS0 quiet panic=-1".into(),
            vcpus: 2,
            memory_bytes: 256 << 20,
            ready: console_pattern("LINUX-READY"),
        }),
        ..Default::default()
    };
    let files = ImageFiles {
        kernel: Some(fs::read(folder.join(kernel))?),
        module: Some(fs::read(folder.join("initramfs.cpio"))?),
        disks: vec![fs::read(folder.join("disk.img"))?],
    };
    client.import(spec, files).await?;
    let request = CreateVmRequest { source: Some(Source::Image("linux".into())), ..Default::default() };
    Ok(client.boot(request).await?.vm)
}

/// The number of CPUs, disks, and a disk sector, as the guest sees them.
async fn expect_machine(console: &mut Console) -> anyhow::Result<()> {
    ensure!(shell(console, "nproc").await? == "2");
    ensure!(shell(console, "ls /sys/block | grep vd").await? == "vda");
    Ok(())
}

async fn sector(console: &mut Console, sector: u32) -> anyhow::Result<String> {
    let command = format!("dd if=/dev/vda bs=512 skip={sector} count=1 iflag=direct 2>/dev/null | head -n 1");
    shell(console, &command).await
}

async fn write_sector(console: &mut Console, sector: u32, words: &str) -> anyhow::Result<()> {
    let command = format!(
        "(echo {words}; cat /dev/zero) | head -c 512 | dd of=/dev/vda bs=512 seek={sector} conv=notrunc,fsync 2>/dev/null && echo written"
    );
    ensure!(shell(console, &command).await? == "written", "writing sector {sector}");
    Ok(())
}

async fn road(stage: Stage, protocol: BootProtocol, mode: MemoryMode) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, protocol).await.context("cold boot")?;
    ensure!(vm.state() == VmState::Ready && vm.protocol() == protocol, "{vm:?}");
    let mut source = client.console(&vm.id).await?;
    source.expect("LINUX-READY ").await?;
    let line = source.expect("\n").await?;
    ensure!(line.contains("cpus=2 disks=1"), "the guest found another machine: {line}");
    source.expect(PROMPT).await?;
    expect_machine(&mut source).await?;
    ensure!(sector(&mut source, 7).await? == "sector 7");
    write_sector(&mut source, 8, "before").await?;
    shell(&mut source, "echo remembered >/tmp/note").await?;
    // The timer runs.
    ensure!(shell(&mut source, "sleep 0.2; echo slept").await? == "slept");
    let uptime = |text: String| text.parse::<f64>().with_context(|| format!("no uptime: {text:?}"));
    let uptime_before = uptime(shell(&mut source, "cut -d' ' -f1 /proc/uptime").await?)?;

    let snapshot = client.snapshot(&vm.id, "ready").await.context("snapshot")?;
    let clones = client.clone_vms(&snapshot.id, CLONES, mode, Identity::Unmanaged).await.context("clones")?;
    let mut consoles = Vec::new();
    for (index, clone) in clones.iter().enumerate() {
        let mut console = client.console(&clone.id).await?;
        // A clone's console begins where the snapshot was: at a prompt that was printed long ago.
        let answer = shell(&mut console, &format!("echo $(({index} * 7 + 1000))")).await?;
        ensure!(answer == (index * 7 + 1000).to_string(), "clone {index} answered {answer:?}");
        expect_machine(&mut console).await?;
        ensure!(shell(&mut console, "cat /tmp/note").await? == "remembered");
        ensure!(sector(&mut console, 8).await? == "before");
        ensure!(sector(&mut console, 9).await? == "sector 9");
        write_sector(&mut console, 9, &format!("clone-{index}")).await?;
        shell(&mut console, &format!("echo clone-{index} >/tmp/note")).await?;
        // Both CPUs work, and time goes on.
        for cpu in [0, 1] {
            ensure!(
                shell(&mut console, &format!("taskset {} echo on {cpu}", cpu + 1)).await?
                    == format!("on {cpu}")
            );
        }
        ensure!(shell(&mut console, "sleep 0.2; echo slept").await? == "slept");
        let now = uptime(shell(&mut console, "cut -d' ' -f1 /proc/uptime").await?)?;
        ensure!(now >= uptime_before, "clone {index}: uptime went from {uptime_before} to {now}");
        consoles.push(console);
    }
    for (index, console) in consoles.iter_mut().enumerate() {
        ensure!(sector(console, 9).await? == format!("clone-{index}"), "another's write shows on the disk");
        ensure!(shell(console, "cat /tmp/note").await? == format!("clone-{index}"));
    }
    // The source went on unharmed.
    ensure!(sector(&mut source, 9).await? == "sector 9");
    ensure!(shell(&mut source, "cat /tmp/note").await? == "remembered");
    ensure!(shell(&mut source, "dmesg | grep -ciE 'BUG:|Oops|soft lockup|rcu.*stall'").await? == "0");

    // One reboots: the VM ends and says how.
    consoles[0].type_line("reboot -f").await?;
    let id = &clones[0].id;
    eventually("the clone ends", 20, async || Ok(client.vm(id).await?.state() == VmState::Exited)).await?;
    let reason = client.vm(id).await?.exit_reason;
    ensure!(reason.contains("reset"), "{reason}");
    Ok(())
}
