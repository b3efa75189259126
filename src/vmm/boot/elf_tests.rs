//! Hostile and broken ELF files.

use proptest::prelude::*;

use super::*;
use crate::vmm::boot::tests::{ElfBuilder, KERNEL_START, file, memory, note};

fn read(content: &[u8]) -> Result<Elf, BootError> {
    Elf::read(&file(content), content.len() as u64)
}

#[test]
fn marks_and_notes_are_found() {
    let elf = read(&ElfBuilder::freebsd().build()).expect("good");
    assert!(elf.freebsd && !elf.linux);
    assert_eq!(elf.pvh_entry, Some(KERNEL_START as u32 + 0x20));
    let elf = read(&ElfBuilder::linux().build()).expect("good");
    assert!(!elf.freebsd && elf.linux);
    assert_eq!(elf.segments.len(), 2);
}

#[test]
fn freebsd_is_known_by_any_of_its_marks() {
    let plain = || ElfBuilder { osabi: 0, notes: Vec::new(), ..ElfBuilder::freebsd() };
    assert!(!read(&plain().build()).expect("good").freebsd);
    for marked in [
        ElfBuilder { osabi: 9, ..plain() },
        ElfBuilder { interpreter: Some(b"/red/herring\0"), ..plain() },
        ElfBuilder { section_name: Some(b"set_sysinit_set"), ..plain() },
        ElfBuilder { notes: note(b"FreeBSD", 1, &[0; 4]), ..plain() },
        ElfBuilder { notes: note(b"Xen", 6, b"FreeBSD\0"), ..plain() },
    ] {
        assert!(read(&marked.build()).expect("good").freebsd);
    }
}

#[test]
fn a_note_in_a_section_only_is_found() {
    let kernel = ElfBuilder { notes_in_section: true, ..ElfBuilder::freebsd() };
    assert_eq!(read(&kernel.build()).expect("good").pvh_entry, Some(KERNEL_START as u32 + 0x20));
}

#[test]
fn eight_byte_entries_are_taken_if_they_fit() {
    let kernel =
        |entry: u64| ElfBuilder { notes: note(b"Xen", 18, &entry.to_le_bytes()), ..ElfBuilder::freebsd() };
    assert_eq!(read(&kernel(0x20_0020).build()).expect("good").pvh_entry, Some(0x20_0020));
    assert!(matches!(read(&kernel(1 << 32).build()), Err(BootError::BadElf(_))));
    let short = ElfBuilder { notes: note(b"Xen", 18, &[1, 2]), ..ElfBuilder::freebsd() };
    assert!(matches!(read(&short.build()), Err(BootError::BadElf(_))));
}

#[test]
fn every_truncation_is_an_error_and_none_a_panic() {
    let whole =
        ElfBuilder { section_name: Some(b"set_sysinit_set"), osabi: 0, ..ElfBuilder::freebsd() }.build();
    for bytes in 0..whole.len() {
        let error = read(&whole[..bytes]).expect_err("broken off");
        assert!(matches!(error, BootError::Truncated { .. }), "{bytes}: {error}");
    }
    assert!(read(&whole).is_ok());
}

#[test]
fn other_cpus_and_kinds_are_named() {
    let arm = ElfBuilder { machine: 183, ..ElfBuilder::freebsd() }.build();
    assert!(read(&arm).expect_err("arm").to_string().contains("another CPU"));
    let mut narrow = ElfBuilder::freebsd().build();
    narrow[4] = 1;
    assert!(read(&narrow).expect_err("32-bit").to_string().contains("32-bit"));
    let mut object = ElfBuilder::freebsd().build();
    object[16] = 1;
    assert!(read(&object).expect_err("object").to_string().contains("object"));
}

#[test]
fn segments_that_lie_are_refused() {
    let with = |v, p, content: &[u8], bytes| {
        ElfBuilder { segments: vec![(v, p, content.to_vec(), bytes)], ..ElfBuilder::freebsd() }.build()
    };
    assert!(matches!(read(&with(KERNBASE, 0, b"longer", 2)), Err(BootError::BadElf(_))));
    assert!(matches!(read(&with(u64::MAX - 1, 0, b"", 10)), Err(BootError::BadElf(_))));
    assert!(matches!(read(&with(KERNBASE, u64::MAX - 1, b"", 10)), Err(BootError::BadElf(_))));
    assert!(matches!(read(&with(KERNBASE, 0, b"", 0)), Err(BootError::NotAKernel(_))));
}

