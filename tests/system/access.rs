//! Who is let in, and who is not: tokens and certificates over TLS, users and groups on the socket, and what strangers can cost.

mod certificates;

use std::fs;
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use certificates::{Authority, Pair};
use coldspark::api::client::{self as remote, Remote};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::{CreateVmRequest, DiskFile, ListVmsRequest};
use hyper_util::rt::TokioIo;
use libtest_mimic::Trial;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use crate::daemon::{Daemon, eventually, program};
use crate::host::Need;
use crate::trial::{Stage, limit, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("access/tokens", &[], 60, tokens),
        trial("access/reload", &[], 60, reload),
        trial("access/client-certificates", &[], 60, client_certificates),
        trial("access/strangers-take-no-place-for-long", &[], 60, strangers),
        trial("access/users-and-groups", &[Need::Root], 60, users_and_groups),
        trial("access/refused-at-the-start", &[], 60, refused_at_the_start),
        trial("config/flag-environment-file-default", &[], 60, settings),
    ]
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Arguments of a service with TLS on a port of its own.
fn tls(service: &Pair, more: &[&str]) -> Vec<String> {
    let mut arguments: Vec<String> = ["--listen", "127.0.0.1:0", "--tls-cert"].map(str::to_owned).to_vec();
    arguments.extend([text(&service.certificate), "--tls-key".into(), text(&service.key)]);
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    arguments
}

/// The port that a service has taken, as it logs it.
async fn port(daemon: &Daemon) -> anyhow::Result<SocketAddr> {
    let mut found = None;
    eventually("the service listens on a TCP port", 30, async || {
        let log = daemon.log()?;
        // Colours stand between the words where the log goes to a terminal; here it goes to a file.
        let address = log.lines().filter(|line| line.contains("listening")).find_map(|line| {
            line.split(|c: char| !(c.is_ascii_digit() || ".:".contains(c))).find_map(|word| word.parse().ok())
        });
        found = address;
        Ok(found.is_some())
    })
    .await?;
    found.context("a port")
}

/// Runs `coldspark token new` as a user would; gives the token.
pub fn new_token(file: &Path, role: &str, name: &str) -> anyhow::Result<String> {
    let output = Command::new(program())
        .args(["token", "new", "--role", role, "--name", name, "--append"])
        .arg(file)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "token new failed");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// `coldspark vm ls` with these arguments, and no settings of the user's own.
fn list(arguments: &[&str], token: Option<&str>) -> anyhow::Result<Output> {
    let mut command = Command::new(program());
    command.args(["vm", "ls", "--json"]).args(arguments).stdin(Stdio::null());
    for name in [
        "COLDSPARK_HOST",
        "COLDSPARK_TOKEN",
        "COLDSPARK_TOKEN_FILE",
        "COLDSPARK_CA",
        "COLDSPARK_CERT",
        "COLDSPARK_KEY",
    ] {
        command.env_remove(name);
    }
    if let Some(token) = token {
        command.env("COLDSPARK_TOKEN", token);
    }
    Ok(command.output()?)
}

/// It failed, and says so with all these words.
fn refused(output: &Output, words: &[&str]) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "was let in");
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in {said}");
    }
    Ok(())
}

