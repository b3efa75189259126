//! What hostile bytes are given to: one function for each target of `fuzz/`, which tests call too, with bytes of all kinds for a moment.
//!
//! A target panics if a promise is broken, and for no other reason. What is refused is refused in words.

#![forbid(unsafe_code)]

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::agent::resync::{DOUBT_BYTES_MAX, DOUBTS_MAX, Doubt, HELLO_BEGINS, Hellos, Verdict};
use crate::agent::streams::Said;
use crate::agent::{AgentReply, AgentRequest, Frame, FrameDecoder, Hello, Host, More, wire};
use crate::api;
use crate::media::{ReadAt, inspect, unpack};
use crate::snapshot::codec;
use crate::snapshot::manifest::Manifest;
use crate::snapshot::state::chipset::{AgentPortState, ChipsetState};
use crate::snapshot::state::file::{Section, StateFile};
use crate::snapshot::state::machine::MachineState;
use crate::snapshot::state::pc::{EventState, PcState, VirtioPciState};
use crate::snapshot::state::vcpu::VcpuState;
use crate::snapshot::state::virtio::TransportState;
use crate::snapshot::working_set::WorkingSet;
use crate::vmm::fuzzing as vmm;
use crate::worker::protocol::{Event, FromWorker, Greeting, Reply, Request, ToZygote};

/// A target: its name in `fuzz/`, what bytes it is given, and seeds that are no mere noise to it.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "agent", run: agent, seeds: agent_seeds },
    Target { name: "control", run: control, seeds: control_seeds },
    Target { name: "devices", run: vmm::devices, seeds: noise },
    Target { name: "kernels", run: vmm::kernels, seeds: kernel_seeds },
    Target { name: "manifest", run: manifest, seeds: manifest_seeds },
    Target { name: "media", run: media, seeds: media_seeds },
    Target { name: "ports", run: vmm::ports, seeds: noise },
    Target { name: "requests", run: api::fuzzing::requests, seeds: api::fuzzing::seeds },
    Target { name: "state", run: state, seeds: state_seeds },
    Target { name: "tables", run: vmm::tables, seeds: noise },
];

/// The target of that name, for `fuzz/fuzz_targets`.
///
/// # Panics
/// If there is none.
pub fn run(name: &str, data: &[u8]) {
    (target(name).run)(data);
}

/// Writes that target's seeds into the folder a fuzzer starts from.
///
/// # Errors
/// The folder cannot be made or written.
///
/// # Panics
/// If there is no such target.
pub fn sow(name: &str, corpus: &Path) -> std::io::Result<()> {
    let folder = corpus.join(name);
    std::fs::create_dir_all(&folder)?;
    for (number, seed) in (target(name).seeds)().iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number}")), seed)?;
    }
    Ok(())
}

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target's name")
}

/// Bytes without a sense, of some lengths.
fn noise() -> Vec<Vec<u8>> {
    let mix = |n: u32| n.wrapping_mul(0x9e37_79b1).rotate_left(13) as u8;
    [1, 16, 200, 1000, 4000].map(|bytes| (0..bytes).map(|n| mix(n + bytes)).collect()).into()
}

/// What can be decoded is encoded to bytes that decode to the same.
fn there_and_back<T: Serialize + DeserializeOwned>(data: &[u8]) {
    if let Ok(value) = codec::decode::<T>(data) {
        let bytes = codec::encode(&value).expect("what was decoded");
        let again = codec::decode::<T>(&bytes).expect("what was encoded");
        assert_eq!(codec::encode(&again).expect("once more"), bytes);
    }
}

// --- manifests and states ---

