//! A strict, small reader of ELF64 x86-64 executables: only what a boot needs, and nothing believed.
//!
//! Reads the kernel file with positioned reads and writes guest memory; the file is hostile. What is read into this
//! process's memory is bounded (headers, notes, section names); segments stream straight into guest memory. Facts: System V
//! ABI, chapters 4 and 5; the Xen note of `xen/include/public/elfnote.h`; FreeBSD's `stand/common/load_elf.c`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memchr::memmem::Finder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::error::BootError;
use super::layout;
use super::reader::Reader;
use crate::vmm::memory::GuestMemory;

/// Where FreeBSD's and Linux's kernel windows begin: virtual = physical + this.
pub const KERNBASE: u64 = 0xffff_ffff_8000_0000;

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const SECTION_BYTES: usize = 64;
/// Real kernels have about ten segments and, with debug information, some two hundred sections.
const SEGMENTS_MAX: usize = 128;
const SECTIONS_MAX: usize = 8192;
const NOTES_BYTES_MAX: u64 = 1 << 20;
const NAMES_BYTES_MAX: u64 = 1 << 20;
const INTERPRETER_BYTES_MAX: u64 = 256;
/// How much of a file is searched at once (it stays in the processor's cache while one text after the other is looked for), and the
/// longest text to be searched for.
const SCAN_BYTES: usize = 128 << 10;
pub const TEXT_BYTES_MAX: usize = 64;

const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const OSABI_FREEBSD: u8 = 9;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_INTERPRETER: u32 = 3;
const SEGMENT_NOTE: u32 = 4;
/// Of the flags of a segment (write 2, execute 1), read alone.
const FLAGS_READ: u32 = 4;
const SECTION_NOTE: u32 = 7;
const XEN_GUEST_OS: u32 = 6;
const XEN_PHYS32_ENTRY: u32 = 18;

/// A segment to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub file_bytes: u64,
    pub memory_bytes: u64,
    pub virtual_address: u64,
    pub physical_address: u64,
    /// Neither to be executed nor written: constants, where a linker gives them a segment of their own.
    pub constant: bool,
}

/// What an ELF file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elf {
    pub entry: u64,
    /// `PT_LOAD` segments with at least one byte of memory.
    pub segments: Vec<Segment>,
    /// Entry of the Xen PHYS32_ENTRY note: the PVH entry, a physical address.
    pub pvh_entry: Option<u32>,
    /// It bears FreeBSD's marks: OSABI, interpreter, a note, or a kernel's linker set.
    pub freebsd: bool,
    /// A note named "Linux", or the Xen note that says so.
    pub linux: bool,
}

/// Which of its two addresses a segment is loaded by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// Virtual address less [`KERNBASE`], as FreeBSD's loader does.
    Window,
    /// Physical address (less [`KERNBASE`] where a linker left a virtual one there), as PVH demands.
    Physical,
}

/// Physical range that was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

impl Elf {
    /// Reads and checks headers, notes and section names of `file`, which has `bytes` bytes.
    pub fn read(file: &File, bytes: u64) -> Result<Elf, BootError> {
        let mut header = [0u8; HEADER_BYTES];
        if bytes < HEADER_BYTES as u64 {
            return Err(truncated("the ELF header", HEADER_BYTES as u64, bytes));
        }
        read_at(file, &mut header, 0)?;
        check_header(&header)?;
        let mut elf = Elf {
            entry: u64_at(&header, 24),
            segments: Vec::new(),
            pvh_entry: None,
            freebsd: header[7] == OSABI_FREEBSD,
            linux: false,
        };
        elf.read_segments(file, bytes, &header)?;
        elf.read_sections(file, bytes, &header)?;
        if elf.segments.is_empty() {
            return Err(BootError::NotAKernel("an ELF file with nothing to load in it".into()));
        }
        Ok(elf)
    }

