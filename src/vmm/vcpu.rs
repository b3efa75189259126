//! One vCPU: a thread that runs it, and a handle that starts, stops and saves it.
//!
//! A thread is either in KVM_RUN or waiting for a command. To stop it, the handle sets the stop flag and
//! `kvm_run.immediate_exit`, then sends a signal whose handler does nothing: whether the thread was about to enter
//! KVM_RUN or inside it, KVM_RUN returns EINTR (api.rst, "immediate_exit"). An exit that waited for its
//! answer (a port or MMIO read) is completed by one more KVM_RUN before the thread reports that it stands still,
//! so that saved registers are those after the instruction.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_IO, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::Bus;
use super::chipset::PortEffect;
use super::look::{self, Look};
use super::stop::Stop;
use super::threads::{self, Role};
use super::vcpu_state::{self, VcpuStateError};
use crate::snapshot::state::vcpu::VcpuState;

/// How long a guest that ends waits for its console to take what it printed.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// What a vCPU reports by itself.
#[derive(Debug, Clone)]
pub enum VcpuEvent {
    /// The guest wrote this to the ready port; it runs on.
    Ready(u32),
    /// The guest reset itself; by which door. The vCPU stands still.
    Reset(&'static str),
    /// The guest powered itself off.
    PowerOff,
    /// KVM cannot run the guest any further; what, with registers.
    Failed(String),
}

/// Where events go. Called from vCPU threads; must not block for long.
pub type EventSink = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

enum Command {
    Run,
    /// Answered when the vCPU stands still.
    Pause(SyncSender<()>),
    Save(SyncSender<Result<VcpuState, VcpuStateError>>),
    Look(SyncSender<Result<Look, errno::Error>>),
    Quit,
}

/// The `immediate_exit` byte of a vCPU's shared page, mapped a second time: the handle may write it while the thread
/// is in KVM_RUN.
struct RunPage {
    page: NonNull<kvm_run>,
}

// SAFETY: the page is shared with the kernel by design; through this mapping only `immediate_exit` is touched from
// other threads, atomically, and the I/O fields by the vCPU's own thread.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new shared mapping of the vCPU's first page (api.rst 5); no existing mapping is replaced.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page.cast::<kvm_run>()) {
            Some(page) if page.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => Ok(RunPage { page }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping lives as long as self; the byte is only ever accessed atomically or by the kernel.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) }
    }

    /// Bytes of one access of the port exit that was just returned: 1, 2 or 4.
    fn port_access_bytes(&self) -> usize {
        // SAFETY: the vCPU's own thread asks after a KVM_EXIT_IO, when the kernel does not write the page.
        let (reason, io) = unsafe {
            let run = self.page.as_ptr();
            ((*run).exit_reason, (*run).__bindgen_anon_1.io)
        };
        if reason == KVM_EXIT_IO { usize::from(io.size).clamp(1, 4) } else { 1 }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and nothing borrows from it beyond self.
        unsafe { libc::munmap(self.page.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

/// A running vCPU thread.
pub struct VcpuHandle {
    commands: mpsc::Sender<Command>,
    stop: Arc<AtomicBool>,
    page: Arc<RunPage>,
    thread: Option<JoinHandle<()>>,
    index: u8,
}

/// A vCPU's thread is gone: it panicked, or could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("vCPU {0}'s thread is gone")]
    Gone(u8),
    #[error("vCPU {index}'s thread cannot be started: {source}; raise the process limits")]
    Start { index: u8, source: io::Error },
    #[error("vCPU {index}: {source}")]
    State { index: u8, source: VcpuStateError },
}

/// Installs the do-nothing handler of the stop signal. Once in a process, before the first vCPU.
pub fn install_stop_signal() -> Result<(), errno::Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
}

impl VcpuHandle {
    /// Starts the thread of vCPU `index`, standing still.
    pub fn start(
        index: u8,
        vcpu: VcpuFd,
        msr_indices: Arc<[u32]>,
        bus: Arc<Bus>,
        events: EventSink,
    ) -> Result<Self, VcpuError> {
        let start = |source| VcpuError::Start { index, source };
        let page = Arc::new(RunPage::map(&vcpu).map_err(start)?);
        let stop = Arc::new(AtomicBool::new(true));
        let (commands, receiver) = mpsc::channel();
        let runner = Runner {
            index,
            vcpu,
            msr_indices,
            bus,
            events,
            stop: stop.clone(),
            page: page.clone(),
            dead: false,
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(256 << 10)
            .spawn(move || {
                let _alive = threads::begin(Role::Vcpu);
                runner.serve(&receiver);
            })
            .map_err(start)?;
        Ok(VcpuHandle { commands, stop, page, thread: Some(thread), index })
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Gone(self.index))
    }

    /// Lets the guest run.
    pub fn resume(&self) -> Result<(), VcpuError> {
        self.stop().take_back();
        self.send(Command::Run)
    }

    /// Asks the vCPU to stand still; [`Pausing::wait`] tells when it does. Ask all first, then wait for all.
    pub fn pause(&self) -> Result<Pausing, VcpuError> {
        let (done, wait) = mpsc::sync_channel(1);
        self.kick();
        self.send(Command::Pause(done))?;
        Ok(Pausing { wait, index: self.index })
    }

    fn stop(&self) -> Stop<'_> {
        Stop { flag: &self.stop, immediate_exit: self.page.immediate_exit() }
    }

    fn kick(&self) {
        self.stop().ask();
        if let Some(thread) = &self.thread
            && !thread.is_finished()
        {
            // Fails only for a thread that is just ending.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// The state of a vCPU that stands still.
    pub fn save(&self) -> Result<VcpuState, VcpuError> {
        let (answer, wait) = mpsc::sync_channel(1);
        self.send(Command::Save(answer))?;
        let state = wait.recv().map_err(|_| VcpuError::Gone(self.index))?;
        state.map_err(|source| VcpuError::State { index: self.index, source })
    }

    /// Begins a look at the registers, which stops the vCPU if it runs; [`Looking::wait_until`] has them. [`VcpuHandle::resume`] must
    /// follow if it is to run on. Unlike a pause this does not need the vCPU to get there: it may hang in a device.
    pub fn look(&self) -> Result<Looking, VcpuError> {
        let (answer, wait) = mpsc::sync_channel(1);
        self.kick();
        self.send(Command::Look(answer))?;
        Ok(Looking { wait })
    }
}

/// A look that was begun.
pub struct Looking {
    wait: Receiver<Result<Look, errno::Error>>,
}

impl Looking {
    /// The registers, or why there are none: in a sentence part.
    pub fn wait_until(self, deadline: Instant) -> Result<Look, String> {
        match self.wait.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(look)) => Ok(look),
            Ok(Err(error)) => Err(format!("KVM does not tell its registers: {error}")),
            Err(RecvTimeoutError::Timeout) => {
                Err("does not stop: its thread is busy outside the guest".to_owned())
            }
            Err(RecvTimeoutError::Disconnected) => Err("its thread is gone".to_owned()),
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.kick();
        let _ = self.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A pause that was asked for.
pub struct Pausing {
    wait: Receiver<()>,
    index: u8,
}

impl Pausing {
    /// Returns when the vCPU stands still.
    pub fn wait(self) -> Result<(), VcpuError> {
        self.wait.recv().map_err(|_| VcpuError::Gone(self.index))
    }
}

/// How one KVM_RUN ended.
enum Step {
    /// By a stop, with nothing left to answer.
    Interrupted,
    /// By an exit that was answered.
    Handled,
    Event(VcpuEvent),
}

/// What the thread owns.
struct Runner {
    index: u8,
    vcpu: VcpuFd,
    msr_indices: Arc<[u32]>,
    bus: Arc<Bus>,
    events: EventSink,
    stop: Arc<AtomicBool>,
    page: Arc<RunPage>,
    /// The guest is over: runs no more, still answers.
    dead: bool,
}

impl Runner {
    fn serve(mut self, commands: &Receiver<Command>) {
        while let Ok(command) = commands.recv() {
            match command {
                Command::Run => self.run(),
                Command::Pause(done) => drop(done.send(())),
                // A clone would go on behind the instruction that reset it.
                Command::Save(answer) if self.dead => drop(answer.send(Err(VcpuStateError::Over))),
                Command::Save(answer) => {
                    drop(answer.send(vcpu_state::save(&self.vcpu, &self.msr_indices)));
                }
                Command::Look(answer) => drop(answer.send(look::take(&self.vcpu))),
                Command::Quit => return,
            }
        }
    }

    fn run(&mut self) {
        if self.index == 0 {
            self.bus.milestones.entered.get_or_init(Instant::now);
        }
        let (flag, page) = (self.stop.clone(), self.page.clone());
        let stop = Stop { flag: &flag, immediate_exit: page.immediate_exit() };
        stop.begin();
        while !self.dead && !stop.asked() {
            self.step();
        }
        // Finish an exit that waits for its answer, without running the guest. A page-crossing access comes in a
        // few parts; more would be a loop.
        for _ in 0..8 {
            stop.finish();
            if self.dead || matches!(self.step(), Step::Interrupted) {
                return;
            }
        }
    }

    /// Runs once and reports what is to be reported.
    fn step(&mut self) -> Step {
        let step = self.run_once();
        if let Step::Event(event) = &step {
            self.dead = !matches!(event, VcpuEvent::Ready(_));
            // What it printed before comes before; and the last words of a guest that ends must not be lost with it.
            self.bus.chipset.serial.flush(if self.dead { LAST_WORDS_LIMIT } else { Duration::ZERO });
            (self.events)(event.clone());
        }
        step
    }

    /// One KVM_RUN and what follows from it.
    fn run_once(&mut self) -> Step {
        let page = self.page.clone();
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            // A stop signal, or an application processor that was just woken.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Step::Interrupted,
            Err(e) => return Step::Event(self.failed(format!("KVM_RUN: {e}"))),
        };
        self.bus.exits.fetch_add(1, Ordering::Relaxed);
        match exit {
            VcpuExit::IoIn(port, data) => {
                for access in data.chunks_mut(page.port_access_bytes()) {
                    self.bus.port_read(port, access);
                }
            }
            VcpuExit::IoOut(port, data) => {
                for access in data.chunks(page.port_access_bytes()) {
                    match self.bus.port_write(port, access) {
                        PortEffect::None => {}
                        PortEffect::Ready(value) => return Step::Event(VcpuEvent::Ready(value)),
                        PortEffect::Reset(how) => return Step::Event(VcpuEvent::Reset(how)),
                        PortEffect::PowerOff => return Step::Event(VcpuEvent::PowerOff),
                    }
                }
            }
            VcpuExit::MmioRead(address, data) => self.bus.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => {
                if let Err(e) = self.bus.mmio_write(address, data) {
                    return Step::Event(VcpuEvent::Failed(format!(
                        "the interrupt routes cannot be set: {e}"
                    )));
                }
            }
            VcpuExit::Shutdown => {
                // AMD's KVM has put the vCPU into its reset state by now (rip 0xfff0); Intel's shows where it was.
                tracing::warn!(
                    "vCPU {} triple faulted; KVM's last registers: {}",
                    self.index,
                    self.registers()
                );
                return Step::Event(VcpuEvent::Reset("triple fault"));
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => return Step::Event(VcpuEvent::PowerOff),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => {
                return Step::Event(VcpuEvent::Reset("KVM system event"));
            }
            VcpuExit::IoapicEoi(vector) => self.bus.chipset.ioapic.end_of_interrupt(vector),
            VcpuExit::Intr | VcpuExit::Hlt => {}
            VcpuExit::InternalError => {
                let detail = self.internal_error();
                return Step::Event(self.failed(detail));
            }
            VcpuExit::FailEntry(reason, cpu) => {
                return Step::Event(
                    self.failed(format!("KVM cannot enter the guest: reason {reason:#x}, CPU {cpu}")),
                );
            }
            other => {
                let what = format!("KVM exit {other:?}, which a guest should not cause");
                return Step::Event(self.failed(what));
            }
        }
        Step::Handled
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: the kernel told KVM_EXIT_INTERNAL_ERROR, so this is the union's member.
        let internal = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal };
        let why = match internal.suberror {
            1 => "its emulator lacks this instruction",
            2 => "exceptions piled up while it delivered one",
            3 => "it left the guest for a reason unknown to it",
            _ => "an internal error",
        };
        let count = (internal.ndata as usize).min(internal.data.len());
        format!("KVM gave up: {why} (suberror {}, data {:x?})", internal.suberror, &internal.data[..count])
    }

    fn failed(&self, what: String) -> VcpuEvent {
        let registers = self.registers();
        tracing::warn!("vCPU {}: {what}; {registers}", self.index);
        VcpuEvent::Failed(format!("{what}; {registers}"))
    }

    fn registers(&self) -> String {
        match (self.vcpu.get_regs(), self.vcpu.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "rip={:#x} rsp={:#x} rflags={:#x} cs={:#x} cpl={} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} \
                 rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x}",
                r.rip,
                r.rsp,
                r.rflags,
                s.cs.selector,
                s.ss.dpl,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi
            ),
            _ => "registers not to be had".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_userspace_memory_region};
    use memmap2::MmapMut;
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::vmm::chipset::Chipset;
    use crate::vmm::chipset::ioapic::{IoApic, PINS};
    use crate::vmm::host::Host;
    use crate::vmm::memory::GuestMemory;

    /// mov al, 0xfe; out 0x64, al; hlt: the keyboard controller's reset.
    const RESET: [u8; 5] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];

    #[test]
    fn a_vcpu_whose_guest_has_reset_itself_has_no_state_to_be_saved() {
        let Some(host) = Host::for_tests() else { return };
        install_stop_signal().unwrap();
        let vm = Arc::new(host.kvm.create_vm().unwrap());
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = PINS as u64;
        vm.enable_cap(&split).unwrap();
        let mut page = MmapMut::map_anon(4096).unwrap();
        page[..RESET.len()].copy_from_slice(&RESET);
        let region = kvm_userspace_memory_region {
            memory_size: page.len() as u64,
            userspace_addr: page.as_mut_ptr().addr() as u64,
            ..Default::default()
        };
        // SAFETY: the page outlives the vCPU's thread, which `handle` ends, and nobody looks at it meanwhile.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let (mut regs, mut sregs) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap());
        (sregs.cs.base, sregs.cs.selector, regs.rip, regs.rflags) = (0, 0, 0, 2);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&regs).unwrap();

        let (console, _) = UnixStream::pair().unwrap();
        console.set_nonblocking(true).unwrap();
        let changed = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let chipset = Chipset::new(Arc::new(IoApic::new(vm)), console, None, changed, None).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let bus = Arc::new(Bus::new(chipset, Vec::new(), memory));
        let (told, hears) = mpsc::channel();
        let told = std::sync::Mutex::new(told);
        let events: EventSink = Arc::new(move |event| told.lock().unwrap().send(event).unwrap());
        let handle = VcpuHandle::start(0, vcpu, host.msr_indices.clone(), bus, events).unwrap();
        assert!(handle.save().is_ok(), "it has not begun");
        handle.resume().unwrap();
        let event = hears.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(event, VcpuEvent::Reset(_)), "{event:?}");
        handle.pause().unwrap().wait().unwrap();
        let saved = handle.save();
        assert!(
            matches!(saved, Err(VcpuError::State { index: 0, source: VcpuStateError::Over })),
            "{:?}",
            saved.err()
        );
        drop(handle);
    }
}
