//! What FreeBSD's 64-bit loader protocol gives: metadata records, SMAP, environment (FREEBSD.md section 2).

use crate::checks::{Checks, check};
use crate::fail;
use crate::given::{Given, Range, Settings};
use crate::memory;

const RECORD_END: u32 = 0;
const NAME: u32 = 1;
const TYPE: u32 = 2;
const ADDR: u32 = 3;
const SIZE: u32 = 4;
const ENVP: u32 = 0x8006;
const HOWTO: u32 = 0x8007;
const KERNEND: u32 = 0x8008;
const SMAP: u32 = 0x9001;
const MODULEP: u32 = 0x9006;

const RECORDS_MAX: usize = 256;
const SMAP_ENTRY_BYTES: usize = 20;
const ENVIRONMENT_BYTES_MAX: u64 = 1 << 20;
const KERNEL_START: u64 = 0x20_0000;
/// The loader's page tables reach this far.
const LOADER_BYTES: u64 = 1 << 30;

/// The records of the first file (the kernel).
#[derive(Default)]
struct Records {
    name: Option<&'static [u8]>,
    kind: Option<&'static [u8]>,
    address: Option<u64>,
    size: Option<u64>,
    environment: Option<u64>,
    howto: Option<u64>,
    kernend: Option<u64>,
    modulep: Option<u64>,
    smap: Option<&'static [u8]>,
    /// Files after the kernel.
    modules: usize,
    terminated: bool,
}

pub(crate) fn read(checks: &mut Checks, modulep: u64, kernend: u64) -> Given {
    let placed =
        modulep > KERNEL_START && modulep.is_multiple_of(4096) && modulep < kernend && kernend < LOADER_BYTES;
    check!(checks, "native.modulep", placed, "modulep {modulep:#x}");
    let records = walk(modulep, kernend);
    let Records { name, kind, address, size, environment, howto, modulep: told, smap, .. } = records;
    check!(
        checks,
        "native.records",
        records.terminated && name.is_some() && howto.is_some() && told == Some(modulep),
        "name {}, howto {howto:x?}, modulep {told:x?}, {} modules, terminated {}",
        memory::text(name.unwrap_or(b"(none)")),
        records.modules,
        records.terminated
    );
    let image = memory::image_end() - KERNEL_START;
    check!(
        checks,
        "native.kernel",
        matches!(kind, Some(b"elf kernel" | b"elf64 kernel"))
            && address == Some(KERNEL_START)
            && size.is_some_and(|size| size >= image && KERNEL_START.saturating_add(size) <= modulep),
        "type {}, address {address:x?}, size {size:x?}, image {image:#x}",
        memory::text(kind.unwrap_or(b"(none)"))
    );
    let environment_text = environment.and_then(|at| read_environment(at, kernend));
    let mut given = Given::new(
        Settings::Environment(environment_text.unwrap_or_default()),
        kernend.max(memory::image_end()),
    );
    let smap = smap.unwrap_or_default();
    let (entries, rest) = smap.as_chunks::<SMAP_ENTRY_BYTES>();
    let mut room = true;
    for entry in entries {
        let [s, l, k] = [&entry[..8], &entry[8..16], &entry[16..]].map(number);
        room &= given.add(Range { start: s, bytes: l, kind: k as u32 });
    }
    // The kernel adds its load base to kernend once more: that much more must be RAM.
    let covers = given.is_ram(KERNEL_START, kernend.saturating_add(KERNEL_START));
    check!(
        checks,
        "native.smap",
        rest.is_empty() && room && covers && given.ranges().len() > 1,
        "{} entries, covers kernel and kernend {covers}",
        entries.len()
    );
    check!(
        checks,
        "native.kernend",
        records.kernend == Some(kernend) && kernend.is_multiple_of(4096),
        "{kernend:#x}, in the record {:x?}",
        records.kernend
    );
    let root = given.value("vfs.root.mountfrom");
    check!(
        checks,
        "native.environment",
        environment_text.is_some() && environment.is_some_and(|at| at % 4096 == 0),
        "at {environment:x?}, {} settings, vfs.root.mountfrom {}",
        given.settings().count(),
        memory::text(root.unwrap_or(b"(none)"))
    );
    if smap.is_empty() {
        fail(format_args!("no SMAP record: no memory to work with"));
    }
    given
}

fn walk(modulep: u64, end: u64) -> Records {
    let mut records = Records::default();
    let mut at = modulep;
    for _ in 0..RECORDS_MAX {
        let (Some(kind), Some(size)) = (memory::read_u32(at), memory::read_u32(at + 4)) else { break };
        let data_end = at + 8 + u64::from(size);
        if kind == RECORD_END {
            records.terminated = size == 0;
            break;
        }
        if data_end > end {
            break;
        }
        let Some(data) = memory::bytes(at + 8, size.into()) else { break };
        let of_kernel = records.modules == 0;
        match kind {
            NAME if records.name.is_some() => records.modules += 1,
            // The name must come first.
            NAME => records.name = Some(without_nul(data)),
            _ if records.name.is_none() => break,
            TYPE if of_kernel => records.kind = Some(without_nul(data)),
            ADDR if of_kernel => records.address = Some(number(data)),
            SIZE if of_kernel => records.size = Some(number(data)),
            ENVP if of_kernel => records.environment = Some(number(data)),
            HOWTO if of_kernel => records.howto = Some(number(data)),
            KERNEND if of_kernel => records.kernend = Some(number(data)),
            MODULEP if of_kernel => records.modulep = Some(number(data)),
            SMAP if of_kernel => records.smap = Some(data),
            _ => {}
        }
        at = data_end.next_multiple_of(8);
    }
    records
}

/// The environment with its double NUL.
fn read_environment(at: u64, end: u64) -> Option<&'static [u8]> {
    if at < KERNEL_START || at >= end {
        return None;
    }
    let room = memory::bytes(at, ENVIRONMENT_BYTES_MAX.min(end - at))?;
    let stop = room.windows(2).position(|pair| pair == [0, 0])?;
    room.get(..stop)
}

fn without_nul(data: &'static [u8]) -> &'static [u8] {
    data.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Up to eight bytes as a number.
fn number(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