fn let_in(output: &Output) -> anyhow::Result<()> {
    ensure!(output.status.success(), "not let in: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn code<T>(result: Result<T, Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}

fn create() -> CreateVmRequest {
    CreateVmRequest { source: Some(Source::Image("there-is-none".into())), ..CreateVmRequest::default() }
}

async fn tokens(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path(), "ca")?;
    let other = Authority::new(folder.path(), "other-ca")?;
    let file = folder.path().join("tokens");
    let reader = new_token(&file, "read", "reader")?;
    let runner = new_token(&file, "run", "runner")?;
    let expired = new_token(&file, "admin", "late")?;
    let lines = fs::read_to_string(&file)?;
    ensure!(!lines.contains(&reader["coldspark_".len()..]), "the file holds a token itself");
    fs::write(&file, lines.trim_end().to_owned() + " until=2020-01-01\n")?;
    let daemon =
        Daemon::start_with(&stage, &tls(&authority.service("127.0.0.1")?, &["--tokens", &text(&file)]))
            .await?;
    let port = port(&daemon).await?;
    let (host, ca) = (format!("https://{port}"), text(&authority.file()));

    // As a user sees it.
    let flags = ["--host", &host, "--ca", &ca];
    let_in(&list(&flags, Some(&reader))?)?;
    refused(&list(&flags, None)?, &["UNAUTHENTICATED", "--token-file"])?;
    refused(&list(&flags, Some("garbage"))?, &["UNAUTHENTICATED", "does not know this token"])?;
    refused(&list(&flags, Some(&reader[..reader.len() - 1]))?, &["UNAUTHENTICATED"])?;
    refused(&list(&flags, Some(&expired))?, &["UNAUTHENTICATED", "late has expired"])?;
    refused(&list(&["--host", &host, "--ca", &text(&other.file())], Some(&reader))?, &["--ca FILE"])?;
    refused(&list(&["--host", &host], Some(&reader))?, &["--ca FILE"])?;
    let by_name = format!("https://localhost:{}", port.port());
    refused(&list(&["--host", &by_name, "--ca", &ca], Some(&reader))?, &["another name"])?;
    let clear = format!("http://{port}");
    refused(&list(&["--host", &clear], Some(&reader))?, &["in the clear"])?;
    refused(&list(&["--host", &clear], None)?, &["error"])?;

    // As roles go. What a role lets through fails for another reason: there is no such image.
    let connect = async |token: &str| {
        let remote = Remote {
            host: host.clone(),
            token: Some(token.into()),
            ca: Some(authority.file()),
            identity: None,
        };
        remote::connect_remote(&remote).await
    };
    let (mut reads, mut runs) = (connect(&reader).await?, connect(&runner).await?);
    reads.vms.list_vms(ListVmsRequest::default()).await?;
    ensure!(code(reads.vms.create_vm(create()).await) == Code::PermissionDenied);
    let mut events = runs.vms.create_vm(create()).await?.into_inner();
    let end = loop {
        match events.message().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    ensure!(code(end) == Code::NotFound, "a runner may create");
    let host_file = DiskFile { path: "/etc/hostname".into(), ..DiskFile::default() };
    let with_file = CreateVmRequest { disks: vec![host_file], ..create() };
    ensure!(
        code(runs.vms.create_vm(with_file).await) == Code::PermissionDenied,
        "files of the host are for admins"
    );
    let import = runs.images.import_image(tokio_stream::empty()).await;
    ensure!(code(import) == Code::PermissionDenied, "images are for admins");

    // Services that are not ours are behind the same guard.
    let channel =
        remote::remote_channel(&Remote { host, ca: Some(authority.file()), ..Remote::default() }).await?;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    ensure!(
        code(health.check(tonic_health::pb::HealthCheckRequest::default()).await) == Code::Unauthenticated
    );
    Ok(())
}

async fn reload(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path(), "ca")?;
    let service = authority.service("127.0.0.1")?;
    let file = folder.path().join("tokens");
    let token = new_token(&file, "read", "ci")?;
    let daemon = Daemon::start_with(&stage, &tls(&service, &["--tokens", &text(&file)])).await?;
    let host = format!("https://{}", port(&daemon).await?);
    let connect = async |token: &str, ca: PathBuf| {
        let remote = Remote { host: host.clone(), token: Some(token.into()), ca: Some(ca), identity: None };
        remote::connect_remote(&remote).await
    };
    let said = async |words: &str, times: usize| {
        eventually(words, 30, async || Ok(daemon.log()?.matches(words).count() == times)).await
    };
    let mut old = connect(&token, authority.file()).await?;
    old.vms.list_vms(ListVmsRequest::default()).await?;

    // A file that is broken changes nothing.
    let good = fs::read_to_string(&file)?;
    fs::write(&file, "run\n")?;
    daemon.hang_up();
    said("stay as they were", 1).await?;
    ensure!(daemon.log()?.contains("tokens, line 1"), "the line is named");
    old.vms.list_vms(ListVmsRequest::default()).await?;

    // A new certificate of another CA and a new token, for connections that come and those that are there.
    let next = Authority::new(folder.path(), "next-ca")?;
    let renewed = next.service("127.0.0.1")?;
    fs::copy(&renewed.certificate, &service.certificate)?;
    fs::copy(&renewed.key, &service.key)?;
    fs::write(&file, good)?;
    let second = new_token(&file, "read", "second")?;
    daemon.hang_up();
    said("were read again", 1).await?;
    let mut new = connect(&second, next.file()).await?;
    new.vms.list_vms(ListVmsRequest::default()).await?;
    ensure!(connect(&second, authority.file()).await.is_err(), "the old certificate is still shown");
    old.vms.list_vms(ListVmsRequest::default()).await?;

    // A token that is withdrawn is so at once, on the same connection.
    fs::write(&file, "")?;
    daemon.hang_up();
    said("were read again", 2).await?;
    for client in [&mut old, &mut new] {
        ensure!(code(client.vms.list_vms(ListVmsRequest::default()).await) == Code::Unauthenticated);
    }
    Ok(())
}

async fn client_certificates(stage: Stage) -> anyhow::Result<()> {
    const URI: &str = "spiffe://example.org/ci";
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path(), "ca")?;
    let clients = Authority::new(folder.path(), "clients")?;
    let others = Authority::new(folder.path(), "others")?;
    let rules = format!("cn:looker=read,uri:{URI}=run,cn:expired=admin,cn:stranger-by-dns=admin");
    let ca = text(&clients.file());
    let more = ["--client-ca", &ca, "--allow", &rules];
    let daemon = Daemon::start_with(&stage, &tls(&authority.service("127.0.0.1")?, &more)).await?;
    let host = format!("https://{}", port(&daemon).await?);
    let ca = text(&authority.file());
    let with = |pair: &Pair| {
        let (certificate, key) = (text(&pair.certificate), text(&pair.key));
        list(&["--host", &host, "--ca", &ca, "--cert", &certificate, "--key", &key], None)
    };

    let looker = clients.client("looker")?;
    let_in(&with(&looker)?)?;
    refused(&list(&["--host", &host, "--ca", &ca], None)?, &["--cert FILE --key FILE"])?;
    refused(&with(&others.client("looker")?)?, &["error"])?;
    refused(&with(&clients.expired_client("expired")?)?, &["error"])?;
    refused(&with(&clients.client("nobody")?)?, &["PERMISSION_DENIED", "certificate nobody"])?;
    let_in(&with(&clients.client_by_uri(URI)?)?)?;
    refused(&with(&clients.client_by_uri("spiffe://example.org/cix")?)?, &["PERMISSION_DENIED"])?;
    // A key that others can read is not used.
    fs::set_permissions(&looker.key, fs::Permissions::from_mode(0o644))?;
    refused(&with(&looker)?, &["chmod o-rwx"])?;
    fs::set_permissions(&looker.key, fs::Permissions::from_mode(0o600))?;

    let identity = Some((looker.certificate, looker.key));
    let remote = Remote { host, token: None, ca: Some(authority.file()), identity };
    let mut client = remote::connect_remote(&remote).await?;
    ensure!(code(client.vms.create_vm(create()).await) == Code::PermissionDenied);
    // This service takes no tokens, so one is no help either.
    let remote = Remote { token: Some("x".into()), ..remote };
    let mut client = remote::connect_remote(&remote).await?;
    ensure!(code(client.vms.list_vms(ListVmsRequest::default()).await) == Code::Unauthenticated);
    Ok(())
}

