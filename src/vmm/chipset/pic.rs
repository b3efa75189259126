//! The two 8259 interrupt controllers (Intel 8259A data sheet), as far as a kernel with an I/O APIC touches them:
//! it initializes them, masks every line and never looks again. They deliver nothing.

use crate::snapshot::state::chipset::PicState;

/// Both controllers and their edge/level registers.
#[derive(Default)]
pub struct Pic {
    state: PicState,
}

impl Pic {
    /// True for the ports of this device.
    pub fn owns(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
    }

    pub fn read(&self, port: u16) -> u8 {
        match port {
            0x21 => self.state.mask[0],
            0xa1 => self.state.mask[1],
            0x4d0 => self.state.level[0],
            0x4d1 => self.state.level[1],
            // IRR or ISR: nothing requested, nothing in service.
            _ => 0,
        }
    }

    pub fn write(&mut self, port: u16, value: u8) {
        let chip = usize::from(port & 0x80 != 0);
        match port {
            // ICW1: two or three more words follow on the data port, by its bits 1 (single) and 0 (ICW4).
            0x20 | 0xa0 if value & 0x10 != 0 => {
                self.state.init_left[chip] = 1 + u8::from(value & 2 == 0) + (value & 1);
                self.state.mask[chip] = 0;
            }
            0x21 | 0xa1 if self.state.init_left[chip] > 0 => self.state.init_left[chip] -= 1,
            0x21 | 0xa1 => self.state.mask[chip] = value,
            0x4d0 => self.state.level[0] = value,
            0x4d1 => self.state.level[1] = value,
            _ => {}
        }
    }

    pub fn save(&self) -> PicState {
        self.state
    }

    pub fn restore(&mut self, state: &PicState) {
        self.state = PicState { init_left: state.init_left.map(|left| left.min(3)), ..*state };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initialization_words_are_not_masks() {
        let mut pic = Pic::default();
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xff)] {
            pic.write(port, value);
        }
        assert_eq!(pic.read(0x21), 0xff);
        assert_eq!(pic.read(0xa1), 0);
    }
}