    fn read_segments(&mut self, file: &File, bytes: u64, header: &[u8]) -> Result<(), BootError> {
        let count = usize::from(u16_at(header, 56));
        if count > SEGMENTS_MAX {
            return Err(BootError::BadElf(format!(
                "{count} program headers; at most {SEGMENTS_MAX} make sense"
            )));
        }
        if count > 0 && usize::from(u16_at(header, 54)) != SEGMENT_BYTES {
            return Err(BootError::BadElf("program headers of a wrong size".into()));
        }
        let table =
            read_part(file, bytes, "the program header table", u64_at(header, 32), count * SEGMENT_BYTES)?;
        for raw in table.chunks_exact(SEGMENT_BYTES) {
            let segment = Segment {
                offset: u64_at(raw, 8),
                virtual_address: u64_at(raw, 16),
                physical_address: u64_at(raw, 24),
                file_bytes: u64_at(raw, 32),
                memory_bytes: u64_at(raw, 40),
                constant: u32_at(raw, 4) & 7 == FLAGS_READ,
            };
            match u32_at(raw, 0) {
                SEGMENT_LOAD if segment.memory_bytes > 0 => {
                    check_segment(&segment, bytes)?;
                    self.segments.push(segment);
                }
                SEGMENT_INTERPRETER if segment.file_bytes <= INTERPRETER_BYTES_MAX => {
                    let what = "the interpreter's name";
                    let name = read_part(file, bytes, what, segment.offset, segment.file_bytes as usize)?;
                    // What FreeBSD kernels name as their interpreter, so that nobody runs them.
                    self.freebsd |= name.starts_with(b"/red/herring");
                }
                SEGMENT_NOTE => {
                    self.read_notes(file, bytes, segment.offset, segment.file_bytes, u64_at(raw, 48))?
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Section headers serve two ends: notes that no segment covers, and the name of a FreeBSD kernel's linker set.
    fn read_sections(&mut self, file: &File, bytes: u64, header: &[u8]) -> Result<(), BootError> {
        let (start, count) = (u64_at(header, 40), usize::from(u16_at(header, 60)));
        if start == 0 || count == 0 {
            return Ok(()); // Stripped of them: legal.
        }
        if usize::from(u16_at(header, 58)) != SECTION_BYTES || count > SECTIONS_MAX {
            return Err(BootError::BadElf(format!(
                "a section header table of {count} entries or a wrong size"
            )));
        }
        // They are the end of a usual file, so this finds a broken-off copy even when all segments are there.
        let table = read_part(file, bytes, "the section header table", start, count * SECTION_BYTES)?;
        if self.pvh_entry.is_none() {
            for raw in table.chunks_exact(SECTION_BYTES).filter(|raw| u32_at(raw, 4) == SECTION_NOTE) {
                self.read_notes(file, bytes, u64_at(raw, 24), u64_at(raw, 32), u64_at(raw, 48))?;
            }
        }
        if !self.freebsd {
            let names = table.chunks_exact(SECTION_BYTES).nth(usize::from(u16_at(header, 62)));
            if let Some(names) = names.filter(|raw| u64_at(raw, 32) <= NAMES_BYTES_MAX) {
                let what = "the table of section names";
                let names = read_part(file, bytes, what, u64_at(names, 24), u64_at(names, 32) as usize)?;
                self.freebsd = names.split(|byte| *byte == 0).any(|name| name == b"set_sysinit_set");
            }
        }
        Ok(())
    }

    fn read_notes(
        &mut self,
        file: &File,
        bytes: u64,
        offset: u64,
        size: u64,
        align: u64,
    ) -> Result<(), BootError> {
        if size > NOTES_BYTES_MAX {
            return Err(BootError::BadElf(format!("{size} bytes of notes")));
        }
        let notes = read_part(file, bytes, "an ELF note", offset, size as usize)?;
        for (name, kind, value) in (Notes { bytes: &notes, at: 0, align: if align == 8 { 8 } else { 4 } }) {
            match (name, kind) {
                (b"Xen", XEN_PHYS32_ENTRY) => {
                    let entry = match value.len() {
                        4 => u64::from(u32_at(value, 0)),
                        8.. => u64_at(value, 0),
                        other => return Err(BootError::BadElf(format!("PVH entry note of {other} bytes"))),
                    };
                    let entry = u32::try_from(entry).map_err(|_| {
                        BootError::BadElf(format!("PVH entry {entry:#x} is not a 32-bit physical address"))
                    })?;
                    self.pvh_entry.get_or_insert(entry);
                }
                (b"Xen", XEN_GUEST_OS) => {
                    self.linux |= value.starts_with(b"linux");
                    self.freebsd |= value.starts_with(b"FreeBSD");
                }
                (b"Linux", _) => self.linux = true,
                (b"FreeBSD", _) => self.freebsd = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// The physical range that loading by `addressing` fills; an error names the segment that makes no sense.
    pub fn range(&self, addressing: Addressing) -> Result<Range, BootError> {
        let mut range = Range { start: u64::MAX, end: 0 };
        for segment in &self.segments {
            let start = segment.load_address(addressing)?;
            // check_segment has seen that neither address overflows.
            range.start = range.start.min(start);
            range.end = range.end.max(start.saturating_add(segment.memory_bytes));
        }
        Ok(range)
    }

    /// Loads all segments. Guest memory must be fresh: what a segment has in memory but not in the file is left as
    /// it is, that is zero.
    pub fn load(
        &self,
        memory: &GuestMemory,
        file: &File,
        addressing: Addressing,
    ) -> Result<Range, BootError> {
        let range = self.range(addressing)?;
        layout::need_ram(memory, "the kernel", range.start, range.end)?;
        for segment in &self.segments {
            let address = segment.load_address(addressing)?;
            stream(memory, "kernel", file, segment.offset, address, segment.file_bytes)?;
        }
        Ok(range)
    }

    /// Which of `texts` (none longer than [`TEXT_BYTES_MAX`]), constants of the program, the segments' bytes in the file contain.
    /// If segments of constants have any of them they have them all: the others, which are larger by far, are not looked into then.
    pub fn contains(&self, file: &File, texts: &[&[u8]]) -> Result<Vec<bool>, BootError> {
        let mut found = vec![false; texts.len()];
        for constant in [true, false] {
            if !found.contains(&true) {
                let segments = self.segments.iter().filter(|segment| segment.constant == constant);
                search(file, segments, texts, &mut found)?;
            }
        }
        Ok(found)
    }

    /// True if a segment's loaded bytes cover `address`.
    pub fn covers(&self, addressing: Addressing, address: u64) -> bool {
        self.segments.iter().any(|segment| {
            segment.load_address(addressing).is_ok_and(|start| {
                address.checked_sub(start).is_some_and(|offset| offset < segment.memory_bytes)
            })
        })
    }
}

impl Segment {
    fn load_address(&self, addressing: Addressing) -> Result<u64, BootError> {
        match addressing {
            Addressing::Window => self.virtual_address.checked_sub(KERNBASE).ok_or_else(|| {
                BootError::NotAKernel(format!(
                    "a program linked at {:#x}, while kernels are linked at {KERNBASE:#x} or above",
                    self.virtual_address
                ))
            }),
            Addressing::Physical => {
                Ok(self.physical_address.checked_sub(KERNBASE).unwrap_or(self.physical_address))
            }
        }
    }
}

/// Sets `found` for those of `texts` that are in these segments.
fn search<'a>(
    file: &File,
    segments: impl Iterator<Item = &'a Segment>,
    texts: &[&[u8]],
    found: &mut [bool],
) -> Result<(), BootError> {
    let finders: Vec<Finder<'_>> = texts.iter().map(Finder::new).collect();
    let mut buffer = vec![0u8; SCAN_BYTES + TEXT_BYTES_MAX];
    for segment in segments {
        let mut done = 0;
        while done < segment.file_bytes && found.contains(&false) {
            // Parts overlap by the longest text, so that one across a border is seen.
            let bytes = (segment.file_bytes - done).min(buffer.len() as u64) as usize;
            let Some(part) = buffer.get_mut(..bytes) else { break };
            read_at(file, part, segment.offset.saturating_add(done))?;
            for (finder, found) in finders.iter().zip(found.iter_mut()).filter(|(_, found)| !**found) {
                *found = finder.find(part).is_some();
            }
            done += SCAN_BYTES as u64;
        }
    }
    Ok(())
}

/// Copies `bytes` bytes at `offset` of `file` to guest memory at `address`, without a buffer between.
pub fn stream(
    memory: &GuestMemory,
    what: &'static str,
    file: &File,
    offset: u64,
    address: u64,
    bytes: u64,
) -> Result<(), BootError> {
    let count = usize::try_from(bytes)
        .map_err(|_| BootError::BadElf(format!("the {what} has {bytes} bytes to load")))?;
    let mut reader = Reader::new(file, offset.saturating_add(bytes), offset);
    match memory.read_exact_volatile_from(GuestAddress(address), &mut reader, count) {
        Ok(()) => Ok(()),
        // The file is on a disk that fails, or has become shorter since it was looked at.
        Err(GuestMemoryError::IOError(source)) => Err(BootError::Read { what, source }),
        Err(GuestMemoryError::PartialBuffer { completed, .. }) => Err(truncated(
            &format!("the {what}"),
            offset.saturating_add(bytes),
            offset.saturating_add(completed as u64),
        )),
        Err(error) => Err(BootError::memory(what, address)(error)),
    }
}

fn check_header(header: &[u8; HEADER_BYTES]) -> Result<(), BootError> {
    let not = |reason: &str| Err(BootError::NotAKernel(reason.into()));
    match header {
        [0x7f, b'E', b'L', b'F', 2, 1, 1, ..] => {}
        [0x7f, b'E', b'L', b'F', 1, ..] => return not("a 32-bit ELF file; an x86-64 kernel is needed"),
        [0x7f, b'E', b'L', b'F', ..] => return not("an ELF file of another byte order or version"),
        _ => return not("no ELF file"),
    }
    let machine = u16_at(header, 18);
    if machine != MACHINE_X86_64 {
        return Err(BootError::NotAKernel(format!(
            "an ELF file for another CPU (machine {machine}); an x86-64 kernel is needed"
        )));
    }
    match u16_at(header, 16) {
        TYPE_EXECUTABLE | TYPE_SHARED => Ok(()),
        1 => not("an ELF object file (a kernel module?), not linked"),
        4 => not("an ELF core dump"),
        other => Err(BootError::NotAKernel(format!("an ELF file of type {other}, not an executable"))),
    }
}

fn check_segment(segment: &Segment, bytes: u64) -> Result<(), BootError> {
    let Segment { offset, file_bytes, memory_bytes, virtual_address, physical_address, constant: _ } =
        *segment;
    if file_bytes > memory_bytes {
        return Err(BootError::BadElf(format!(
            "a segment with {file_bytes} bytes in the file but {memory_bytes} in memory"
        )));
    }
    if virtual_address.checked_add(memory_bytes).is_none()
        || physical_address.checked_add(memory_bytes).is_none()
    {
        return Err(BootError::BadElf(format!(
            "a segment of {memory_bytes} bytes at {virtual_address:#x} runs over the end of the address space"
        )));
    }
    let end = offset.saturating_add(file_bytes);
    if end > bytes {
        return Err(truncated(&format!("the segment at {virtual_address:#x}"), end, bytes));
    }
    Ok(())
}

fn truncated(part: &str, needed: u64, bytes: u64) -> BootError {
    BootError::Truncated { part: part.to_owned(), needed, bytes }
}

/// Reads a part of the file whose `size` the caller has bounded.
fn read_part(file: &File, bytes: u64, part: &str, offset: u64, size: usize) -> Result<Vec<u8>, BootError> {
    let end = offset.saturating_add(size as u64);
    if end > bytes {
        return Err(truncated(part, end, bytes));
    }
    let mut buffer = vec![0u8; size];
    read_at(file, &mut buffer, offset)?;
    Ok(buffer)
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), BootError> {
    file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => {
            truncated("its content", offset.saturating_add(buffer.len() as u64), offset)
        }
        _ => BootError::Read { what: "kernel", source },
    })
}

/// Walks ELF notes; ends at the first that does not fit. The padding is 4, or 8 where the segment says so.
struct Notes<'a> {
    bytes: &'a [u8],
    at: usize,
    align: usize,
}

impl<'a> Iterator for Notes<'a> {
    type Item = (&'a [u8], u32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let header = self.bytes.get(self.at..)?.get(..12)?;
        let (name_bytes, value_bytes) = (u32_at(header, 0) as usize, u32_at(header, 4) as usize);
        let name_start = self.at.checked_add(12)?;
        let name_end = name_start.checked_add(name_bytes)?;
        let value_start = name_end.checked_next_multiple_of(self.align)?;
        let value_end = value_start.checked_add(value_bytes)?;
        let name = self.bytes.get(name_start..name_end)?;
        let value = self.bytes.get(value_start..value_end)?;
        self.at = value_end.checked_next_multiple_of(self.align)?;
        Some((name.strip_suffix(b"\0").unwrap_or(name), u32_at(header, 8), value))
    }
}

/// Little-endian fields; zero where `bytes` is too short, which callers have excluded.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

#[cfg(test)]
#[path = "elf_tests.rs"]
mod tests;
