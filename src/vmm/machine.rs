//! The machine: memory, split interrupt chip, vCPUs and devices put together, in the order that is cheap.
//!
//! It begins with a [`Shell`], parts of which were made ahead ([`crate::vmm::shell`]). Everything is created standing still;
//! [`Machine::resume`] lets it go.
//!
//! ```text
//!   boot / Prepared::into_machine --> paused --resume--> running --pause--> paused --save--> paused ...
//! ```
//!
//! Pausing stops the vCPUs first and the device thread after them, which waits for what devices have begun: what the last
//! instruction notified is either done or still in the ring, where the restored device finds it.

#![forbid(unsafe_code)]

mod prepared;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

pub use self::prepared::Prepared;
use super::boot::{
    self, BootError, BootInput, BootProtocol, DiskView, Hardware, HardwareWish, Loaded, MmioSlot, ModuleKind,
    ReadAt,
};
use super::bus::{Bus, Pc, SharedBus, lock};
use super::chipset::pci::{Function, PciBus, intx_pin};
use super::chipset::power::{self, Power};
use super::chipset::{AgentPort, Chipset};
use super::devices::{DeviceThread, DevicesError};
use super::host::Host;
use super::irq::{Interrupt, KvmMessages, Messages};
use super::look::Look;
use super::memory::{MemoryError, Ram, VIRTIO_MMIO_BYTES, VIRTIO_MMIO_START};
use super::milestones::GuestClock;
use super::shell::Shell;
use super::vcpu::{EventSink, Looking, VcpuError, VcpuHandle};
use super::vcpu_state::{self, VcpuStateError};
use super::virtio::block::pool::Pool;
use super::virtio::block::{Block, SharedDisk};
use super::virtio::console::{Console, MessageLength};
use super::virtio::mmio::MmioTransport;
use super::virtio::net::counters::{Counted, Counters};
use super::virtio::net::link::Link;
use super::virtio::net::{Net, NetConfig};
use super::virtio::pci::{VirtioFunction, Wires};
use super::virtio::rate::Rates;
use super::virtio::rng::Rng;
use super::virtio::transport::{RestoreError, TransportError};
use super::virtio::{DeviceError, VirtioDevice};
use super::x86::cpuid;
use crate::snapshot::codec::CodecError;
use crate::snapshot::layers::{Freeze, LayerError, LayeredDisk};
use crate::snapshot::state::file::{StateError, StateFile};
use crate::snapshot::state::machine::MachineState;
use crate::snapshot::state::pc::PcState;

/// Most vCPUs.
pub const VCPUS_MAX: u8 = 32;
/// I/O APIC pins of the virtio-mmio slots: those without a legacy owner. (A PC's are in `chipset::pci`.)
pub(super) const SLOT_PINS: [u8; 16] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22];
/// Most network interfaces.
pub const NETWORKS_MAX: usize = 4;
/// Most disks: the slots, less console, rng and network interfaces.
pub const DISKS_MAX: usize = SLOT_PINS.len() - 2 - NETWORKS_MAX;

/// Write-back memory type as default, as firmware leaves it (SDM volume 3, 12.11.2.1).
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 0x806;
/// Local vector table: LINT0 takes the PIC, LINT1 NMIs, on the boot CPU.
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;

