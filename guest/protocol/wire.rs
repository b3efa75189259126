//! The agent protocol's wire format, compiled into the host program and into every guest program.
//!
//! `no_std`, no allocation. All integers little endian. A frame is a [`HEADER_BYTES`] header and `length` bytes of
//! payload. Host to guest: requests. Guest to host: [`KIND_HELLO`] when it is ready to serve, and one reply
//! (`kind | REPLY`, same `id`) for each request, in order. Frames are a byte stream over a virtio-console port: a
//! frame may be cut anywhere between buffers.
//!
//! A reply with a `status` other than [`STATUS_OK`] carries a sentence (UTF-8) as its payload.
//!
//! Streams. EXEC, FILE_PUT and FILE_GET open one each; its handle is the id of the request that opened it. What follows
//! carries that id, in both directions, and is not replied to: [`KIND_STREAM_DATA`], [`KIND_STREAM_WINDOW`],
//! [`KIND_SIGNAL`] and, the guest's last word on it, [`KIND_END`]. Nobody sends more data than the other side has granted:
//! a pipe that nobody reads costs the other side's window and holds nothing else up. Frames for a stream that is not open
//! are ignored: its end and the last words to it may cross.
//!
//! A stream belongs to the conversation that opened it, named by a random `session`. IDENTITY, and an opening by another
//! session, kill what is open, without a word about it: those who read and wrote it are on another machine, so
//! nobody would ever read on, and a command that went on in every clone would do there what one caller asked for once.
//! What is to live in clones must leave the process group that EXEC gave it (`daemon(8)`).
//!
//! A snapshot may be taken while a request is under way; the clone then answers a request that its own host never
//! sent. A host ignores replies with an id it does not know. It must not freeze a guest in the middle of sending a
//! frame *to* it: the clone would take its first new bytes for the rest of the old frame. Nor may the guest be in the middle
//! of one to the host: while streams are open the host first says HUSH, sends nothing further, and waits for the reply.

#![allow(dead_code)] // Each side uses its half.

/// "CSA1" read as a little-endian word.
pub const MAGIC: u32 = 0x3141_5343;
/// Version that [`KIND_HELLO`] reports.
pub const PROTOCOL_VERSION: u32 = 1;
/// Bytes of a frame header: magic u32, kind u16, status u16, id u32, length u32.
pub const HEADER_BYTES: usize = 16;
/// Longest payload either side accepts.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Set in the kind of a reply.
pub const REPLY: u16 = 0x8000;

// === Kinds. Each line: request payload -> reply payload. Kinds stay below 64 (see HELLO's `kinds`). ===

