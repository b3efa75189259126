//! The I/O APIC (Intel 82093AA data sheet), ours because the interrupt chip is split: KVM has the local APICs.
//!
//! Each pin that a device uses has an irqfd, and each redirection entry that is unmasked is one MSI route of the
//! same GSI number: an edge is one eventfd write, with no lock and no exit. Routes are set again when the guest
//! rewrites an entry, which it does at boot.
//!
//! An edge that meets a masked entry is kept and delivered on unmasking. The data sheet would drop it; a guest that
//! masks a line to move it to another CPU would then hang on a virtio device that signals once.
//!
//! Level-triggered inputs ([`LevelLine`]: PCI's INTx and the SCI) are delivered once and again after each end of
//! interrupt (KVM_EXIT_IOAPIC_EOI) until no source asserts the pin any more; remote IRR stands for "delivered, not ended".

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::snapshot::state::chipset::IoApicState;
use crate::vmm::irq::{Interrupt, Level};

/// Where the guest sees it, and how many bytes.
pub const IOAPIC_START: u64 = 0xfec0_0000;
pub const IOAPIC_BYTES: u64 = 0x1000;
/// Interrupt pins.
pub const PINS: usize = 24;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;
const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_ENTRIES: u8 = 0x10;
/// Version 0x11 (no EOI register), highest entry 23.
const VERSION: u32 = 0x0017_0011;

const ENTRY_MASKED: u64 = 1 << 16;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
/// Delivery status and remote IRR are read-only.
const ENTRY_READ_ONLY: u64 = 1 << 12 | ENTRY_REMOTE_IRR;
const ENTRY_WRITABLE: u64 = 0xff00_0000_0001_ffff & !ENTRY_READ_ONLY;
const DELIVERY_LOWEST: u64 = 1;
const DELIVERY_EXTINT: u64 = 7;
const MSI_BASE: u32 = 0xfee0_0000;

struct Registers {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    /// Level sources that assert each pin; bit = source.
    asserted: [u32; PINS],
    /// Level sources that each pin has.
    sources: [u32; PINS],
    /// Those entries that have routes, as KVM knows them, and 0 for the others. `None`: not known.
    routed: Option<[u64; PINS]>,
}

/// Which pins are masked, and which masked ones have an edge waiting; shared with the lines.
#[derive(Default)]
struct Gate {
    masked: AtomicU32,
    pending: AtomicU32,
}

/// Where the interrupts of the pins go: KVM's routing table.
pub trait Routing: Send + Sync {
    /// Makes each signal of `irqfd` an interrupt by the route `gsi`.
    fn connect(&self, irqfd: &EventFd, gsi: u32) -> Result<(), errno::Error>;
    /// Replaces all routes.
    fn set(&self, routes: &KvmIrqRouting) -> Result<(), errno::Error>;
}

impl Routing for VmFd {
    fn connect(&self, irqfd: &EventFd, gsi: u32) -> Result<(), errno::Error> {
        self.register_irqfd(irqfd, gsi)
    }

    fn set(&self, routes: &KvmIrqRouting) -> Result<(), errno::Error> {
        self.set_gsi_routing(routes)
    }
}

/// The I/O APIC.
pub struct IoApic {
    routing: Arc<dyn Routing>,
    registers: Mutex<Registers>,
    gate: Arc<Gate>,
    lines: Mutex<Vec<Option<Arc<Line>>>>,
}

/// One pin, as a device holds it.
pub struct Line {
    pin: usize,
    irqfd: EventFd,
    gate: Arc<Gate>,
}

impl IoApic {
    /// All entries masked, no routes set. The VM must have its split irqchip with [`PINS`] reserved routes.
    pub fn new(routing: Arc<dyn Routing>) -> Self {
        let gate = Gate { masked: AtomicU32::new((1 << PINS) - 1), ..Default::default() };
        IoApic {
            routing,
            registers: Mutex::new(Registers::default()),
            gate: Arc::new(gate),
            lines: Mutex::new(vec![None; PINS]),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The line of `pin` (0 to 23), with its irqfd registered on first use.
    pub fn line(&self, pin: usize) -> Result<Arc<Line>, errno::Error> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = lines.get_mut(pin).ok_or(errno::Error::new(libc::EINVAL))?;
        if let Some(line) = slot {
            return Ok(line.clone());
        }
        let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(errno::Error::from)?;
        self.routing.connect(&irqfd, pin as u32)?;
        let line = Arc::new(Line { pin, irqfd, gate: self.gate.clone() });
        *slot = Some(line.clone());
        Ok(line)
    }

    /// One more level-triggered source of `pin`: at most 32 share one.
    pub fn level_line(self: &Arc<Self>, pin: usize) -> Result<LevelLine, errno::Error> {
        let line = self.line(pin)?;
        let mut r = self.lock();
        let sources = r.sources.get_mut(pin).ok_or(errno::Error::new(libc::EINVAL))?;
        let source = 1u32.checked_shl(*sources).ok_or(errno::Error::new(libc::ENOSPC))?;
        *sources += 1;
        drop(r);
        Ok(LevelLine { ioapic: self.clone(), line, source })
    }

    /// The guest's end of interrupt for `vector`, of a level-triggered entry.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut r = self.lock();
        for pin in 0..PINS {
            if r.ended(pin, vector) && r.deliverable(pin) {
                self.signal(pin);
            }
        }
    }