/// Why a machine cannot be made, or not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{call}: {source}")]
    Kvm { call: &'static str, source: errno::Error },
    #[error("{0} vCPUs: a VM has 1 to {VCPUS_MAX}")]
    Vcpus(u8),
    #[error("{0} disks: a VM has at most {DISKS_MAX}")]
    Disks(usize),
    #[error("{0} network interfaces: a VM has at most {NETWORKS_MAX}")]
    Networks(usize),
    #[error(
        "{given} links for a guest with {has} network interfaces; give at most as many, or take the snapshot of a VM that has more"
    )]
    Links { given: usize, has: usize },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("vCPU {index}: {source}")]
    VcpuState { index: usize, source: VcpuStateError },
    #[error(transparent)]
    Devices(#[from] DevicesError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    DeviceState(#[from] DeviceError),
    #[error(transparent)]
    DeviceRestore(#[from] RestoreError),
    #[error(transparent)]
    Layers(#[from] LayerError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the state {0}")]
    Encode(#[from] CodecError),
    #[error("{0}; end the VM, or ask its agent")]
    NoPowerButton(&'static str),
    #[error("the snapshot does not fit what was given: {0}")]
    Mismatch(String),
    #[error("descriptors: {0}; raise the limit of open files")]
    Descriptors(io::Error),
}

pub(super) fn call(call: &'static str) -> impl FnOnce(errno::Error) -> MachineError {
    move |source| MachineError::Kvm { call, source }
}

/// What a machine is made of besides memory.
pub struct Parts {
    /// The console, non-blocking.
    pub console: UnixStream,
    /// The agent channel, non-blocking.
    pub agent: UnixStream,
    /// What it is plugged into in the guest.
    pub agent_port: AgentPort,
    /// What is said to the agent is cut into messages so.
    pub agent_messages: MessageLength,
    pub disks: Vec<DiskPart>,
    pub networks: Vec<NetworkPart>,
    pub ready_port: Option<u16>,
    pub events: EventSink,
}

/// One disk and its serial number, as the guest sees it.
pub struct DiskPart {
    pub disk: LayeredDisk,
    pub serial: String,
}

/// What a writable disk goes on with when it is frozen, as [`LayeredDisk::freeze`] has it.
pub struct NextOverlay {
    pub sealed: File,
    pub overlay: File,
}

/// One network interface.
pub struct NetworkPart {
    pub link: Link,
    /// `None` for a machine that is restored: as the guest knows it.
    pub config: Option<NetConfig>,
}

/// A cold boot's wishes.
pub struct BootOptions<'a> {
    pub vcpus: u8,
    pub kernel: &'a File,
    pub module: Option<(ModuleKind, &'a File)>,
    pub protocol: BootProtocol,
    pub hardware: HardwareWish,
    pub command_line: &'a str,
}

/// A machine.
pub struct Machine {
    // In the order in which they must go: threads, then what they use.
    vcpus: Vec<VcpuHandle>,
    devices: DeviceThread,
    bus: SharedBus,
    disks: Vec<SharedDisk>,
    serials: Vec<String>,
    networks: Vec<Arc<Counters>>,
    vm: Arc<VmFd>,
    ram: Ram,
    /// The guest's counter before its first instruction; of cold-booted machines.
    clock: Option<GuestClock>,
}

/// A disk as the boot builder reads it.
struct DiskReader<'a>(&'a LayeredDisk);

impl ReadAt for DiskReader<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset).map_err(io::Error::other)
    }
}

/// Bus and device thread, before there are vCPUs.
struct Frame {
    bus: SharedBus,
    devices: DeviceThread,
    disks: Vec<SharedDisk>,
    serials: Vec<String>,
    networks: Vec<Arc<Counters>>,
    events: EventSink,
}

impl Frame {
    fn new(shell: &Shell, parts: Parts, hardware: Hardware) -> Result<Self, MachineError> {
        if parts.disks.len() > DISKS_MAX {
            return Err(MachineError::Disks(parts.disks.len()));
        }
        if parts.networks.len() > NETWORKS_MAX {
            return Err(MachineError::Networks(parts.networks.len()));
        }
        let changed =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::Descriptors)?;
        let told = changed.try_clone().map_err(MachineError::Descriptors)?;
        let (on_virtio, on_serial) = match parts.agent_port {
            AgentPort::Virtio => (Some(parts.agent), None),
            AgentPort::Serial => (None, Some(parts.agent)),
        };
        let chipset = Chipset::new(shell.ioapic(), parts.console, on_serial, told, parts.ready_port)
            .map_err(call("the chipset's lines and timer"))?;
        let mut virtio: Vec<Box<dyn VirtioDevice>> = Vec::new();
        let (mut disks, mut serials) = (Vec::new(), Vec::new());
        let pool = Pool::new();
        for part in parts.disks {
            let disk: SharedDisk = Arc::new(part.disk);
            let block = Block::new(disk.clone(), &part.serial, Arc::clone(&pool));
            virtio.push(Box::new(block.map_err(MachineError::Descriptors)?));
            disks.push(disk);
            serials.push(part.serial);
        }
        virtio.extend(on_virtio.map(|agent| {
            Box::new(Console::of_messages(agent, parts.agent_messages)) as Box<dyn VirtioDevice>
        }));
        virtio.push(Box::new(Rng::new()));
        let mut networks = Vec::new();
        for part in parts.networks {
            let net = match part.config {
                Some(config) => Net::new(part.link, config),
                None => Net::for_restore(part.link),
            };
            networks.push(net.counters());
            virtio.push(Box::new(net));
        }
        let memory = shell.ram().memory().clone();
        let bus = match hardware {
            Hardware::Microvm => {
                let windows = mmio_windows(&chipset, virtio)?;
                Bus::new(chipset, windows, memory)
            }
            Hardware::Pc { transitional } => {
                let pc = pc(shell, &chipset, virtio, transitional)?;
                Bus::with_pc(chipset, pc, memory)
            }
        };
        let bus = Arc::new(bus);
        let devices = DeviceThread::start(bus.clone(), changed)?;
        Ok(Frame { bus, devices, disks, serials, networks, events: parts.events })
    }

    /// The virtio-mmio windows, for the tables.
    fn slots(&self) -> Vec<MmioSlot> {
        if self.bus.pc.is_some() {
            return Vec::new();
        }
        let slot = |(n, irq): (usize, &u8)| MmioSlot {
            base: VIRTIO_MMIO_START + n as u64 * VIRTIO_MMIO_BYTES,
            bytes: VIRTIO_MMIO_BYTES,
            irq: *irq,
        };
        SLOT_PINS.iter().enumerate().take(self.bus.virtio.len()).map(slot).collect()
    }

    fn into_machine(self, host: &Host, shell: Shell, vcpus: Vec<VcpuFd>) -> Result<Machine, MachineError> {
        let vcpus = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, vcpu)| {
                let (msrs, bus, events) = (host.msr_indices.clone(), self.bus.clone(), self.events.clone());
                VcpuHandle::start(index as u8, vcpu, msrs, bus, events)
            })
            .collect::<Result<_, _>>()?;
        let (vm, ram) = shell.into_parts()?;
        Ok(Machine {
            vcpus,
            devices: self.devices,
            bus: self.bus,
            disks: self.disks,
            serials: self.serials,
            networks: self.networks,
            vm,
            ram,
            clock: None,
        })
    }
}

