//! Walks what was written as FreeBSD's `preload_*` functions and `hammer_time` do.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::boot::tests::{ElfBuilder, KERNEL_START, c_string, file, input, memory};
use crate::vmm::boot::{BootProtocol, load};
use crate::vmm::memory::GuestMemory;

type Record = (u32, Vec<u8>);

/// modulep and kernend from the stack, as `btext` takes them.
fn arguments(memory: &GuestMemory, entry: &Entry) -> (u64, u64) {
    let word = |at| u64::from(memory.read_obj::<u32>(GuestAddress(at)).expect("stack in RAM"));
    (word(entry.rsp + 4), word(entry.rsp + 8))
}

fn records(memory: &GuestMemory, mut at: u64) -> Vec<Record> {
    let mut records = Vec::new();
    loop {
        let [kind, bytes]: [u32; 2] = memory.read_obj(GuestAddress(at)).expect("in RAM");
        if kind == 0 && bytes == 0 {
            return records;
        }
        let mut data = vec![0u8; bytes as usize];
        memory.read_slice(&mut data, GuestAddress(at + 8)).expect("in RAM");
        records.push((kind, data));
        assert!(records.len() < 100, "no end of the records");
        at += u64::from(8 + bytes).next_multiple_of(8);
    }
}

/// The records of the first file of `kind`.
fn file_records(all: &[Record], kind: &str) -> Vec<Record> {
    let mut files = all.chunk_by(|_, next| next.0 != NAME);
    let of_kind =
        |f: &&[Record]| f.iter().any(|(k, d)| *k == TYPE && d == &[kind.as_bytes(), b"\0"].concat());
    files.find(of_kind).unwrap_or_else(|| panic!("no {kind}")).to_vec()
}

fn number(records: &[Record], kind: u32) -> u64 {
    let data = &records.iter().find(|(k, _)| *k == kind).unwrap_or_else(|| panic!("no record {kind:#x}")).1;
    data.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

fn environment(memory: &GuestMemory, mut at: u64) -> Vec<String> {
    let mut variables = Vec::new();
    loop {
        let variable = c_string(memory, at);
        if variable.is_empty() {
            return variables;
        }
        at += variable.len() as u64 + 1;
        variables.push(variable);
    }
}

#[test]
fn the_kernel_finds_everything() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let loaded = load(&BootInput { command_line: "-v a.b=c,d", ..input(&memory, &kernel) }).expect("loads");
    let (modulep, kernend) = arguments(&memory, &loaded.entry);
    assert_eq!(modulep, 0x20_4000);
    assert_eq!(kernend % 4096, 0);

    let all = records(&memory, modulep);
    assert_eq!(all[0].0, NAME, "the name must come first");
    let kernel = file_records(&all, "elf kernel");
    assert_eq!(number(&kernel, ADDR), KERNEL_START);
    assert_eq!(number(&kernel, SIZE), 0x3000);
    assert_eq!(number(&kernel, MODULEP), modulep);
    assert_eq!(number(&kernel, KERNEND), kernend);
    assert_eq!(number(&kernel, HOWTO), 0x1000 | 0x800);
    let seed = file_records(&all, "boot_entropy_cache");
    assert_eq!((number(&seed, ADDR), number(&seed, SIZE)), (0x20_3000, 4096));
    let mut bytes = [0u8; 4096];
    memory.read_slice(&mut bytes, GuestAddress(0x20_3000)).expect("RAM");
    assert!(bytes.chunks(64).all(|part| part.iter().any(|b| *b != 0)), "not all of it is random");
    assert!(modulep < number(&kernel, ENVP) && number(&kernel, ENVP) < kernend);

    let variables = environment(&memory, number(&kernel, ENVP));
    for wanted in [
        "console=comconsole",
        "boot_serial=YES",
        "hint.uart.0.flags=0x10",
        "hint.acpi.0.disabled=1",
        "virtio_mmio.device=0x1000@0xd0000000:5",
        "virtio_mmio.device_1=0x1000@0xd0001000:6",
        "a.b=c,d",
    ] {
        assert!(variables.iter().any(|v| v == wanted), "{wanted} not in {variables:?}");
    }
}

/// What costs a FreeBSD boot time and a VMM can remove (FREEBSD.md section 9), and what must not be set for it.
#[test]
fn the_environment_spares_waits_and_hides_nothing() {
    for hardware in [Hardware::Microvm, Hardware::Pc { transitional: false }] {
        let environment = default_environment(hardware, AgentPort::Virtio, &[], None);
        for absent in ["uart.1", "uart.2", "uart.3", "atkbdc.0", "atkbd.0", "psm.0"] {
            let name = format!("hint.{absent}.disabled");
            assert_eq!(environment.get(&name), Some("1"), "{name}");
        }
        assert_eq!(environment.get("hint.uart.0.baud"), Some("115200"));
        assert_eq!(environment.get("kern.shutdown.poweroff_delay"), Some("0"));
        // A muted kernel would panic and halt unheard; our serial port needs no mending; a kernel that does not read the
        // frequency leaf must be able to calibrate.
        for unset in ["boot_mute", "hw.broken_txfifo", "machdep.disable_tsc_calibration"] {
            assert_eq!(environment.get(unset), None, "{unset}");
        }
        let microvm = (hardware == Hardware::Microvm).then_some("1");
        assert_eq!(environment.get("hint.acpi.0.disabled"), microvm);
        assert_eq!(environment.get("hint.pcib.0.disabled"), microvm);
        assert_eq!(environment.get("coldspark.agent_port"), None);
        // With an agent behind it, COM2 is to be found, and the agent's start script told.
        let environment = default_environment(hardware, AgentPort::Serial, &[], None);
        assert_eq!(environment.get("hint.uart.1.disabled"), None);
        assert_eq!(environment.get("hint.uart.1.port"), Some("0x2F8"));
        assert_eq!(environment.get("hint.uart.1.irq"), Some("3"));
        assert_eq!(environment.get("coldspark.agent_port"), Some("/dev/cuau1"));
    }
}

