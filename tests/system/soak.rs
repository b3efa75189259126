//! No hangs: FreeBSD booted and restored many times in a row, each time up to an answer. As often as
//! `COLDSPARK_FREEBSD_SOAK=BOOTS,RESTORES` says (docs/testing.md); what does not get there is told with where its vCPUs stood, and counted.

use std::fs::File;
use std::io::Write as _;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::Client;
use crate::daemon::Daemon;
use crate::freebsd::{Kernel, PROMPT, READY, ask, import};
use crate::host::{self, Need};
use crate::trial::{Stage, limit, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::Userfault, Need::FreeBsd, Need::FreeBsdSoak];
/// What one boot and one restore may take before they count as hung.
const BOOT_SECONDS: u64 = 20;
const RESTORE_SECONDS: u64 = 10;

pub fn trials() -> Vec<Trial> {
    let (boots, restores) = host::freebsd_soak().unwrap_or_default();
    let seconds = 60 + u64::from(boots) * BOOT_SECONDS + u64::from(restores) * RESTORE_SECONDS;
    vec![trial("freebsd/soak", NEEDS, seconds, move |stage| soak(stage, boots, restores))]
}

/// vCPUs of each VM.
fn vcpus() -> anyhow::Result<u32> {
    const VCPUS: &str = "COLDSPARK_FREEBSD_SOAK_VCPUS";
    let given = std::env::var(VCPUS).unwrap_or_default();
    if given.is_empty() {
        return Ok(4);
    }
    given.parse().with_context(|| format!("{VCPUS} is {given:?}, not a number of vCPUs"))
}

/// What happened, line by line, in a file that is there also when the rest is not.
struct Diary {
    file: File,
    boots: Vec<f64>,
    restores: Vec<f64>,
    failures: Vec<String>,
}

impl Diary {
    fn note(&mut self, line: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.file, "{line}")?)
    }

    fn took(&mut self, what: &str, since: Instant, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let seconds = since.elapsed().as_secs_f64();
        match result {
            Ok(()) => self.note(&format!("{what}: {seconds:.2} s")),
            Err(error) => {
                let failure = format!("{what}: after {seconds:.2} s: {error:#}");
                self.note(&failure)?;
                self.failures.push(failure);
                Ok(())
            }
        }
    }
}

fn summary(times: &mut [f64]) -> String {
    times.sort_by(f64::total_cmp);
    let at =
        |share: f64| times.get(((times.len() as f64 - 1.0) * share).round() as usize).copied().unwrap_or(0.0);
    format!("{} good, median {:.2} s, longest {:.2} s", times.len(), at(0.5), at(1.0))
}

async fn soak(stage: Stage, boots: u32, restores: u32) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vcpus = vcpus()?;
    import(&mut client, Kernel::Microvm, vcpus).await?;
    let file = File::create(stage.logs.join("soak.txt"))?;
    let mut diary = Diary { file, boots: Vec::new(), restores: Vec::new(), failures: Vec::new() };
    for n in 0..boots {
        let begin = Instant::now();
        let result = boot(&mut client, vcpus).await;
        if result.is_ok() {
            diary.boots.push(begin.elapsed().as_secs_f64());
        }
        diary.took(&format!("boot {n}"), begin, result)?;
    }
    if restores > 0 {
        let snapshot = snapshot(&mut client).await.context("the snapshot")?;
        for n in 0..restores {
            let mode = if n % 2 == 0 { MemoryMode::Mapped } else { MemoryMode::Userfault };
            let begin = Instant::now();
            let result = restore(&mut client, &snapshot, mode, vcpus).await;
            if result.is_ok() {
                diary.restores.push(begin.elapsed().as_secs_f64());
            }
            diary.took(&format!("restore {n} {mode:?}"), begin, result)?;
        }
    }
    let (boots_line, restores_line) = (summary(&mut diary.boots), summary(&mut diary.restores));
    diary.note(&format!("boots: {boots_line}\nrestores: {restores_line}"))?;
    ensure!(
        diary.failures.is_empty(),
        "{} of {boots} boots and {restores} restores failed:\n{}",
        diary.failures.len(),
        diary.failures.join("\n")
    );
    Ok(())
}

fn image() -> CreateVmRequest {
    CreateVmRequest { source: Some(Source::Image("freebsd".into())), ..Default::default() }
}

/// A cold boot that answers, then is ended. (A boot that is not ready in time tells by itself where it stood.)
async fn boot(client: &mut Client, vcpus: u32) -> anyhow::Result<()> {
    let vm = client.boot(image()).await?.vm;
    let good = within(client, (&vm, true), BOOT_SECONDS, &[("cpus", &format!("cpus={vcpus}"))]).await;
    client.delete_vm(&vm.id).await?;
    good
}

/// Of a VM at its prompt.
async fn snapshot(client: &mut Client) -> anyhow::Result<String> {
    let vm = client.boot(image()).await?.vm;
    let mut console = client.console(&vm.id).await?;
    console.expect(READY).await?;
    console.expect(PROMPT).await?;
    let snapshot = client.snapshot(&vm.id, "soak").await?.id;
    client.delete_vm(&vm.id).await?;
    Ok(snapshot)
}

/// A clone that answers and whose timers end a sleep, then is ended.
async fn restore(client: &mut Client, snapshot: &str, mode: MemoryMode, vcpus: u32) -> anyhow::Result<()> {
    let vm = client.clone_vms(snapshot, 1, mode, Identity::Unmanaged).await?.remove(0);
    let cpus = format!("cpus={vcpus}");
    let asked = [("ping", "pong"), ("cpus", &cpus), ("sleep 20", "slept")];
    let good = within(client, (&vm, false), RESTORE_SECONDS, &asked).await;
    client.delete_vm(&vm.id).await?;
    good
}

/// The VM answers these (command, beginning of the answer) in time, or it is told where it stands.
async fn within(
    client: &mut Client,
    (vm, cold): (&Vm, bool),
    seconds: u64,
    asked: &[(&str, &str)],
) -> anyhow::Result<()> {
    let answered = async {
        let mut console = client.console(&vm.id).await?;
        // A cold-booted one may still be printing; a clone's console begins with what it is asked.
        if cold {
            console.expect(READY).await?;
            console.expect(PROMPT).await?;
        }
        for (command, wanted) in asked {
            let answer = ask(&mut console, command).await?;
            ensure!(answer.starts_with(wanted), "answered {answer:?} to {command:?}");
        }
        anyhow::Ok(())
    };
    let problem = match tokio::time::timeout(limit(seconds), answered).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("no answer to {asked:?} in {} s", limit(seconds).as_secs()),
    };
    let looked = client.vms.inspect_vm(InspectVmRequest { vm: vm.id.clone() }).await;
    anyhow::bail!("{problem}; it stands: {looked:?}")
}
