//! The serial console under load: what the guest prints arrives byte for byte, who lags behind is told exactly how much is
//! missing, and what is typed comes to the guest once.

use anyhow::{Context as _, ensure};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::Client;
use crate::console::{Console, Output};
use crate::daemon::Daemon;
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];
/// Bytes printed by one request.
const PIECE_BYTES: usize = 16 << 10;
/// What the service keeps of a console.
const BACKLOG_BYTES: usize = 256 << 10;

/// 1 MiB printed, and 64 KiB typed; little of it in the rig, where every byte takes a millisecond.
fn sizes() -> (usize, usize) {
    if host::in_rig() { (32 << 10, 4 << 10) } else { (1 << 20, 64 << 10) }
}

pub fn trials() -> Vec<Trial> {
    vec![trial("serial/flood", NEEDS, 600, flood), trial("serial/typed", NEEDS, 300, typed)]
}

/// Bytes of all values, none of which says the same as another at its place: each word is its own number, mixed.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_be_bytes()).collect()
}

/// Says where two runs of bytes part.
fn expect_same(what: &str, got: &[u8], due: &[u8]) -> anyhow::Result<()> {
    let parted = got.iter().zip(due).position(|(got, due)| got != due);
    ensure!(parted.is_none(), "{what}: other bytes from byte {} on", parted.unwrap_or_default());
    ensure!(got.len() == due.len(), "{what}: {} bytes, not {}", got.len(), due.len());
    Ok(())
}

/// Has the agent do something that takes as long as it takes: every byte is an exit, and slow hosts are busy besides.
async fn call(client: &mut Client, vm: &str, op: Op) -> anyhow::Result<()> {
    const TIMEOUT_MS_MAX: u32 = 600_000;
    let request = AgentCallRequest { vm: vm.into(), timeout_ms: TIMEOUT_MS_MAX, op: Some(op) };
    client.agent.call(request).await?;
    Ok(())
}

/// Has the guest print.
async fn print(client: &mut Client, vm: &str, bytes: &[u8]) -> anyhow::Result<()> {
    for piece in bytes.chunks(PIECE_BYTES) {
        call(client, vm, Op::Serial(SerialOp { data: piece.to_vec().into() })).await?;
    }
    Ok(())
}

/// A VM, and consoles of it that have taken all that it said so far.
async fn consoles<const N: usize>(client: &mut Client) -> anyhow::Result<(Vm, [Console; N])> {
    let vm = client.boot_embedded(64 << 20).await?;
    let mut consoles = Vec::new();
    for _ in 0..N {
        let mut console = client.console(&vm.id).await?;
        console.expect("COLDSPARK-READY").await?;
        console.expect("\r\n").await?;
        consoles.push(console);
    }
    let consoles = consoles.try_into().ok().context("as many consoles as asked for")?;
    Ok((vm, consoles))
}

/// All of it to two listeners that read, and one that begins to read when all is printed: that one has what fits between it
/// and the guest, and what it has not is counted where it is missing.
async fn flood(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (vm, [mut first, mut second, mut slow]) = consoles(&mut client).await?;
    let (bytes, _) = sizes();
    let due = pattern(bytes);
    let (printed, one, other) =
        tokio::join!(print(&mut client, &vm.id, &due), first.bytes(bytes), second.bytes(bytes));
    printed?;
    expect_same("the first listener", &one?, &due)?;
    expect_same("the second listener", &other?, &due)?;
    client.delete_vm(&vm.id).await?;
    let (mut at, mut received, mut lost) = (0usize, 0usize, 0usize);
    while let Some(message) = slow.message().await? {
        match message {
            Output::Output(piece) => {
                let due = due.get(at..at + piece.len()).context("more bytes than were printed")?;
                expect_same(&format!("the slow listener, from byte {at} on"), &piece, due)?;
                (at, received) = (at + piece.len(), received + piece.len());
            }
            Output::LostBytes(count) => (at, lost) = (at + count as usize, lost + count as usize),
        }
    }
    ensure!(received + lost == bytes, "{received} bytes received, {lost} lost, of {bytes}");
    let holds = BACKLOG_BYTES.min(bytes);
    ensure!(received >= holds, "{received} bytes received, {lost} lost: the backlog holds {holds}");
    // Backlog, windows and buffers together hold far less.
    ensure!(lost > 0 || bytes < 1 << 20, "a listener that did not read missed nothing of {bytes} bytes");
    Ok(())
}

/// Bytes typed as fast as the service takes them, while the guest echoes them.
async fn typed(stage: Stage) -> anyhow::Result<()> {
    const MESSAGE_BYTES: usize = 4 << 10;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (vm, [mut typist, mut witness]) = consoles(&mut client).await?;
    let (_, bytes) = sizes();
    let due = pattern(bytes);
    let typing = async {
        for piece in due.chunks(MESSAGE_BYTES) {
            typist.type_bytes(piece).await?;
        }
        anyhow::Ok(())
    };
    let echo = Op::SerialEcho(SerialEchoOp { bytes: bytes as u32 });
    let echoing = call(&mut client, &vm.id, echo);
    let (typed, echoed, seen) = tokio::join!(typing, echoing, witness.bytes(bytes));
    typed?;
    echoed?;
    expect_same("the echo", &seen?, &due)?;
    // Nothing of it comes a second time.
    print(&mut client, &vm.id, b"and this is the end\n").await?;
    expect_same("after the echo", &witness.bytes(20).await?, b"and this is the end\n")
}