/// Guest to host, unasked, id 0: the [`HELLO_BYTES`] of the list below, then the agent's name (UTF-8, at most
/// [`NAME_BYTES_MAX`]).
///
/// `version u32, agent u32, boot u32, cpus_found u32, cpus_alive u32, tsc_khz u32, checks_run u64, checks_failed
/// u64, kinds u64, memory_bytes u64, arena_bytes u64, filled_bytes u64, disks u32, request_bytes u32`
///
/// `request_bytes`: most bytes of requests, headers included, that the host may have sent without a reply (0: no limit): what
/// the port's driver holds for a slow reader, and drops beyond it.
pub const KIND_HELLO: u16 = 0x01;
/// `bytes` -> the same bytes.
pub const KIND_ECHO: u16 = 0x02;
/// `first_page u64, pages u64` -> `digest u64, ticks u64`: [`super::pattern::Digest`] of the arena's pages as they are.
pub const KIND_HASH: u16 = 0x03;
/// `first_page u64, pages u64, stride u64, seed u64, mode u32, reserved u32` -> `pages u64, xor u64, ticks u64`: goes over
/// `pages` pages, `stride` apart, doing what `mode` says (`TOUCH_*`).
pub const KIND_TOUCH: u16 = 0x04;
/// As [`KIND_TOUCH`] -> `bad_pages u64, first_bad_page u64 (all ones: none), ticks u64`: compares each page with the
/// pattern of `seed`: its first word (mode [`TOUCH_WRITE`]) or all of it (mode [`TOUCH_FILL`]).
pub const KIND_CHECK: u16 = 0x05;
/// `disk u32` -> `sectors u64, features u64, read_only u32, disks u32, serial 20 bytes`. Sectors of 512 bytes.
pub const KIND_DISK_INFO: u16 = 0x06;
/// `disk u32, sectors u32, first_sector u64` -> the bytes.
pub const KIND_DISK_READ: u16 = 0x07;
/// `disk u32, flags u32, first_sector u64, bytes` -> nothing. Bytes: whole sectors; none is allowed with
/// [`DISK_FLUSH`], which flushes the disk's cache after the write.
pub const KIND_DISK_WRITE: u16 = 0x08;
/// nothing -> `tsc u64, tsc_khz u64, cmos_unix_s u64, wall_ns u64`: `wall_ns` is the guest's own wall clock (Unix
/// nanoseconds): CMOS at boot, or what the last IDENTITY said, carried on by the TSC.
pub const KIND_TIME: u16 = 0x09;
/// nothing -> `found u32, alive u32`, then for each alive CPU `apic_id u32, reserved u32, runs u64`.
pub const KIND_CPUS: u16 = 0x0a;
/// `seed u64, rounds u64` -> for each alive CPU `apic_id u32, reserved u32, result u64, ticks u64`: each computes
/// [`super::pattern::run`] on its own.
pub const KIND_RUN_ON_ALL: u16 = 0x0b;
/// `bytes u32` -> that many bytes of the guest's generator (at most [`RANDOM_BYTES_MAX`]).
pub const KIND_RANDOM: u16 = 0x0c;
/// nothing -> `generation 16 bytes, count u64`: the id of the last IDENTITY (zeros: none yet) and how many there were.
pub const KIND_GENERATION: u16 = 0x0d;
/// `generation 16 bytes, entropy 32 bytes, wall_ns u64` -> `generation 16 bytes, count u64`: become this clone: mix
/// the entropy into the generator, step the clock (0: leave it), remember the generation. The reply confirms it.
pub const KIND_IDENTITY: u16 = 0x0e;
/// `nonce u64, bytes u64` -> `generation 16 bytes, digest u64, ticks u64`: digest of generation, nonce and the
/// arena's first `bytes` (a multiple of 8), which are first filled with [`super::pattern::ARENA_SEED`]'s pattern
/// where they have not been yet.
pub const KIND_COMPUTE: u16 = 0x0f;
/// `bytes` -> nothing: prints them on the serial console.
pub const KIND_SERIAL: u16 = 0x10;
/// nothing -> no reply: resets the machine by the keyboard controller.
pub const KIND_RESET: u16 = 0x11;
/// `bytes u32` -> nothing: reads so many bytes from the serial console, and prints each there as it comes. Refused when
/// nothing comes for a long time.
pub const KIND_SERIAL_ECHO: u16 = 0x12;
/// `session u64, window u32, flags u32 (0), args u32, env u32`, then strings (`bytes u32, bytes`, without NUL): working
/// folder and user (empty: the agent's own), so many arguments, so many `NAME=VALUE` -> `window u32, pid u32`: starts a
/// command (see [`ExecStart`]). Windows: bytes that may be sent on each of stdout and stderr; on stdin. Stdin ends with
/// an empty STREAM_DATA. After its end, what it had written is sent, and then END.
pub const KIND_EXEC: u16 = 0x13;
/// `session u64, window u32 (0), mode u32, path string` -> `window u32, reserved u32`: makes a file of what comes on
/// stdin. At its end the file takes its place, with these permission bits, and END says so.
pub const KIND_FILE_PUT: u16 = 0x14;
/// `session u64, window u32, reserved u32, path string` -> `bytes u64, mode u32, reserved u32`: sends a file on stdout,
/// then END. `bytes` is what its size was then.
pub const KIND_FILE_GET: u16 = 0x15;
/// Both ways, no reply: `pipe u32 (PIPE_*), bytes` of a stream: 1 to [`STREAM_BYTES_MAX`]; none: stdin ends.
pub const KIND_STREAM_DATA: u16 = 0x16;
/// Both ways, no reply: `pipe u32, bytes u32`: so many bytes more may be sent.
pub const KIND_STREAM_WINDOW: u16 = 0x17;
/// To the guest, no reply: `signal u32` (its system's number) for all processes of the command. Any ends a file's stream, as a
/// failure.
pub const KIND_SIGNAL: u16 = 0x18;
/// From the guest, unasked: `how u32 (END_*), value u32, sentence`: the stream is over.
pub const KIND_END: u16 = 0x19;
/// `on u32` -> nothing. After the reply to 1 the guest sends nothing unasked until 0, IDENTITY or an opening of another session.
pub const KIND_HUSH: u16 = 0x1a;
/// nothing -> `uptime_ns u64, memory_bytes u64, free_bytes u64, load u32 x 3 (1, 5, 15 minutes; in 1/1000), streams u32`.
pub const KIND_STATS: u16 = 0x1b;
/// IDENTITY's payload, then `host name string (empty: leave it), interfaces u32, {interface u32, address 6 bytes, zeros 2 bytes}`
/// -> IDENTITY's reply, then `host name string`: the same, and the host's name, and Ethernet addresses by the number of the
/// virtio-net device. The name in the reply is read back from the system.
pub const KIND_BECOME: u16 = 0x1c;
/// `wall_ns u64` -> `wall_ns u64`: steps the clock; what it says then.
pub const KIND_SET_CLOCK: u16 = 0x1d;
/// `on u32` -> `wait_ns u64`: before a snapshot: the system's generator keeps its state as it is, so that each clone can have it drawn
/// from the clone's own entropy at once (FreeBSD's does that at most ten times a second). The snapshot is to be taken when so
/// much of the guest's time has gone by. With 0, or after some seconds, all is as it was.
pub const KIND_SETTLE: u16 = 0x1e;
/// BECOME's payload, then `flags u32 (CLONE_*), count u32, {[`Address`], 24 bytes}` -> BECOME's reply, `entropy u32 (ENTROPY_*), count u32,
/// {the same}`: an interface that is named gets these addresses and loses all others but those that its system makes for the link itself; and the
/// default routes. The reply tells the addresses of these interfaces, and the default routes through them, as they were read back.
pub const KIND_CLONE: u16 = 0x1f;
/// The last kind there is.
pub const KIND_LAST: u16 = KIND_CLONE;