/// `manifest.json`, and the working set's file.
pub fn manifest(data: &[u8]) {
    match Manifest::parse(data) {
        Ok(manifest) => {
            let json = manifest.to_json().expect("what was parsed");
            assert_eq!(Manifest::parse(&json).expect("what was written"), manifest);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    const MEMORY_BYTES: u64 = 1 << 30;
    if let Ok(set) = WorkingSet::from_bytes(data, MEMORY_BYTES) {
        let bytes = set.to_bytes().expect("what was read");
        assert_eq!(WorkingSet::from_bytes(&bytes, MEMORY_BYTES).expect("what was written"), set);
    }
}

fn manifest_seeds() -> Vec<Vec<u8>> {
    let json = br#"{"format":1,"facts":{"name":"web","created_unix_ms":1,"vcpus":2,"memory_bytes":67108864,"disks":[],"devices":["console","rng"]}}"#;
    vec![json.to_vec(), codec::encode(&(1u32, vec![(0u64, 4096u64)])).unwrap_or_default()]
}

/// `state.bin`, and each section in it.
pub fn state(data: &[u8]) {
    let Ok(file) = StateFile::from_bytes(data) else { return };
    let bytes = file.to_bytes().expect("what was read");
    assert_eq!(StateFile::from_bytes(&bytes).expect("what was written"), file);
    for instance in 0..8 {
        section::<MachineState>(&file, instance);
        section::<VcpuState>(&file, instance);
        section::<ChipsetState>(&file, instance);
        section::<AgentPortState>(&file, instance);
        section::<TransportState>(&file, instance);
        section::<PcState>(&file, instance);
        section::<EventState>(&file, instance);
        section::<VirtioPciState>(&file, instance);
    }
}

fn section<T: Section>(file: &StateFile, instance: u32) {
    if let Ok(value) = file.get::<T>(instance) {
        there_and_back::<T>(&codec::encode(&value).expect("what was decoded"));
    }
}

fn state_seeds() -> Vec<Vec<u8>> {
    let mut file = StateFile::default();
    let machine = MachineState { vcpus: 1, memory: Vec::new(), clock_ns: 1, devices: vec!["rng".into()] };
    let pushed = file.push(0, &machine).and_then(|()| file.push(0, &EventState { status: 1, enable: 1 }));
    vec![pushed.and_then(|()| file.to_bytes()).expect("a state")]
}

// --- the agent ---

/// What a guest sends on its agent port, in pieces.
pub fn agent(data: &[u8]) {
    let Some((&piece, stream)) = data.split_first() else { return };
    doubt(stream, usize::from(piece).max(1));
    let mut decoder = FrameDecoder::new();
    for piece in stream.chunks(usize::from(piece).max(1)) {
        let Ok(frames) = decoder.push(piece) else { return };
        for frame in frames {
            if let Ok(hello) = Hello::decode(&frame) {
                let frame =
                    FrameDecoder::new().push(&hello.encode().expect("what was decoded")).expect("a frame");
                assert_eq!(Hello::decode(&frame[0]).expect("what was encoded"), hello);
            }
            let _ = Said::decode(&frame);
            for request in [
                AgentRequest::Echo(frame.payload.clone()),
                AgentRequest::Random { bytes: 32 },
                AgentRequest::Stats,
                AgentRequest::Time,
                AgentRequest::Generation,
                AgentRequest::Settle { on: true },
                AgentRequest::DiskInfo { disk: 0 },
                identity(),
            ] {
                // A frame of any kind is looked at as if it were the answer to each.
                let answer = Frame { kind: request.kind() | wire::REPLY, ..frame.clone() };
                let _ = AgentReply::decode(&request, answer);
            }
            // And what a hostile host could say to a guest.
            for kind in [wire::KIND_IDENTITY, wire::KIND_BECOME, wire::KIND_CLONE] {
                if let Some(told) = wire::Become::decode(kind, &frame.payload) {
                    assert!(told.addresses.count() <= wire::ADDRESSES_MAX);
                }
            }
        }
    }
}

/// What is kept in a doubt is given back, all of it, or given up from the place of the answer.
fn doubt(stream: &[u8], piece: usize) {
    let (mut hellos, mut doubt) = (Hellos::default(), Doubt::new([7; 16], 3));
    let mut given = 0;
    for piece in stream.chunks(piece) {
        let _ = hellos.look(piece);
        given += piece.len();
        match doubt.hear(piece) {
            Verdict::Wait(_) => assert!(given <= DOUBT_BYTES_MAX),
            Verdict::Continue(bytes) | Verdict::TooLong(bytes) => return assert_eq!(bytes.len(), given),
            Verdict::Answered { follows, place, .. } => {
                return assert!(follows.len() == given && place <= given);
            }
        }
    }
}

/// A clone's, with an address.
fn identity() -> AgentRequest {
    let address = wire::Address { interface: 0, six: true, bits: 64, gateway: false, bytes: [0xfd; 16] };
    let more = Some(More { reseed: true, addresses: vec![address] });
    let host = Some(Host { name: "web".into(), macs: vec![(0, [2; 6])], more });
    AgentRequest::Identity { generation: [1; 16], entropy: [2; 32], wall_ns: 3, host }
}

fn agent_seeds() -> Vec<Vec<u8>> {
    let frame = |request: AgentRequest| request.encode(1).expect("a frame");
    let with_piece = |frame: Vec<u8>| [vec![7], frame].concat();
    let hello = Hello {
        version: wire::PROTOCOL_VERSION,
        agent: wire::AGENT_FREEBSD,
        boot: wire::BOOT_UNKNOWN,
        cpus_found: 1,
        cpus_alive: 1,
        tsc_khz: 1,
        checks_run: 0,
        checks_failed: 0,
        kinds: 6,
        memory_bytes: 1,
        arena_bytes: 0,
        filled_bytes: 0,
        disks: 0,
        request_bytes: 9,
        name: "agent".into(),
    }
    .encode()
    .expect("a frame");
    // After the first bytes of a hello, as a doubt begins: the rest, and the answer to its question.
    let (_, rest) = hello.split_at(HELLO_BEGINS);
    let answer = crate::agent::frame::encode(wire::KIND_ECHO | wire::REPLY, 0, 3, &[7; 16]).expect("a frame");
    vec![
        with_piece(frame(AgentRequest::Stats)),
        with_piece(frame(AgentRequest::Echo(b"hello".to_vec()))),
        with_piece(frame(identity())),
        with_piece(hello.clone()),
        with_piece([rest, &answer].concat()),
        // A doubt with what looks like others in it, and is none.
        with_piece(
            [rest, &[&hello[..HELLO_BEGINS], &[0xff; 4]].concat().repeat(DOUBTS_MAX), &[0x43; 4096]].concat(),
        ),
    ]
}

// --- the control socket ---

/// What daemon, zygote and worker say to each other.
pub fn control(data: &[u8]) {
    there_and_back::<Request>(data);
    there_and_back::<FromWorker>(data);
    there_and_back::<Reply>(data);
    there_and_back::<Event>(data);
    there_and_back::<ToZygote>(data);
    if let Ok(greeting) = codec::decode::<Greeting>(data) {
        let _ = greeting.version();
    }
}

fn control_seeds() -> Vec<Vec<u8>> {
    (0..24u8).map(|first| vec![first, 0, 1, 2, 3]).collect()
}

// --- media ---

struct Disk<'a>(&'a [u8]);

impl ReadAt for Disk<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A disk: partitions and file systems on it; or, by the first byte, a compressed one.
pub fn media(data: &[u8]) {
    const UNPACKED_BYTES_MAX: u64 = 1 << 20;
    let Some((&choice, data)) = data.split_first() else { return };
    if choice % 2 == 0 {
        // Read at few places of many: the rest of the disk is zeros.
        let mut disk = vec![0; (data.len() + (usize::from(choice) << 12)).min(4 << 20)];
        let length = data.len().min(disk.len());
        disk[..length].copy_from_slice(&data[..length]);
        let disk = Disk(&disk);
        if let Ok(found) = inspect::disk(&disk, disk.0.len() as u64) {
            assert!(found.describe().len() < 1 << 20);
            let _ = found.likely_roots();
            if let Ok(kernel) = inspect::kernel(&found) {
                let _ = kernel.read(UNPACKED_BYTES_MAX, |_| Ok(()));
            }
        }
        return;
    }
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    std::io::Write::write_all(&mut file, data).expect("written");
    // qcow2 is given to qemu-img, which is not ours to try.
    if data.starts_with(b"QFI\xfb") {
        return;
    }
    if let Ok(mut unpacked) = unpack::open(file.path()) {
        let _ =
            std::io::copy(&mut std::io::Read::take(&mut unpacked, UNPACKED_BYTES_MAX), &mut std::io::sink());
    }
}

fn media_seeds() -> Vec<Vec<u8>> {
    let ufs = crate::media::testing::ufs2(256 << 10, "rootfs", &[("/boot/kernel/kernel", b"kernel")]);
    let raw = [&[0u8][..], &ufs].concat();
    let zstd = zstd::encode_all(&b"a disk"[..], 1).expect("packed");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, b"a disk").expect("packed");
    vec![raw, [&[1u8][..], &zstd].concat(), [&[1u8][..], &gzip.finish().expect("packed")].concat()]
}