/// Each device in a virtio-mmio window with a line of its own.
fn mmio_windows(
    chipset: &Chipset,
    devices: Vec<Box<dyn VirtioDevice>>,
) -> Result<Vec<MmioTransport>, MachineError> {
    let window = |(device, pin): (Box<dyn VirtioDevice>, &u8)| {
        let line: Arc<dyn Interrupt> = chipset.ioapic.line(usize::from(*pin)).map_err(call("KVM_IRQFD"))?;
        Ok(MmioTransport::new(device, line)?)
    };
    devices.into_iter().zip(&SLOT_PINS).map(window).collect()
}

/// PCI with each device as a function, and the power block.
fn pc(
    shell: &Shell,
    chipset: &Chipset,
    devices: Vec<Box<dyn VirtioDevice>>,
    transitional: bool,
) -> Result<Pc, MachineError> {
    let messages: Arc<dyn Messages> = Arc::new(KvmMessages(shell.vm()));
    let level = |pin: u8| chipset.ioapic.level_line(pin.into()).map(Box::new).map_err(call("KVM_IRQFD"));
    let mut functions = Vec::new();
    for (slot, device) in (1..).zip(devices) {
        let wires = Wires { messages: messages.clone(), intx: level(intx_pin(slot))? };
        let memory = shell.ram().memory().clone();
        functions.push(Arc::new(VirtioFunction::new(device, slot, transitional, wires, memory)?));
    }
    let power = Power::new(level(power::SCI)?);
    let pci = PciBus::new(functions.iter().map(|function| function.clone() as Arc<dyn Function>).collect());
    Ok(Pc { pci, power, functions, transitional })
}

