//! What a machine's vCPUs tell, on its way to the daemon.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use crate::vmm::vcpu::{EventSink, VcpuEvent};
use crate::worker::Daemon;
use crate::worker::protocol::{Event, ExitReason};

/// Most words of one machine's ready port that the daemon is told. The first is what somebody waits for; a guest can say as many more as it
/// likes, and each takes the daemon's time, which no limit of the VM's counts.
const READY_TOLD_MAX: u32 = 16;

/// Turns vCPU events into messages. An end of the guest ends the process once it was told.
pub(super) fn sink(daemon: Daemon) -> EventSink {
    let started = Instant::now();
    let ready_told = AtomicU32::new(0);
    let has_reset = AtomicBool::new(false);
    Arc::new(move |event| {
        let reason = match event {
            VcpuEvent::Ready(value) => {
                let more = |told| (told < READY_TOLD_MAX).then_some(told + 1);
                if ready_told.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
                    return;
                }
                let us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                daemon.event(Event::Phase { name: "ready port".into(), us });
                daemon.event(Event::ReadyPort { value });
                return;
            }
            // Once for a machine: another vCPU's, told while the next machine is being made, would be taken for that one's.
            VcpuEvent::Reset(_) if has_reset.swap(true, Ordering::Relaxed) => return,
            VcpuEvent::Reset(how) => {
                // The daemon decides: this one, or the next, if there may be one; else there is nobody who would boot it again.
                daemon.note_reset(Some(how));
                if !daemon.event(Event::GuestReset { how: how.into() }) && !daemon.may_be_adopted() {
                    std::process::exit(0);
                }
                return;
            }
            VcpuEvent::PowerOff => ExitReason::GuestPowerOff,
            VcpuEvent::Failed(what) => ExitReason::Failed(what),
        };
        daemon.event(Event::Exited(reason));
        // Everything the guest printed is in the console socket, everything it flushed is in its files: nothing
        // is left to be done in order, and the vCPU threads must not run on.
        std::process::exit(0);
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::worker::Connection;
    use crate::worker::channel::Channel;
    use crate::worker::protocol::FromWorker;

    /// A worker's connection, and the daemon's end of it.
    fn connection() -> (Daemon, Channel) {
        let (channel, theirs) = Channel::pair().unwrap();
        for end in [&channel, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let connection = Connection { channel, adoptable: AtomicBool::new(true), reset: Mutex::new(None) };
        (Daemon(Arc::new(connection)), theirs)
    }

    fn told(theirs: &Channel) -> Vec<Event> {
        let next = || match theirs.recv::<FromWorker>() {
            Ok((FromWorker::Event(event), _)) => Some(event),
            _ => None,
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_ready_port_that_is_written_all_the_time_does_not_keep_the_daemon_busy() {
        let (daemon, theirs) = connection();
        let sink = sink(daemon);
        let mut words = Vec::new();
        for value in 0..1000 {
            sink(VcpuEvent::Ready(value));
            words.extend(told(&theirs).into_iter().filter_map(|event| match event {
                Event::ReadyPort { value } => Some(value),
                _ => None,
            }));
        }
        assert_eq!(words, (0..READY_TOLD_MAX).collect::<Vec<_>>());
    }

    #[test]
    fn a_machine_resets_once_whatever_its_other_vcpus_do() {
        let (daemon, theirs) = connection();
        let first = sink(daemon.clone());
        first(VcpuEvent::Reset("one door"));
        assert_eq!(daemon.reset().as_deref(), Some("one door"));
        // The daemon has asked for the next machine, and the old one's threads are still ending.
        daemon.note_reset(None);
        first(VcpuEvent::Reset("another"));
        assert_eq!(daemon.reset(), None);
        sink(daemon.clone())(VcpuEvent::Reset("its own"));
        assert_eq!(daemon.reset().as_deref(), Some("its own"));
        let doors = told(&theirs).into_iter().filter_map(|event| match event {
            Event::GuestReset { how } => Some(how),
            _ => None,
        });
        assert_eq!(doors.collect::<Vec<_>>(), ["one door", "its own"]);
    }
}
