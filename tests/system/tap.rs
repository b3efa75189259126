//! TAPs of a trial's own, and the host's side of what travels over them: ping, and a TCP stream that comes back.

pub mod six;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::trial::limit;

/// Addresses here are those of networks of 24 bits.
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// A TAP with an address, up; removed at the end.
pub struct Tap {
    pub name: String,
    pub address: Ipv4Addr,
}

/// Whether TAPs can be made here; the error is the reason.
pub fn available() -> Result<(), String> {
    let name = name_of("p");
    let tap = attach(&name).map_err(|error| format!("no TAP can be made here: {error}"))?;
    drop(tap); // Not persistent: it goes with the descriptor.
    Ok(())
}

/// Removes the TAPs of trials that were killed: two with one network would take each other's packets.
fn remove_left() {
    for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("cs").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
            && let Ok(file) = attach(&name)
        {
            // SAFETY: TUNSETPERSIST takes a number. What cannot be removed stays.
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 0) };
        }
    }
}

impl Tap {
    /// A TAP that answers to `address`, and only to that: what comes in from elsewhere, or asks for other addresses of this
    /// host, is ignored, so that several guests with one address do not disturb each other.
    pub fn new(address: [u8; 4]) -> anyhow::Result<Tap> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static LEFT: Once = Once::new();
        LEFT.call_once(remove_left);
        let name = name_of(&NUMBER.fetch_add(1, Ordering::Relaxed).to_string());
        let file = attach(&name).context("making a TAP")?;
        // SAFETY: TUNSETPERSIST takes a number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 1) })?;
        drop(file);
        let tap = Tap { name, address: address.into() };
        tap.configure().with_context(|| format!("configuring {}", tap.name))?;
        for (setting, value) in [("rp_filter", "1"), ("arp_ignore", "1")] {
            let path = format!("/proc/sys/net/ipv4/conf/{}/{setting}", tap.name);
            fs::write(&path, value).with_context(|| path.clone())?;
        }
        Ok(tap)
    }

    /// The address of the guest at its other end.
    pub fn guest(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.address.octets();
        Ipv4Addr::new(a, b, c, 2)
    }

    /// Opens it as a VM would; as long as the file lives no VM can have it.
    pub fn take(&self) -> io::Result<File> {
        attach(&self.name)
    }

    /// Address and mask, and up.
    fn configure(&self) -> io::Result<()> {
        // SAFETY: a new socket, which nobody else owns.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            check(fd)?;
            OwnedFd::from_raw_fd(fd)
        };
        let set = |call: libc::Ioctl, fill: &dyn Fn(&mut libc::ifreq)| {
            let mut request = request_for(&self.name);
            fill(&mut request);
            // SAFETY: these calls read an ifreq, which lives through the call.
            check(unsafe { libc::ioctl(socket.as_raw_fd(), call, &request) })
        };
        set(libc::SIOCSIFADDR as _, &|request| request.ifr_ifru.ifru_addr = sockaddr(self.address))?;
        set(libc::SIOCSIFNETMASK as _, &|request| request.ifr_ifru.ifru_netmask = sockaddr(NETMASK))?;
        let up = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        set(libc::SIOCSIFFLAGS as _, &|request| request.ifr_ifru.ifru_flags = up)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        match attach(&self.name) {
            // SAFETY: TUNSETPERSIST takes a number.
            Ok(file) => drop(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 0) }),
            Err(error) => eprintln!("{} is left behind: {error}", self.name),
        }
    }
}

fn name_of(what: &str) -> String {
    format!("cs{}-{what}", std::process::id())
}

/// Attaches to a TAP as coldspark does; makes it if there is none.
fn attach(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request_for(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) })?;
    Ok(file)
}

fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: an ifreq of zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = CString::new(name).unwrap_or_default();
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = *from as libc::c_char;
    }
    request
}

fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    let inet = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of 16 bytes, and the former begins with the latter's family.
    unsafe { std::mem::transmute(inet) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends `count` pings, `every` apart, and counts the answers; the last may take their time.
pub fn ping(to: Ipv4Addr, count: u16, every: Duration) -> anyhow::Result<u16> {
    // SAFETY: a new socket, which nobody else owns.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP);
        check(fd).context("a raw socket for ping")?;
        UdpSocket::from_raw_fd(fd)
    };
    let id = (std::process::id() as u16) ^ u32::from(to) as u16;
    // An IPv4 header without options, then ICMP: type, code, checksum, id, number.
    let answered = |packet: &[u8]| {
        let ours = packet.len() >= 28 && packet[20] == 0 && packet[24..26] == id.to_be_bytes();
        ours.then(|| u16::from_be_bytes([packet[26], packet[27]]))
    };
    pings(&socket, SocketAddrV4::new(to, 0).into(), count, every, |number| echo_request(id, number), answered)
}