/// Fixed part of HELLO's payload.
pub const HELLO_BYTES: usize = 80;
/// Longest agent name.
pub const NAME_BYTES_MAX: usize = 64;
/// Most bytes of one RANDOM.
pub const RANDOM_BYTES_MAX: u32 = 64 << 10;
/// Bytes of a generation id.
pub const GENERATION_BYTES: usize = 16;
/// Bytes of entropy that IDENTITY brings.
pub const ENTROPY_BYTES: usize = 32;
/// Longest host name.
pub const HOST_NAME_BYTES_MAX: usize = 63;
/// Most interfaces of a BECOME.
pub const INTERFACES_MAX: usize = 8;
/// Most addresses and gateways of a CLONE, and of its reply.
pub const ADDRESSES_MAX: usize = 64;
/// CLONE: the guest is a copy of another that runs, or may run: its system's random numbers are to be its own when it replies.
pub const CLONE_RESEED: u32 = 1;
/// CLONE's reply: the system's generator has been given entropy, and will draw on it sooner or later.
pub const ENTROPY_PENDING: u32 = 0;
/// CLONE's reply: it has drawn on it.
pub const ENTROPY_DRAWN: u32 = 1;
/// Bytes of an Ethernet address.
pub const MAC_BYTES: usize = 6;
/// Bytes of a page, of the arena's and of [`KIND_TOUCH`].
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of a disk's serial in DISK_INFO.
pub const DISK_SERIAL_BYTES: usize = 20;
/// Most rounds of one RUN_ON_ALL.
pub const RUN_ROUNDS_MAX: u64 = 1 << 32;

/// Most streams at a time.
pub const STREAMS_MAX: usize = 32;
/// Most data in one frame, so that one stream does not hold the others up.
pub const STREAM_BYTES_MAX: usize = 16 << 10;
/// Most that either side may be granted on one pipe.
pub const WINDOW_BYTES_MAX: u32 = 1 << 20;
/// Longest payload of what opens a stream; most arguments, and variables.
pub const OPENING_BYTES_MAX: usize = 64 << 10;
pub const ARGUMENTS_MAX: usize = 1024;
/// Longest path of a file.
pub const PATH_BYTES_MAX: usize = 1023;

