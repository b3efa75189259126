//! What the network interfaces of VMs are plugged into: the daemon opens TAPs and hands them to workers.
//!
//! A TAP that is asked for by name is made by the host's administrator, never here: an interface that does not exist is an error, although
//! TUNSETIFF would make one. The daemon keeps no descriptor of it: a TAP is free again when its VM has ended. Those that the service makes itself
//! are in [`super::slots`].
//!
//! A TAP may be in a network namespace of the host, so that clones with the same addresses run side by side. A thread of its own
//! enters the namespace, opens the TAP there and ends: no thread that serves anything else is ever in another namespace.
//!
//! Facts: Linux's `Documentation/networking/tuntap.rst` and `drivers/net/tun.c` (EBUSY: another holds the only queue; EPERM:
//! neither CAP_NET_ADMIN nor the owner set with `ip tuntap add ... user`; EINVAL: not a TAP, or one with other flags).

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::addresses::{self, AddressError, Given};
use super::error::{FleetError, Kind};
use super::slots::access::Access;
use super::slots::error::SlotError;
use super::slots::{Held, Lease, SlotLink, Slots};
use super::tasks::blocking;
pub use crate::worker::protocol::NETWORKS_MAX;
use crate::worker::protocol::{LinkKind, NetworkSpec};

/// Bytes of `struct virtio_net_hdr` with the number of buffers, as workers expect it on a TAP.
const HEADER_BYTES: libc::c_int = 12;
/// Least and most MTU (virtio 1.2 clause 5.1.4.1; a frame of it with tags still has 16 bits of length).
pub const MTU_MIN: u16 = 68;
pub const MTU_MAX: u16 = 65_521;

/// Where `ip netns add` keeps the network namespaces that have names.
pub(super) const NETNS_FOLDER: &str = "/run/netns";
/// Longest name of a namespace: that of a file.
const NETNS_NAME_MAX: usize = 255;

/// Why a network interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{0} network interfaces; a VM has at most {NETWORKS_MAX}")]
    TooMany(usize),
    #[error(
        "{0:?} is no name of a network interface: use 1 to 15 bytes without blanks, control characters, '/', ':' and '%'"
    )]
    Name(String),
    #[error("MTU {0}; give {MTU_MIN} to {MTU_MAX}")]
    Mtu(u32),
    #[error(
        "{0} is no address for a VM: give 6 bytes of a unicast address that is not zero, such as 02:00:00:00:00:01"
    )]
    Mac(String),
    #[error("two interfaces of the VM have the address {0}; give each its own, or leave them out")]
    SameMac(String),
    #[error("{0} is asked for twice; each link is for one interface")]
    Twice(String),
    #[error(
        "a clone's guest has read its MTU already: leave it out, and change it in the guest (FreeBSD: ifconfig vtnet0 mtu ...)"
    )]
    CloneMtu,
    #[error(
        "this clone's guest cannot be told another address: that takes an agent that knows how (`coldspark agent`), identity MANAGED and a link; leave it out, and change it in the guest (FreeBSD: ifconfig vtnet0 ether ...)"
    )]
    CloneMac,
    #[error("{count} clones cannot share a link; clone one at a time, or without links")]
    Shared { count: u32 },
    #[error("{given} links for a snapshot whose guest has {has} network interfaces; give at most as many")]
    TooManyLinks { given: usize, has: usize },
    #[error(
        "this host has no network interface {0:?}; make the TAP first: `ip tuntap add dev {0} mode tap user $USER && ip link set {0} up`"
    )]
    Missing(String),
    #[error("TAP {0} is taken: another VM or program has it open; end that one, or make another TAP")]
    Taken(String),
    #[error(
        "this service may not open TAP {0}; give it to the service's user (`ip tuntap del dev {0} mode tap`, then `ip tuntap add dev {0} mode tap user NAME`), or give the service CAP_NET_ADMIN"
    )]
    Forbidden(String),
    #[error(
        "{0} is no TAP that a VM can use; make one with `ip tuntap add dev {0} mode tap` (not tun, and without multi_queue)"
    )]
    NotATap(String),
    #[error(
        "/dev/net/tun cannot be opened: {0}; load the kernel module tun, and let the service's user open the device"
    )]
    NoTun(io::Error),
    #[error(
        "{0:?} is no name of a network namespace: use 1 to {NETNS_NAME_MAX} bytes without blanks, control characters and '/'"
    )]
    NetnsName(String),
    #[error("this host has no network namespace {0:?}; make it first: `ip netns add {0}`, and its TAP in it")]
    NetnsMissing(String),
    #[error(
        "this service may not enter network namespaces; give it CAP_SYS_ADMIN and CAP_NET_ADMIN, or use TAPs of its own namespace"
    )]
    NetnsForbidden,
    #[error("network namespace {name}: {call}: {source}")]
    Netns { name: String, call: &'static str, source: io::Error },
    #[error("in network namespace {netns}: {source}")]
    Within { netns: String, source: Box<NetworkError> },
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("TAP {name}: {call}: {source}")]
    Tap { name: String, call: &'static str, source: io::Error },
}

