//! A real Linux kernel that nobody here wrote: Debian's, as it is, with a busybox initramfs.

use std::fs;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ImageFiles, console_pattern, expect_status};
use crate::console::Console;
use crate::daemon::{self, Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::Userfault, Need::LinuxGuest];
/// The shell's prompt (tests/rig/linux-init).
pub const PROMPT: &str = "# ";
/// Clones of each memory source.
const CLONES: u32 = 2;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("linux/pvh/2-vcpu", NEEDS, 90, |stage| road(stage, BootProtocol::Pvh, Machine::Microvm)),
        trial("linux/bzimage/2-vcpu", NEEDS, 90, |stage| road(stage, BootProtocol::Linux, Machine::Microvm)),
        trial("linux/pc/msi-x", NEEDS, 90, |stage| road(stage, BootProtocol::Pvh, Machine::Pc)),
        trial("linux/pc/intx", NEEDS, 90, |stage| {
            road(stage, BootProtocol::Linux, Machine::PcWithoutMessages)
        }),
        trial("linux/pc/power-button", NEEDS, 60, power_button),
        trial("linux/console", NEEDS, 120, console_flood),
        trial("linux/panic", NEEDS, 60, panics),
        trial("linux/run-command", NEEDS, 120, run_command),
    ]
}

/// What the guest is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Machine {
    /// As it is chosen by itself.
    Microvm,
    Pc,
    /// Its kernel is told to do without message-signalled interrupts.
    PcWithoutMessages,
}

impl Machine {
    fn is_pc(self) -> bool {
        self != Machine::Microvm
    }

    fn hardware(self) -> Hardware {
        if self.is_pc() { Hardware::Pc } else { Hardware::Unspecified }
    }

    fn command_line(self) -> &'static str {
        match self {
            Machine::PcWithoutMessages => "console=ttyS0 quiet panic=-1 pci=nomsi",
            _ => "console=ttyS0 quiet panic=-1",
        }
    }
}

/// Runs a command in the guest's shell; returns what it printed.
pub async fn shell(console: &mut Console, command: &str) -> anyhow::Result<String> {
    // The marks are put together by the shell, so that the echo of the typed line does not hold them.
    console.ask(&format!("echo out''put:; {command}; echo :e''nd"), "output:").await?;
    let output = console.expect(":end").await.with_context(|| format!("running {command:?}"))?;
    console.expect(PROMPT).await?;
    Ok(output.replace('\r', "").trim().to_string())
}

/// Imports the guest as the image `linux`, on the machine that is chosen by itself.
pub async fn import(client: &mut Client, protocol: BootProtocol) -> anyhow::Result<()> {
    import_on(client, protocol, Machine::Microvm).await
}

async fn import_on(client: &mut Client, protocol: BootProtocol, machine: Machine) -> anyhow::Result<()> {
    let folder = host::linux_guest().map_err(anyhow::Error::msg)?;
    let kernel = if protocol == BootProtocol::Pvh { "vmlinux" } else { "bzImage" };
    let spec = ImageSpec {
        name: "linux".into(),
        module: ModuleKind::Initrd.into(),
        disks: vec![DiskSettings { read_only: false, ..Default::default() }],
        boot: Some(BootSettings {
            protocol: protocol.into(),
            hardware: machine.hardware().into(),
            command_line: machine.command_line().into(),
            vcpus: 2,
            memory_bytes: 256 << 20,
            ready: console_pattern("LINUX-READY"),
            ..Default::default()
        }),
        ..Default::default()
    };
    let files = ImageFiles {
        kernel: Some(fs::read(folder.join(kernel))?),
        module: Some(fs::read(folder.join("initramfs.cpio"))?),
        disks: vec![fs::read(folder.join("disk.img"))?],
    };
    client.import(spec, files).await?;
    Ok(())
}

async fn boot(client: &mut Client, protocol: BootProtocol, machine: Machine) -> anyhow::Result<Vm> {
    import_on(client, protocol, machine).await?;
    let request = CreateVmRequest { source: Some(Source::Image("linux".into())), ..Default::default() };
    Ok(client.boot(request).await?.vm)
}

