//! What kind of kernel a file is, and which boot protocol goes with it.
//!
//! Reads the beginning of the file (and, for ELF, what [`super::elf`] reads). Facts: the magic numbers of the formats named;
//! Linux `Documentation/arch/x86/boot.rst` (bzImage header).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::elf::{Addressing, Elf};
use super::error::BootError;
use super::linux::BzImage;
use super::{BootProtocol, file_bytes};

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