impl NetworkError {
    /// Sorts the failure for the API.
    pub fn kind(&self) -> Kind {
        match self {
            Self::TooMany(_)
            | Self::Name(_)
            | Self::Mtu(_)
            | Self::Mac(_)
            | Self::SameMac(_)
            | Self::Twice(_)
            | Self::CloneMtu
            | Self::CloneMac
            | Self::Shared { .. }
            | Self::NetnsName(_)
            | Self::TooManyLinks { .. } => Kind::InvalidArgument,
            Self::Missing(_) | Self::NetnsMissing(_) => Kind::NotFound,
            Self::Within { source, .. } => source.kind(),
            Self::Slot(error) => error.kind(),
            Self::Address(AddressError::CannotBeTold) => Kind::FailedPrecondition,
            Self::Address(_) => Kind::InvalidArgument,
            Self::Taken(_) | Self::NotATap(_) => Kind::FailedPrecondition,
            Self::Forbidden(_) | Self::NetnsForbidden => Kind::PermissionDenied,
            Self::NoTun(source) if source.kind() == io::ErrorKind::PermissionDenied => Kind::PermissionDenied,
            Self::NoTun(source) | Self::Tap { source, .. } | Self::Netns { source, .. } => {
                match source.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Kind::ResourceExhausted,
                    _ => Kind::FailedPrecondition,
                }
            }
        }
    }
}

/// What an interface is to be plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkRequest {
    /// A TAP of the host, by name.
    Tap {
        name: String,
        /// Name of the network namespace that it is in; `None`: the service's own.
        netns: Option<String>,
    },
    /// Nothing: the guest sees an interface whose link is down.
    Down,
    /// A network slot of the service's ([`super::slots`]).
    Slot(Box<SlotLink>),
}

/// An interface that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRequest {
    pub link: LinkRequest,
    /// `None`: derived from the VM's id.
    pub mac: Option<[u8; 6]>,
    /// Told to the guest, if there is one.
    pub mtu: Option<u16>,
    /// IP addresses that a clone's guest is to be given.
    pub given: Given,
}

/// An interface of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmNetwork {
    pub link: LinkRequest,
    /// The address that the first VM of the line was given; a guest may have chosen another since.
    pub mac: [u8; 6],
    pub mtu: Option<u16>,
    /// What a clone's guest was given, and has confirmed.
    #[serde(default)]
    pub given: Given,
}

/// A link as a worker is handed it.
#[derive(Debug)]
pub struct OpenLink {
    pub kind: LinkKind,
    pub fd: Option<OwnedFd>,
}