/// Waits until the other side has closed the connection.
async fn closed(stream: TcpStream) -> anyhow::Result<()> {
    let ended = tokio::task::spawn_blocking(move || {
        stream.set_read_timeout(Some(limit(40)))?;
        let mut rest = Vec::new();
        match (&stream).read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            other => other.map(|_| ()),
        }
    });
    ended.await?.context("a connection that should have been closed")
}

async fn strangers(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path(), "ca")?;
    let file = folder.path().join("tokens");
    let token = new_token(&file, "read", "ci")?;
    let more = ["--tokens", &text(&file), "--connections-max", "3"];
    let daemon = Daemon::start_with(&stage, &tls(&authority.service("127.0.0.1")?, &more)).await?;
    let port = port(&daemon).await?;
    let remote = Remote {
        host: format!("https://{port}"),
        token: Some(token),
        ca: Some(authority.file()),
        identity: None,
    };
    let mut proven = remote::connect_remote(&remote).await?;
    proven.vms.list_vms(ListVmsRequest::default()).await?;

    // One that says nothing, and one that finishes its handshake and says nothing that counts.
    let silent = TcpStream::connect(port)?;
    let unproven = remote::remote_channel(&remote).await?;
    // All places are taken: the next is closed at once, and those on the socket notice nothing.
    eventually("the fourth connection is turned away", 30, async || {
        closed(TcpStream::connect(port)?).await?;
        Ok(daemon.log()?.contains("3 connections on the TCP port"))
    })
    .await?;
    daemon.client().await?.vms.list_vms(ListVmsRequest::default()).await?;
    // They are put out, and there is room again; who has proved to be somebody stays.
    closed(silent).await?;
    eventually("there is room again", 30, async || Ok(remote::connect_remote(&remote).await.is_ok())).await?;
    proven.vms.list_vms(ListVmsRequest::default()).await?;
    drop(unproven);

    // Noise instead of a handshake.
    let mut noise = TcpStream::connect(port)?;
    std::io::Write::write_all(&mut noise, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    closed(noise).await?;
    proven.vms.list_vms(ListVmsRequest::default()).await?;
    Ok(())
}

