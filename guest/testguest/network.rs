//! A host on a network, as small as can be: with the addresses that the settings `coldspark.ip` and `coldspark.ip6` give it, it answers ARP,
//! neighbour solicitations and pings; sends what UDP brings back with its name before it, on every port; does the same on every port of
//! TCP, and hangs up; and asks one UDP question at a time by itself, through the gateway, which has the first address of its network.
//!
//! An IDENTITY may give it other addresses, and a gateway.
//!
//! TCP is answered from what each segment says, without a memory: enough for a caller who sends one short line.
//!
//! Facts: RFC 826 (ARP), 791, 792, 768, 9293 (IPv4, ICMP, UDP, TCP), 8200, 4443, 4861 (IPv6, ICMPv6, neighbours).

use core::net::IpAddr;

use crate::fail;
use crate::gate::{self, ticks};
use crate::given::Given;
use crate::interrupts;
use crate::memory;
use crate::port::Port;
use crate::virtio::{FRAME_BYTES, Failure, Net};
use crate::wire::{Address, Addresses};

const ETHERNET: usize = 14;
const TYPE_4: [u8; 2] = [0x08, 0x00];
const TYPE_6: [u8; 2] = [0x86, 0xdd];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
/// Longest question, and longest name and answer.
const QUESTION_BYTES: usize = 256;
const TEXT_BYTES_MAX: usize = 1024;
/// Port that questions come from.
const OUR_PORT: u16 = 40_000;
/// How often a question, or one for the gateway, is sent.
const TRIES: u32 = 6;
const FIRST_SEQUENCE: u32 = 1000;

type Mac = [u8; 6];
type Frame = [u8; FRAME_BYTES];

static mut FRAMES: [Frame; 2] = [[0; FRAME_BYTES]; 2];

pub(crate) struct Network {
    device: Net,
    ip4: [u8; 4],
    ip6: [u8; 16],
    /// Bits of their networks, where an IDENTITY gave them, and the gateways that it gave.
    bits: [Option<u8>; 2],
    routers: [Option<[u8; 16]>; 2],
    arrived: &'static mut Frame,
    out: &'static mut Frame,
    /// The gateway's, as far as it is known, for IPv4 and IPv6.
    gateways: [Option<Mac>; 2],
    question: Option<Question>,
}

struct Question {
    to: Ip,
    port: u16,
    bytes: [u8; QUESTION_BYTES],
    length: usize,
    /// When something was last sent for it; 0: nothing was.
    sent: u64,
    tries: u32,
    answered: bool,
}

/// An address of either kind: 4 bytes, or 16.
#[derive(Clone, Copy)]
struct Ip {
    bytes: [u8; 16],
    six: bool,
}

impl Question {
    /// It is to be sent again.
    fn is_open(&self) -> bool {
        !self.answered && self.tries < TRIES
    }
}

impl Ip {
    fn of(bytes: &[u8]) -> Ip {
        let mut ip = Ip { bytes: [0; 16], six: bytes.len() == 16 };
        ip.bytes[..bytes.len()].copy_from_slice(bytes);
        ip
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..if self.six { 16 } else { 4 }]
    }
}

/// A segment that came.
struct Segment<'a> {
    mac: Mac,
    from: Ip,
    protocol: u8,
    bytes: &'a [u8],
}

impl Network {
    /// The host that the settings ask for, on this device; `None`: they ask for none.
    pub(crate) fn start(given: &Given, device: Option<Net>) -> Option<Network> {
        let address = |name| memory::text(given.value(name)?).parse::<IpAddr>().ok();
        let (ip4, ip6) = match (address("coldspark.ip")?, address("coldspark.ip6")) {
            (IpAddr::V4(ip4), None) => (ip4.octets(), [0; 16]),
            (IpAddr::V4(ip4), Some(IpAddr::V6(ip6))) => (ip4.octets(), ip6.octets()),
            _ => fail(format_args!("coldspark.ip and coldspark.ip6 are no addresses of a host")),
        };
        // SAFETY: called once, so these are the only references.
        let [arrived, out] = unsafe { &mut *(&raw mut FRAMES) };
        Some(Network { device: device?, ip4, ip6, bits: [None; 2], routers: [None; 2], arrived, out, gateways: [None; 2], question: None })
    }

