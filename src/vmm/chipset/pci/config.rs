//! The configuration space of one PCI function: 256 bytes, which of their bits a guest may change, and base addresses.
//!
//! Registers are plain bytes; a write changes the writable bits and nothing else, so every value is safe. A base
//! address register keeps its address bits above the size and its type bits below, which is what a sizing probe reads.
//!
//! Facts: PCI Local Bus 3.0, 6.1 (header), 6.2.5 (base addresses), 6.7 (capabilities).

/// Bytes of the space. There is no extended configuration space: no function here is a PCI Express one.
pub const CONFIG_BYTES: usize = 256;
/// Base address registers of a function.
pub const BARS: usize = 6;

/// Command register bits.
pub const COMMAND_IO: u16 = 1;
pub const COMMAND_MEMORY: u16 = 1 << 1;
pub const COMMAND_MASTER: u16 = 1 << 2;
pub const COMMAND_INTX_OFF: u16 = 1 << 10;
const COMMAND_WRITABLE: u16 =
    COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_OFF;
/// Status register bits.
const STATUS_INTX: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

pub const REGISTER_COMMAND: usize = 0x04;
const REGISTER_STATUS: usize = 0x06;
const REGISTER_BARS: usize = 0x10;
const REGISTER_CAPABILITIES: usize = 0x34;
const REGISTER_LINE: usize = 0x3c;
const REGISTER_PIN: usize = 0x3d;
/// First byte of the capabilities.
const CAPABILITIES_START: usize = 0x40;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// What a base address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    Io,
    /// Below 4 GiB, not prefetchable.
    Memory,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    space: Space,
    /// A power of two, at least 4 (I/O) or 16 (memory).
    bytes: u32,
}

/// Where a base address register makes its function answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub space: Space,
    pub start: u64,
    pub bytes: u64,
}

/// Why saved registers are refused: the first one that differs where no guest could have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Differs(pub usize);