#[test]
fn loading_puts_bytes_where_the_addressing_says() {
    let memory = memory(16);
    let content = ElfBuilder::freebsd().build();
    let file = file(&content);
    let elf = Elf::read(&file, content.len() as u64).expect("good");
    let range = elf.load(&memory, &file, Addressing::Window).expect("loads");
    assert_eq!(range, Range { start: KERNEL_START, end: KERNEL_START + 0x3000 });
    let mut loaded = [0u8; 25];
    memory.read_slice(&mut loaded, GuestAddress(KERNEL_START)).expect("RAM");
    assert_eq!(&loaded, b"first segment, with code\0");
}

#[test]
fn a_virtual_address_in_the_physical_field_is_understood() {
    let at = KERNBASE + KERNEL_START;
    let kernel = ElfBuilder { segments: vec![(at, at, vec![7; 8], 8)], ..ElfBuilder::freebsd() };
    let elf = read(&kernel.build()).expect("good");
    assert_eq!(elf.range(Addressing::Physical).expect("fits").start, KERNEL_START);
}

#[test]
fn kernels_outside_ram_are_told_how_much_is_needed() {
    let memory = memory(4);
    for (physical, bytes, part) in
        [(8 << 20, 64, "9 MiB"), (0x1000, 64, "1 MiB or above"), (1 << 40, 64, "3 GiB")]
    {
        let segments = vec![(KERNBASE, physical, Vec::new(), bytes)];
        let content = ElfBuilder { segments, ..ElfBuilder::freebsd() }.build();
        let elf = read(&content).expect("good");
        let error =
            elf.load(&memory, &file(&content), Addressing::Physical).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_loaded_is_truncated() {
    let memory = memory(16);
    let content = ElfBuilder::freebsd().build();
    let file = file(&content);
    let elf = Elf::read(&file, content.len() as u64).expect("good");
    file.set_len(70).expect("shrinks");
    assert!(matches!(elf.load(&memory, &file, Addressing::Window), Err(BootError::Truncated { .. })));
}

#[test]
fn texts_are_found_wherever_they_lie() {
    for at in [0, SCAN_BYTES - 3, SCAN_BYTES - 1, SCAN_BYTES, 2 * SCAN_BYTES + 7, 3 * SCAN_BYTES - 6] {
        let mut content = vec![0u8; 3 * SCAN_BYTES];
        content[at..at + 6].copy_from_slice(b"needle");
        let segments = vec![(KERNBASE + KERNEL_START, KERNEL_START, content, 4 << 20)];
        let kernel = ElfBuilder { segments, ..ElfBuilder::freebsd() };
        let content = kernel.build();
        let elf = read(&content).expect("good");
        let found = elf.contains(&file(&content), &[b"needle", b"noodle"]).expect("readable");
        assert_eq!(found, [true, false], "at {at}");
    }
}

#[test]
fn segments_of_constants_come_first_and_suffice() {
    let segment = |n: u64, text: &[u8]| {
        let start = KERNEL_START + n * (2 << 20);
        (KERNBASE + start, start, text.to_vec(), 2 << 20)
    };
    let found = |texts: [&[u8]; 2], constant: usize| {
        let segments = vec![segment(0, texts[0]), segment(1, texts[1])];
        let mut content = ElfBuilder { segments, ..ElfBuilder::freebsd() }.build();
        let flags = 64 + 56 * constant + 4;
        content[flags] = 4;
        let elf = read(&content).expect("good");
        elf.contains(&file(&content), &[b"needle", b"noodle"]).expect("readable")
    };
    assert_eq!(found([b"a noodle", b"a needle"], 1), [true, false], "the program's text is not looked into");
    assert_eq!(found([b"a noodle", b"a needle"], 0), [false, true]);
    assert_eq!(found([b"a needle, a noodle", b"nothing"], 1), [true, true], "constants are elsewhere");
}

proptest! {
    #[test]
    fn damaged_files_do_not_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        linux in any::<bool>(),
    ) {
        let mut content = if linux { ElfBuilder::linux() } else { ElfBuilder::freebsd() }.build();
        for (at, value) in damage {
            let at = at.index(content.len().min(512));
            content[at] = value;
        }
        let file = file(&content);
        if let Ok(elf) = Elf::read(&file, content.len() as u64) {
            let memory = memory(32);
            let _ = elf.load(&memory, &file, Addressing::Window);
            let _ = elf.load(&memory, &file, Addressing::Physical);
            let _ = elf.covers(Addressing::Window, elf.entry);
        }
    }

    #[test]
    fn any_notes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), align in prop::sample::select(vec![4usize, 8])) {
        let notes = Notes { bytes: &bytes, at: 0, align }.count();
        prop_assert!(notes <= bytes.len());
    }
}