    pub(crate) fn set_mac(&mut self, mac: Mac) {
        self.device.set_mac(mac);
    }

    /// Takes these addresses, at most one of each kind, instead of its own, and gateways. False: that is too much for it.
    pub(crate) fn set_addresses(&mut self, told: Addresses) -> bool {
        let of = |six, gateway| told.filter(move |address| address.six == six && address.gateway == gateway);
        let kinds = [(false, false), (true, false), (false, true), (true, true)];
        if told.into_iter().any(|address| address.interface != 0)
            || kinds.into_iter().any(|(six, gateway)| of(six, gateway).count() > 1)
        {
            return false;
        }
        (self.ip4, self.ip6, self.bits, self.routers) = ([0; 4], [0; 16], [None; 2], [None; 2]);
        self.gateways = [None; 2];
        for address in told {
            let which = usize::from(address.six);
            match (address.gateway, address.six) {
                (true, _) => self.routers[which] = Some(address.bytes),
                (false, true) => self.ip6 = address.bytes,
                (false, false) => self.ip4.copy_from_slice(&address.bytes[..4]),
            }
            if !address.gateway {
                self.bits[which] = Some(address.bits);
            }
        }
        true
    }

    /// What [`Self::set_addresses`] has set, as it is used.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = Address> {
        let mut ip4 = [0; 16];
        ip4[..4].copy_from_slice(&self.ip4);
        let own = [(false, ip4), (true, self.ip6)].map(|(six, bytes)| {
            Some(Address { interface: 0, six, bits: self.bits[usize::from(six)]?, gateway: false, bytes })
        });
        let routers = [(false, 32), (true, 128)].map(|(six, bits)| {
            Some(Address { interface: 0, six, bits, gateway: true, bytes: self.routers[usize::from(six)]? })
        });
        own.into_iter().chain(routers).flatten()
    }

    /// Asks this of a port, and nothing else any more; the answer comes, or it does not. False: there is no room for so long a question.
    pub(crate) fn ask(&mut self, to: IpAddr, port: u16, question: &[u8]) -> bool {
        if question.len() > QUESTION_BYTES {
            return false;
        }
        let to = match to {
            IpAddr::V4(to) => Ip::of(&to.octets()),
            IpAddr::V6(to) => Ip::of(&to.octets()),
        };
        let mut bytes = [0; QUESTION_BYTES];
        bytes[..question.len()].copy_from_slice(question);
        self.question =
            Some(Question { to, port, bytes, length: question.len(), sent: 0, tries: 0, answered: false });
        true
    }

    /// The answer, as far as it fits.
    pub(crate) fn answer(&self) -> Option<&[u8]> {
        let question = self.question.as_ref().filter(|question| question.answered)?;
        Some(&question.bytes[..question.length])
    }

    /// There is no question any more.
    pub(crate) fn forget(&mut self) {
        self.question = None;
    }

    /// What there is to do. False: nothing.
    pub(crate) fn step(&mut self, name: &[u8], second: u64) -> bool {
        let length = match self.device.receive(self.arrived) {
            Ok(Some(length)) => length,
            Ok(None) => return self.go_on_asking(second),
            Err(why) => broken(why),
        };
        let arrived = *self.arrived;
        // `None`: not for this host, or too short for what it says it is.
        let _ = self.hear(&arrived[..length], name);
        true
    }

    /// Halts until a frame comes, or the host says something, or it is time to ask again.
    pub(crate) fn halt(&mut self, console: &mut Port) {
        let asks = self.question.as_ref().is_some_and(Question::is_open);
        if asks {
            interrupts::arm_timer();
        }
        if !console.is_due() && !self.device.is_due() {
            gate::halt();
        }
        console.woken();
        self.device.woken();
        if asks {
            interrupts::disarm_timer();
            gate::take_timer_note(0);
        }
    }

    fn go_on_asking(&mut self, second: u64) -> bool {
        let now = ticks();
        let Some(question) = self.question.as_mut().filter(|question| question.is_open()) else { return false };
        if question.sent != 0 && now.wrapping_sub(question.sent) < second {
            return false;
        }
        question.sent = now.max(1);
        question.tries += 1;
        let (to, port, bytes, length) = (question.to, question.port, question.bytes, question.length);
        match self.gateways[usize::from(to.six)] {
            Some(mac) => {
                let at = self.begin(mac, &to, UDP);
                self.out[at..at + 2].copy_from_slice(&OUR_PORT.to_be_bytes());
                self.out[at + 2..at + 4].copy_from_slice(&port.to_be_bytes());
                self.out[at + 4..at + 6].copy_from_slice(&((8 + length) as u16).to_be_bytes());
                self.out[at + 6..at + 8].fill(0);
                self.out[at + 8..at + 8 + length].copy_from_slice(&bytes[..length]);
                self.finish(&to, UDP, at, 8 + length, 6);
            }
            None if to.six => {
                let gateway = self.gateway6();
                let mut group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0];
                group[13..].copy_from_slice(&gateway[13..]);
                let mac = [0x33, 0x33, 0xff, gateway[13], gateway[14], gateway[15]];
                self.neighbour(mac, &Ip::of(&group), SOLICITATION, &gateway);
            }
            None => self.arp(1, [0xff; 6], self.gateway4()),
        }
        true
    }

    fn gateway4(&self) -> [u8; 4] {
        if let Some([a, b, c, d, ..]) = self.routers[0] {
            return [a, b, c, d];
        }
        let [a, b, c, _] = self.ip4;
        [a, b, c, 1]
    }

    fn gateway6(&self) -> [u8; 16] {
        if let Some(router) = self.routers[1] {
            return router;
        }
        let mut gateway = self.ip6;
        gateway[15] = 1;
        gateway
    }

    fn hear(&mut self, frame: &[u8], name: &[u8]) -> Option<()> {
        let mac: Mac = frame.get(6..12)?.try_into().ok()?;
        let packet = frame.get(ETHERNET..)?;
        match <[u8; 2]>::try_from(frame.get(12..14)?).ok()? {
            TYPE_ARP => {
                // Ethernet and IPv4, then: what, sender's MAC and address, target's MAC and address.
                let sender: [u8; 4] = packet.get(14..18)?.try_into().ok()?;
                if packet.get(24..28)? != self.ip4 {
                    return None;
                }
                if sender == self.gateway4() {
                    self.know(0, mac);
                }
                if packet.get(6..8)? == [0, 1] {
                    self.arp(2, mac, sender);
                }
            }
            TYPE_4 => {
                let header = usize::from(packet.first()? & 15) * 4;
                let end = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                // Fragments are nothing for it.
                let whole = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x3fff == 0;
                if packet.get(16..20)? == self.ip4 && whole {
                    let (from, protocol) = (Ip::of(packet.get(12..16)?), *packet.get(9)?);
                    self.segment(&Segment { mac, from, protocol, bytes: packet.get(header..end)? }, name)?;
                }
            }
            TYPE_6 => {
                let end = 40 + usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
                let (from, protocol) = (Ip::of(packet.get(8..24)?), *packet.get(6)?);
                let bytes = packet.get(40..end)?;
                let to = packet.get(24..40)?;
                if to == self.ip6 || protocol == ICMP6 && *to.first()? == 0xff {
                    self.segment(&Segment { mac, from, protocol, bytes }, name)?;
                }
            }
            _ => {}
        }
        Some(())
    }

    fn know(&mut self, which: usize, mac: Mac) {
        self.gateways[which] = Some(mac);
        if let Some(question) = &mut self.question {
            // It is sent at once.
            question.sent = 0;
        }
    }

    fn segment(&mut self, segment: &Segment, name: &[u8]) -> Option<()> {
        let (from, bytes) = (&segment.from, segment.bytes);
        match (segment.protocol, *bytes.first()?) {
            (ICMP, 8) | (ICMP6, 128) => {
                let at = self.begin(segment.mac, from, segment.protocol);
                self.out.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
                self.out[at] = if from.six { 129 } else { 0 };
                self.out.get_mut(at + 2..at + 4)?.fill(0);
                self.finish(from, segment.protocol, at, bytes.len(), 2);
            }
            (ICMP6, SOLICITATION) if bytes.get(8..24)? == self.ip6 => {
                let target = self.ip6;
                self.neighbour(segment.mac, from, ADVERTISEMENT, &target);
            }
            (ICMP6, ADVERTISEMENT) if bytes.get(8..24)? == self.gateway6() => self.know(1, segment.mac),
            (UDP, _) => self.datagram(segment, name)?,
            (TCP, _) => self.line(segment, name)?,
            _ => {}
        }
        Some(())
    }

    fn datagram(&mut self, segment: &Segment, name: &[u8]) -> Option<()> {
        let (ports, text) = (segment.bytes.get(..4)?, segment.bytes.get(8..)?);
        if ports[2..] == OUR_PORT.to_be_bytes() {
            let question = self.question.as_mut()?;
            let from = segment.from.as_slice() == question.to.as_slice();
            if from && ports[..2] == question.port.to_be_bytes() && !question.answered {
                question.length = text.len().min(QUESTION_BYTES);
                question.bytes[..question.length].copy_from_slice(&text[..question.length]);
                question.answered = true;
            }
            return Some(());
        }
        let at = self.begin(segment.mac, &segment.from, UDP);
        let count = self.say(at + 8, name, text);
        self.out[at..at + 2].copy_from_slice(&ports[2..]);
        self.out[at + 2..at + 4].copy_from_slice(&ports[..2]);
        self.out[at + 4..at + 6].copy_from_slice(&((8 + count) as u16).to_be_bytes());
        self.out[at + 6..at + 8].fill(0);
        self.finish(&segment.from, UDP, at, 8 + count, 6);
        Some(())
    }

    /// Every connection is accepted; what comes on it goes back behind the name, with the end.
    fn line(&mut self, segment: &Segment, name: &[u8]) -> Option<()> {
        let bytes = segment.bytes;
        let number = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (sequence, acknowledged) = (number(4)?, number(8)?);
        let (header, flags) = (usize::from(bytes.get(12)? >> 4) * 4, *bytes.get(13)?);
        let text = bytes.get(header..)?;
        if flags & RST != 0 {
            return Some(());
        }
        let (ours, next, answer, says) = match flags & (SYN | FIN) {
            SYN => (FIRST_SEQUENCE, sequence.wrapping_add(1), SYN | ACK, false),
            fin if !text.is_empty() || fin != 0 => {
                let next = sequence.wrapping_add(text.len() as u32).wrapping_add(u32::from(fin != 0));
                // What follows our end is acknowledged, and no more is said.
                let says = !text.is_empty() && acknowledged == FIRST_SEQUENCE.wrapping_add(1);
                (acknowledged, next, if says { ACK | FIN } else { ACK }, says)
            }
            _ => return Some(()),
        };
        let at = self.begin(segment.mac, &segment.from, TCP);
        let count = if says { self.say(at + 20, name, text) } else { 0 };
        let out = &mut self.out[at..at + 20];
        out[..2].copy_from_slice(&bytes[2..4]);
        out[2..4].copy_from_slice(&bytes[..2]);
        out[4..8].copy_from_slice(&ours.to_be_bytes());
        out[8..12].copy_from_slice(&next.to_be_bytes());
        // No options; a window of one line.
        out[12..20].copy_from_slice(&[5 << 4, answer, 4, 0, 0, 0, 0, 0]);
        self.finish(&segment.from, TCP, at, 20 + count, 16);
        Some(())
    }

    /// Name, blank, text; gives how much that is.
    fn say(&mut self, at: usize, name: &[u8], text: &[u8]) -> usize {
        let text = &text[..text.len().min(TEXT_BYTES_MAX)];
        let out = &mut self.out[at..at + name.len() + 1 + text.len()];
        out[..name.len()].copy_from_slice(name);
        out[name.len()] = b' ';
        out[name.len() + 1..].copy_from_slice(text);
        out.len()
    }

    fn arp(&mut self, what: u8, mac: Mac, to: [u8; 4]) {
        let (ours, ip4) = (self.device.mac(), self.ip4);
        let mut at = self.ethernet(mac, TYPE_ARP);
        for part in [&[0, 1, 8, 0, 6, 4, 0, what][..], &ours, &ip4, &mac, &to] {
            self.out[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.send(at);
    }

    /// A neighbour's solicitation or advertisement, with our address of the link.
    fn neighbour(&mut self, mac: Mac, to: &Ip, kind: u8, target: &[u8; 16]) {
        let ours = self.device.mac();
        let at = self.begin(mac, to, ICMP6);
        // Solicited, and it overrides.
        let flags = if kind == ADVERTISEMENT { 0x60 } else { 0 };
        let option = if kind == ADVERTISEMENT { 2 } else { 1 };
        self.out[at..at + 8].copy_from_slice(&[kind, 0, 0, 0, flags, 0, 0, 0]);
        self.out[at + 8..at + 24].copy_from_slice(target);
        self.out[at + 24..at + 26].copy_from_slice(&[option, 1]);
        self.out[at + 26..at + 32].copy_from_slice(&ours);
        self.finish(to, ICMP6, at, 32, 2);
    }

    fn ethernet(&mut self, to: Mac, kind: [u8; 2]) -> usize {
        self.out[..6].copy_from_slice(&to);
        self.out[6..12].copy_from_slice(&self.device.mac());
        self.out[12..14].copy_from_slice(&kind);
        ETHERNET
    }

    /// Headers up to the segment, without what [`Self::finish`] knows; gives where the segment begins.
    fn begin(&mut self, mac: Mac, to: &Ip, protocol: u8) -> usize {
        if to.six {
            let at = self.ethernet(mac, TYPE_6);
            let header = &mut self.out[at..at + 40];
            // Neighbours are believed only with the most hops.
            header[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, protocol, 255]);
            header[8..24].copy_from_slice(&self.ip6);
            header[24..].copy_from_slice(to.as_slice());
            return at + 40;
        }
        let at = self.ethernet(mac, TYPE_4);
        let header = &mut self.out[at..at + 20];
        header[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
        header[12..16].copy_from_slice(&self.ip4);
        header[16..].copy_from_slice(to.as_slice());
        at + 20
    }

    /// Lengths and checksums of a segment of `count` bytes at `at`, whose own checksum is `check` bytes into it; and it goes.
    fn finish(&mut self, to: &Ip, protocol: u8, at: usize, count: usize, check: usize) {
        let mut sum = sum_of(&self.out[at..at + count]);
        if protocol != ICMP {
            sum += sum_of(&self.out[at - 2 * to.as_slice().len()..at]);
            sum += u64::from(protocol) + count as u64;
        }
        let value = folded(sum).to_be_bytes();
        self.out[at + check..at + check + 2].copy_from_slice(&value);
        if to.six {
            self.out[at - 36..at - 34].copy_from_slice(&(count as u16).to_be_bytes());
        } else {
            self.out[at - 18..at - 16].copy_from_slice(&((20 + count) as u16).to_be_bytes());
            let value = folded(sum_of(&self.out[at - 20..at])).to_be_bytes();
            self.out[at - 10..at - 8].copy_from_slice(&value);
        }
        self.send(at + count);
    }

    fn send(&mut self, count: usize) {
        if let Err(why) = self.device.send(&self.out[..count]) {
            broken(why);
        }
    }
}

fn broken(why: Failure) -> ! {
    fail(format_args!("virtio-net: {why:?}"))
}

/// The sum of 16-bit words, the last filled up with zero (RFC 1071).
fn sum_of(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

fn folded(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // UDP writes all ones for none.
    match !(sum as u16) {
        0 => 0xffff,
        value => value,
    }
}