fn kernel_seeds() -> Vec<Vec<u8>> {
    let mut elf = vec![0, 3, b'-', b's', b' '];
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\x09");
    elf.extend_from_slice(&[0; 8]);
    elf.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend_from_slice(&0xffff_ffff_8020_0000u64.to_le_bytes());
    elf.extend_from_slice(&64u64.to_le_bytes());
    elf.extend_from_slice(&[0; 8]);
    elf.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for number in [0x1000u64, 0xffff_ffff_8020_0000, 0x20_0000, 0x100, 0x100, 0x1000] {
        elf.extend_from_slice(&number.to_le_bytes());
    }
    elf.resize(5 + 0x1100, 0x90);
    let mut linux = vec![8, 0];
    linux.resize(2 + 0x4000, 0);
    linux[2 + 0x1fe..2 + 0x206].copy_from_slice(b"\x55\xaa\xeb\x66HdrS");
    vec![elf, linux]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Seeds as they are, and cut and changed; noise; and all that ever broke a target.
    #[test]
    fn no_bytes_break_a_target() {
        let noise = prop::collection::vec(any::<u8>(), 0..400);
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
        for target in TARGETS {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{}", target.name);
            seeds.iter().for_each(|seed| (target.run)(seed));
            let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
                cases: 64,
                failure_persistence: None,
                ..ProptestConfig::default()
            });
            let strategy = (&noise, &changes, any::<prop::sample::Index>(), 0usize..8);
            let outcome = runner.run(&strategy, |(noise, changes, seed, cut)| {
                (target.run)(&noise);
                let mut bytes = seeds[seed.index(seeds.len())].clone();
                for (place, value) in changes {
                    if !bytes.is_empty() {
                        let place = place.index(bytes.len());
                        bytes[place] = value;
                    }
                }
                bytes.truncate(bytes.len() - bytes.len() * cut / 8);
                (target.run)(&bytes);
                Ok(())
            });
            if let Err(error) = outcome {
                panic!("{}: {error}", target.name);
            }
        }
    }

    #[test]
    fn what_once_broke_a_target_does_not_any_more() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
        for target in TARGETS {
            // One without findings has no folder.
            let Ok(inputs) = std::fs::read_dir(folder.join(target.name)) else { continue };
            for input in inputs {
                (target.run)(&std::fs::read(input.unwrap().path()).unwrap());
            }
        }
    }

    /// Every target has a program in `fuzz/`, and every program a target.
    #[test]
    fn the_fuzzers_are_those_of_the_list() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
        let mut programs: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        programs.sort();
        assert_eq!(programs, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
    }
}