impl LinkRequest {
    /// For people.
    pub fn text(&self) -> String {
        match self {
            Self::Tap { name, netns: None } => format!("TAP {name}"),
            Self::Tap { name, netns: Some(netns) } => format!("TAP {name} in network namespace {netns}"),
            Self::Down => "no link".to_owned(),
            Self::Slot(link) => match &link.place {
                Some(place) => format!("network slot {} at {}", place.number, place.address4),
                None => "network slot".to_owned(),
            },
        }
    }

    fn check(&self) -> Result<(), NetworkError> {
        match self {
            Self::Tap { name, netns } => {
                check_interface_name(name)?;
                netns.as_deref().map_or(Ok(()), check_netns_name)
            }
            Self::Down => Ok(()),
            Self::Slot(link) => Ok(link.access.check()?),
        }
    }

    /// Opens it, if that is to be done now. Waits for the host's network configuration to be free for a moment.
    fn open(&self) -> Result<OpenLink, NetworkError> {
        let fd = match self {
            Self::Tap { name, netns: None } => open_tap(name)?,
            Self::Tap { name, netns: Some(netns) } => within(netns, || open_tap(name))?,
            Self::Down | Self::Slot(_) => return Ok(OpenLink { kind: LinkKind::Down, fd: None }),
        };
        Ok(OpenLink { kind: LinkKind::Tap, fd: Some(fd) })
    }
}

impl OpenLink {
    /// What the worker is handed.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(|fd| fd.as_fd())
    }
}

/// Opens the links of a VM, all or none. A slot is taken out of the pool, if none is `held` for it already; it is given up when the lease is dropped.
pub async fn open(
    slots: &Arc<Slots>,
    networks: &mut [VmNetwork],
    mut held: Option<Held>,
) -> Result<(Vec<OpenLink>, Option<Lease>), FleetError> {
    let mut opened: Vec<OpenLink> =
        match networks.iter().any(|network| matches!(network.link, LinkRequest::Tap { .. })) {
            false => networks.iter().map(|_| OpenLink { kind: LinkKind::Down, fd: None }).collect(),
            true => {
                let links: Vec<LinkRequest> = networks.iter().map(|network| network.link.clone()).collect();
                blocking(move || links.iter().map(LinkRequest::open).collect::<Result<_, _>>()).await??
            }
        };
    let mut lease = None;
    for (network, opened) in networks.iter_mut().zip(&mut opened) {
        if let LinkRequest::Slot(link) = &mut network.link {
            let Held { link: taken, lease: of_slot, tap } = match held.take() {
                Some(held) => held,
                None => slots.take(&link.access).await?,
            };
            **link = taken;
            *opened = OpenLink { kind: LinkKind::Tap, fd: Some(tap) };
            lease = Some(of_slot);
        }
    }
    Ok((opened, lease))
}

impl VmNetwork {
    /// What the worker is told.
    pub fn spec(&self, link: &OpenLink) -> NetworkSpec {
        NetworkSpec { link: link.kind, mac: self.mac, mtu: self.mtu }
    }
}

/// For a VM whose interfaces are plugged into slots with such an access, or nothing.
pub fn requests(slots: &[Option<Access>]) -> Vec<NetworkRequest> {
    let link = |access: &Option<Access>| match access {
        Some(access) => {
            LinkRequest::Slot(Box::new(SlotLink { access: access.clone(), place: None, six: false }))
        }
        None => LinkRequest::Down,
    };
    let plugged =
        |access| NetworkRequest { link: link(access), mac: None, mtu: None, given: Given::default() };
    slots.iter().map(plugged).collect()
}