pub const PIPE_STDIN: u32 = 0;
pub const PIPE_STDOUT: u32 = 1;
pub const PIPE_STDERR: u32 = 2;

/// END: it exited with status `value`; a file is complete (0).
pub const END_EXITED: u32 = 0;
/// END: signal `value` ended it.
pub const END_SIGNALLED: u32 = 1;
/// END: the agent could not go on; a sentence says why.
pub const END_FAILED: u32 = 2;

/// HELLO's `agent`: the embedded test guest.
pub const AGENT_TEST_GUEST: u32 = 1;
/// HELLO's `agent`: the program inside a FreeBSD guest.
pub const AGENT_FREEBSD: u32 = 2;

/// HELLO's `boot`: not known to the agent.
pub const BOOT_UNKNOWN: u32 = 0;
/// HELLO's `boot`: FreeBSD's 64-bit loader protocol.
pub const BOOT_NATIVE: u32 = 1;
/// HELLO's `boot`: PVH.
pub const BOOT_PVH: u32 = 2;

/// TOUCH: read the first word of each page (into the reply's xor).
pub const TOUCH_READ: u32 = 0;
/// TOUCH: write the pattern's first word to each page.
pub const TOUCH_WRITE: u32 = 1;
/// TOUCH: write the pattern to all of each page.
pub const TOUCH_FILL: u32 = 2;

/// DISK_WRITE: flush after the write.
pub const DISK_FLUSH: u32 = 1;

pub const STATUS_OK: u16 = 0;
/// The agent does not know this kind.
pub const STATUS_UNKNOWN_KIND: u16 = 1;
/// The payload does not have the kind's layout.
pub const STATUS_BAD_PAYLOAD: u16 = 2;
/// A page, sector, size or mode is out of range.
pub const STATUS_OUT_OF_RANGE: u16 = 3;
/// The guest does not have this device.
pub const STATUS_NO_DEVICE: u16 = 4;
/// The device said no.
pub const STATUS_DEVICE_FAILED: u16 = 5;
/// The agent could not do it.
pub const STATUS_FAILED: u16 = 6;
/// There is no such command, file, folder or user.
pub const STATUS_NOT_FOUND: u16 = 7;
/// The guest's system does not allow it.
pub const STATUS_NOT_ALLOWED: u16 = 8;
/// As much of it as there can be is there already.
pub const STATUS_LIMIT: u16 = 9;

/// What the test guest checks at boot; bit n of HELLO's `checks_run` and `checks_failed` is entry n.
pub const CHECK_NAMES: [&str; 27] = [
    "native.modulep",
    "native.records",
    "native.kernel",
    "native.smap",
    "native.environment",
    "native.kernend",
    "pvh.start_info",
    "pvh.memmap",
    "pvh.cmdline",
    "memory.low",
    "cpuid.hypervisor",
    "cpuid.timing_leaf",
    "cpuid.tsc_khz",
    "cpuid.lapic_khz",
    "cpuid.invariant_tsc",
    "cpuid.features",
    "mptable.found",
    "mptable.checksum",
    "mptable.entries",
    "smp.started",
    "virtio.block",
    "virtio.console",
    "virtio.rng",
    "irq.delivery",
    "madt.tables",
    "madt.entries",
    "smp.run",
];

/// A frame's header as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: u16,
    pub status: u16,
    pub id: u32,
    /// Payload bytes that follow.
    pub length: u32,
}

/// Why sixteen bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHeader {
    /// The first word is not [`MAGIC`].
    Magic(u32),
    /// More than [`PAYLOAD_BYTES_MAX`].
    Length(u32),
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let (magic, rest) = bytes.split_at_mut(4);
        magic.copy_from_slice(&MAGIC.to_le_bytes());
        let (kind, rest) = rest.split_at_mut(2);
        kind.copy_from_slice(&self.kind.to_le_bytes());
        let (status, rest) = rest.split_at_mut(2);
        status.copy_from_slice(&self.status.to_le_bytes());
        let (id, length) = rest.split_at_mut(4);
        id.copy_from_slice(&self.id.to_le_bytes());
        length.copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, BadHeader> {
        let [m0, m1, m2, m3, k0, k1, s0, s1, i0, i1, i2, i3, l0, l1, l2, l3] = *bytes;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        if magic != MAGIC {
            return Err(BadHeader::Magic(magic));
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length as usize > PAYLOAD_BYTES_MAX {
            return Err(BadHeader::Length(length));
        }
        Ok(Header {
            kind: u16::from_le_bytes([k0, k1]),
            status: u16::from_le_bytes([s0, s1]),
            id: u32::from_le_bytes([i0, i1, i2, i3]),
            length,
        })
    }
}

