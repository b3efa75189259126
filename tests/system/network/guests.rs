//! The two guests of the network trials, and how each is told to use its interface.

use std::net::Ipv4Addr;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::BootProtocol;

use super::PINGS;
use crate::client::Client;
use crate::console::Console;
use crate::freebsd::Kernel;
use crate::tap::Echo;
use crate::{freebsd, host, linux};

/// Linux's setting for the least number of MTUs in a segment that the interface cuts, and its largest sensible value.
const MIN_SEGMENTS: (&str, &str) = ("/proc/sys/net/ipv4/tcp_min_tso_segs", "44");

/// A real guest with a network interface. (FreeBSD's kernel says on the console what happens to its interfaces, so its
/// answers may have other lines around them.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Its shell has busybox's tools.
    Linux,
    /// Its init has the commands `ifup`, `ifdel`, `ifstate`, `icmp`, `echo` and `reap` (docs/testing.md).
    FreeBsd(Kernel),
}

impl Guest {
    /// Imports its image; gives the image's name.
    pub async fn import(self, client: &mut Client) -> anyhow::Result<String> {
        match self {
            Self::Linux => linux::import(client, BootProtocol::Linux).await?,
            Self::FreeBsd(kernel) => freebsd::import(client, kernel, 2).await?,
        }
        Ok(if self == Self::Linux { "linux" } else { "freebsd" }.to_owned())
    }

    /// Waits until it has booted and takes commands.
    pub async fn wait_ready(self, console: &mut Console) -> anyhow::Result<()> {
        let (ready, prompt) = match self {
            Self::Linux => ("LINUX-READY ", linux::PROMPT),
            Self::FreeBsd(_) => (freebsd::READY, freebsd::PROMPT),
        };
        console.expect(ready).await?;
        console.expect(prompt).await?;
        Ok(())
    }

    async fn ask(self, console: &mut Console, command: &str) -> anyhow::Result<String> {
        match self {
            Self::Linux => linux::shell(console, command).await,
            Self::FreeBsd(_) => freebsd::ask(console, command).await,
        }
    }

    /// Gives the interface `address` with 24 bits of network, instead of `before`.
    pub async fn address(
        self,
        console: &mut Console,
        address: Ipv4Addr,
        before: Option<Ipv4Addr>,
    ) -> anyhow::Result<()> {
        if host::in_rig() {
            // The rig's processors are so slow that Linux takes the link for one of 100 kB/s and makes small segments, which
            // keep it as slow. So whoever is Linux is told to make large ones.
            std::fs::write(MIN_SEGMENTS.0, MIN_SEGMENTS.1)?;
        }
        match self {
            Self::Linux => {
                let command = format!(
                    "ip addr flush dev eth0; ip link set eth0 up; ip addr add {address}/24 dev eth0 && echo good"
                );
                let said = self.ask(console, &command).await?;
                ensure!(said == "good", "no address: {said}");
                if host::in_rig() {
                    self.ask(console, &format!("echo {} >{}", MIN_SEGMENTS.1, MIN_SEGMENTS.0)).await?;
                }
            }
            Self::FreeBsd(_) => {
                if let Some(before) = before {
                    let said = self.ask(console, &format!("ifdel vtnet0 {before}")).await?;
                    ensure!(said.contains("ifdel=0"), "the old address stays: {said}");
                }
                let said = self.ask(console, &format!("ifup vtnet0 {address}/24")).await?;
                ensure!(said.contains("ifup=0"), "no address: {said}");
            }
        }
        Ok(())
    }

    /// Whether its driver says that the link is up.
    pub async fn link_up(self, console: &mut Console) -> anyhow::Result<bool> {
        Ok(match self {
            Self::Linux => self.ask(console, "cat /sys/class/net/eth0/carrier").await? == "1",
            Self::FreeBsd(_) => self.ask(console, "ifstate vtnet0").await?.contains("link=up"),
        })
    }

    /// Pings from it; gives how many were answered.
    pub async fn pings(self, console: &mut Console, to: Ipv4Addr) -> anyhow::Result<u16> {
        let (command, before) = match self {
            Self::Linux => {
                (format!("ping -q -c {PINGS} -i 0.05 -W 10 {to} | grep received"), "transmitted, ")
            }
            Self::FreeBsd(_) => (format!("icmp {to} {PINGS}"), "got="),
        };
        let said = self.ask(console, &command).await?;
        said.split_once(before)
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("no count of answers in {said:?}"))
    }

    /// Has it send back what it gets from `echo`, in the background.
    pub async fn start_echo(self, console: &mut Console, echo: &Echo, to: Ipv4Addr) -> anyhow::Result<()> {
        let port = echo.port()?;
        let (command, good) = match self {
            Self::Linux => (format!("nc {to} {port} -e cat & echo started"), "started"),
            Self::FreeBsd(_) => (format!("echo {to} {port}"), "echo pid="),
        };
        let said = self.ask(console, &command).await?;
        ensure!(said.contains(good), "no connection: {said}");
        Ok(())
    }

    /// Whether one that was started is still at it.
    pub async fn echoes(self, console: &mut Console) -> anyhow::Result<bool> {
        Ok(match self {
            Self::Linux => self.ask(console, "pidof cat >/dev/null && echo under way").await? == "under way",
            Self::FreeBsd(_) => self.ask(console, "reap").await?.contains("reap=0 "),
        })
    }

    /// Has it boot again.
    pub async fn reboot(self, console: &mut Console) -> anyhow::Result<()> {
        console.type_line(if self == Self::Linux { "reboot -f" } else { "reboot" }).await
    }
}
