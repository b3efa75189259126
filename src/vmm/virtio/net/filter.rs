//! Which frames the driver wants to see: its address, tables, modes and VLANs.
//!
//! Until a driver says otherwise everything is passed on, as drivers expect (FreeBSD's `if_vtnet.c` switches promiscuous
//! mode off when it attaches). More addresses than are kept here mean that all are received: a filter may let too
//! much through, never too little.
//!
//! Facts: virtio 1.2 clauses 5.1.6.5.1 (modes), 5.1.6.5.2 (addresses), 5.1.6.5.3 (VLANs); IEEE 802.1Q for the tag.

/// Most addresses kept in one table.
pub const TABLE_MAX: usize = 64;
/// VLAN numbers that exist.
pub const VLANS: u16 = 4096;

const TAG: [u8; 2] = [0x81, 0x00];

pub type Mac = [u8; 6];

/// The receive filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    pub promiscuous: bool,
    pub all_multicast: bool,
    /// `None`: all.
    pub unicast: Option<Vec<Mac>>,
    pub multicast: Option<Vec<Mac>>,
    /// Numbers that are received, a bit each; `None`: all.
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

impl Filter {
    /// What holds until the driver says something. A driver that took CTRL_VLAN begins without any.
    pub fn new(filter_vlans: bool) -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            unicast: Some(vec![]),
            multicast: Some(vec![]),
            vlans: filter_vlans.then(|| Box::new([0; VLANS as usize / 64])),
        }
    }

    /// A VLAN is received from now on, or no more. False: there is no such number, or they are not filtered.
    pub fn set_vlan(&mut self, vlan: u16, receive: bool) -> bool {
        let Some(words) = &mut self.vlans else { return false };
        match words.get_mut(usize::from(vlan / 64)) {
            Some(word) if receive => *word |= 1 << (vlan % 64),
            Some(word) => *word &= !(1 << (vlan % 64)),
            None => return false,
        }
        true
    }

    /// The VLANs received, ascending; `None`: not filtered.
    pub fn vlans(&self) -> Option<Vec<u16>> {
        self.vlans.as_ref()?;
        Some((0..VLANS).filter(|vlan| self.has_vlan(*vlan)).collect())
    }

    fn has_vlan(&self, vlan: u16) -> bool {
        match &self.vlans {
            None => true,
            Some(words) => words.get(usize::from(vlan / 64)).is_some_and(|word| word & 1 << (vlan % 64) != 0),
        }
    }

    /// Whether a device with address `mac` passes this Ethernet frame on.
    pub fn passes(&self, mac: &Mac, frame: &[u8]) -> bool {
        let Some((destination, rest)) = frame.split_first_chunk::<6>() else { return false };
        if self.promiscuous {
            return true;
        }
        // Source, then type.
        if let Some([t0, t1, n0, n1]) = rest.get(6..10).and_then(|tag| <[u8; 4]>::try_from(tag).ok())
            && [t0, t1] == TAG
            && !self.has_vlan(u16::from_be_bytes([n0, n1]) % VLANS)
        {
            return false;
        }
        let listed =
            |table: &Option<Vec<Mac>>| table.as_ref().is_none_or(|table| table.contains(destination));
        match destination {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => true,
            [first, ..] if first & 1 != 0 => self.all_multicast || listed(&self.multicast),
            own => own == mac || listed(&self.unicast),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    fn frame(to: Mac, vlan: Option<u16>) -> Vec<u8> {
        let mut frame = [to, OTHER].concat();
        if let Some(vlan) = vlan {
            frame.extend(TAG);
            // Priority bits are no part of the number.
            frame.extend((vlan | 0xe000).to_be_bytes());
        }
        frame.extend([8, 0]);
        frame
    }

    #[test]
    fn everything_passes_until_a_driver_says_otherwise() {
        let filter = Filter::new(true);
        assert!(filter.passes(&OWN, &frame(OTHER, Some(7))));
    }

    #[test]
    fn tables_and_modes_decide() {
        let mut filter = Filter { promiscuous: false, ..Filter::new(false) };
        let passes = |filter: &Filter, to| filter.passes(&OWN, &frame(to, None));
        assert!(passes(&filter, OWN) && passes(&filter, [0xff; 6]));
        assert!(!passes(&filter, OTHER) && !passes(&filter, GROUP));
        filter.multicast = Some(vec![GROUP]);
        assert!(passes(&filter, GROUP) && !passes(&filter, [1, 0, 0x5e, 0, 0, 2]));
        filter.unicast = Some(vec![OTHER]);
        assert!(passes(&filter, OTHER));
        filter = Filter { all_multicast: true, unicast: None, multicast: Some(vec![]), ..filter };
        assert!(passes(&filter, GROUP) && passes(&filter, [4; 6]));
    }

    #[test]
    fn vlans_are_filtered_by_number_only() {
        let mut filter = Filter { promiscuous: false, ..Filter::new(true) };
        assert!(filter.passes(&OWN, &frame(OWN, None)));
        assert!(!filter.passes(&OWN, &frame(OWN, Some(4095))));
        assert!(filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert!(filter.passes(&OWN, &frame(OWN, Some(4095))));
        assert!(!filter.passes(&OWN, &frame(OTHER, Some(4095))));
        assert_eq!(filter.vlans(), Some(vec![4095]));
        assert!(filter.set_vlan(4095, false));
        assert!(!filter.passes(&OWN, &frame(OWN, Some(4095))));
        let mut open = Filter { promiscuous: false, ..Filter::new(false) };
        assert!(open.passes(&OWN, &frame(OWN, Some(9))) && !open.set_vlan(9, true));
    }

    #[test]
    fn short_frames_pass_nowhere() {
        for bytes in 0..6 {
            assert!(!Filter::new(false).passes(&OWN, &vec![0xff; bytes]));
        }
    }
}