/// Sends `count` requests, `every` apart, and counts those of which an answer says the number.
fn pings(
    socket: &UdpSocket,
    to: SocketAddr,
    count: u16,
    every: Duration,
    request: impl Fn(u16) -> Vec<u8>,
    answered_by: impl Fn(&[u8]) -> Option<u16>,
) -> anyhow::Result<u16> {
    let mut answered = vec![false; usize::from(count)];
    let begin = Instant::now();
    let patience = limit(3);
    let mut sent = 0u16;
    loop {
        while sent < count && begin.elapsed() >= every * u32::from(sent) {
            socket.send_to(&request(sent), to)?;
            sent += 1;
        }
        let got = answered.iter().filter(|answered| **answered).count() as u16;
        if got == count || begin.elapsed() > every * u32::from(count) + patience {
            return Ok(got);
        }
        socket.set_read_timeout(Some(every.clamp(Duration::from_millis(1), Duration::from_millis(100))))?;
        let mut packet = [0; 1500];
        let bytes = match socket.recv(&mut packet) {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => 0,
            Err(error) => return Err(error.into()),
        };
        if let Some(number) = answered_by(&packet[..bytes])
            && let Some(answered) = answered.get_mut(usize::from(number))
        {
            *answered = true;
        }
    }
}

fn echo_request(id: u16, number: u16) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.extend([0x5a; 56]);
    let words = packet.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[2..4].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
    packet
}

/// A stream of bytes that says at each place which place it is: a block of an odd length, again and again.
fn block() -> Vec<u8> {
    let mut block = vec![0; (1 << 20) + 13];
    blake3::Hasher::new().update(b"a coldspark network trial").finalize_xof().fill(&mut block);
    block
}

/// A TCP connection on which a guest sends back what it is sent, checked byte for byte.
pub struct Echo {
    listener: TcpListener,
    /// Bytes that have come back so far.
    pub returned: Arc<AtomicU64>,
    /// Set it to have no more sent than has been.
    pub enough: Arc<AtomicBool>,
}

impl Echo {
    /// Listens at `address` for the guest.
    pub fn listen(address: impl Into<IpAddr>) -> anyhow::Result<Echo> {
        let listener = TcpListener::bind(SocketAddr::new(address.into(), 0))?;
        Ok(Echo { listener, returned: Arc::default(), enough: Arc::default() })
    }

    pub fn port(&self) -> anyhow::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    /// Waits for the guest and sends it `bytes`, or fewer if it is told `enough`; ends when all have come back, and gives the time that took.
    pub async fn run(self, bytes: u64) -> anyhow::Result<Duration> {
        tokio::task::spawn_blocking(move || self.exchange(bytes)).await?
    }

    fn exchange(self, bytes: u64) -> anyhow::Result<Duration> {
        let stream = self.accept()?;
        stream.set_read_timeout(Some(limit(20)))?;
        stream.set_write_timeout(Some(limit(20)))?;
        let begin = Instant::now();
        let out = stream.try_clone()?;
        let enough = Arc::clone(&self.enough);
        let writer = std::thread::spawn(move || send(out, bytes, &enough));
        let received = receive(stream, &self.returned);
        let sent = writer.join().map_err(|_| anyhow::anyhow!("the sending thread failed"))?;
        let received = received.context("what came back")?;
        let sent = sent.context("sending")?;
        ensure!(received == sent, "{received} of {sent} bytes came back");
        Ok(begin.elapsed())
    }

    /// `accept` with a time limit.
    fn accept(&self) -> anyhow::Result<TcpStream> {
        self.listener.set_nonblocking(true)?;
        let mut entry = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which lives through the call.
        let ready = unsafe { libc::poll(&mut entry, 1, limit(20).as_millis() as libc::c_int) };
        ensure!(ready == 1, "the guest did not connect");
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    }
}

/// Gives how many it has sent.
fn send(mut stream: TcpStream, bytes: u64, enough: &AtomicBool) -> anyhow::Result<u64> {
    let block = block();
    let mut sent = 0;
    while sent < bytes && !enough.load(Ordering::Relaxed) {
        let part = (bytes - sent).min(block.len() as u64) as usize;
        stream.write_all(&block[..part])?;
        sent += part as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

/// Gives how many came back before the end.
fn receive(mut stream: TcpStream, returned: &AtomicU64) -> anyhow::Result<u64> {
    let block = block();
    let mut data = vec![0; 256 << 10];
    let mut at = 0u64;
    loop {
        let got = stream.read(&mut data).with_context(|| format!("after {at} bytes"))?;
        if got == 0 {
            break;
        }
        let mut rest = &data[..got];
        while !rest.is_empty() {
            let place = (at % block.len() as u64) as usize;
            let part = rest.len().min(block.len() - place);
            ensure!(rest[..part] == block[place..place + part], "other bytes came back around byte {at}");
            at += part as u64;
            rest = &rest[part..];
        }
        returned.store(at, Ordering::Relaxed);
    }
    Ok(at)
}
