//! Saved state of the chipset: serial port, timer, clock, interrupt controllers.

use serde::{Deserialize, Serialize};

/// A 16550A serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub interrupt_enable: u8,
    pub fifo_control: u8,
    pub line_control: u8,
    pub modem_control: u8,
    pub scratch: u8,
    pub divisor: u16,
    pub overrun: bool,
    pub transmit_interrupt: bool,
    pub modem_delta: u8,
    /// Received, not yet read by the guest.
    pub receive: Vec<u8>,
    /// Written by the guest, not yet taken by the console.
    pub transmit: Vec<u8>,
}

/// The second port, on machines whose agent talks through it. A section of its own: other machines' snapshots do not have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentPortState {
    pub serial: SerialState,
}

/// One channel of the 8254 timer. Times are relative, so that a clone's timer goes on where the snapshot stopped it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannelState {
    pub mode: u8,
    pub access: u8,
    pub reload: u16,
    pub latched_count: Option<u16>,
    pub latched_status: Option<u8>,
    pub write_low: Option<u8>,
    pub read_high_next: bool,
    pub gate: bool,
    /// A count was loaded since the mode was set.
    pub counting: bool,
    /// Nanoseconds since the count was loaded.
    pub elapsed_ns: u64,
    /// Interrupts that were already delivered since then.
    pub delivered: u64,
}

/// The 8254 timer with the speaker port's latch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    pub channels: [PitChannelState; 3],
    pub speaker: bool,
}

/// The CMOS clock's index register and memory. The time of day is always the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    pub index: u8,
    pub memory: Vec<u8>,
}

/// The two masked 8259s.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    pub mask: [u8; 2],
    pub level: [u8; 2],
    /// Initialization words still to come, for each chip.
    pub init_left: [u8; 2],
}

/// The I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    pub select: u8,
    pub id: u8,
    /// Redirection entries, one for each pin.
    pub entries: Vec<u64>,
    /// Pins with an edge that waits for its entry to be unmasked.
    pub pending: u32,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsetState {
    pub serial: SerialState,
    pub pit: PitState,
    pub cmos: CmosState,
    pub pic: PicState,
    pub ioapic: IoApicState,
}
