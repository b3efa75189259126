//! What a kernel file is, told from its first bytes: enough to refuse one for another processor when it is brought, not when
//! it is booted. The boot builder reads more and decides.
//!
//! Facts: System V ABI, chapter 4 (ELF header); the machine numbers of FreeBSD's `sys/sys/elf_common.h`; Linux
//! `Documentation/arch/x86/boot.rst`.

use super::u16_at;

/// Bytes of the file that [`look`] wants.
pub const HEAD_BYTES: usize = 1024;
const MACHINE_AMD64: u16 = 62;

/// Processors that kernels are made for.
const MACHINES: &[(u16, &str)] = &[
    (2, "SPARC"),
    (3, "i386"),
    (8, "MIPS"),
    (20, "PowerPC"),
    (21, "64-bit PowerPC"),
    (40, "32-bit ARM"),
    (43, "64-bit SPARC"),
    (183, "64-bit ARM (aarch64)"),
    (243, "RISC-V"),
    (258, "LoongArch"),
];

/// What is known of a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// An ELF file for amd64.
    Amd64,
    /// A Linux bzImage.
    BzImage,
    /// Nothing that is known here; the boot builder says more.
    Unknown,
}

/// Looks at a file's first bytes.
///
/// # Errors
/// It is a kernel, or another program, that can never run here: the sentence says what it is and what to do.
pub fn look(head: &[u8]) -> Result<Look, String> {
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(Look::BzImage);
    }
    if !head.starts_with(b"\x7fELF") {
        return Ok(Look::Unknown);
    }
    let advice = "this service runs amd64 guests: take the kernel of an amd64 build";
    if head.get(5) == Some(&2) {
        return Err(format!("an ELF file for a big-endian processor; {advice}"));
    }
    let machine = u16_at(head, 18);
    if machine == MACHINE_AMD64 {
        return match head.get(4) {
            Some(1) => Err(format!("a 32-bit ELF file; {advice}")),
            _ => Ok(Look::Amd64),
        };
    }
    match MACHINES.iter().find(|(number, _)| *number == machine) {
        Some((_, name)) => Err(format!("an ELF file for {name}; {advice}")),
        None => Err(format!("an ELF file for another processor (ELF machine {machine}); {advice}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(class: u8, order: u8, machine: u16) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, order]);
        head[18..20].copy_from_slice(&machine.to_le_bytes());
        head
    }

    #[test]
    fn kernels_for_others_are_named() {
        assert_eq!(look(&elf(2, 1, 62)), Ok(Look::Amd64));
        for (head, says) in [
            (elf(2, 1, 183), "aarch64"),
            (elf(1, 1, 3), "i386"),
            (elf(2, 1, 243), "RISC-V"),
            (elf(2, 1, 9999), "9999"),
            (elf(2, 2, 21), "big-endian"),
            (elf(1, 1, 62), "32-bit"),
        ] {
            let error = look(&head).unwrap_err();
            assert!(error.contains(says) && error.contains("amd64"), "{error}");
        }
        assert_eq!(look(b""), Ok(Look::Unknown));
        assert!(look(b"\x7fELF").is_err());
        assert_eq!(look(&[0x90; 2000]), Ok(Look::Unknown));
        let mut linux = vec![0; 0x400];
        linux[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(look(&linux), Ok(Look::BzImage));
    }
}