/// A guest that is asked by the power button, and powers itself off.
async fn power_button(stage: Stage) -> anyhow::Result<()> {
    // The kernel counts presses; without a daemon for them, the shell looks at the count.
    const OBEY: &str =
        "while grep -q ' 0 ' /sys/firmware/acpi/interrupts/ff_pwr_btn; do sleep 0.1; done; poweroff -f";
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, BootProtocol::Linux, Machine::Pc).await?;
    let mut console = client.console(&vm.id).await?;
    console.expect(PROMPT).await?;
    console.type_line(OBEY).await?;
    let request = StopVmRequest { vm: vm.id.clone(), timeout_ms: 120_000 };
    let stopped = client.vms.stop_vm(request).await?.into_inner();
    ensure!(stopped.by_itself && stopped.not_asked.is_empty(), "{stopped:?}");
    let reason = stopped.vm.context("no VM in the answer")?.exit_reason;
    ensure!(reason.contains("switched itself off"), "{reason}");
    Ok(())
}

/// A real driver of the serial port: many lines printed at once, and many typed.
async fn console_flood(stage: Stage) -> anyhow::Result<()> {
    // Lines of 7 and of 64 bytes: 1 MiB and 16 KiB, and little of it where every byte takes a millisecond.
    let (lines, typed_lines) = if host::in_rig() { (4_681, 64) } else { (149_797, 256) };
    // A driver that prints for long looks stuck to the kernel on a slow machine, and it says so in between.
    const QUIET: &str = "nowatchdog rcupdate.rcu_cpu_stall_suppress=1";
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    import(&mut client, BootProtocol::Linux).await?;
    let request = CreateVmRequest {
        source: Some(Source::Image("linux".into())),
        command_line: QUIET.into(),
        ..Default::default()
    };
    let vm = client.boot(request).await?.vm;
    let mut console = client.console(&vm.id).await?;
    console.expect(PROMPT).await?;
    let printed = shell(&mut console, &format!("seq -w 1 {lines}")).await?;
    let width = lines.to_string().len();
    let mut due = (1..=lines).map(|line| format!("{line:0width$}"));
    let wrong = printed.lines().position(|line| due.next().is_none_or(|due| due != line));
    ensure!(wrong.is_none(), "line {} is another", wrong.unwrap_or_default() + 1);
    ensure!(due.next().is_none(), "only {} lines of {lines} came", printed.lines().count());

    let typed: Vec<String> = (0..typed_lines).map(|line| format!("{line:063}\n")).collect();
    let bytes = 64 * typed_lines;
    console.ask(&format!("echo wait''ing; head -c {bytes} >/typed; echo tak''en"), "waiting").await?;
    for piece in typed.concat().as_bytes().chunks(4096) {
        console.type_bytes(piece).await?;
    }
    console.expect("taken").await?;
    console.expect(PROMPT).await?;
    let taken = shell(&mut console, "cat /typed").await?;
    ensure!(taken == typed.concat().trim_end(), "typed lines came otherwise: {taken}");
    Ok(())
}

/// A kernel that panics for want of a root file system: said at once, with its trace, long before the ready point's timeout.
async fn panics(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let folder = host::linux_guest().map_err(anyhow::Error::msg)?;
    let spec = ImageSpec {
        name: "rootless".into(),
        boot: Some(BootSettings {
            command_line: "console=ttyS0 panic=0".into(),
            vcpus: 1,
            memory_bytes: 256 << 20,
            ready: console_pattern("LINUX-READY"),
            ..Default::default()
        }),
        ..Default::default()
    };
    let files = ImageFiles { kernel: Some(fs::read(folder.join("bzImage"))?), ..Default::default() };
    client.import(spec, files).await?;
    let request = CreateVmRequest {
        source: Some(Source::Image("rootless".into())),
        ready_timeout_ms: 3_600_000,
        ..Default::default()
    };
    let message = expect_status("a kernel that panics", client.boot(request).await, &[Code::Aborted])?;
    for words in ["panicked", "Kernel panic - not syncing: VFS", "Call Trace"] {
        ensure!(message.contains(words), "{words:?} is not in: {message}");
    }
    ensure!(client.list_vms().await?.is_empty(), "the VM stayed");
    Ok(())
}