/// Takes a payload apart from the front; every step says `None` when the bytes are not there.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(payload: &'a [u8]) -> Reader<'a> {
        Reader(payload)
    }

    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        if self.0.len() < count {
            return None;
        }
        let (front, rest) = self.0.split_at(count);
        self.0 = rest;
        Some(front)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.array()?))
    }

    /// A length and so many bytes, none of them 0.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.bytes(length as usize).filter(|bytes| !bytes.contains(&0))
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.0)
    }

    /// `Some` when nothing is left: a layout is exact.
    pub fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// What [`KIND_EXEC`] brings, checked: counts, lengths and no NUL.
#[derive(Debug, Clone, Copy)]
pub struct ExecStart<'a> {
    pub session: u64,
    pub window: u32,
    pub folder: &'a [u8],
    pub user: &'a [u8],
    /// At least one.
    pub arguments: Strings<'a>,
    /// `NAME=VALUE` each.
    pub environment: Strings<'a>,
}

/// Strings that are known to be there.
#[derive(Debug, Clone, Copy)]
pub struct Strings<'a> {
    count: u32,
    reader: Reader<'a>,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.count = self.count.checked_sub(1)?;
        self.reader.string()
    }
}

impl<'a> Strings<'a> {
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes `count` strings from the front of `reader`; `good` judges each.
    fn take(reader: &mut Reader<'a>, count: u32, good: impl Fn(&[u8]) -> bool) -> Option<Strings<'a>> {
        let strings = Strings { count, reader: *reader };
        if count as usize > ARGUMENTS_MAX {
            return None;
        }
        for _ in 0..count {
            if !good(reader.string()?) {
                return None;
            }
        }
        Some(strings)
    }
}

impl<'a> ExecStart<'a> {
    pub fn decode(payload: &'a [u8]) -> Option<ExecStart<'a>> {
        let mut reader = Reader::new(payload);
        let (session, window, flags) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let (arguments, variables) = (reader.u32()?, reader.u32()?);
        let (folder, user) = (reader.string()?, reader.string()?);
        let arguments = Strings::take(&mut reader, arguments, |_| true)?;
        let named = |variable: &[u8]| variable.iter().position(|byte| *byte == b'=').is_some_and(|at| at > 0);
        let environment = Strings::take(&mut reader, variables, named)?;
        reader.end()?;
        let good = flags == 0 && !arguments.is_empty() && window <= WINDOW_BYTES_MAX;
        good.then_some(ExecStart { session, window, folder, user, arguments, environment })
    }
}

/// An address of an interface, or a default route through it: `interface u32, family u8 (4, 6), bits u8, what u8 (ADDRESS_*), zero u8, address 16
/// bytes` (of IPv4 the first four, then zeros).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Number of the virtio-net device.
    pub interface: u32,
    pub six: bool,
    /// Of the network that it is in; a gateway's are all.
    pub bits: u8,
    pub gateway: bool,
    pub bytes: [u8; 16],
}

pub const ADDRESS_OWN: u8 = 0;
pub const ADDRESS_GATEWAY: u8 = 1;

impl Address {
    /// Bytes of one.
    pub const BYTES: usize = 24;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.interface.to_le_bytes());
        bytes[4] = if self.six { 6 } else { 4 };
        bytes[5] = self.bits;
        bytes[6] = if self.gateway { ADDRESS_GATEWAY } else { ADDRESS_OWN };
        bytes[8..].copy_from_slice(&self.bytes);
        bytes
    }

    pub fn decode(reader: &mut Reader) -> Option<Address> {
        let interface = reader.u32()?;
        let [family, bits, what, zero] = reader.array()?;
        let bytes: [u8; 16] = reader.array()?;
        let six = family == 6;
        let most = if six { 128 } else { 32 };
        let good = (six || family == 4 && bytes[4..].iter().all(|byte| *byte == 0))
            && bits <= most
            && zero == 0
            && (what == ADDRESS_OWN || what == ADDRESS_GATEWAY && bits == most);
        good.then_some(Address { interface, six, bits, gateway: what == ADDRESS_GATEWAY, bytes })
    }

    /// So many of them, counted and checked.
    pub fn decode_all<'a>(reader: &mut Reader<'a>) -> Option<Addresses<'a>> {
        let count = reader.u32()?;
        let addresses = Addresses { count, reader: *reader };
        if count as usize > ADDRESSES_MAX {
            return None;
        }
        for _ in 0..count {
            Address::decode(reader)?;
        }
        Some(addresses)
    }
}