/// A client on a connection that was made by another user: what counts is who connected.
async fn client_as(socket: &Path, uid: u32, groups: &[u32]) -> anyhow::Result<remote_vms::Vms> {
    let (path, groups) = (socket.to_owned(), groups.to_vec());
    // The raw calls change this thread alone.
    let connected = std::thread::spawn(move || -> std::io::Result<std::os::unix::net::UnixStream> {
        // SAFETY: both only read their arguments; the thread ends with these credentials.
        let changed = unsafe {
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == 0
                && libc::syscall(libc::SYS_setresgid, uid, uid, uid) == 0
                && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
        };
        if !changed {
            return Err(std::io::Error::last_os_error());
        }
        std::os::unix::net::UnixStream::connect(path)
    });
    let stream = connected.join().map_err(|_| anyhow::anyhow!("the thread failed"))??;
    stream.set_nonblocking(true)?;
    let mut stream = Some(TokioIo::new(tokio::net::UnixStream::from_std(stream)?));
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or(std::io::Error::other("connected already"));
        async move { stream }
    });
    let channel = Endpoint::from_static("http://coldspark.local").connect_with_connector(connector).await?;
    Ok(remote_vms::Vms::new(channel))
}

mod remote_vms {
    pub type Vms = coldspark::api::proto::vm_service_client::VmServiceClient<tonic::transport::Channel>;
}

async fn users_and_groups(stage: Stage) -> anyhow::Result<()> {
    const ALICE: u32 = 41_001;
    const LOOKERS: u32 = 41_500;
    const RUNNERS: u32 = 41_501;
    let mode = |daemon: &Daemon| -> anyhow::Result<u32> {
        Ok(fs::metadata(daemon.socket())?.permissions().mode() & 0o777)
    };
    let reachable = |daemon: &Daemon| -> anyhow::Result<()> {
        let folder = daemon.socket().parent().context("a folder")?.to_owned();
        Ok(fs::set_permissions(folder, fs::Permissions::from_mode(0o711))?)
    };

    let own = Daemon::start(&stage).await?;
    ensure!(mode(&own)? == 0o600);
    reachable(&own)?;
    ensure!(client_as(&own.socket(), ALICE, &[]).await.is_err(), "the mode keeps others out");
    // And if it did not, the guard would.
    fs::set_permissions(own.socket(), fs::Permissions::from_mode(0o666))?;
    let denied = client_as(&own.socket(), ALICE, &[]).await?.list_vms(ListVmsRequest::default()).await;
    let denied = denied.err().context("a stranger was let in")?;
    ensure!(
        denied.code() == Code::PermissionDenied && denied.message().contains("--allow group:"),
        "{denied}"
    );
    drop(own);

    let allow = format!("group:{LOOKERS}=read,group:{RUNNERS}=run,user:{ALICE}=read");
    let daemon = Daemon::start_with(&stage, &["--allow".into(), allow]).await?;
    ensure!(mode(&daemon)? == 0o666);
    reachable(&daemon)?;
    let socket = daemon.socket();
    for (uid, groups, lists, creates) in [
        (ALICE, &[][..], Code::Ok, Code::PermissionDenied),
        (ALICE, &[RUNNERS], Code::Ok, Code::Ok),
        (ALICE + 1, &[7, LOOKERS], Code::Ok, Code::PermissionDenied),
        (ALICE + 1, &[RUNNERS], Code::Ok, Code::Ok),
        (ALICE + 1, &[7], Code::PermissionDenied, Code::PermissionDenied),
        // Its main group.
        (LOOKERS, &[], Code::Ok, Code::PermissionDenied),
    ] {
        let mut vms = client_as(&socket, uid, groups).await?;
        let (listed, created) =
            (vms.list_vms(ListVmsRequest::default()).await, vms.create_vm(create()).await);
        ensure!(code(listed) == lists, "listing by {uid} of {groups:?}");
        ensure!(code(created) == creates, "creating by {uid} of {groups:?}");
    }
    // More groups than are asked for at first.
    let many: Vec<u32> = (50_000..50_200).chain([RUNNERS]).collect();
    client_as(&socket, ALICE + 1, &many).await?.list_vms(ListVmsRequest::default()).await?;
    drop(daemon);

    let one = Daemon::start_with(&stage, &["--allow".into(), format!("group:{RUNNERS}=run")]).await?;
    ensure!(mode(&one)? == 0o660);
    reachable(&one)?;
    client_as(&one.socket(), ALICE, &[RUNNERS]).await?.list_vms(ListVmsRequest::default()).await?;
    ensure!(client_as(&one.socket(), ALICE, &[LOOKERS]).await.is_err(), "the mode keeps other groups out");
    Ok(())
}

