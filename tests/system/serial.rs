//! The serial console under load: what the guest prints arrives byte for byte, who lags behind is told exactly how much is
//! missing, and what is typed comes to the guest once.

use anyhow::{Context as _, ensure};
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ask};
use crate::console::{Console, Output};
use crate::daemon::Daemon;
use crate::host::Need;
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];
const MIB: usize = 1 << 20;
/// Bytes printed by one request.
const PIECE_BYTES: usize = 64 << 10;
const TYPED_BYTES: usize = 64 << 10;
/// What the service keeps of a console.
const BACKLOG_BYTES: usize = 256 << 10;

pub fn trials() -> Vec<Trial> {
    vec![trial("serial/flood", NEEDS, 300, flood), trial("serial/typed-64-kib", NEEDS, 180, typed)]
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

/// Has the guest print.
async fn print(client: &mut Client, vm: &str, bytes: &[u8]) -> anyhow::Result<()> {
    for piece in bytes.chunks(PIECE_BYTES) {
        ask!(client, vm, Serial(SerialOp { data: piece.to_vec().into() }));
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

/// 1 MiB to two listeners that read, and one that begins to read when all is printed: that one has what fits between it
/// and the guest, and what it has not is counted where it is missing.
async fn flood(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (vm, [mut first, mut second, mut slow]) = consoles(&mut client).await?;
    let due = pattern(MIB);
    let (printed, one, other) =
        tokio::join!(print(&mut client, &vm.id, &due), first.bytes(MIB), second.bytes(MIB));
    printed?;
    expect_same("the first listener", &one?, &due)?;
    expect_same("the second listener", &other?, &due)?;
    client.delete_vm(&vm.id).await?;
    let (mut at, mut received, mut lost) = (0usize, 0usize, 0usize);
    while let Some(message) = slow.message().await? {
        match message {
            Output::Output(bytes) => {
                let due = due.get(at..at + bytes.len()).context("more bytes than were printed")?;
                expect_same(&format!("the slow listener, from byte {at} on"), &bytes, due)?;
                (at, received) = (at + bytes.len(), received + bytes.len());
            }
            Output::LostBytes(bytes) => (at, lost) = (at + bytes as usize, lost + bytes as usize),
        }
    }
    ensure!(lost > 0, "a listener that does not read misses something of {MIB} bytes");
    ensure!(received + lost == MIB, "{received} bytes received, {lost} lost, of {MIB}");
    ensure!(received >= BACKLOG_BYTES, "{received} bytes received: the backlog holds {BACKLOG_BYTES}");
    Ok(())
}

/// 64 KiB typed as fast as the service takes them, while the guest echoes them.
async fn typed(stage: Stage) -> anyhow::Result<()> {
    const MESSAGE_BYTES: usize = 4 << 10;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (vm, [mut typist, mut witness]) = consoles(&mut client).await?;
    let due = pattern(TYPED_BYTES);
    let typing = async {
        for piece in due.chunks(MESSAGE_BYTES) {
            typist.type_bytes(piece).await?;
        }
        anyhow::Ok(())
    };
    let echoing = async {
        ask!(&mut client, &vm.id, SerialEcho(SerialEchoOp { bytes: TYPED_BYTES as u32 }));
        anyhow::Ok(())
    };
    let (typed, echoed, seen) = tokio::join!(typing, echoing, witness.bytes(TYPED_BYTES));
    typed?;
    echoed?;
    expect_same("the echo", &seen?, &due)?;
    // Nothing of it comes a second time.
    print(&mut client, &vm.id, b"and this is the end\n").await?;
    expect_same("after the echo", &witness.bytes(20).await?, b"and this is the end\n")
}
