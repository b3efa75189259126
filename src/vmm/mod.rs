//! The machine itself: KVM, memory, vCPUs, chipset, virtio, boot protocols. No policy, no async, no network API.
//!
//! | module | what it holds |
//! |---|---|
//! | [`host`] | what this host's KVM offers |
//! | [`machine`] | all of it put together: boot, restore, pause, resume, save |
//! | [`shell`] | what can be made before it is known which machine it will be |
//! | [`memory`] | the guest-physical layout and the RAM |
//! | [`vcpu`], [`vcpu_state`] | a vCPU's thread; its registers out of KVM and back |
//! | [`bus`] | what a vCPU's exits reach |
//! | [`look`] | a vCPU's registers, for the watchdog |
//! | [`milestones`] | when a boot reached what |
//! | [`devices`] | the thread that does all I/O |
//! | [`random`] | the host's random bytes |
//! | [`threads`] | what each thread does first |
//! | [`chipset`] | serial, timer, clock, interrupt controllers |
//! | [`virtio`] | virtio devices and their transport |
//! | [`boot`], [`x86`] | kernels and the tables they expect |

pub mod boot;
pub mod bus;
pub mod chipset;
pub mod devices;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod host;
#[cfg(any(test, fuzzing))]
mod hostile;
pub mod irq;
pub mod look;
pub mod machine;
pub mod memory;
pub mod milestones;
pub mod random;
pub mod shell;
mod stop;
pub mod threads;
pub mod vcpu;
pub mod vcpu_state;
pub mod virtio;
pub mod x86;
