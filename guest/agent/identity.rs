//! Becoming a clone: clock, random generators, host id, host name, Ethernet and other addresses.
//!
//! The agent's own generator is another one at once; the system's when it has drawn on what it was given ([`crate::entropy`]).

use crate::entropy::Pools;
use crate::neighbours;
use crate::network;
use crate::port::Output;
use crate::random::Generator;
use crate::streams::Refusal;
use crate::sys;
use crate::wire::*;

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

    /// Gives what is known of the system's entropy (ENTROPY_*).
    pub(crate) fn become_clone(&mut self, told: &Become, random: &mut Generator, pools: &mut Pools) -> Result<u32, Refusal> {
        if told.wall_ns != 0 && sys::set_wall_ns(told.wall_ns).is_err() {
            return Err((STATUS_NOT_ALLOWED, "the agent may not set the guest's clock; is it root, and the securelevel below 2?"));
        }
        random.feed(&told.entropy);
        // A child is at it while the rest is done. Who is no copy has what is its own already.
        let reseed = told.flags & CLONE_RESEED != 0;
        let feeding = match reseed {
            true => {
                pools.close();
                Pools::feed(random)
            }
            false => None,
        };
        let host_id = u64::from(u32::from_be_bytes([told.generation[0], told.generation[1], told.generation[2], told.generation[3]]));
        let named = sys::sysctl("kern.hostuuid", &mut [], &uuid(&told.generation))
            .and_then(|_| sys::sysctl("kern.hostid", &mut [], &host_id.to_le_bytes()));
        if named.is_err() {
            return Err((STATUS_NOT_ALLOWED, "the agent may not set the guest's host id; is it root?"));
        }
        if !told.host_name.is_empty() && sys::sysctl("kern.hostname", &mut [], told.host_name).is_err() {
            return Err((STATUS_NOT_ALLOWED, "the agent may not set the guest's host name; is it root?"));
        }
        network::clear(told.addresses)?;
        for (interface, mac) in told.interfaces {
            network::set_mac(interface, &mac)?;
        }
        network::set(told.addresses, told.interfaces)?;
        neighbours::announce(told.interfaces);
        self.generation = told.generation;
        self.count += 1;
        if reseed {
            return Ok(pools.draw(feeding, random));
        }
        Ok(ENTROPY_PENDING)
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
