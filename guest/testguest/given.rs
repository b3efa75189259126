//! What the loader gave, whichever protocol it spoke: memory map and settings.

use crate::checks::{Checks, check};
use crate::memory;

const RANGES_MAX: usize = 64;
const TYPE_RAM: u32 = 1;
/// Where guests expect devices: no RAM may be told of here.
const DEVICES: core::ops::Range<u64> = 0xfec0_0000..0x1_0000_0000;
/// Page that other CPUs start in: must be RAM.
pub(crate) const AP_PAGE: u64 = 0x8000;

/// A range of the memory map.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) kind: u32,
}

impl Range {
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }
}

/// How the settings are written down.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Settings {
    /// `name=value\0name=value\0\0`
    Environment(&'static [u8]),
    /// Words between spaces or commas.
    CommandLine(&'static [u8]),
}

pub(crate) struct Given {
    ranges: [Range; RANGES_MAX],
    count: usize,
    settings: Settings,
    /// First byte that belongs neither to the image nor to the loader's data.
    pub(crate) free_from: u64,
}

impl Given {
    pub(crate) fn new(settings: Settings, free_from: u64) -> Given {
        Given { ranges: [Range::default(); RANGES_MAX], count: 0, settings, free_from }
    }

    /// False when there is no more room.
    pub(crate) fn add(&mut self, range: Range) -> bool {
        let Some(slot) = self.ranges.get_mut(self.count) else { return false };
        *slot = range;
        self.count += 1;
        true
    }

    pub(crate) fn ranges(&self) -> &[Range] {
        self.ranges.get(..self.count).unwrap_or_default()
    }

    pub(crate) fn ram(&self) -> impl Iterator<Item = &Range> {
        self.ranges().iter().filter(|range| range.kind == TYPE_RAM)
    }

    pub(crate) fn ram_bytes(&self) -> u64 {
        self.ram().fold(0, |sum, range| sum.saturating_add(range.bytes))
    }

    /// True if all of it is RAM of one range.
    pub(crate) fn is_ram(&self, start: u64, end: u64) -> bool {
        self.ram().any(|range| range.start <= start && end <= range.end())
    }

    /// Names and values, in order. A word without a value has "1".
    pub(crate) fn settings(&self) -> impl Iterator<Item = (&'static [u8], &'static [u8])> {
        let (text, is_line) = match self.settings {
            Settings::Environment(text) => (text, false),
            Settings::CommandLine(text) => (text, true),
        };
        text.split(move |byte| if is_line { matches!(byte, b' ' | b',' | b'\t' | b'\n') } else { *byte == 0 })
            .filter(|word| !word.is_empty())
            .map(|word| match word.iter().position(|byte| *byte == b'=') {
                Some(at) => (&word[..at], &word[at + 1..]),
                None => (word, b"1".as_slice()),
            })
    }

    /// The last value of a setting: later ones win.
    pub(crate) fn value(&self, name: &str) -> Option<&'static [u8]> {
        self.settings().filter(|(key, _)| *key == name.as_bytes()).last().map(|(_, value)| value)
    }

    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        memory::text(self.value(name)?).parse().ok()
    }

    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.value(name).is_some_and(|value| value != b"0")
    }

    /// The map's own sense, and RAM where the guest needs it.
    pub(crate) fn check_memory(&self, checks: &mut Checks) {
        let overlap = self.ranges().iter().enumerate().any(|(index, one)| {
            let others = self.ranges().iter().skip(index + 1);
            one.bytes == 0 || others.clone().any(|other| one.start < other.end() && other.start < one.end())
        });
        let on_devices = self.ram().any(|range| range.start < DEVICES.end && DEVICES.start < range.end());
        let low = self.is_ram(AP_PAGE, AP_PAGE + 4096);
        let image = self.is_ram(0x20_0000, self.free_from.max(memory::image_end()));
        check!(
            checks,
            "memory.low",
            low && image && !overlap && !on_devices,
            "{} ranges, {} MiB of RAM, low page {low}, image in RAM {image}, overlap {overlap}, on devices {on_devices}",
            self.count,
            self.ram_bytes() >> 20
        );
    }
}