impl Machine {
    /// Puts a kernel into a new machine. It stands at its first instruction. `done` hears the name of each step when it is done.
    pub fn boot(
        host: &Host,
        mut shell: Shell,
        parts: Parts,
        options: &BootOptions<'_>,
        done: &mut dyn FnMut(&'static str),
    ) -> Result<(Self, Loaded), MachineError> {
        let count = options.vcpus;
        if !(1..=VCPUS_MAX).contains(&count) {
            return Err(MachineError::Vcpus(count));
        }
        let (hardware, mut choices) = boot::hardware(options.kernel, options.hardware)?;
        let agent_port = parts.agent_port;
        let frame = Frame::new(&shell, parts, hardware)?;
        done("devices");
        let readers: Vec<DiskReader<'_>> = frame.disks.iter().map(|disk| DiskReader(disk)).collect();
        let views: Vec<DiskView<'_>> = readers
            .iter()
            .map(|reader| DiskView {
                content: reader,
                bytes: reader.0.disk_bytes(),
                read_only: reader.0.read_only(),
            })
            .collect();
        let mut loaded = boot::load(&BootInput {
            memory: shell.ram().memory(),
            kernel: options.kernel,
            module: options.module,
            protocol: options.protocol,
            hardware,
            command_line: options.command_line,
            vcpus: count,
            disks: &views,
            mmio: &frame.slots(),
            agent_port,
        })?;
        done("load");
        choices.append(&mut loaded.choices);
        loaded.choices = choices;
        // The tables say: the first id after the vCPUs'.
        frame.bus.chipset.ioapic.set_id(count);
        let (mut vcpus, mut khz) = (Vec::new(), 0);
        for index in 0..count {
            let vcpu = shell.vcpu(index)?;
            let tsc_khz = vcpu.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?;
            khz = tsc_khz;
            let cpuid: CpuId = cpuid::for_vcpu(&host.supported_cpuid, index, count, tsc_khz);
            vcpu.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
            set_firmware_state(&vcpu)?;
            if index == 0 {
                let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
                let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
                loaded.entry.apply(&mut regs, &mut sregs);
                vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
                vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
            }
            vcpus.push(vcpu);
        }
        let tsc = vcpus.first().and_then(vcpu_state::read_tsc);
        let clock = tsc.map(|tsc| GuestClock { at: Instant::now(), tsc, khz });
        let machine = Machine { clock, ..frame.into_machine(host, shell, vcpus)? };
        done("vcpus");
        Ok((machine, loaded))
    }

    /// Limits what each device may do in a second. To be called before the machine is let go.
    ///
    /// # Errors
    /// [`MachineError::Descriptors`].
    pub fn limit(&self, rates: &Rates) -> Result<(), MachineError> {
        for device in &self.bus.virtio {
            lock(device).limit(rates).map_err(MachineError::Descriptors)?;
        }
        Ok(())
    }

    /// Another peer takes the place of the one behind the agent's port, who writes no more.
    pub fn new_peer(&self) {
        for device in &self.bus.virtio {
            lock(device).new_peer();
        }
    }

    /// Lets it run.
    pub fn resume(&self) -> Result<(), MachineError> {
        for device in &self.bus.virtio {
            lock(device).kick_after_restore();
        }
        self.devices.resume()?;
        for vcpu in &self.vcpus {
            vcpu.resume()?;
        }
        Ok(())
    }

    /// Returns when every vCPU and every device stands still.
    pub fn pause(&self) -> Result<(), MachineError> {
        let pausing = self.vcpus.iter().map(VcpuHandle::pause).collect::<Result<Vec<_>, _>>()?;
        for vcpu in pausing {
            vcpu.wait()?;
        }
        Ok(self.devices.pause()?)
    }

    /// The state of a paused machine: all but memory and disks.
    pub fn save(&self) -> Result<StateFile, MachineError> {
        let mut file = StateFile::default();
        let clock = self.vm.get_clock().map_err(call("KVM_GET_CLOCK"))?;
        let devices = self.bus.virtio.iter().map(|device| lock(device).device_name().to_string()).collect();
        let memory = self.ram.regions().map(|(region, _)| region).collect();
        let vcpus = self.vcpus.len() as u8;
        file.push(0, &MachineState { vcpus, memory, clock_ns: clock.clock, devices })?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            file.push(index as u32, &vcpu.save()?)?;
        }
        file.push(0, &self.bus.chipset.save())?;
        if let Some(agent) = self.bus.chipset.save_agent() {
            file.push(0, &agent)?;
        }
        for (slot, device) in self.bus.virtio.iter().enumerate() {
            file.push(slot as u32, &lock(device).save()?)?;
        }
        if let Some(pc) = &self.bus.pc {
            let (config_address, bridge) = pc.pci.save();
            let power = pc.power.save();
            file.push(0, &PcState { transitional: pc.transitional, config_address, bridge, power })?;
            file.push(0, &pc.power.save_events())?;
            for (slot, function) in pc.functions.iter().enumerate() {
                file.push(slot as u32, &function.save())?;
            }
        }
        Ok(file)
    }