/// `coldspark run`: a command's output and its status come back, and nothing else on standard output.
async fn run_command(_: Stage) -> anyhow::Result<()> {
    let folder = host::linux_guest().map_err(anyhow::Error::msg)?;
    let run = |command: &'static [&'static str]| {
        let mut program = tokio::process::Command::new(daemon::program());
        program.arg("run").arg("--kernel").arg(folder.join("bzImage"));
        program.arg("--initrd").arg(folder.join("initramfs.cpio"));
        program.args([
            "--cmdline",
            "console=ttyS0 quiet",
            "--mem",
            "256M",
            "--ready",
            "LINUX-READY",
            "--timeout",
            "600",
        ]);
        program.arg("--").args(command).kill_on_drop(true);
        program
    };
    let done = run(&["seq", "1", "2000;", "echo", "last;", "exit", "42"]).output().await?;
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    ensure!(done.status.code() == Some(42), "status {:?}; stdout: {out}; stderr: {err}", done.status);
    let lines: Vec<&str> = out.lines().map(str::trim_end).collect();
    let right: Vec<String> = (1..=2000).map(|n| n.to_string()).chain(["last".into()]).collect();
    ensure!(lines == right, "stdout: {out}");
    ensure!(err.contains("LINUX-READY"), "the console is not shown on stderr: {err}");

    let done = run(&["reboot", "-f"]).output().await?;
    let err = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.code() == Some(125), "status {:?}; stderr: {err}", done.status);
    ensure!(err.contains("ended before the command did"), "{err}");
    Ok(())
}

async fn write_sector(console: &mut Console, sector: u32, words: &str) -> anyhow::Result<()> {
    let command = format!(
        "(echo {words}; cat /dev/zero) | head -c 512 | dd of=/dev/vda bs=512 seek={sector} conv=notrunc,fsync 2>/dev/null && echo written"
    );
    ensure!(shell(console, &command).await? == "written", "writing sector {sector}");
    Ok(())
}

/// What the guest must still know and have, read by one command because each byte typed is work for the rig.
const LOOK: &str = "nproc; ls /sys/block | grep vd; cat /tmp/note; \
                    dd if=/dev/vda bs=512 skip=8 count=2 iflag=direct 2>/dev/null | tr -d '\\000' | grep .";

async fn expect_look(console: &mut Console, note: &str, sector_9: &str) -> anyhow::Result<()> {
    let seen = shell(console, LOOK).await?;
    let seen: Vec<&str> = seen.lines().map(str::trim).collect();
    ensure!(seen == ["2", "vda", note, "before", sector_9], "the guest sees {seen:?}");
    Ok(())
}

async fn uptime(console: &mut Console) -> anyhow::Result<f64> {
    // The sleep ends only if the timer's interrupt comes.
    let text = shell(console, "sleep 0.2; cut -d' ' -f1 /proc/uptime").await?;
    text.parse().with_context(|| format!("no uptime: {text:?}"))
}

/// PCI as the guest sees it: the bridge and three functions, interrupts of the kind asked for, and a device that is
/// asked and answers by one.
async fn expect_pc(console: &mut Console, machine: Machine) -> anyhow::Result<()> {
    const ASK: &str = "ls /sys/bus/pci/devices | wc -l; head -c 32 /dev/hwrng | wc -c; \
                       grep virtio /proc/interrupts | grep -c MSI; grep virtio /proc/interrupts | grep -c fasteoi";
    let seen = shell(console, ASK).await?;
    let seen: Vec<&str> = seen.lines().map(str::trim).collect();
    let [functions, random, messages, lines] = seen[..] else {
        anyhow::bail!("the guest sees {seen:?}");
    };
    ensure!(functions == "4" && random == "32", "the guest sees {seen:?}");
    let (messages, lines): (u32, u32) = (messages.parse()?, lines.parse()?);
    match machine {
        // Disk, console and rng: one vector for each queue at least.
        Machine::Pc => ensure!(messages >= 4 && lines == 0, "the guest sees {seen:?}"),
        _ => ensure!(messages == 0 && lines == 3, "the guest sees {seen:?}"),
    }
    Ok(())
}

/// How often ACPI's event 0 came, and whether the kernel listens to it.
const GENERATION_EVENT: &str = "echo $(cat /sys/firmware/acpi/interrupts/gpe00)";

/// ACPI tells a clone that it is one: the device of the generation id is there, and its event came.
async fn expect_other_generation(console: &mut Console) -> anyhow::Result<()> {
    let device = shell(console, "cat /sys/bus/acpi/devices/CLDS0001:00/path").await?;
    ensure!(device == "\\_SB_.VGEN", "{device}");
    // It is handled in the background.
    let until = "until grep -q ' [1-9]' /sys/firmware/acpi/interrupts/gpe00; do sleep 0.1; done";
    let told = shell(console, &format!("{until}; {GENERATION_EVENT}")).await?;
    ensure!(told.starts_with("1 ") && told.contains(" enabled"), "{told}");
    Ok(())
}

