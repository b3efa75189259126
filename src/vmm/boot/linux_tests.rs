//! Synthetic bzImages, and the zero page read back at the offsets of `zero-page.rst`.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::vmm::boot::tests::{c_string, file, input, memory};
use crate::vmm::boot::{BootProtocol, load};

const PREFERRED: u64 = 0x100_0000;

/// A bzImage with one setup sector and a kernel of 4096 bytes.
fn image() -> Vec<u8> {
    let mut image = vec![0u8; 1024 + 4096];
    image[0x1f1] = 1;
    image[0x1f4..0x1f8].copy_from_slice(&256u32.to_le_bytes());
    image[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236] = 1;
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&PREFERRED.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    image[1024..].fill(0xcc);
    image
}

fn page<T: ByteValued>(memory: &crate::vmm::memory::GuestMemory, offset: u64) -> T {
    memory.read_obj(GuestAddress(ZERO_PAGE_START + offset)).expect("RAM")
}

#[test]
fn the_zero_page_tells_everything() {
    let memory = memory(64);
    let (kernel, initrd) = (file(&image()), file(b"initrd content"));
    let module = Some((ModuleKind::Initrd, &initrd));
    let loaded =
        load(&BootInput { module, command_line: "quiet", ..input(&memory, &kernel) }).expect("loads");
    assert_eq!(loaded.protocol, BootProtocol::Linux);
    assert_eq!((loaded.entry.rip, loaded.entry.rsi), (PREFERRED + 0x200, ZERO_PAGE_START));
    assert_eq!(memory.read_obj::<u32>(GuestAddress(PREFERRED)).expect("RAM"), 0xcccc_cccc);

    assert_eq!(page::<u8>(&memory, 0x210), 0xff);
    assert_eq!(page::<u16>(&memory, 0x1fe), 0xaa55);
    assert_eq!(page::<u64>(&memory, 0x70), acpi_start(), "root pointer of the ACPI tables");
    let line = c_string(&memory, page::<u32>(&memory, 0x228).into());
    assert!(
        line.starts_with("console=ttyS0 reboot=k pci=off virtio_mmio.device=") && line.ends_with(" quiet"),
        "{line}"
    );
    let (at, bytes) = (page::<u32>(&memory, 0x218), page::<u32>(&memory, 0x21c));
    assert_eq!((bytes, u64::from(at)), (14, (64 << 20) - 4096));
    assert_eq!(c_string(&memory, at.into()), "initrd content");
    assert_eq!(page::<u8>(&memory, 0x1e8), 3);
    assert_eq!(page::<[u64; 2]>(&memory, 0x2d0), [0, 0x9fc00]);
    assert_eq!(page::<u32>(&memory, 0x2d0 + 16), 1);
    assert_eq!(page::<[u64; 2]>(&memory, 0x2d0 + 40), [1 << 20, 63 << 20]);
}

fn acpi_start() -> u64 {
    crate::vmm::x86::acpi::TABLES_START
}

#[test]
fn damaged_images_are_refused_with_the_reason() {
    let memory = memory(64);
    let with = |at: usize, bytes: &[u8]| {
        let mut image = image();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    for (image, part) in [
        (with(0x206, &[0x00, 0x02]), "2.12"),
        (with(0x211, &[0]), "zImage"),
        (with(0x236, &[0]), "32-bit"),
        (with(0x260, &[1, 0, 0, 0]), "less memory"),
        (with(0x1f4, &[0, 0, 1, 0]), "truncated"),
        (image()[..1024].to_vec(), "truncated"),
        (image()[..0x240].to_vec(), "truncated"),
        (with(0x258, &[0; 8]), "1 MiB or above"),
        (with(0x258, &[0xff; 8]), "3 GiB"),
        (with(0x260, &[0, 0, 0, 0x10]), "272 MiB"),
        (with(0x238, &[1, 0, 0, 0]), "takes 1"),
    ] {
        let error = load(&input(&memory, &file(&image))).expect_err(part).to_string();
        assert!(error.contains(part), "{error}, not {part}");
    }
}

#[test]
fn a_memory_disk_is_not_for_linux() {
    let memory = memory(64);
    let (kernel, image) = (file(&image()), file(b"x"));
    let module = Some((ModuleKind::MemoryDisk, &image));
    assert!(matches!(load(&BootInput { module, ..input(&memory, &kernel) }), Err(BootError::Module(_))));
}

proptest! {
    #[test]
    fn hostile_headers_do_not_panic(header in prop::collection::vec(any::<u8>(), 0x77), version in 0x20cu16..0x210) {
        let memory = memory(32);
        let mut image = image();
        image[0x1f1..0x268].copy_from_slice(&header);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        image[0x211] |= 1;
        image[0x236] |= 1;
        let _ = load(&input(&memory, &file(&image)));
    }
}
