//! Becoming a clone: clock, random generators, host id, host name, Ethernet addresses.
//!
//! The agent's own generator is another one at once. The kernel's takes its entropy where it takes all of it, in its pools:
//! those are drawn on at most ten times a second, and a write to `/dev/random` waits a tenth of a second
//! (sys/dev/random), so a child does the writing; virtio-rng feeds them meanwhile.

use crate::port::Output;
use crate::random::Generator;
use crate::streams::Refusal;
use crate::sys;
use crate::wire::*;

/// Each write goes into four of the kernel's 32 pools; the first is the one that is drawn on each time.
const WRITES: usize = 16;

/// Who the guest thinks it is.
pub(crate) struct Identity {
    generation: [u8; GENERATION_BYTES],
    count: u64,
}


impl Identity {
    pub(crate) const fn new() -> Identity {
        Identity { generation: [0; GENERATION_BYTES], count: 0 }
    }

    pub(crate) fn put(&self, out: &mut Output) {
        out.put(&self.generation);
        out.put64(self.count);
    }

    pub(crate) fn become_clone(&mut self, told: &Become, random: &mut Generator) -> Result<(), Refusal> {
        if told.wall_ns != 0 && sys::set_wall_ns(told.wall_ns).is_err() {
            return Err((STATUS_NOT_ALLOWED, "the agent may not set the guest's clock; is it root, and the securelevel below 2?"));
        }
        random.feed(&told.entropy);
        let host_id = u64::from(u32::from_be_bytes([told.generation[0], told.generation[1], told.generation[2], told.generation[3]]));
        let named = sys::sysctl("kern.hostuuid", &mut [], &uuid(&told.generation))
            .and_then(|_| sys::sysctl("kern.hostid", &mut [], &host_id.to_le_bytes()));
        if named.is_err() {
            return Err((STATUS_NOT_ALLOWED, "the agent may not set the guest's host id; is it root?"));
        }
        if !told.host_name.is_empty() && sys::sysctl("kern.hostname", &mut [], told.host_name).is_err() {
            return Err((STATUS_NOT_ALLOWED, "the agent may not set the guest's host name; is it root?"));
        }
        for (interface, mac) in told.interfaces {
            match sys::set_mac(interface, &mac) {
                Ok(()) => {}
                Err(sys::ENXIO) => return Err((STATUS_NO_DEVICE, "the guest has no such network interface (vtnet)")),
                Err(_) => return Err((STATUS_NOT_ALLOWED, "the guest's system does not take the Ethernet address")),
            }
        }
        self.generation = told.generation;
        self.count += 1;
        feed_kernel(random);
        Ok(())
    }
}

/// Puts the host's name as the system has it now.
pub(crate) fn put_host_name(out: &mut Output) {
    // MAXHOSTNAMELEN (sys/sys/param.h).
    let mut name = [0u8; 256];
    let read = sys::sysctl("kern.hostname", &mut name, &[]).unwrap_or(0);
    let bytes = name[..read].iter().position(|byte| *byte == 0).unwrap_or(read);
    out.put32(bytes as u32);
    out.put(&name[..bytes]);
}

/// Has a child write to the kernel's generator. Without one it has virtio-rng, and the next clone.
fn feed_kernel(random: &mut Generator) {
    let mut entropy = [[0u8; ENTROPY_BYTES]; WRITES];
    random.fill(entropy.as_flattened_mut());
    // SAFETY: one thread; the child ends here.
    if let Ok(None) = unsafe { sys::fork() } {
        if let Ok(fd) = sys::open(c"/dev/random", sys::O_WRONLY, 0) {
            for piece in &entropy {
                let _ = sys::write(fd, piece);
            }
        }
        sys::exit(0);
    }
}

/// The generation as a UUID (RFC 9562, version 4), as text.
fn uuid(generation: &[u8; GENERATION_BYTES]) -> [u8; 36] {
    let mut bytes = *generation;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = [b'-'; 36];
    let places = text.iter_mut().enumerate().filter(|(at, _)| ![8, 13, 18, 23].contains(at));
    for (digit, (_, place)) in places.enumerate() {
        let half = bytes[digit / 2] >> if digit % 2 == 0 { 4 } else { 0 } & 15;
        *place = b"0123456789abcdef"[usize::from(half & 15)];
    }
    text
}
