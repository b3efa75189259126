//! Signed snapshots: signed where a key is, taken or refused where only signed ones are, and all as before where nobody asks.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::client::{Client, ask, expect_status};
use crate::daemon::{Daemon, program};
use crate::host::Need;
use crate::trial::{Stage, trial};

const KVM: &[Need] = &[Need::Kvm];
const ANYWHERE: &[Need] = &[];
const MEMORY_BYTES: u64 = 64 << 20;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("signed/made-and-taken", KVM, 120, made_and_taken),
        trial("signed/forged", KVM, 120, forged),
        trial("signed/keys", ANYWHERE, 30, keys),
    ]
}

/// Runs the program; gives what it printed.
fn coldspark(words: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program()).args(words).output()?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// A new key in `folder`, and a file that trusts it alone: their paths.
fn key(folder: &Path, name: &str) -> anyhow::Result<(String, String)> {
    let path = |extension: &str| {
        Ok::<_, anyhow::Error>(
            folder.join(name).with_extension(extension).to_str().context("a path")?.to_owned(),
        )
    };
    let (secret, trusted) = (path("key")?, path("trusted")?);
    fs::write(&trusted, coldspark(&["snapshot", "key", "new", "--name", name, &secret])?)?;
    fs::set_permissions(&trusted, fs::Permissions::from_mode(0o644))?;
    Ok((secret, trusted))
}

/// Starts the daemon again on its data with other arguments.
async fn again(daemon: &mut Daemon, arguments: &[&str]) -> anyhow::Result<Client> {
    daemon.stop().await?;
    daemon.set_arguments(arguments.iter().map(|&word| word.to_owned()).collect());
    daemon.start_again().await?;
    daemon.client().await
}

async fn clones(client: &mut Client, snapshot: &str) -> anyhow::Result<()> {
    let vm = client.clone_vms(snapshot, 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);
    let echo = ask!(client, &vm.id, Echo(EchoOp { data: b"here".to_vec().into() }));
    ensure!(echo.data[..] == b"here"[..]);
    client.delete_vm(&vm.id).await?;
    Ok(())
}

/// Refused, with the reason for programs and these words for people.
fn refused<T: std::fmt::Debug>(what: &str, result: Result<T, Status>, words: &str) -> anyhow::Result<()> {
    let reason = result
        .as_ref()
        .err()
        .and_then(|status| status.get_error_details().error_info().map(|info| info.reason.clone()));
    let message = expect_status(what, result, &[Code::FailedPrecondition])?;
    ensure!(reason.as_deref() == Some("SNAPSHOT_NOT_TRUSTED"), "{what}: reason {reason:?}");
    ensure!(message.contains(words), "{what}: {message}");
    Ok(())
}

async fn clone_refused(client: &mut Client, snapshot: &str, words: &str) -> anyhow::Result<()> {
    let cloned = client.clone_vms(snapshot, 1, MemoryMode::Mapped, Identity::Managed).await;
    refused(&format!("a clone of {snapshot}"), cloned, words)
}

async fn made_and_taken(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, trusted) = key(folder.path(), "ours")?;
    let (theirs, others) = key(folder.path(), "theirs")?;

    // As it always was: nothing is signed, everything is taken.
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(MEMORY_BYTES).await?;
    let plain = client.snapshot(&vm.id, "plain").await?;
    ensure!(plain.signature.is_none(), "{plain:?}");
    clones(&mut client, "plain").await?;

    // With a key and no policy: signed, and both are taken.
    let mut client = again(&mut daemon, &["--sign-key", &ours]).await?;
    let vm = client.boot_embedded(MEMORY_BYTES).await?;
    let signed = client.snapshot(&vm.id, "signed").await?;
    let signature = signed.signature.context("no signature")?;
    ensure!(signature.name == "ours" && !signature.trusted && signature.problem.is_empty(), "{signature:?}");
    for name in ["plain", "signed"] {
        clones(&mut client, name).await.context(name)?;
    }

    // With a policy too: what is made is signed and taken, the unsigned one is refused.
    let mut client = again(&mut daemon, &["--sign-key", &ours, "--trusted-keys", &trusted]).await?;
    clone_refused(&mut client, "plain", "it is not signed").await?;
    clones(&mut client, "signed").await?;
    let vm = client.boot_embedded(MEMORY_BYTES).await?;
    client.snapshot(&vm.id, "new").await?;
    clones(&mut client, "new").await?;
    let verified = client
        .snapshots
        .verify_snapshot(VerifySnapshotRequest { snapshot: "new".into() })
        .await?
        .into_inner();
    ensure!(verified.signature.is_some_and(|signature| signature.trusted && signature.name == "ours"));
    let pool = CreatePoolRequest { name: "web".into(), snapshot: "plain".into(), ..Default::default() };
    refused("a pool", client.pools.create_pool(pool).await, "it is not signed")?;
    // As people see it.
    let socket = daemon.socket();
    let socket = socket.to_str().context("a path")?;
    let list = coldspark(&["snapshot", "ls", "--socket", socket])?;
    let line = |name: &str| list.lines().find(|line| line.contains(name)).unwrap_or_default().to_owned();
    ensure!(line("signed").contains(" ours ") && line("plain").contains(" - "), "{list}");
    let words = coldspark(&["snapshot", "verify", "--socket", socket, "signed"])?;
    ensure!(words.contains(&format!("signed by ours ({}), who is trusted", signature.key)), "{words}");
    let words = coldspark(&["snapshot", "verify", "--socket", socket, "plain"])?;
    ensure!(words.contains("not signed"), "{words}");

    // Without the secret it takes what is signed, and makes nothing.
    let mut client = again(&mut daemon, &["--trusted-keys", &trusted]).await?;
    clones(&mut client, "signed").await?;
    let vm = client.boot_embedded(MEMORY_BYTES).await?;
    refused("a snapshot", client.snapshot(&vm.id, "nobodys").await, "--sign-key")?;
    ensure!(client.vm(&vm.id).await?.state() == vm.state(), "the VM should go on");

    // Who trusts somebody else takes none of them.
    let mut client = again(&mut daemon, &["--sign-key", &theirs, "--trusted-keys", &others]).await?;
    for name in ["signed", "new"] {
        clone_refused(&mut client, name, &signature.key).await?;
    }
    daemon.stop().await?;
    Ok(())
}

