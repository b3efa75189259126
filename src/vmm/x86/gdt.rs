//! Segment descriptors for the boot CPU: the table in guest memory and the same segments as KVM's cached registers.
//!
//! Touches guest memory only at [`GDT_START`]. Both kinds of entry use it: long mode (FreeBSD's native protocol,
//! Linux's 64-bit entry) and flat 32-bit protected mode (PVH). Facts: Intel SDM volume 3, sections 3.4.5 and 7.2.
//! The descriptors lie in memory as well as in the registers, because a guest may reload a selector before it
//! loads a table of its own.

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::memory::GuestMemory;

/// Where the table lies: below 1 MiB, so that no kernel allocates over it before it has its own.
pub const GDT_START: u64 = 0x1000;
/// Null, code, data and a 16-byte task state descriptor.
const GDT_BYTES: u16 = 5 * 8;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The mode in which the guest is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit, paging on with the tables whose top page is at `page_table`.
    Long { page_table: u64 },
    /// Flat 32-bit protected mode, paging off.
    Protected,
}

fn code(mode: Mode) -> kvm_segment {
    let long = matches!(mode, Mode::Long { .. });
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: 0xb, // Execute, read, accessed.
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn data() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: DATA_SELECTOR,
        type_: 0x3, // Read, write, accessed.
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// The busy TSS that VMX and SVM want to see in TR (PVH demands limit 0x67). No kernel uses it.
fn task() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    }
}

/// The 8-byte descriptor of `segment`; for the task state segment this is the lower half.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let access = u64::from(segment.type_ & 0xf)
        | u64::from(segment.s & 1) << 4
        | u64::from(segment.dpl & 3) << 5
        | u64::from(segment.present & 1) << 7;
    let flags = u64::from(segment.avl & 1)
        | u64::from(segment.l & 1) << 1
        | u64::from(segment.db & 1) << 2
        | u64::from(segment.g & 1) << 3;
    u64::from(limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Writes the table for `mode`.
pub fn write(memory: &GuestMemory, mode: Mode) -> Result<(), vm_memory::GuestMemoryError> {
    let entries = [0, descriptor(&code(mode)), descriptor(&data()), descriptor(&task()), 0];
    for (i, entry) in entries.into_iter().enumerate() {
        memory.write_slice(&entry.to_le_bytes(), GuestAddress(GDT_START + i as u64 * 8))?;
    }
    Ok(())
}

/// Sets segment, table, control and EFER registers for `mode`; leaves the APIC base and pending interrupts alone.
pub fn apply(mode: Mode, sregs: &mut kvm_sregs) {
    sregs.cs = code(mode);
    sregs.ds = data();
    sregs.es = data();
    sregs.fs = data();
    sregs.gs = data();
    sregs.ss = data();
    sregs.tr = task();
    sregs.ldt = kvm_segment { unusable: 1, type_: 0x2, ..Default::default() };
    sregs.gdt.base = GDT_START;
    sregs.gdt.limit = GDT_BYTES - 1;
    // No table: an exception before the kernel has its own is a triple fault, which is seen as a reset.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr2 = 0;
    sregs.cr8 = 0;
    match mode {
        Mode::Long { page_table } => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = page_table;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        Mode::Protected => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory")
    }

    fn entry(memory: &GuestMemory, index: u64) -> u64 {
        memory.read_obj(GuestAddress(GDT_START + index * 8)).expect("in memory")
    }

    #[test]
    fn descriptors_are_the_usual_constants() {
        let memory = memory();
        write(&memory, Mode::Long { page_table: 0x2000 }).expect("fits");
        assert_eq!(entry(&memory, 0), 0);
        assert_eq!(entry(&memory, 1), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(&memory, 2), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(&memory, 3), 0x0000_8b00_0000_0067);
        write(&memory, Mode::Protected).expect("fits");
        assert_eq!(entry(&memory, 1), 0x00cf_9b00_0000_ffff);
    }

    #[test]
    fn registers_fit_the_mode() {
        let mut sregs = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        apply(Mode::Long { page_table: 0x2000 }, &mut sregs);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0011, 0x2000, 0x20, 0x500));
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_eq!(sregs.apic_base, 0xfee0_0900, "the boot CPU bit and the enable bit must survive");
        apply(Mode::Protected, &mut sregs);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.tr.limit), (0, 1, 0x67));
    }

    #[test]
    fn memory_too_small_is_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        assert!(write(&memory, Mode::Protected).is_err());
    }
}