/// The registers of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    registers: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: [Option<Bar>; BARS],
    /// Where the next capability goes, and where the last one's link is.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A type 0 header.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            registers: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: [None; BARS],
            next: CAPABILITIES_START,
            link: REGISTER_CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, identity.class[2], identity.class[1], identity.class[0]]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(REGISTER_COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(REGISTER_LINE, &[0xff]);
        space
    }

    /// Interrupt pin A, and the line that firmware would have noted.
    pub fn set_interrupt(&mut self, line: u8) {
        self.put(REGISTER_LINE, &[line]);
        self.put(REGISTER_PIN, &[1]);
    }

    /// A base address register, with decoding of its space on. `bytes` is a power of two and `address` a multiple of it.
    pub fn add_bar(&mut self, index: usize, space: Space, bytes: u32, address: u32) {
        let Some(slot) = self.bars.get_mut(index) else { return };
        *slot = Some(Bar { space, bytes });
        let (kind, command) = match space {
            Space::Io => (1, COMMAND_IO),
            Space::Memory => (0, COMMAND_MEMORY),
        };
        let register = REGISTER_BARS + 4 * index;
        self.put(register, &(address | kind).to_le_bytes());
        self.allow(register, &(!(bytes - 1)).to_le_bytes());
        let command = self.command() | command;
        self.put(REGISTER_COMMAND, &command.to_le_bytes());
    }

    /// A capability: its id, and its bytes from the third on, with the bits of those that a guest may change. Returns
    /// its offset. Those that do not fit are left out (offset 0); what is built here is checked by tests.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        let end = at + 2 + body.len();
        if end > CONFIG_BYTES {
            return 0;
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        let link = self.link;
        self.put(link, &[at as u8]);
        (self.link, self.next) = (at + 1, end.next_multiple_of(4));
        let status = self.word(REGISTER_STATUS) | STATUS_CAPABILITIES;
        self.put(REGISTER_STATUS, &status.to_le_bytes());
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.registers.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(bits) {
            *to = *from;
        }
    }

    fn byte(&self, at: usize) -> u8 {
        self.registers.get(at).copied().unwrap_or(0)
    }

    /// 16 bits at `at`.
    pub fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    /// 32 bits at `at`.
    pub fn double(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    pub fn command(&self) -> u16 {
        self.word(REGISTER_COMMAND)
    }

    /// The status register's bit for an interrupt that INTx carries, or would carry.
    pub fn show_intx(&mut self, pending: bool) {
        let status = self.word(REGISTER_STATUS) & !STATUS_INTX | if pending { STATUS_INTX } else { 0 };
        self.put(REGISTER_STATUS, &status.to_le_bytes());
    }

    /// Any width, any offset; bytes outside read zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.byte(offset.saturating_add(index));
        }
    }

    /// Any width, any offset. True if a window may have opened, closed or moved.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        for (index, value) in data.iter().enumerate() {
            let at = offset.saturating_add(index);
            if let (Some(register), Some(mask)) = (self.registers.get_mut(at), self.writable.get(at)) {
                *register = *register & !mask | value & mask;
            }
        }
        let end = offset.saturating_add(data.len());
        let touches = |start: usize, bytes: usize| offset < start + bytes && end > start;
        touches(REGISTER_COMMAND, 1) || touches(REGISTER_BARS, 4 * BARS)
    }

    /// The window of a base address register, if its space is decoded.
    pub fn window(&self, index: usize) -> Option<Window> {
        let bar = self.bars.get(index).copied().flatten()?;
        let (decode, kind) = match bar.space {
            Space::Io => (COMMAND_IO, 3),
            Space::Memory => (COMMAND_MEMORY, 15),
        };
        let start = u64::from(self.double(REGISTER_BARS + 4 * index) & !kind);
        (self.command() & decode != 0).then_some(Window { space: bar.space, start, bytes: bar.bytes.into() })
    }

    /// Bytes of a base address register's window; 0 if there is none.
    pub fn bar_bytes(&self, index: usize) -> u64 {
        self.bars.get(index).copied().flatten().map_or(0, |bar| bar.bytes.into())
    }

    /// All registers.
    pub fn save(&self) -> Vec<u8> {
        self.registers.to_vec()
    }

    /// Takes over saved registers, which may be anything: they may differ from these only where a guest can write.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), Differs> {
        if saved.len() != CONFIG_BYTES {
            return Err(Differs(saved.len().min(CONFIG_BYTES)));
        }
        for at in 0..CONFIG_BYTES {
            let dynamic = if at == REGISTER_STATUS { STATUS_INTX as u8 } else { 0 };
            let mask = self.writable.get(at).copied().unwrap_or(0) | dynamic;
            let (old, new) = (self.byte(at), saved.get(at).copied().unwrap_or(0));
            if (old ^ new) & !mask != 0 {
                return Err(Differs(at));
            }
        }
        self.put(0, saved);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        space.add_bar(0, Space::Io, 0x80, 0xc000);
        space.add_bar(4, Space::Memory, 0x4000, 0xc000_0000);
        space.set_interrupt(16);
        space
    }

    fn read32(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_sizing_probe_reads_the_size_and_the_type() {
        let mut space = space();
        for (register, size, kind) in [(0x10, 0x80u32, 1), (0x20, 0x4000, 0)] {
            let before = read32(&space, register);
            assert!(space.write(register, &[0xff; 4]));
            assert_eq!(read32(&space, register), !(size - 1) | kind);
            space.write(register, &before.to_le_bytes());
            assert_eq!(read32(&space, register), before);
        }
        space.write(0x14, &[0xff; 4]);
        assert_eq!(read32(&space, 0x14), 0, "no such base address");
    }

    #[test]
    fn windows_follow_address_and_command() {
        let mut space = space();
        let window = |space: &ConfigSpace| space.window(4).map(|window| window.start);
        assert_eq!(window(&space), Some(0xc000_0000));
        assert!(space.write(0x20, &0xd123_4567u32.to_le_bytes()));
        assert_eq!(window(&space), Some(0xd123_4000), "as far as the size lets it");
        assert!(space.write(REGISTER_COMMAND, &COMMAND_IO.to_le_bytes()));
        assert_eq!(window(&space), None);
        assert!(space.window(0).is_some() && space.window(3).is_none() && space.window(77).is_none());
        assert!(!space.write(0x3c, &[9]), "no window has to do with the interrupt line");
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        let second = space.add_capability(9, &[0; 14], &[]);
        assert_eq!((first, second), (0x40, 0x4c));
        let (mut at, mut seen) = (space.byte(0x34), Vec::new());
        while at != 0 {
            seen.push(space.byte(at.into()));
            at = space.byte(usize::from(at) + 1);
        }
        assert_eq!(seen, [0x11, 9]);
        assert_ne!(space.word(REGISTER_STATUS) & STATUS_CAPABILITIES, 0);
        assert_eq!(space.add_capability(9, &[0; 250], &[]), 0);
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_not_writable(
            writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..40)
        ) {
            let fresh = space();
            let mut space = space();
            for (offset, data) in &writes {
                space.write((*offset).into(), data);
                let mut back = vec![0; data.len()];
                space.read((*offset).into(), &mut back);
            }
            let mut again = fresh.clone();
            prop_assert_eq!(again.restore(&space.save()), Ok(()));
            prop_assert_eq!(again.save(), space.save());
        }

        #[test]
        fn saved_registers_may_be_anything(mut bytes in prop::collection::vec(any::<u8>(), 250..260), keep in any::<bool>()) {
            let mut space = space();
            if keep && bytes.len() >= CONFIG_BYTES {
                bytes.truncate(CONFIG_BYTES);
                bytes[..4].copy_from_slice(&space.save()[..4]);
            }
            let before = space.save();
            if space.restore(&bytes).is_err() {
                prop_assert_eq!(space.save(), before);
            }
        }
    }
}