async fn refused_at_the_start(_: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new(folder.path(), "ca")?;
    let pair = authority.service("127.0.0.1")?;
    let (certificate, key, ca) = (text(&pair.certificate), text(&pair.key), text(&authority.file()));
    let tls = ["--listen", "127.0.0.1:0", "--tls-cert", &certificate, "--tls-key", &key];
    let open = folder.path().join("open");
    fs::create_dir(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777))?;
    let in_open = text(&open.join("socket"));
    let missing = text(&folder.path().join("missing"));
    let cases: [(Vec<&str>, &str); 8] = [
        (vec!["--listen", "127.0.0.1:0"], "--insecure"),
        (tls.to_vec(), "--tokens FILE"),
        ([&tls[..], &["--client-ca", &ca]].concat(), "--allow cn:NAME=ROLE"),
        ([&tls[..], &["--insecure"]].concat(), "does not go with"),
        (vec!["--insecure"], "add --listen"),
        ([&tls[..], &["--tokens", &missing]].concat(), "missing"),
        (vec!["--allow", "group:no-such-group-here=run"], "no-such-group-here"),
        (vec!["--socket", &in_open], "chmod go-w"),
    ];
    for (arguments, words) in cases {
        let mut command = Command::new(program());
        command.args(["serve", "--data-dir"]).arg(folder.path()).args(&arguments).stdin(Stdio::null());
        if !arguments.contains(&"--socket") {
            command.arg("--socket").arg(folder.path().join("socket"));
        }
        refused(&command.output()?, &[words]).with_context(|| format!("{arguments:?}"))?;
    }
    Ok(())
}

async fn settings(stage: Stage) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("coldspark.toml");
    let config = |words: &[&str], variables: &[(&str, &str)]| -> anyhow::Result<Output> {
        let mut command = Command::new(program());
        command
            .env_remove("COLDSPARK_SHELLS")
            .env_remove("COLDSPARK_VMS_MAX")
            .env_remove("COLDSPARK_DATA_DIR");
        Ok(command.arg("config").args(words).envs(variables.iter().copied()).stdin(Stdio::null()).output()?)
    };
    fs::write(&file, "shells = 2\nvms-max = 7\nconnections-max = 9\nlog-format = \"json\"\n")?;
    let path = text(&file);
    let_in(&config(&["check", &path], &[])?)?;
    let shown =
        config(&["show", "--json", "--config", &path, "--shells", "3"], &[("COLDSPARK_VMS_MAX", "8")])?;
    let_in(&shown)?;
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout)?;
    for (key, value, from) in [
        ("shells", "3", "flag".to_owned()),
        ("vms-max", "8", "COLDSPARK_VMS_MAX".to_owned()),
        ("connections-max", "9", format!("{path}:3")),
        ("data-dir", ".", "default".to_owned()),
    ] {
        let found = (shown[key]["value"].as_str(), shown[key]["from"].as_str());
        ensure!(found == (Some(value), Some(&from)), "{key}: {found:?}");
    }

    // The service takes the file, and a flag over it: here the log's format.
    let daemon = Daemon::start_with(&stage, &["--config".into(), path.clone()]).await?;
    let serves = async |daemon: &Daemon| {
        eventually("the service says that it serves", 30, async || Ok(daemon.log()?.contains("serving")))
            .await
    };
    serves(&daemon).await?;
    for line in daemon.log()?.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| format!("not JSON: {line}"))?;
    }
    drop(daemon);
    let over = ["--config", &path, "--log-format", "text"].map(str::to_owned);
    let daemon = Daemon::start_with(&stage, &over).await?;
    serves(&daemon).await?;
    ensure!(
        serde_json::from_str::<serde_json::Value>(daemon.log()?.lines().next().unwrap_or_default()).is_err()
    );
    drop(daemon);

    fs::write(&file, "shells = 2\nshels = 7\n")?;
    refused(&config(&["check", &path], &[])?, &["coldspark.toml, line 2", "did you mean \"shells\""])?;
    fs::write(&file, "listen = \"127.0.0.1:0\"\n")?;
    refused(&config(&["check", &path], &[])?, &["coldspark.toml", "--insecure"])?;
    // Every line of the example, taken as it is.
    fs::write(&file, config(&["example"], &[])?.stdout)?;
    let_in(&config(&["check", &path], &[])?)?;
    Ok(())
}