/// Addresses that are known to be there.
#[derive(Debug, Clone, Copy)]
pub struct Addresses<'a> {
    count: u32,
    reader: Reader<'a>,
}

impl Iterator for Addresses<'_> {
    type Item = Address;

    fn next(&mut self) -> Option<Address> {
        self.count = self.count.checked_sub(1)?;
        Address::decode(&mut self.reader)
    }
}

/// What [`KIND_IDENTITY`], [`KIND_BECOME`] and [`KIND_CLONE`] bring, checked.
#[derive(Debug, Clone, Copy)]
pub struct Become<'a> {
    pub generation: [u8; GENERATION_BYTES],
    pub entropy: [u8; ENTROPY_BYTES],
    /// 0: leave the clock.
    pub wall_ns: u64,
    /// Empty: leave it.
    pub host_name: &'a [u8],
    pub interfaces: Interfaces<'a>,
    /// Of a CLONE.
    pub flags: u32,
    pub addresses: Addresses<'a>,
}

/// Numbers of interfaces and their addresses, known to be there.
#[derive(Debug, Clone, Copy)]
pub struct Interfaces<'a> {
    count: u32,
    reader: Reader<'a>,
}

impl Iterator for Interfaces<'_> {
    type Item = (u32, [u8; MAC_BYTES]);

    fn next(&mut self) -> Option<Self::Item> {
        self.count = self.count.checked_sub(1)?;
        let interface = (self.reader.u32()?, self.reader.array()?);
        self.reader.bytes(2)?;
        Some(interface)
    }
}

impl<'a> Become<'a> {
    pub fn decode(kind: u16, payload: &'a [u8]) -> Option<Become<'a>> {
        let mut reader = Reader::new(payload);
        let (generation, entropy, wall_ns) = (reader.array()?, reader.array()?, reader.u64()?);
        let mut told = Become {
            generation,
            entropy,
            wall_ns,
            host_name: &[],
            interfaces: Interfaces { count: 0, reader },
            flags: CLONE_RESEED,
            addresses: Addresses { count: 0, reader },
        };
        if kind == KIND_BECOME || kind == KIND_CLONE {
            told.host_name = reader.string()?;
            let count = reader.u32()?;
            told.interfaces = Interfaces { count, reader };
            if told.host_name.len() > HOST_NAME_BYTES_MAX || count as usize > INTERFACES_MAX {
                return None;
            }
            reader.bytes(count as usize * (4 + MAC_BYTES + 2))?;
        }
        if kind == KIND_CLONE {
            told.flags = reader.u32()?;
            told.addresses = Address::decode_all(&mut reader)?;
            if told.flags & !CLONE_RESEED != 0 {
                return None;
            }
        }
        reader.end()?;
        Some(told)
    }
}

/// What [`KIND_FILE_PUT`] and [`KIND_FILE_GET`] bring.
#[derive(Debug, Clone, Copy)]
pub struct FileStart<'a> {
    pub session: u64,
    pub window: u32,
    /// PUT's permission bits.
    pub mode: u32,
    pub path: &'a [u8],
}

impl<'a> FileStart<'a> {
    pub fn decode(payload: &'a [u8]) -> Option<FileStart<'a>> {
        let mut reader = Reader::new(payload);
        let start = FileStart {
            session: reader.u64()?,
            window: reader.u32()?,
            mode: reader.u32()?,
            path: reader.string()?,
        };
        reader.end()?;
        let path = 1..=PATH_BYTES_MAX;
        let good =
            path.contains(&start.path.len()) && start.window <= WINDOW_BYTES_MAX && start.mode <= 0o7777;
        good.then_some(start)
    }
}