/// Checks the interfaces asked for a VM that is to be booted, and fills in what was left to us.
pub fn plan(requests: &[NetworkRequest], vm_id: &str) -> Result<Vec<VmNetwork>, NetworkError> {
    check_links(requests)?;
    if requests.iter().any(|request| !request.given.is_empty()) {
        return Err(AddressError::Boot.into());
    }
    let mut networks: Vec<VmNetwork> = Vec::with_capacity(requests.len());
    for (index, request) in requests.iter().enumerate() {
        let mac = request.mac.unwrap_or_else(|| derived_mac(vm_id, index));
        check_mac(mac)?;
        if networks.iter().any(|other| other.mac == mac) {
            return Err(NetworkError::SameMac(mac_text(&mac)));
        }
        if let Some(mtu) = request.mtu.filter(|mtu| !(MTU_MIN..=MTU_MAX).contains(mtu)) {
            return Err(NetworkError::Mtu(mtu.into()));
        }
        let given = Given::default();
        networks.push(VmNetwork { link: request.link.clone(), mac, mtu: request.mtu, given });
    }
    Ok(networks)
}

/// What the guests of clones can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CanBeTold {
    pub macs: bool,
    pub addresses: bool,
}

/// Checks the links asked for `count` clones whose guests have the interfaces `has`; gives the interfaces of each.
pub fn plan_clones(
    requests: &[NetworkRequest],
    has: &[VmNetwork],
    count: u32,
    can_be_told: CanBeTold,
) -> Result<Vec<VmNetwork>, NetworkError> {
    check_links(requests)?;
    for (index, request) in requests.iter().enumerate() {
        if request.mtu.is_some() {
            return Err(NetworkError::CloneMtu);
        }
        let Some(mac) = request.mac else { continue };
        if matches!(request.link, LinkRequest::Slot(_)) {
            return Err(SlotError::CloneMac.into());
        }
        if !can_be_told.macs || request.link == LinkRequest::Down {
            return Err(NetworkError::CloneMac);
        }
        check_mac(mac)?;
        if requests.iter().take(index).any(|other| other.mac == Some(mac)) {
            return Err(NetworkError::SameMac(mac_text(&mac)));
        }
    }
    addresses::check(requests.iter().map(|request| &request.given))?;
    for request in requests.iter().filter(|request| !request.given.is_empty()) {
        if !matches!(request.link, LinkRequest::Tap { .. }) {
            return Err(AddressError::Link.into());
        }
        if !can_be_told.addresses {
            return Err(AddressError::CannotBeTold.into());
        }
    }
    if requests.len() > has.len() {
        return Err(NetworkError::TooManyLinks { given: requests.len(), has: has.len() });
    }
    if count > 1 && requests.iter().any(|request| matches!(request.link, LinkRequest::Tap { .. })) {
        return Err(NetworkError::Shared { count });
    }
    let publishes = |request: &NetworkRequest| matches!(&request.link, LinkRequest::Slot(link) if !link.access.publish.is_empty());
    if count > 1 && requests.iter().any(publishes) {
        return Err(SlotError::PublishedByMany { count }.into());
    }
    let down = NetworkRequest { link: LinkRequest::Down, mac: None, mtu: None, given: Given::default() };
    let asked = requests.iter().chain(std::iter::repeat(&down));
    let network = |(network, asked): (&VmNetwork, &NetworkRequest)| VmNetwork {
        link: asked.link.clone(),
        mac: asked.mac.unwrap_or(network.mac),
        mtu: network.mtu,
        given: asked.given.clone(),
    };
    Ok(has.iter().zip(asked).map(network).collect())
}

/// Gives each interface of a clone that is plugged into a TAP, and was not given an address by its caller, one of its own: `has` is what
/// the snapshot's guest has. In a slot a guest is alone, and keeps what it has.
pub fn own_addresses(networks: &mut [VmNetwork], has: &[VmNetwork], vm_id: &str) {
    for (index, (network, has)) in networks.iter_mut().zip(has).enumerate() {
        if matches!(network.link, LinkRequest::Tap { .. }) && network.mac == has.mac {
            network.mac = derived_mac(vm_id, index);
        }
    }
}

fn check_mac(mac: [u8; 6]) -> Result<(), NetworkError> {
    match mac[0] & 1 != 0 || mac == [0; 6] {
        true => Err(NetworkError::Mac(mac_text(&mac))),
        false => Ok(()),
    }
}