#[test]
fn smap_is_the_memory_map() {
    let ranges = [(GuestAddress(0), 64 << 20), (GuestAddress(1 << 32), 4 << 20)];
    let memory = GuestMemory::from_ranges(&ranges).expect("memory");
    let kernel = ElfBuilder::freebsd().file();
    let loaded = load(&input(&memory, &kernel)).expect("loads");
    let all = records(&memory, arguments(&memory, &loaded.entry).0);
    let smap = &file_records(&all, "elf kernel").into_iter().find(|(k, _)| *k == SMAP).expect("SMAP").1;
    let entries: Vec<_> =
        smap.chunks_exact(20).map(|e| (elf::u64_at(e, 0), elf::u64_at(e, 8), elf::u32_at(e, 16))).collect();
    assert_eq!(smap.len() % 20, 0);
    assert_eq!(
        entries,
        [(0, 0x9fc00, 1), (0x9fc00, 0x60400, 2), (1 << 20, 63 << 20, 1), (1 << 32, 4 << 20, 1)]
    );
}

#[test]
fn a_memory_disk_is_a_file_of_its_own_and_the_root() {
    let memory = memory(64);
    let (kernel, image) = (ElfBuilder::freebsd().file(), file(&[0xa5; 10_000]));
    let module = Some((ModuleKind::MemoryDisk, &image));
    let loaded = load(&BootInput { module, ..input(&memory, &kernel) }).expect("loads");
    let (modulep, _) = arguments(&memory, &loaded.entry);
    let all = records(&memory, modulep);
    let disk = file_records(&all, "md_image");
    assert_eq!((number(&disk, ADDR), number(&disk, SIZE)), (0x20_3000, 10_000));
    let mut content = [0u8; 10_001];
    memory.read_slice(&mut content, GuestAddress(0x20_3000)).expect("RAM");
    assert!(content[..10_000].iter().all(|b| *b == 0xa5) && content[10_000] == 0);
    let variables = environment(&memory, number(&file_records(&all, "elf kernel"), ENVP));
    assert!(variables.iter().any(|v| v == "vfs.root.mountfrom=ufs:/dev/md0"));
    assert!(loaded.choices.iter().any(|c| c.contains("memory disk")));
}

#[test]
fn the_environment_may_be_larger_than_a_page() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let line: String = (0..100).map(|i| format!("test.variable.{i}={} ", "x".repeat(100))).collect();
    let loaded = load(&BootInput { command_line: &line, ..input(&memory, &kernel) }).expect("loads");
    let (modulep, kernend) = arguments(&memory, &loaded.entry);
    let kernel = file_records(&records(&memory, modulep), "elf kernel");
    let envp = number(&kernel, ENVP);
    assert!(kernend - envp > 8192);
    assert!(environment(&memory, envp).iter().any(|v| v.starts_with("test.variable.99=xxx")));
}

#[test]
fn memory_that_is_too_small_says_how_much_is_needed() {
    let kernel = ElfBuilder::freebsd().file();
    let error = load(&input(&memory(4), &kernel)).expect_err("too small").to_string();
    assert!(error.contains("up to 7 MiB"), "{error}");
    assert!(load(&input(&memory(7), &kernel)).is_ok());

    let image = tempfile::tempfile().expect("file");
    image.set_len(1 << 30).expect("sparse");
    let module = Some((ModuleKind::MemoryDisk, &image));
    let error =
        load(&BootInput { module, ..input(&memory(16), &kernel) }).expect_err("too large").to_string();
    assert!(error.contains("first GiB"), "{error}");
}

#[test]
fn wrong_modules_and_entries_are_refused() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let image = file(b"x");
    let module = Some((ModuleKind::Initrd, &image));
    let error = load(&BootInput { module, ..input(&memory, &kernel) }).expect_err("refused").to_string();
    assert!(error.contains("initrd is for Linux"), "{error}");
    let empty = file(b"");
    let module = Some((ModuleKind::MemoryDisk, &empty));
    assert!(matches!(load(&BootInput { module, ..input(&memory, &kernel) }), Err(BootError::Empty { .. })));

    for entry in [0, KERNBASE, KERNBASE + KERNEL_START + 0x3000] {
        let kernel = ElfBuilder { entry, ..ElfBuilder::freebsd() }.file();
        let input = BootInput { protocol: BootProtocol::FreeBsd, ..input(&memory, &kernel) };
        assert!(matches!(load(&input), Err(BootError::BadElf(_))), "{entry:#x}");
    }
}
