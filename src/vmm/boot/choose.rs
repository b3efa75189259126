//! What kind of kernel a file is, and which boot protocol and which machine go with it.
//!
//! Reads the beginning of the file (and, for ELF, what [`super::elf`] reads). Facts: the magic numbers of the formats named;
//! Linux `Documentation/arch/x86/boot.rst` (bzImage header); what FreeBSD's drivers say of themselves in
//! `sys/dev/virtio/{mmio,pci}` and `sys/x86/x86/mptable.c`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::elf::{Addressing, Elf};
use super::error::BootError;
use super::linux::BzImage;
use super::{BootProtocol, Hardware, HardwareWish, file_bytes};

/// A kernel file, looked into.
#[derive(Debug)]
pub enum Kernel {
    Elf(Elf),
    BzImage(BzImage),
}

/// Beginnings of files that are given by mistake, with what to say.
const COMPRESSED: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x5d\0\0", "lzma"),
    (b"\x89LZO", "lzo"),
    (b"PK\x03\x04", "zip"),
];

/// FreeBSD kernels take more memory than this, the test guest less.
const FREEBSD_BYTES_MIN: u64 = 6 << 20;

/// Drivers in a FreeBSD kernel that decide about its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drivers {
    pub virtio_mmio: bool,
    pub mptable: bool,
    /// The modern one.
    pub virtio_pci: bool,
    /// FreeBSD 12 and before have no other.
    pub virtio_pci_legacy: bool,
}

/// Looks for the drivers in a FreeBSD kernel; `None`: too small to be FreeBSD itself.
pub fn freebsd_drivers(file: &File, elf: &Elf) -> Result<Option<Drivers>, BootError> {
    let range = elf.range(Addressing::Physical)?;
    if range.end.saturating_sub(range.start) < FREEBSD_BYTES_MIN {
        return Ok(None);
    }
    let texts: [&[u8]; 5] = [
        b"VirtIO MMIO adapter",
        b"MPTable: <",
        b"VirtIO PCI (modern) ",
        b"VirtIO PCI (legacy) ",
        b"VirtIO PCI %s adapter", // 12 and before.
    ];
    let found = elf.contains(file, &texts)?;
    let has = |index: usize| found.get(index).copied().unwrap_or(false);
    Ok(Some(Drivers {
        virtio_mmio: has(0),
        mptable: has(1),
        virtio_pci: has(2),
        virtio_pci_legacy: has(3) || has(4),
    }))
}

/// The machine to make, with a line for each choice and each driver that the kernel will miss there: it would stop at
/// its mountroot prompt, or earlier, with no hint of why.
pub fn hardware(drivers: Option<Drivers>, wish: HardwareWish) -> (Hardware, Vec<String>) {
    let legacy_only = drivers.is_some_and(|drivers| drivers.virtio_pci_legacy && !drivers.virtio_pci);
    let pc = Hardware::Pc { transitional: legacy_only };
    let (hardware, why) = match (wish, drivers) {
        (HardwareWish::Microvm, _) => (Hardware::Microvm, "as asked"),
        (HardwareWish::Pc, _) => (pc, "as asked"),
        (HardwareWish::Auto, Some(Drivers { virtio_mmio: true, .. })) => {
            (Hardware::Microvm, "the kernel has a virtio_mmio driver")
        }
        (HardwareWish::Auto, Some(drivers)) if drivers.virtio_pci || drivers.virtio_pci_legacy => {
            (pc, "the kernel has a virtio_pci driver and no virtio_mmio")
        }
        (HardwareWish::Auto, _) => (Hardware::Microvm, "the default"),
    };
    let what = match hardware {
        Hardware::Microvm => "microvm (virtio-mmio",
        Hardware::Pc { transitional: false } => "pc (ACPI, virtio-pci",
        Hardware::Pc { transitional: true } => "pc (ACPI, virtio-pci with the legacy interface",
    };
    let mut choices = vec![format!("hardware: {what}; {why})")];
    let missing: &[(bool, &str, &str)] = match (drivers, hardware) {
        (None, _) => &[],
        (Some(d), Hardware::Microvm) => &[
            (d.virtio_mmio, "virtio_mmio", "it will find no disk, console or network device"),
            (d.mptable, "mptable", "it will find one CPU and no interrupts"),
        ],
        (Some(d), Hardware::Pc { .. }) => &[(
            d.virtio_pci || d.virtio_pci_legacy,
            "virtio_pci",
            "it will find no disk, console or network device",
        )],
    };
    choices.extend(missing.iter().filter(|(found, ..)| !found).map(|(_, device, what)| {
        format!("warning: this kernel has no {device} driver, so {what}; add: device {device}")
    }));
    (hardware, choices)
}

/// Looks into the file.
pub fn identify(file: &File) -> Result<Kernel, BootError> {
    let bytes = file_bytes("kernel", file)?;
    let mut head = vec![0u8; bytes.min(1024) as usize];
    file.read_exact_at(&mut head, 0).map_err(|source| BootError::Read { what: "kernel", source })?;
    if head.starts_with(b"\x7fELF") {
        return Elf::read(file, bytes).map(Kernel::Elf);
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return BzImage::read(&head, bytes).map(Kernel::BzImage);
    }
    if let Some((_, name)) = COMPRESSED.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(BootError::Compressed(name));
    }
    let not = |what: &str| Err(BootError::NotAKernel(what.into()));
    match head.as_slice() {
        [b'#', b'!', ..] => not("a script"),
        [b'Q', b'F', b'I', 0xfb, ..] => {
            not("a QCOW disk image; give the kernel file here, and the disk in raw form as a disk")
        }
        [b'0', b'7', b'0', b'7', b'0', ..] => not("a cpio archive (an initrd?)"),
        [b'M', b'Z', ..] => {
            not("an EFI program without a Linux x86 header; give the kernel itself, not its loader")
        }
        _ if head.get(512..520) == Some(b"EFI PART") || head.get(510..512) == Some(b"\x55\xaa") => {
            not("a disk image; give the kernel file here, and this as a disk")
        }
        _ => not("neither an ELF file nor a Linux bzImage"),
    }
}