/// Checks links by themselves.
pub fn check_links(requests: &[NetworkRequest]) -> Result<(), NetworkError> {
    if requests.len() > NETWORKS_MAX {
        return Err(NetworkError::TooMany(requests.len()));
    }
    let slots = requests.iter().filter(|request| matches!(request.link, LinkRequest::Slot(_))).count();
    if slots > 1 {
        return Err(SlotError::Several(slots).into());
    }
    for (index, request) in requests.iter().enumerate() {
        request.link.check()?;
        let before = requests.iter().take(index);
        if request.link != LinkRequest::Down && before.clone().any(|other| other.link == request.link) {
            return Err(NetworkError::Twice(request.link.text()));
        }
    }
    Ok(())
}

/// The kernel's own rules, and no pattern: `tap%d` would make the kernel choose a number.
fn check_interface_name(name: &str) -> Result<(), NetworkError> {
    let good = (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if good { Ok(()) } else { Err(NetworkError::Name(name.to_owned())) }
}

/// A name of a file in [`NETNS_FOLDER`], and no path.
fn check_netns_name(name: &str) -> Result<(), NetworkError> {
    let good = (1..=NETNS_NAME_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if good { Ok(()) } else { Err(NetworkError::NetnsName(name.to_owned())) }
}

/// Runs `work` on a thread of its own that is in the network namespace `netns`, and waits for it. (A TAP belongs to the
/// namespace in which `/dev/net/tun` was opened; its descriptor then works anywhere.)
pub(super) fn within<T: Send>(
    netns: &str,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let failed = |call, source: io::Error| NetworkError::Netns { name: netns.to_owned(), call, source };
    let namespace = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(Path::new(NETNS_FOLDER).join(netns))
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NetworkError::NetnsMissing(netns.to_owned()),
            io::ErrorKind::PermissionDenied => NetworkError::NetnsForbidden,
            _ => failed("open", source),
        })?;
    std::thread::scope(|scope| {
        let enter = || {
            // This moves this thread only, which ends below.
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).map_err(
                |error| match error {
                    Errno::PERM => NetworkError::NetnsForbidden,
                    _ => failed("setns", error.into()),
                },
            )?;
            work().map_err(|source| NetworkError::Within { netns: netns.to_owned(), source: source.into() })
        };
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, enter);
        let thread = thread.map_err(|source| failed("starting a thread", source))?;
        thread.join().unwrap_or_else(|_| Err(failed("thread", io::Error::other("it ended in a panic"))))
    })
}

/// A locally administered address from the random bytes of the VM's id, another for each interface.
fn derived_mac(vm_id: &str, index: usize) -> [u8; 6] {
    let digits: Vec<u8> =
        vm_id.chars().rev().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).take(12).collect();
    let mut mac = [0; 6];
    for (byte, pair) in mac.iter_mut().rev().zip(digits.chunks(2)) {
        *byte = pair.iter().rev().fold(0, |byte, digit| byte << 4 | digit);
    }
    mac[0] = mac[0] & 0xfc | 2;
    mac[5] = mac[5].wrapping_add(index as u8);
    mac
}

/// `02:00:00:00:00:01`.
pub fn mac_text(mac: &[u8; 6]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Reads what [`mac_text`] writes.
pub fn mac_from_text(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| {
            let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        })
        .collect::<Option<_>>()?;
    bytes.try_into().ok()
}

