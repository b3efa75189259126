//! Reading physical memory: all of it below 4 GiB is identity-mapped.

use core::arch::asm;

/// End of the identity map.
pub(crate) const IDENTITY_BYTES: u64 = 1 << 32;

/// Physical bytes; `None` outside the identity map.
pub(crate) fn bytes(address: u64, count: u64) -> Option<&'static [u8]> {
    let end = address.checked_add(count)?;
    if address == 0 || end > IDENTITY_BYTES {
        return None;
    }
    // SAFETY: mapped; what loaders leave there is not changed while the guest looks at it.
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, count as usize) })
}

pub(crate) fn read_u16(address: u64) -> Option<u16> {
    Some(u16::from_le_bytes(bytes(address, 2)?.try_into().ok()?))
}

pub(crate) fn read_u32(address: u64) -> Option<u32> {
    Some(u32::from_le_bytes(bytes(address, 4)?.try_into().ok()?))
}

/// A string up to its NUL, at most `max` bytes.
pub(crate) fn c_string(address: u64, max: u64) -> Option<&'static [u8]> {
    let room = bytes(address, max)?;
    room.split(|byte| *byte == 0).next().filter(|text| text.len() < room.len())
}

/// Bytes as text for the console.
pub(crate) fn text(bytes: &[u8]) -> &str {
    core::str::from_utf8(bytes).unwrap_or("(not UTF-8)")
}

/// First address after the guest's own image.
pub(crate) fn image_end() -> u64 {
    unsafe extern "C" {
        static image_end: u8;
    }
    &raw const image_end as u64
}

pub(crate) fn read_mmio(address: u64) -> u32 {
    let value;
    // SAFETY: a device register; reads of those the guest uses have no effect on its memory. One plain instruction, which
    // every emulator knows.
    unsafe {
        asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
    }
    value
}

pub(crate) fn write_mmio(address: u64, value: u32) {
    // SAFETY: a device register of a driver that owns the memory it names to the device.
    unsafe {
        asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) address, options(nostack, preserves_flags))
    }
}
