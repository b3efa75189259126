//! How a virtio function interrupts: MSI-X messages, or INTx with its status byte.
//!
//! All of it is behind a small lock of its own, never held for long: the device thread raises, drivers mask vectors and
//! read the status byte, while a disk keeps the transport's lock.
//!
//! Facts: PCI Local Bus 3.0, 6.8.2 (MSI-X table, pending bits, masks); virtio 1.2 clauses 4.1.4.5 (status byte: read
//! clears), 4.1.5.1.2 (vectors), 4.1.5.3, 4.1.5.4.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::snapshot::state::pc::{VectorState, VirtioPciState};
use crate::vmm::irq::{Level, Messages};
use crate::vmm::virtio::transport::{CAUSE_CHANGED, CAUSE_USED, QUEUES_MAX, Signal};

/// "No vector".
pub const NO_VECTOR: u16 = 0xffff;
/// Bytes of a table entry.
const ENTRY_BYTES: usize = 16;
const ENTRY_MASKED: u32 = 1;
/// Bits of MSI-X's message control.
pub const CONTROL_ENABLE: u16 = 1 << 15;
pub const CONTROL_MASK_ALL: u16 = 1 << 14;

/// A freshly reset entry.
const UNUSED: VectorState = VectorState { address: 0, data: 0, control: ENTRY_MASKED };

struct State {
    /// Causes that INTx tells of.
    causes: u32,
    intx_off: bool,
    enabled: bool,
    mask_all: bool,
    entries: Vec<VectorState>,
    /// Vectors raised while masked; bit = number.
    pending: u64,
    config_vector: u16,
    queue_vectors: [u16; QUEUES_MAX],
}

/// One function's interrupts.
pub struct Interrupts {
    state: Mutex<State>,
    messages: Arc<dyn Messages>,
    intx: Box<dyn Level>,
}

impl Interrupts {
    /// One vector for each queue and one for changes.
    pub fn new(queues: usize, messages: Arc<dyn Messages>, intx: Box<dyn Level>) -> Self {
        let state = State {
            causes: 0,
            intx_off: false,
            enabled: false,
            mask_all: false,
            entries: vec![UNUSED; queues.min(QUEUES_MAX) + 1],
            pending: 0,
            config_vector: NO_VECTOR,
            queue_vectors: [NO_VECTOR; QUEUES_MAX],
        };
        Self { state: Mutex::new(state), messages, intx }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries of the table.
    pub fn vectors(&self) -> usize {
        self.lock().entries.len()
    }

    /// Follows the configuration space: MSI-X's message control, and the command register's INTx bit.
    pub fn configure(&self, control: u16, intx_off: bool) {
        let mut s = self.lock();
        s.enabled = control & CONTROL_ENABLE != 0;
        s.mask_all = control & CONTROL_MASK_ALL != 0;
        s.intx_off = intx_off;
        self.deliver(&mut s);
        self.update_intx(&s);
    }

    /// MSI-X is on: the legacy interface has two more registers then.
    pub fn message_signalled(&self) -> bool {
        self.lock().enabled
    }

    /// INTx has something to say, whether or not it is let through (bit 3 of the PCI status).
    pub fn intx_pending(&self) -> bool {
        let s = self.lock();
        !s.enabled && s.causes != 0
    }

    /// The status byte. Reading clears it and ends the interrupt.
    pub fn take_causes(&self) -> u8 {
        let mut s = self.lock();
        let causes = s.causes;
        s.causes = 0;
        self.update_intx(&s);
        causes as u8
    }

    pub fn config_vector(&self) -> u16 {
        self.lock().config_vector
    }

    /// A vector that the table does not have reads back as none (clause 4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16) {
        let mut s = self.lock();
        s.config_vector = s.checked(vector);
    }

    pub fn queue_vector(&self, queue: u32) -> u16 {
        self.lock().queue_vectors.get(queue as usize).copied().unwrap_or(NO_VECTOR)
    }

    pub fn set_queue_vector(&self, queue: u32, vector: u16) {
        let mut s = self.lock();
        let vector = s.checked(vector);
        if let Some(slot) = s.queue_vectors.get_mut(queue as usize) {
            *slot = vector;
        }
    }