async fn road(stage: Stage, protocol: BootProtocol, machine: Machine) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, protocol, machine).await.context("cold boot")?;
    ensure!(vm.state() == VmState::Ready && vm.protocol() == protocol, "{vm:?}");
    let mut source = client.console(&vm.id).await?;
    source.expect("LINUX-READY ").await?;
    let line = source.expect("\n").await?;
    ensure!(line.contains("cpus=2 disks=1"), "the guest found another machine: {line}");
    source.expect(PROMPT).await?;
    shell(&mut source, "echo remembered >/tmp/note").await?;
    if machine.is_pc() {
        expect_pc(&mut source, machine).await?;
        let told = shell(&mut source, GENERATION_EVENT).await?;
        ensure!(
            told.starts_with("0 "),
            "a machine that was never cloned is told of another generation: {told}"
        );
    }
    write_sector(&mut source, 8, "before").await?;
    expect_look(&mut source, "remembered", "sector 9").await?;
    let uptime_before = uptime(&mut source).await?;

    let snapshot = client.snapshot(&vm.id, "ready").await.context("snapshot")?;
    let mut clones = client
        .clone_vms(&snapshot.id, CLONES, MemoryMode::Mapped, Identity::Unmanaged)
        .await
        .context("mapped clones")?;
    let more = client.clone_vms(&snapshot.id, CLONES, MemoryMode::Userfault, Identity::Unmanaged).await;
    clones.extend(more.context("userfault clones")?);
    let mut consoles = Vec::new();
    for (index, clone) in clones.iter().enumerate() {
        let which = || format!("clone {index}, {:?}", clone.memory_mode());
        let mut console = client.console(&clone.id).await?;
        // A clone's console begins where the snapshot was: at a prompt that was printed long ago.
        let answer =
            shell(&mut console, &format!("echo $(({index} * 7 + 1000))")).await.with_context(which)?;
        ensure!(answer == (index * 7 + 1000).to_string(), "{} answered {answer:?}", which());
        expect_look(&mut console, "remembered", "sector 9").await.with_context(which)?;
        if machine.is_pc() {
            expect_pc(&mut console, machine).await.with_context(which)?;
            expect_other_generation(&mut console).await.with_context(which)?;
        }
        let now = uptime(&mut console).await.with_context(which)?;
        ensure!(now > uptime_before, "{}: uptime went from {uptime_before} to {now}", which());
        // Its own marks, one from each CPU.
        write_sector(&mut console, 9, &format!("clone-{index}")).await.with_context(which)?;
        let both = format!("for cpu in 1 2; do taskset $cpu sh -c 'echo clone-{index} >/tmp/note'; done");
        shell(&mut console, &both).await.with_context(which)?;
        consoles.push(console);
    }
    for (index, console) in consoles.iter_mut().enumerate() {
        let mark = format!("clone-{index}");
        expect_look(console, &mark, &mark)
            .await
            .with_context(|| format!("clone {index} when all have written"))?;
    }
    // The source went on unharmed.
    expect_look(&mut source, "remembered", "sector 9").await.context("the source")?;
    let faults = shell(&mut source, "dmesg | grep -ciE 'BUG:|Oops|rcu.*stall'").await?;
    ensure!(faults == "0", "the kernel complained {faults} times");

    // The source reboots in place, with its disk and its console.
    source.type_line("reboot -f").await?;
    source.expect("LINUX-READY ").await.context("after a reboot")?;
    source.expect(PROMPT).await?;
    let seen = shell(&mut source, "dd if=/dev/vda bs=512 skip=8 count=1 2>/dev/null | head -n 1").await?;
    ensure!(seen == "before", "after a reboot sector 8 is {seen:?}");
    let now = client.vm(&vm.id).await?;
    ensure!(now.restarts == 1 && now.state() == VmState::Ready, "{now:?}");

    // A clone reboots: it ends and says how.
    consoles[0].type_line("reboot -f").await?;
    let id = &clones[0].id;
    eventually("the clone ends", 20, async || Ok(client.vm(id).await?.state() == VmState::Exited)).await?;
    let reason = client.vm(id).await?.exit_reason;
    ensure!(reason.contains("reset"), "{reason}");

    // Another powers itself off, where that can be said.
    if machine.is_pc() {
        consoles[1].type_line("poweroff -f").await?;
        let id = &clones[1].id;
        eventually("the clone ends", 20, async || Ok(client.vm(id).await?.state() == VmState::Exited))
            .await?;
        let reason = client.vm(id).await?.exit_reason;
        ensure!(reason.contains("switched itself off"), "{reason}");
    }
    Ok(())
}
