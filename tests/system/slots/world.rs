//! A host of a trial's own, and a machine beyond it: two network namespaces with a link between them, so that what a service does to its host's
//! network is done to nobody else's.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::trial::limit;

/// The host's and the other machine's addresses: public, private, and of IPv6. (They are nobody's: these namespaces lead nowhere.)
pub const HOST: &str = "1.2.3.1";
pub const BEYOND: &str = "1.2.3.4";
pub const BEYOND_PRIVATE: &str = "192.168.50.4";
pub const HOST6: &str = "2600:1:2:3::1";
pub const BEYOND6: &str = "2600:1:2:3::4";
/// Where both answer to UDP.
pub const ECHO: u16 = 7;
/// What says no more after so long says nothing. Answers come within a few milliseconds.
const SILENCE: Duration = Duration::from_millis(700);

pub struct World {
    pub host: String,
    pub beyond: String,
    echoes: Arc<AtomicBool>,
}

impl World {
    /// With the services at [`ECHO`].
    pub fn new() -> anyhow::Result<World> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("cst{}-{number}-{what}", std::process::id());
        let world =
            World { host: name("host"), beyond: name("beyond"), echoes: Arc::new(AtomicBool::new(true)) };
        let (host, beyond) = (&world.host, &world.beyond);
        ip(&["netns", "add", host])?;
        ip(&["netns", "add", beyond])?;
        ip(&["-n", host, "link", "set", "lo", "up"])?;
        ip(&["-n", host, "link", "add", "wan0", "type", "veth", "peer", "name", "wan1", "netns", beyond])?;
        for (netns, device, addresses) in [
            (host, "wan0", [HOST, "192.168.50.1", HOST6]),
            (beyond, "wan1", [BEYOND, BEYOND_PRIVATE, BEYOND6]),
        ] {
            for address in addresses {
                match address.contains(':') {
                    true => {
                        ip(&["-n", netns, "addr", "add", &format!("{address}/64"), "dev", device, "nodad"])?
                    }
                    false => ip(&["-n", netns, "addr", "add", &format!("{address}/24"), "dev", device])?,
                };
            }
            ip(&["-n", netns, "link", "set", device, "up"])?;
        }
        // Slots' own addresses are tried from there, too.
        ip(&["-n", beyond, "route", "add", "10.77.0.0/16", "via", HOST])?;
        inside(host, || {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            Ok(fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?)
        })?;
        // Bound to the addresses: from any of its own the host would answer by the one that is nearest to the guest.
        for (netns, address) in [(host, HOST), (host, HOST6), (beyond, "::")] {
            let socket = inside(netns, || Ok(UdpSocket::bind((address, ECHO))?))?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let on = Arc::clone(&world.echoes);
            std::thread::spawn(move || echo(&socket, &on));
        }
        Ok(world)
    }

    /// Tables of nftables on the host.
    pub fn tables(&self) -> anyhow::Result<String> {
        inside(&self.host, || {
            let output = Command::new("nft").args(["list", "tables"]).output()?;
            ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
    }

    /// What tells the service's things from others: of its table.
    fn tag(&self) -> anyhow::Result<Option<String>> {
        let tables = self.tables()?;
        Ok(tables
            .lines()
            .find_map(|line| line.split_once("coldspark_"))
            .map(|(_, tag)| tag.trim().to_owned()))
    }

    /// Names of the namespaces of the service's slots.
    pub fn slots(&self) -> anyhow::Result<BTreeSet<String>> {
        let Some(tag) = self.tag()? else { return Ok(BTreeSet::new()) };
        slots_of(&tag)
    }

    /// Names of the service's interfaces on the host.
    pub fn links(&self) -> anyhow::Result<Vec<String>> {
        let all = ip(&["-n", &self.host, "-o", "link"])?;
        Ok(all.lines().filter(|line| line.contains(": cs")).map(str::to_owned).collect())
    }
}

/// Namespaces of the slots of the service with this tag.
pub fn slots_of(tag: &str) -> anyhow::Result<BTreeSet<String>> {
    let names =
        fs::read_dir("/run/netns")?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(&format!("cs-{tag}-"))).collect())
}

impl Drop for World {
    fn drop(&mut self) {
        self.echoes.store(false, Ordering::Relaxed);
        // Of a daemon that a failed trial has killed.
        let left = self.slots().unwrap_or_default();
        for netns in left.iter().chain([&self.host, &self.beyond]) {
            if let Err(error) = ip(&["netns", "del", netns]) {
                eprintln!("the network namespace {netns} is left behind: {error:#}");
            }
        }
    }
}

/// Says who asked, and what.
fn echo(socket: &UdpSocket, on: &AtomicBool) {
    let mut bytes = [0; 1500];
    while on.load(Ordering::Relaxed) {
        if let Ok((count, from)) = socket.recv_from(&mut bytes) {
            let said =
                format!("{} asked {}", from.ip().to_canonical(), String::from_utf8_lossy(&bytes[..count]));
            let _ = socket.send_to(said.as_bytes(), from);
        }
    }
}

/// Runs `work` in a network namespace, on a thread of its own. What it opens stays there.
pub fn inside<T: Send>(netns: &str, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    let file =
        File::open(format!("/run/netns/{netns}")).with_context(|| format!("network namespace {netns}"))?;
    let enter = || {
        // SAFETY: setns takes a descriptor, which lives through the call, and moves this thread only, which ends below.
        ensure!(
            unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } == 0,
            std::io::Error::last_os_error()
        );
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join().map_err(|_| anyhow::anyhow!("a thread failed"))?)
}

/// Asks by UDP from a namespace; `None`: no answer.
pub fn ask(netns: &str, to: &str, port: u16, words: &str) -> anyhow::Result<Option<String>> {
    let to = SocketAddr::new(to.parse()?, port);
    let any: IpAddr = if to.is_ipv6() { "::".parse()? } else { "0.0.0.0".parse()? };
    let socket = inside(netns, || Ok(UdpSocket::bind((any, 0))?))?;
    socket.set_read_timeout(Some(SILENCE))?;
    let mut bytes = [0; 1500];
    // Twice: the first may be lost on a busy host, while addresses are being found.
    for _ in 0..2 {
        if socket.send_to(words.as_bytes(), to).is_ok()
            && let Ok(count) = socket.recv(&mut bytes)
        {
            return Ok(Some(String::from_utf8_lossy(&bytes[..count]).into_owned()));
        }
    }
    Ok(None)
}

/// Says a line by TCP from a namespace, and hears what comes back to the end.
pub fn call(netns: &str, to: &str, port: u16, words: &str) -> anyhow::Result<String> {
    let to = SocketAddr::new(to.parse()?, port);
    inside(netns, || {
        let mut stream = TcpStream::connect_timeout(&to, limit(3))?;
        stream.set_read_timeout(Some(limit(3)))?;
        stream.write_all(words.as_bytes())?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })
    .with_context(|| format!("{to} from {netns}"))
}

/// Runs iproute2; gives what it says.
pub fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ip").args(arguments).output().context("running `ip` (iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {}`: {}", arguments.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