/// What is done to the snapshots "first" and "second", and what is said of the second then.
type Forgery = fn(&Path, &Path) -> anyhow::Result<()>;

const FORGERIES: &[(&str, Forgery)] = &[
    ("its signature is wrong", |first, second| {
        fs::copy(first.join("manifest.sig"), second.join("manifest.sig"))?;
        Ok(())
    }),
    ("its signature is wrong", |_, second| {
        let mut line = fs::read(second.join("manifest.sig"))?;
        line[100] ^= 1;
        Ok(fs::write(second.join("manifest.sig"), line)?)
    }),
    // Another machine under the old signature.
    ("its signature is wrong", |_, second| {
        let json =
            fs::read_to_string(second.join("manifest.json"))?.replace("\"agent\": true", "\"agent\": false");
        fs::write(second.join("manifest.json"), &json)?;
        let line = format!("{}  manifest.json\n", blake3::hash(json.as_bytes()).to_hex());
        Ok(fs::write(second.join("manifest.b3"), line)?)
    }),
    ("it is not signed", |_, second| Ok(fs::remove_file(second.join("manifest.sig"))?)),
];

async fn forged(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, trusted) = key(folder.path(), "ours")?;
    let arguments = ["--sign-key", &ours, "--trusted-keys", &trusted].map(str::to_owned);
    let mut daemon = Daemon::start_with(&stage, &arguments).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(MEMORY_BYTES).await?;
    let store = daemon.data.join("snapshots");
    let first = store.join(client.snapshot(&vm.id, "first").await?.id);
    let second = store.join(client.snapshot(&vm.id, "second").await?.id);
    let files = ["manifest.json", "manifest.b3", "manifest.sig"];
    let sound = files.map(|file| fs::read(second.join(file)));
    for (words, forge) in FORGERIES {
        daemon.stop().await?;
        forge(&first, &second)?;
        daemon.start_again().await?;
        let mut client = daemon.client().await?;
        clone_refused(&mut client, "second", words).await?;
        ensure!(client.list_vms().await?.is_empty(), "something was started of it");
        clones(&mut client, "first").await?;
        for (file, content) in files.iter().zip(&sound) {
            fs::write(second.join(file), content.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?)?;
        }
    }
    // Memory that nobody signed, of the right length, under a signature that is right: all is compared before it is used.
    daemon.stop().await?;
    let memory = second.join("memory.img");
    let mut bytes = fs::read(&memory)?;
    let at = bytes.len() / 4;
    bytes[at] ^= 1;
    fs::write(&memory, bytes)?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    let cloned = client.clone_vms("second", 1, MemoryMode::Mapped, Identity::Managed).await;
    let message = expect_status("a clone of forged memory", cloned, &[Code::DataLoss])?;
    ensure!(message.contains("memory.img"), "{message}");
    clones(&mut client, "first").await
}

/// What the program says of keys that cannot be used.
async fn keys(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (secret, trusted) = key(folder.path(), "ours")?;
    ensure!(fs::metadata(&secret)?.permissions().mode() & 0o777 == 0o600, "others may read the secret");
    ensure!(coldspark(&["snapshot", "key", "show", &secret])? == fs::read_to_string(&trusted)?);
    let fails = |words: &[&str], expected: &str| -> anyhow::Result<()> {
        let output = Command::new(program()).args(words).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success() && text.contains(expected),
            "{words:?} should say {expected:?}: {text}"
        );
        Ok(())
    };
    let before = fs::read(&secret)?;
    fails(&["snapshot", "key", "new", "--name", "ours", &secret], "exists")?;
    ensure!(fs::read(&secret)? == before, "a key was written over");
    let data = stage.logs.to_str().context("a path")?;
    let serve = |flag, file| ["serve", "--data-dir", data, flag, file];
    fails(&serve("--sign-key", &trusted), "chmod 600")?;
    fails(&serve("--sign-key", "/nowhere/key"), "/nowhere/key")?;
    fails(&serve("--trusted-keys", &secret), "line 1")?;
    let settings = folder.path().join("coldspark.toml");
    fs::write(&settings, format!("trusted-keys = {secret:?}\n"))?;
    let settings = settings.to_str().context("a path")?;
    fails(&["config", "check", settings], "line 1")?;
    fs::write(settings, format!("trusted-keys = {trusted:?}\nsign-key = {secret:?}\n"))?;
    let words = coldspark(&["config", "check", settings])?;
    if !words.contains("2 settings") {
        bail!("{words}");
    }
    Ok(())
}