pub(super) fn open_tap(name: &str) -> Result<OwnedFd, NetworkError> {
    let named = CString::new(name).map_err(|_| NetworkError::Name(name.to_owned()))?;
    // SAFETY: a string that ends in zero and lives through the call.
    if unsafe { libc::if_nametoindex(named.as_ptr()) } == 0 {
        return Err(NetworkError::Missing(name.to_owned()));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(NetworkError::NoTun)?;
    // SAFETY: an ifreq of zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name is shorter than the field: a zero stays at its end.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = wanted as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
    let attached = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    if attached < 0 {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::EBUSY) => NetworkError::Taken(name.to_owned()),
            Some(libc::EPERM | libc::EACCES) => NetworkError::Forbidden(name.to_owned()),
            Some(libc::EINVAL) => NetworkError::NotATap(name.to_owned()),
            _ => NetworkError::Tap { name: name.to_owned(), call: "TUNSETIFF", source },
        });
    }
    // SAFETY: TUNGETIFF writes an ifreq, which lives through the call.
    check_call(name, "TUNGETIFF", unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF as _, &mut request)
    })?;
    // SAFETY: TUNGETIFF filled the flags in.
    if libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_PERSIST == 0 {
        // It went away a moment ago, and the kernel made a new one, which goes with the descriptor.
        return Err(NetworkError::Missing(name.to_owned()));
    }
    set_header(name, &file)?;
    Ok(file.into())
}

fn set_header(name: &str, file: &File) -> Result<(), NetworkError> {
    let bytes = HEADER_BYTES;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which lives through the call.
    check_call(name, "TUNSETVNETHDRSZ", unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &bytes)
    })
}