    /// Presses the machine's power button: the guest is asked to power itself off.
    ///
    /// # Errors
    /// [`MachineError::NoPowerButton`] on a machine without ACPI, or while the guest does not listen to it (a kernel that
    /// has not come that far sees it when it does).
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        let pc = self.bus.pc.as_ref().ok_or(MachineError::NoPowerButton(
            "this machine has no ACPI (hardware microvm), so no power button",
        ))?;
        match pc.power.press_button() {
            true => Ok(()),
            false => Err(MachineError::NoPowerButton("the guest does not listen to its power button")),
        }
    }

    /// Freezes the writable disks of a paused machine: each goes on with a new empty overlay, taken from `overlays` in
    /// the order of the writable disks, and reads the frozen one through the file beside it ([`LayeredDisk::freeze`]). The answer is in the order of all disks; `None` is a read-only one.
    pub fn freeze_disks(&self, overlays: Vec<NextOverlay>) -> Result<Vec<Option<Freeze>>, MachineError> {
        let writable = self.disks.iter().filter(|disk| !disk.read_only()).count();
        if overlays.len() != writable {
            return Err(MachineError::Mismatch(format!(
                "{} new overlays for {writable} writable disks",
                overlays.len()
            )));
        }
        let mut overlays = overlays.into_iter();
        let mut frozen = Vec::new();
        for disk in &self.disks {
            frozen.push(match disk.read_only() {
                true => None,
                false => overlays.next().map(|next| disk.freeze(next.overlay, next.sealed)).transpose()?,
            });
        }
        Ok(frozen)
    }

    /// Ends the machine and gives its disks to the next one, as they are.
    pub fn into_disks(self) -> Result<Vec<DiskPart>, MachineError> {
        let Machine { vcpus, devices, bus, disks, serials, networks: _, vm: _, ram: _, clock: _ } = self;
        // Threads first: nobody uses the devices any more when they go. With the last device goes the pool, which waits
        // for the requests that its threads have begun: after that nobody uses the disks.
        drop(vcpus);
        drop(devices);
        drop(bus);
        let part = |(disk, serial): (SharedDisk, String)| match Arc::into_inner(disk) {
            Some(disk) => Ok(DiskPart { disk, serial }),
            None => Err(MachineError::Mismatch("a disk of the machine is still in use".into())),
        };
        disks.into_iter().zip(serials).map(part).collect()
    }

    /// The machine's memory. Reading it is sound only while the machine is paused.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u8 {
        self.vcpus.len() as u8
    }

    /// What went through each network interface so far.
    pub fn networks(&self) -> Vec<Counted> {
        self.networks.iter().map(|counters| counters.read()).collect()
    }

    /// The registers of each vCPU, or why there are none. Those that run stand still for a moment; one that does not come out of its
    /// exit by `deadline` is left alone. `running`: let them run on.
    pub fn look(&self, running: bool, deadline: Instant) -> Result<Vec<Result<Look, String>>, MachineError> {
        let looking: Vec<_> = self.vcpus.iter().map(VcpuHandle::look).collect();
        let wait = |looking: Result<Looking, VcpuError>| match looking {
            Ok(looking) => looking.wait_until(deadline),
            Err(error) => Err(error.to_string()),
        };
        let looks = looking.into_iter().map(wait).collect();
        if running {
            for vcpu in &self.vcpus {
                vcpu.resume()?;
            }
        }
        Ok(looks)
    }

    /// When the boot CPU entered the guest, when the guest wrote its first console byte, and a reading of its clock.
    pub fn milestones(&self) -> (Option<Instant>, Option<Instant>, Option<GuestClock>) {
        (self.bus.milestones.entered.get().copied(), self.bus.chipset.serial.first_output(), self.clock)
    }

    /// Exits of all vCPUs to this process so far.
    pub fn exits(&self) -> u64 {
        self.bus.exits.load(Ordering::Relaxed)
    }
}

/// What firmware would have set and kernels take for granted.
fn set_firmware_state(vcpu: &VcpuFd) -> Result<(), MachineError> {
    let entry =
        kvm_msr_entry { index: MSR_MTRR_DEFAULT_TYPE, data: MTRR_ENABLED_WRITE_BACK, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry])
        .map_err(|_| MachineError::Kvm { call: "KVM_SET_MSRS", source: errno::Error::new(libc::ENOMEM) })?;
    if vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))? != 1 {
        tracing::warn!("this KVM has no MTRR default type register; the guest keeps KVM's own default");
    }
    let mut lapic = vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    for (register, value) in [(LAPIC_LVT_LINT0, DELIVERY_EXTINT), (LAPIC_LVT_LINT1, DELIVERY_NMI)] {
        for (to, from) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *to = from as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))
}