/// The protocol to use, or why the one asked for does not go with this kernel.
pub fn protocol(kernel: &Kernel, asked: BootProtocol) -> Result<BootProtocol, BootError> {
    let refuse = |reason: &str| Err(BootError::Protocol { protocol: name(asked), reason: reason.into() });
    match (kernel, asked) {
        (Kernel::BzImage(_), BootProtocol::Auto | BootProtocol::Linux) => Ok(BootProtocol::Linux),
        (Kernel::BzImage(_), _) => refuse("it is a Linux bzImage; use the Linux protocol (or its vmlinux for PVH)"),
        (Kernel::Elf(_), BootProtocol::Linux) => {
            refuse("it is an ELF file; the Linux protocol starts bzImage files, PVH starts a vmlinux")
        }
        (Kernel::Elf(elf), BootProtocol::FreeBsd) if !elf.freebsd => {
            refuse("it bears none of FreeBSD's marks; use PVH if it has the entry note")
        }
        (Kernel::Elf(elf), BootProtocol::FreeBsd | BootProtocol::Auto) if elf.freebsd => {
            elf.range(Addressing::Window)?; // A FreeBSD program that is no kernel ends here.
            Ok(BootProtocol::FreeBsd)
        }
        (Kernel::Elf(elf), BootProtocol::Pvh | BootProtocol::Auto) if elf.pvh_entry.is_some() => Ok(BootProtocol::Pvh),
        (Kernel::Elf(_), BootProtocol::Pvh) => {
            refuse("it has no Xen PHYS32_ENTRY note (FreeBSD: build with options XENHVM; Linux: CONFIG_PVH)")
        }
        (Kernel::Elf(_), _) => Err(BootError::NotAKernel(
            "an ELF file with neither FreeBSD's marks nor a PVH entry note (a program? a Linux without CONFIG_PVH?)".into(),
        )),
    }
}

/// A protocol's name as people write it.
pub fn name(protocol: BootProtocol) -> &'static str {
    match protocol {
        BootProtocol::Auto => "auto",
        BootProtocol::FreeBsd => "FreeBSD native",
        BootProtocol::Pvh => "PVH",
        BootProtocol::Linux => "Linux",
    }
}

/// The line about kernel and protocol.
pub fn describe(kernel: &Kernel, used: BootProtocol, asked: BootProtocol) -> String {
    let what = match kernel {
        Kernel::BzImage(_) => "Linux bzImage",
        Kernel::Elf(elf) if elf.freebsd => "FreeBSD ELF kernel",
        Kernel::Elf(elf) if elf.linux => "Linux ELF kernel",
        Kernel::Elf(_) => "ELF kernel with a PVH entry",
    };
    let why = if asked == BootProtocol::Auto { "found in the file" } else { "as asked" };
    format!("protocol: {} ({what}, {why})", name(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Drivers =
        Drivers { virtio_mmio: false, mptable: false, virtio_pci: false, virtio_pci_legacy: false };

    fn auto(drivers: Drivers) -> Hardware {
        hardware(Some(drivers), HardwareWish::Auto).0
    }

    #[test]
    fn the_machine_has_what_the_kernel_can_drive() {
        let firecracker = Drivers { virtio_mmio: true, mptable: true, ..NONE };
        assert_eq!(auto(firecracker), Hardware::Microvm);
        let generic = Drivers { virtio_pci: true, virtio_pci_legacy: true, ..NONE };
        assert_eq!(auto(generic), Hardware::Pc { transitional: false });
        let old = Drivers { virtio_pci_legacy: true, mptable: true, ..NONE };
        assert_eq!(auto(old), Hardware::Pc { transitional: true });
        assert_eq!(auto(Drivers { virtio_mmio: true, ..generic }), Hardware::Microvm, "the faster one");
        assert_eq!(hardware(None, HardwareWish::Auto).0, Hardware::Microvm);
        assert_eq!(hardware(None, HardwareWish::Pc).0, Hardware::Pc { transitional: false });
        assert_eq!(hardware(Some(old), HardwareWish::Pc).0, Hardware::Pc { transitional: true });
        assert_eq!(hardware(Some(generic), HardwareWish::Microvm).0, Hardware::Microvm);
    }

    #[test]
    fn a_missing_driver_is_told() {
        let warnings = |drivers, wish| {
            let lines = hardware(Some(drivers), wish).1;
            lines.into_iter().filter(|line| line.starts_with("warning")).collect::<Vec<_>>()
        };
        let generic = Drivers { virtio_pci: true, ..NONE };
        assert!(warnings(generic, HardwareWish::Auto).is_empty());
        let two = warnings(generic, HardwareWish::Microvm);
        assert!(two.len() == 2 && two[0].contains("virtio_mmio") && two[1].contains("mptable"), "{two:?}");
        let one = warnings(Drivers { virtio_mmio: true, mptable: true, ..NONE }, HardwareWish::Pc);
        assert!(one.len() == 1 && one[0].contains("virtio_pci"), "{one:?}");
    }
}