    /// A guest read of 1, 2, 4 or 8 bytes at `offset` into the window; registers are 32 bits.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let r = self.lock();
        let value = match offset {
            REGISTER_SELECT => u32::from(r.select),
            REGISTER_WINDOW => r.read_selected(),
            _ => 0,
        };
        let bytes = u64::from(value).to_le_bytes();
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// A guest write. Fails only if KVM refuses the new routes.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), errno::Error> {
        let mut bytes = [0u8; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        let mut r = self.lock();
        match offset {
            REGISTER_SELECT => r.select = value as u8,
            REGISTER_WINDOW => {
                if let Some(pin) = r.write_selected(value) {
                    self.entry_changed(&mut r, pin)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The id that firmware gave it, the same as in the tables. Eight bits, as on every later chip: with 16 vCPUs and
    /// more the data sheet's four do not reach.
    pub fn set_id(&self, id: u8) {
        self.lock().id = id;
    }

    fn entry_changed(&self, r: &mut Registers, pin: usize) -> Result<(), errno::Error> {
        let bit = 1u32 << pin;
        let was_masked = self.gate.masked.load(Ordering::SeqCst) & bit != 0;
        let masked = r.entries[pin] & ENTRY_MASKED != 0;
        if was_masked && masked {
            return Ok(());
        }
        if masked {
            self.gate.masked.fetch_or(bit, Ordering::SeqCst);
            // The route may stay: a line that raises now sees the mask first.
            return Ok(());
        }
        self.set_routes(&mut r.routed, &r.entries)?;
        self.gate.masked.fetch_and(!bit, Ordering::SeqCst);
        let edge = self.gate.pending.fetch_and(!bit, Ordering::SeqCst) & bit != 0;
        if r.deliverable(pin) || edge {
            self.signal(pin);
        }
        Ok(())
    }

    fn signal(&self, pin: usize) {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(line)) = lines.get(pin) {
            line.signal();
        }
    }

    /// Sets the routes that [`IoApic::restore`] of the same state will want, which waits for all vCPUs to have seen them; and connects
    /// `pins`.
    pub fn expect(&self, state: &IoApicState, pins: impl Iterator<Item = usize>) -> Result<(), errno::Error> {
        let mut entries = [ENTRY_MASKED; PINS];
        for (to, from) in entries.iter_mut().zip(&state.entries) {
            *to = from & ENTRY_WRITABLE;
        }
        self.set_routes(&mut self.lock().routed, &entries)?;
        for pin in pins {
            self.line(pin)?;
        }
        Ok(())
    }

    /// Sets the MSI routes of all unmasked entries.
    fn set_routes(
        &self,
        routed: &mut Option<[u64; PINS]>,
        entries: &[u64; PINS],
    ) -> Result<(), errno::Error> {
        let wanted =
            entries.map(|entry| if has_route(entry) { entry & ENTRY_WRITABLE & !ENTRY_MASKED } else { 0 });
        if *routed == Some(wanted) {
            return Ok(());
        }
        let routes: Vec<_> =
            entries.iter().enumerate().filter_map(|(pin, entry)| route(pin, *entry)).collect();
        let routing = KvmIrqRouting::from_entries(&routes).map_err(|_| errno::Error::new(libc::ENOMEM))?;
        *routed = None;
        self.routing.set(&routing)?;
        *routed = Some(wanted);
        Ok(())
    }

    pub fn save(&self) -> IoApicState {
        let r = self.lock();
        IoApicState {
            select: r.select,
            id: r.id,
            entries: r.entries.to_vec(),
            pending: self.gate.pending.load(Ordering::SeqCst),
        }
    }

    /// Takes on a saved state and sets its routes. Entries beyond the last pin are ignored.
    pub fn restore(&self, state: &IoApicState) -> Result<(), errno::Error> {
        let mut r = self.lock();
        r.select = state.select;
        r.id = state.id;
        let mut masked = 0;
        for (pin, (to, from)) in r.entries.iter_mut().zip(&state.entries).enumerate() {
            let in_service = if from & ENTRY_LEVEL != 0 { ENTRY_REMOTE_IRR } else { 0 };
            *to = from & (ENTRY_WRITABLE | in_service);
            masked |= u32::from(*to & ENTRY_MASKED != 0) << pin;
        }
        let r = &mut *r;
        self.set_routes(&mut r.routed, &r.entries)?;
        self.gate.masked.store(masked, Ordering::SeqCst);
        self.gate.pending.store(state.pending & masked, Ordering::SeqCst);
        Ok(())
    }
}

/// Not wired to a PIC, and not masked, or in service: KVM tells us of the end of an interrupt only as long as there is a route to its vector
/// (`kvm_scan_ioapic_routes`), and FreeBSD masks a level-triggered entry before it ends it.
fn has_route(entry: u64) -> bool {
    entry & (ENTRY_MASKED | ENTRY_REMOTE_IRR) != ENTRY_MASKED && entry >> 8 & 7 != DELIVERY_EXTINT
}

/// The MSI that an entry stands for (82093AA section 3.2.4; SDM volume 3, 11.11), if it has a route.
fn route(pin: usize, entry: u64) -> Option<kvm_irq_routing_entry> {
    if !has_route(entry) {
        return None;
    }
    let delivery = entry >> 8 & 7;
    let destination = (entry >> 56) as u32;
    let logical = (entry >> 11 & 1) as u32;
    let redirect = u32::from(delivery == DELIVERY_LOWEST);
    let level = u32::from(entry & ENTRY_LEVEL != 0);
    let msi = kvm_irq_routing_msi {
        address_lo: MSI_BASE | destination << 12 | redirect << 3 | logical << 2,
        data: (entry & 0xff) as u32 | (delivery as u32) << 8 | 1 << 14 | level << 15,
        ..Default::default()
    };
    Some(kvm_irq_routing_entry {
        gsi: pin as u32,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    })
}

// === impl Registers ===

impl Default for Registers {
    fn default() -> Self {
        Registers {
            select: 0,
            id: 0,
            entries: [ENTRY_MASKED; PINS],
            asserted: [0; PINS],
            sources: [0; PINS],
            routed: None,
        }
    }
}

impl Registers {
    /// Sets or clears a level source of `pin`; true if an interrupt is to be delivered now.
    fn set_source(&mut self, pin: usize, source: u32, asserted: bool) -> bool {
        let before = self.asserted[pin];
        self.asserted[pin] = if asserted { before | source } else { before & !source };
        if self.entries[pin] & ENTRY_LEVEL == 0 {
            // A guest that takes the pin for an edge gets the rising one.
            return before == 0 && asserted;
        }
        self.deliverable(pin)
    }

    /// True, once, if a level-triggered entry is to be delivered: then it is in service.
    fn deliverable(&mut self, pin: usize) -> bool {
        let entry = &mut self.entries[pin];
        let ready = *entry & (ENTRY_LEVEL | ENTRY_MASKED | ENTRY_REMOTE_IRR) == ENTRY_LEVEL
            && self.asserted[pin] != 0;
        if ready {
            *entry |= ENTRY_REMOTE_IRR;
        }
        ready
    }

    /// Ends the service of `pin` if it is in service with `vector`.
    fn ended(&mut self, pin: usize, vector: u8) -> bool {
        let entry = &mut self.entries[pin];
        let ended = *entry & ENTRY_REMOTE_IRR != 0 && *entry as u8 == vector;
        if ended {
            *entry &= !ENTRY_REMOTE_IRR;
        }
        ended
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            INDEX_ID | INDEX_ARBITRATION => u32::from(self.id) << 24,
            INDEX_VERSION => VERSION,
            index => match self.entry(index) {
                Some((pin, high)) => (self.entries[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    /// The pin whose entry changed, if any.
    fn write_selected(&mut self, value: u32) -> Option<usize> {
        if self.select == INDEX_ID {
            self.id = (value >> 24) as u8;
            return None;
        }
        let (pin, high) = self.entry(self.select)?;
        let old = self.entries[pin];
        let new = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        // Old guests end a level interrupt by making the entry an edge for a moment.
        let in_service = if new & ENTRY_LEVEL != 0 { old & ENTRY_REMOTE_IRR } else { 0 };
        self.entries[pin] = new & ENTRY_WRITABLE | in_service;
        (self.entries[pin] != old).then_some(pin)
    }

    fn entry(&self, index: u8) -> Option<(usize, bool)> {
        let offset = usize::from(index.checked_sub(INDEX_ENTRIES)?);
        (offset < 2 * PINS).then_some((offset / 2, offset % 2 == 1))
    }
}

// === impl Line ===

impl Line {
    fn signal(&self) {
        // A non-blocking eventfd fails only when its counter is full: then it is signalled already.
        let _ = self.irqfd.write(1);
    }
}

impl Interrupt for Line {
    fn raise(&self) {
        let bit = 1u32 << self.pin;
        if self.gate.masked.load(Ordering::SeqCst) & bit == 0 {
            return self.signal();
        }
        self.gate.pending.fetch_or(bit, Ordering::SeqCst);
        // Unmasked between the two looks: whoever takes the bit delivers it.
        if self.gate.masked.load(Ordering::SeqCst) & bit == 0
            && self.gate.pending.fetch_and(!bit, Ordering::SeqCst) & bit != 0
        {
            self.signal();
        }
    }
}

/// One device's level-triggered input to a pin.
pub struct LevelLine {
    ioapic: Arc<IoApic>,
    line: Arc<Line>,
    source: u32,
}

impl Level for LevelLine {
    fn set(&self, asserted: bool) {
        let mut r = self.ioapic.lock();
        let edge = r.entries[self.line.pin] & ENTRY_LEVEL == 0;
        if r.set_source(self.line.pin, self.source, asserted) {
            // An edge waits for the unmasking; a level is delivered only when it is not masked.
            match edge {
                true => self.line.raise(),
                false => self.line.signal(),
            }
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Counts how often routes were set, and keeps how many; fails as long as it is told to.
    #[derive(Default)]
    struct Table {
        set: AtomicUsize,
        routes: AtomicUsize,
        refuses: std::sync::atomic::AtomicBool,
    }

    impl Routing for Table {
        fn connect(&self, _: &EventFd, _: u32) -> Result<(), errno::Error> {
            Ok(())
        }

        fn set(&self, routes: &KvmIrqRouting) -> Result<(), errno::Error> {
            if self.refuses.load(Ordering::SeqCst) {
                return Err(errno::Error::new(libc::ENOMEM));
            }
            self.set.fetch_add(1, Ordering::SeqCst);
            self.routes.store(routes.as_slice().len(), Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn routes_are_set_ahead_and_again_only_if_they_differ() {
        let table = Arc::new(Table::default());
        let is = || (table.set.load(Ordering::SeqCst), table.routes.load(Ordering::SeqCst));
        let ioapic = IoApic::new(table.clone());
        let mut state = ioapic.save();
        state.entries[5] = 0x31;
        state.entries[6] = 0x32 | ENTRY_LEVEL | ENTRY_REMOTE_IRR;
        ioapic.expect(&state, [5, 6].into_iter()).unwrap();
        assert_eq!(is(), (1, 2));
        assert_ne!(ioapic.save(), state, "nothing but the routes");
        ioapic.restore(&state).unwrap();
        assert_eq!(is(), (1, 2));
        assert_eq!(ioapic.save(), state);
        // Another state than was expected.
        state.entries[6] = 0x33;
        ioapic.restore(&state).unwrap();
        assert_eq!(is(), (2, 2));
        // The guest masks one, which keeps its route, and lets another in.
        let write = |pin: usize, value: u32| {
            ioapic.write(REGISTER_SELECT, &[INDEX_ENTRIES + 2 * pin as u8])?;
            ioapic.write(REGISTER_WINDOW, &value.to_le_bytes())
        };
        write(5, ENTRY_MASKED as u32 | 0x31).unwrap();
        assert_eq!(is(), (2, 2));
        write(7, 0x34).unwrap();
        assert_eq!(is(), (3, 2));
        // What was refused is not taken for done.
        table.refuses.store(true, Ordering::SeqCst);
        write(5, 0x31).unwrap_err();
        table.refuses.store(false, Ordering::SeqCst);
        write(8, 0x35).unwrap();
        assert_eq!(is(), (4, 4));
    }

    /// Else its end is never told, and the pin is dead: in a clone of a guest that stood still between the two, or when another
    /// entry changes in between.
    #[test]
    fn an_entry_that_is_masked_in_service_keeps_its_route() {
        let table = Arc::new(Table::default());
        let is = || (table.set.load(Ordering::SeqCst), table.routes.load(Ordering::SeqCst));
        let ioapic = Arc::new(IoApic::new(table.clone()));
        let level = ioapic.level_line(16).unwrap();
        let mut state = ioapic.save();
        state.entries[16] = 0x41 | ENTRY_LEVEL | ENTRY_REMOTE_IRR | ENTRY_MASKED;
        ioapic.restore(&state).unwrap();
        assert_eq!(is(), (1, 1));
        level.set(true);
        let write = |pin: usize, value: u64| {
            ioapic.write(REGISTER_SELECT, &[INDEX_ENTRIES + 2 * pin as u8]).unwrap();
            ioapic.write(REGISTER_WINDOW, &(value as u32).to_le_bytes()).unwrap();
        };
        write(17, 0x42 | ENTRY_LEVEL);
        assert_eq!(is(), (2, 2));
        // Ended, unmasked, and delivered again by the route that is there already.
        ioapic.end_of_interrupt(0x41);
        write(16, 0x41 | ENTRY_LEVEL);
        assert_eq!(is(), (2, 2));
        assert_ne!(ioapic.save().entries[16] & ENTRY_REMOTE_IRR, 0);
        // Masked and at rest: none.
        ioapic.end_of_interrupt(0x41);
        level.set(false);
        ioapic.end_of_interrupt(0x41);
        write(16, 0x41 | ENTRY_LEVEL | ENTRY_MASKED);
        write(18, 0x43 | ENTRY_LEVEL);
        assert_eq!(is(), (3, 2));
    }

    #[test]
    fn an_entry_becomes_the_msi_of_the_manual() {
        // Vector 0x31, lowest priority, logical, level, destination 0x03.
        let entry = 0x0300_0000_0000_0000 | ENTRY_LEVEL | 1 << 11 | 1 << 8 | 0x31;
        let route = route(5, entry).unwrap();
        assert_eq!(route.gsi, 5);
        // SAFETY: `route` wrote the `msi` member.
        let msi = unsafe { route.u.msi };
        assert_eq!(msi.address_lo, 0xfee0_300c);
        assert_eq!(msi.data, 0xc131);
        assert!(super::route(5, entry | ENTRY_MASKED).is_none());
        assert!(super::route(0, DELIVERY_EXTINT << 8).is_none());
    }

    #[test]
    fn every_register_index_is_safe() {
        let mut r = Registers::default();
        for select in 0..=255 {
            r.select = select;
            r.write_selected(0xffff_ffff);
            r.read_selected();
        }
        assert_eq!(r.entries[23], ENTRY_WRITABLE);
        r.select = INDEX_VERSION;
        assert_eq!(r.read_selected(), VERSION);
    }

    #[test]
    fn a_level_is_delivered_until_no_source_asserts_it() {
        let mut r = Registers::default();
        r.entries[17] = ENTRY_LEVEL | 0x41;
        assert!(r.set_source(17, 1, true), "delivered");
        assert!(!r.set_source(17, 2, true), "in service already");
        assert!(!r.ended(17, 0x40), "another vector");
        assert!(!r.set_source(17, 1, false));
        assert!(r.ended(17, 0x41) && r.deliverable(17), "the other source still asserts it");
        r.set_source(17, 2, false);
        assert!(r.ended(17, 0x41) && !r.deliverable(17));
        assert_eq!(r.entries[17] & ENTRY_REMOTE_IRR, 0);
    }

    #[test]
    fn a_masked_level_waits_and_an_edge_write_ends_its_service() {
        let mut r = Registers::default();
        r.entries[16] = ENTRY_LEVEL | ENTRY_MASKED | 0x50;
        assert!(!r.set_source(16, 1, true));
        r.select = INDEX_ENTRIES + 32;
        assert_eq!(r.write_selected(ENTRY_LEVEL as u32 | 0x50), Some(16));
        assert!(r.deliverable(16));
        r.write_selected((ENTRY_LEVEL | ENTRY_MASKED) as u32 | 0x50);
        assert_ne!(r.read_selected() as u64 & ENTRY_REMOTE_IRR, 0, "masking does not end it");
        r.write_selected(0x50);
        assert_eq!(r.read_selected() as u64 & ENTRY_REMOTE_IRR, 0);
    }

    #[test]
    fn an_edge_on_a_masked_pin_waits_for_the_unmasking() {
        let gate = Arc::new(Gate { masked: AtomicU32::new(1 << 5), ..Default::default() });
        let line = Line { pin: 5, irqfd: EventFd::new(libc::EFD_NONBLOCK).unwrap(), gate: gate.clone() };
        line.raise();
        assert!(line.irqfd.read().is_err());
        assert_eq!(gate.pending.load(Ordering::SeqCst), 1 << 5);
        gate.masked.store(0, Ordering::SeqCst);
        line.raise();
        assert_eq!(line.irqfd.read().unwrap(), 1);
    }
}