    /// Reads the vector table, any width; outside it, zeros.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let s = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset as usize + index;
            *byte = s
                .entries
                .get(at / ENTRY_BYTES)
                .and_then(|entry| bytes(entry).get(at % ENTRY_BYTES).copied())
                .unwrap_or(0);
        }
    }

    /// Writes it: 4 or 8 bytes, aligned (PCI 6.8.2). Anything else is ignored. Unmasking delivers what waits.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let (at, width) = (offset as usize, data.len());
        if !matches!(width, 4 | 8) || !at.is_multiple_of(width) {
            return;
        }
        let mut s = self.lock();
        let Some(entry) = s.entries.get_mut(at / ENTRY_BYTES) else { return };
        let mut raw = bytes(entry);
        for (to, from) in raw.iter_mut().skip(at % ENTRY_BYTES).zip(data) {
            *to = *from;
        }
        *entry = entry_of(&raw);
        self.deliver(&mut s);
    }

    /// Reads the pending bits; they cannot be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        crate::vmm::virtio::read_space(&self.lock().pending.to_le_bytes(), offset, data);
    }

    /// Raises vectors: sends their messages, or notes the masked ones.
    fn raise(&self, s: &mut State, vectors: u64) {
        s.pending |= vectors;
        self.deliver(s);
    }

    /// Sends the pending messages that nothing masks any more.
    fn deliver(&self, s: &mut State) {
        if !s.enabled || s.mask_all || s.pending == 0 {
            return;
        }
        for (index, entry) in s.entries.iter().enumerate() {
            let bit = 1u64 << index;
            if s.pending & bit != 0 && entry.control & ENTRY_MASKED == 0 {
                s.pending &= !bit;
                self.messages.send(entry.address, entry.data);
            }
        }
    }

    fn update_intx(&self, s: &State) {
        self.intx.set(!s.enabled && !s.intx_off && s.causes != 0);
    }

    fn note(&self, s: &mut State, cause: u32) {
        s.causes |= cause;
        self.update_intx(s);
    }

    /// Into a saved state.
    pub fn save(&self, state: &mut VirtioPciState, queues: usize) {
        let s = self.lock();
        state.config_vector = s.config_vector;
        state.queue_vectors = s.queue_vectors.iter().take(queues).copied().collect();
        state.vectors = s.entries.clone();
        state.pending = s.pending;
    }

    /// Takes over a saved state, which may be anything; what does not fit is told. Interrupts nobody. `control` and
    /// `intx_off` as for [`Self::configure`].
    pub fn restore(&self, state: &VirtioPciState, control: u16, intx_off: bool) -> Result<(), String> {
        let mut s = self.lock();
        if state.vectors.len() != s.entries.len() || state.queue_vectors.len() + 1 != s.entries.len() {
            return Err(format!(
                "a table of {} vectors for {} queues",
                state.vectors.len(),
                state.queue_vectors.len()
            ));
        }
        if state.pending.checked_shr(s.entries.len() as u32).unwrap_or(0) != 0 {
            return Err(format!("set of pending vectors {:#x}", state.pending));
        }
        s.entries = state.vectors.iter().map(|entry| entry_of(&bytes(entry))).collect();
        s.config_vector = s.checked(state.config_vector);
        for index in 0..state.queue_vectors.len() {
            let vector = s.checked(state.queue_vectors.get(index).copied().unwrap_or(NO_VECTOR));
            if let Some(slot) = s.queue_vectors.get_mut(index) {
                *slot = vector;
            }
        }
        s.pending = state.pending;
        s.enabled = control & CONTROL_ENABLE != 0;
        s.mask_all = control & CONTROL_MASK_ALL != 0;
        s.intx_off = intx_off;
        Ok(())
    }
}

impl Signal for Interrupts {
    fn used(&self, queues: u32) {
        let mut s = self.lock();
        if !s.enabled {
            return self.note(&mut s, CAUSE_USED);
        }
        let mut vectors = 0u64;
        for (index, vector) in s.queue_vectors.iter().enumerate() {
            if queues & 1 << index != 0 {
                vectors |= 1u64.checked_shl((*vector).into()).unwrap_or(0);
            }
        }
        self.raise(&mut s, vectors);
    }

    fn changed(&self) {
        let mut s = self.lock();
        if !s.enabled {
            return self.note(&mut s, CAUSE_CHANGED);
        }
        let vectors = 1u64.checked_shl(s.config_vector.into()).unwrap_or(0);
        self.raise(&mut s, vectors);
    }

    fn causes(&self) -> u32 {
        self.lock().causes
    }

    fn reset(&self) {
        let mut s = self.lock();
        s.causes = 0;
        s.config_vector = NO_VECTOR;
        s.queue_vectors = [NO_VECTOR; QUEUES_MAX];
        self.update_intx(&s);
    }

    fn restore(&self, causes: u32) {
        self.lock().causes = causes;
    }

    fn again(&self) {
        self.update_intx(&self.lock());
    }
}

impl State {
    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.entries.len() { vector } else { NO_VECTOR }
    }
}

fn bytes(entry: &VectorState) -> [u8; ENTRY_BYTES] {
    let mut raw = [0; ENTRY_BYTES];
    raw[..8].copy_from_slice(&entry.address.to_le_bytes());
    raw[8..12].copy_from_slice(&entry.data.to_le_bytes());
    raw[12..].copy_from_slice(&entry.control.to_le_bytes());
    raw
}

fn entry_of(raw: &[u8; ENTRY_BYTES]) -> VectorState {
    let [address, rest] = [&raw[..8], &raw[8..]]
        .map(|half| half.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)));
    // Addresses of messages are those of double words; of the control word only the mask exists.
    VectorState { address: address & !3, data: rest as u32, control: (rest >> 32) as u32 & ENTRY_MASKED }
}