fn check_call(name: &str, call: &'static str, result: libc::c_int) -> Result<(), NetworkError> {
    match result {
        0.. => Ok(()),
        _ => Err(NetworkError::Tap { name: name.to_owned(), call, source: io::Error::last_os_error() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: CanBeTold = CanBeTold { macs: false, addresses: false };

    fn tap(name: &str) -> NetworkRequest {
        NetworkRequest { link: LinkRequest::Tap { name: name.into(), netns: None }, ..down() }
    }

    fn down() -> NetworkRequest {
        NetworkRequest { link: LinkRequest::Down, mac: None, mtu: None, given: Given::default() }
    }

    #[test]
    fn addresses_are_derived_for_each_vm_and_interface() {
        let planned = plan(&[tap("a"), tap("b")], "vm-0123456789ff").unwrap();
        assert_eq!(mac_text(&planned[0].mac), "02:23:45:67:89:ff");
        assert_eq!(mac_text(&planned[1].mac), "02:23:45:67:89:00");
        let other = plan(&[tap("a")], "vm-f123456789fe").unwrap();
        assert_eq!(mac_text(&other[0].mac), "f2:23:45:67:89:fe");
        for mac in planned.iter().chain(&other).map(|network| network.mac) {
            assert_eq!(mac[0] & 3, 2, "locally administered, unicast");
            assert_eq!(mac_from_text(&mac_text(&mac)), Some(mac));
        }
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02:00:00:00:00:+1",
            "zz:00:00:00:00:01",
        ] {
            assert_eq!(mac_from_text(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let id = "vm-0123456789ab";
        for name in ["", ".", "..", "a b", "tap%d", "a/b", "sixteen-bytes-xx", "ä", "a\n"] {
            assert!(matches!(plan(&[tap(name)], id), Err(NetworkError::Name(_))), "{name:?}");
        }
        let inside = |netns: &str| NetworkRequest {
            link: LinkRequest::Tap { name: "t".into(), netns: Some(netns.into()) },
            ..down()
        };
        for netns in ["", ".", "..", "a b", "../x", "ä", &"x".repeat(256)] {
            assert!(matches!(plan(&[inside(netns)], id), Err(NetworkError::NetnsName(_))), "{netns:?}");
        }
        assert!(plan(&[inside("blue"), inside("red"), tap("t")], id).is_ok(), "three TAPs of one name");
        assert!(matches!(plan(&[inside("blue"), inside("blue")], id), Err(NetworkError::Twice(_))));
        let with = |mac, mtu| plan(&[NetworkRequest { mac, mtu, ..tap("t") }], id);
        assert!(matches!(with(Some([1, 0, 0, 0, 0, 0]), None), Err(NetworkError::Mac(_))));
        assert!(matches!(with(Some([0; 6]), None), Err(NetworkError::Mac(_))));
        assert!(matches!(with(None, Some(67)), Err(NetworkError::Mtu(67))));
        assert!(with(Some([4, 0, 0, 0, 0, 1]), Some(68)).is_ok());
        assert!(matches!(plan(&[tap("t"), tap("t")], id), Err(NetworkError::Twice(_))));
        assert!(plan(&[down(), down()], id).is_ok());
        assert!(matches!(plan(&vec![down(); 5], id), Err(NetworkError::TooMany(5))));
        let same = NetworkRequest { mac: Some([2, 0, 0, 0, 0, 1]), ..down() };
        assert!(matches!(plan(&[same.clone(), same], id), Err(NetworkError::SameMac(_))));
    }

    #[test]
    fn clones_get_links_and_keep_the_rest() {
        let has =
            plan(&[NetworkRequest { mtu: Some(1400), ..tap("a") }, tap("b")], "vm-0123456789ab").unwrap();
        let clones = plan_clones(&[tap("c")], &has, 1, NOTHING).unwrap();
        assert_eq!(
            clones[0],
            VmNetwork { link: LinkRequest::Tap { name: "c".into(), netns: None }, ..has[0].clone() }
        );
        assert_eq!(clones[1], VmNetwork { link: LinkRequest::Down, ..has[1].clone() });
        assert_eq!(plan_clones(&[], &has, 64, NOTHING).unwrap().len(), 2);
        assert!(matches!(plan_clones(&[tap("c")], &has, 2, NOTHING), Err(NetworkError::Shared { count: 2 })));
        assert!(plan_clones(&[down(), down()], &has, 2, NOTHING).is_ok());
        assert!(matches!(
            plan_clones(&[tap("c")], &[], 1, NOTHING),
            Err(NetworkError::TooManyLinks { given: 1, has: 0 })
        ));
        let moved = NetworkRequest { mac: Some([2; 6]), ..tap("c") };
        assert!(matches!(plan_clones(&[moved], &has, 1, NOTHING), Err(NetworkError::CloneMac)));
    }

    #[test]
    fn clones_are_given_addresses_when_their_guests_can_be_told() {
        let has = plan(&[tap("a"), tap("b")], "vm-0123456789ab").unwrap();
        let given =
            Given { addresses: vec!["10.0.0.5/24".parse().unwrap()], gateways: vec![[10, 0, 0, 1].into()] };
        let with = |link: NetworkRequest| NetworkRequest { given: given.clone(), ..link };
        let told = CanBeTold { macs: true, addresses: true };
        let clones = plan_clones(&[with(tap("c"))], &has, 1, told).unwrap();
        assert_eq!((&clones[0].given, &clones[1].given), (&given, &Given::default()));
        let refused = |requests: &[NetworkRequest], told| match plan_clones(requests, &has, 1, told) {
            Err(NetworkError::Address(error)) => error,
            other => panic!("{other:?}"),
        };
        let older = CanBeTold { addresses: false, ..told };
        let error = refused(&[with(tap("c"))], older);
        assert_eq!(NetworkError::from(error).kind(), Kind::FailedPrecondition);
        assert_eq!(refused(&[with(down())], told), AddressError::Link);
        let twice = refused(&[with(tap("c")), with(tap("d"))], told);
        assert_eq!(twice, AddressError::Twice([10, 0, 0, 5].into()));
        assert!(matches!(
            plan(&[with(tap("a"))], "vm-0123456789ab"),
            Err(NetworkError::Address(AddressError::Boot))
        ));
    }

    #[test]
    fn a_tap_that_is_not_there_is_named_with_what_to_do() {
        let error = open_tap("cs-none-0").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("ip tuntap add dev cs-none-0 mode tap"), "{error}");
        // There, but of another kind. (What is answered depends on this test's rights and on /dev/net/tun.)
        let error = open_tap("lo").unwrap_err();
        assert_ne!(error.kind(), Kind::NotFound);
    }
}
