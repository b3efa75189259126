//! Why a network slot cannot be had, sorted for the API and named for programs.

use super::access::{ALLOW_MAX, PUBLISH_MAX, Transport};
use crate::fleet::error::Kind;

#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error(
        "this service makes no networks; serve with --networks N, or give the VM a TAP (`--net tap=NAME`)"
    )]
    Off,
    #[error(
        "no network slot is ready, and none became so within {waited_ms} ms{problem}; ask again, or serve with a higher --networks"
    )]
    NoneReady { waited_ms: u128, problem: String },
    #[error(
        "no network slot is to spare for what is made ahead of requests: {ready} of {size} are ready{problem}; serve with a higher --networks or a wider --slot-network, or let pools keep fewer ready"
    )]
    NoneToSpare { ready: usize, size: usize, problem: String },
    #[error(
        "a published port is one VM's; give it when one is taken out of the pool (`coldspark pool take --publish`)"
    )]
    PublishedByPool,
    #[error(
        "the VMs of the pool {0:?} have no network slot, to which a port could lead; make it with --net auto"
    )]
    PoolWithoutSlot(String),
    #[error(
        "{0} interfaces with a network slot; a VM has one at most, since all slots have the same addresses"
    )]
    Several(usize),
    #[error("{0} entries in the list of what is allowed; give at most {ALLOW_MAX}")]
    ManyAllowed(usize),
    #[error("{0} published ports; give at most {PUBLISH_MAX}")]
    ManyPublished(usize),
    #[error("{0} has bits beyond its prefix; write {1}")]
    HostBits(String, String),
    #[error(
        "{0} cannot be allowed: give addresses of other machines, no loopback, multicast or unspecified ones"
    )]
    NoDestination(String),
    #[error("port 0 is none; give 1 to 65535")]
    PortZero,
    #[error(
        "port {port}/{transport} is published twice; each port of the host leads to one port of one guest"
    )]
    PublishedTwice { port: u16, transport: Transport },
    #[error("a clone in a network slot keeps the address that its snapshot has; leave it out")]
    CloneMac,
    #[error("{count} clones cannot have one published port; clone one at a time, or publish none")]
    PublishedByMany { count: u32 },
    #[error(
        "port {port}/{transport} of this host is published for {of} already; choose another, or end that VM (`coldspark vm ls --json` shows slots)"
    )]
    PortPublished { port: u16, transport: Transport, of: String },
    #[error(
        "port {port}/{transport} of this host is taken by a program; choose another, or end that program"
    )]
    PortTaken { port: u16, transport: Transport },
    #[error("port {port}/{transport} of this host cannot be taken: {reason}")]
    Port { port: u16, transport: Transport, reason: String },
    #[error("more than {0} ports are published on this host; end some VMs")]
    PortsFull(usize),
    #[error(
        "this service may not make networks; run it as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN, or without --networks"
    )]
    NoRights,
    #[error(
        "{network} is reached by {interface} already, and {flag} {slots} would hide it; choose another {flag}"
    )]
    Route { network: String, interface: String, slots: String, flag: &'static str },
    #[error("`{program}` cannot be run: {reason}; install the Debian packages iproute2 and nftables")]
    NoTool { program: &'static str, reason: String },
    #[error("`{program}` failed: {said}")]
    Tool { program: &'static str, said: String },
    #[error("{path} cannot be set: {reason}")]
    Setting { path: String, reason: String },
}

impl SlotError {
    /// Sorts the failure for the API.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Off | Self::PoolWithoutSlot(_) => Kind::FailedPrecondition,
            Self::NoneReady { .. } | Self::NoneToSpare { .. } | Self::PortsFull(_) => Kind::ResourceExhausted,
            Self::PortPublished { .. } | Self::PortTaken { .. } => Kind::AlreadyExists,
            Self::NoRights => Kind::PermissionDenied,
            Self::Port { .. } | Self::Route { .. } => Kind::FailedPrecondition,
            Self::Several(_)
            | Self::ManyAllowed(_)
            | Self::ManyPublished(_)
            | Self::HostBits(..)
            | Self::NoDestination(_)
            | Self::PortZero
            | Self::CloneMac
            | Self::PublishedTwice { .. }
            | Self::PublishedByPool
            | Self::PublishedByMany { .. } => Kind::InvalidArgument,
            Self::NoTool { .. } | Self::Tool { .. } | Self::Setting { .. } => Kind::Internal,
        }
    }

    /// Its name for programs (see [`crate::fleet::reason`]).
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Off => "NO_NETWORK_SLOTS",
            Self::NoneReady { .. } | Self::NoneToSpare { .. } => "NETWORK_SLOTS_EXHAUSTED",
            Self::PortPublished { .. } | Self::PortTaken { .. } | Self::Port { .. } => "PORT_TAKEN",
            Self::PortsFull(_) => "LIMIT_REACHED",
            _ => "NETWORK",
        }
    }

    /// Whether the same request may succeed a moment later.
    pub fn passes(&self) -> bool {
        matches!(self, Self::NoneReady { .. } | Self::NoneToSpare { .. })
    }
}
