//! Which VMs there are: by id, by name, in order of creation. Ended ones are listed for a while.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Fleet;
use super::error::FleetError;
use super::events::Change;
use super::limits::EXITED_KEPT_MAX;
use super::vm::{Command, State, Stopped, Vm};
use crate::telemetry::metrics;

/// The table of VMs.
#[derive(Debug)]
pub struct Registry {
    vms_max: usize,
    next_number: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// By number.
    vms: BTreeMap<u64, Arc<Vm>>,
    numbers_by_id: HashMap<String, u64>,
    numbers_by_name: HashMap<String, u64>,
    /// The service ends: none is let in.
    closed: bool,
}

impl Registry {
    pub fn new(vms_max: usize) -> Self {
        Self { vms_max, next_number: AtomicU64::new(0), table: Mutex::new(Table::default()) }
    }

    /// Most living VMs.
    pub fn vms_max(&self) -> usize {
        self.vms_max
    }

    /// A number for a VM to be made.
    pub fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// From here on none is let in: what is made still by calls under way would outlive a service that ends. Gives those that are in.
    pub fn close(&self) -> Vec<Arc<Vm>> {
        let mut table = self.lock();
        table.closed = true;
        table.vms.values().cloned().collect()
    }

    /// Whether so many more VMs may be made, and these names given.
    pub fn check_room(&self, count: usize, names: &[String]) -> Result<(), FleetError> {
        let table = self.lock();
        self.check_count(&table, count)?;
        names.iter().try_for_each(|name| table.check_name(name))
    }

    /// Adds a VM.
    pub fn insert(&self, vm: &Arc<Vm>) -> Result<(), FleetError> {
        let mut table = self.lock();
        self.check_count(&table, 1)?;
        if let Some(name) = vm.name() {
            table.check_name(name)?;
            table.numbers_by_name.insert(name.to_owned(), vm.number);
        }
        table.numbers_by_id.insert(vm.id.clone(), vm.number);
        table.vms.insert(vm.number, Arc::clone(vm));
        table.forget_old();
        vm.events.tell(|| vm.event(Change::Made));
        Ok(())
    }

    /// Adds one that runs already. It counts, and is let in also where there is no room for more.
    pub fn adopt(&self, vm: &Arc<Vm>) {
        let mut table = self.lock();
        if let Some(name) = vm.name()
            && table.check_name(name).is_ok()
        {
            table.numbers_by_name.insert(name.to_owned(), vm.number);
        }
        table.numbers_by_id.insert(vm.id.clone(), vm.number);
        table.vms.insert(vm.number, Arc::clone(vm));
        vm.events.tell(|| vm.event(Change::Exists));
    }

    /// Finds a VM by id or name. One that stands ready in a pool is nobody's to use.
    pub fn get(&self, id_or_name: &str) -> Result<Arc<Vm>, FleetError> {
        let table = self.lock();
        let found = table.number(id_or_name).and_then(|number| table.vms.get(&number));
        let vm = found.ok_or_else(|| FleetError::NoVm(id_or_name.chars().take(80).collect()))?;
        match &vm.pool {
            Some(pool) if vm.is_held() => Err(FleetError::WrongState(format!(
                "VM {} stands ready in the pool {pool}; take one with `coldspark pool take {pool}`",
                vm.id
            ))),
            _ => Ok(Arc::clone(vm)),
        }
    }

    /// Hands a VM of a pool over: it can be found and used from now on, also by its name.
    pub fn release(&self, vm: &Arc<Vm>, name: Option<String>) -> Result<(), FleetError> {
        let mut table = self.lock();
        if let Some(name) = name {
            table.check_name(&name)?;
            if vm.name.set(name.clone()).is_ok() {
                table.numbers_by_name.insert(name, vm.number);
            }
        }
        vm.held.store(false, Ordering::Release);
        // Those who do not look into pools see it for the first time.
        vm.events.tell(|| vm.event(Change::Made));
        Ok(())
    }

    /// All VMs, oldest first, those of pools among them.
    pub fn list(&self) -> Vec<Arc<Vm>> {
        self.lock().vms.values().cloned().collect()
    }

    /// Takes a VM out of the table; it is not ended by that.
    pub fn remove(&self, id_or_name: &str) -> Option<Arc<Vm>> {
        let mut table = self.lock();
        let number = table.number(id_or_name)?;
        table.remove(number)
    }

    fn check_count(&self, table: &Table, more: usize) -> Result<(), FleetError> {
        if table.closed {
            return Err(FleetError::Ending);
        }
        let living = table.vms.values().filter(|vm| vm.state() != State::Exited).count();
        match living.saturating_add(more) <= self.vms_max {
            true => Ok(()),
            false => Err(FleetError::Limit {
                what: "VMs",
                limit: self.vms_max,
                hint: "delete some, or serve with a higher --vms-max",
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn number(&self, id_or_name: &str) -> Option<u64> {
        self.numbers_by_id.get(id_or_name).or_else(|| self.numbers_by_name.get(id_or_name)).copied()
    }

    fn check_name(&self, name: &str) -> Result<(), FleetError> {
        let holder = self.numbers_by_name.get(name).and_then(|number| self.vms.get(number));
        match holder {
            Some(vm) if vm.state() != State::Exited => {
                Err(FleetError::Exists { what: "a VM", name: name.to_owned() })
            }
            _ => Ok(()),
        }
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Vm>> {
        let vm = self.vms.remove(&number)?;
        self.numbers_by_id.remove(&vm.id);
        if let Some(name) = vm.name()
            && self.numbers_by_name.get(name) == Some(&number)
        {
            self.numbers_by_name.remove(name);
        }
        vm.events.tell(|| vm.event(Change::Gone));
        Some(vm)
    }

    fn forget_old(&mut self) {
        let ended = self.vms.values().filter(|vm| vm.state() == State::Exited);
        let ended: Vec<u64> = ended.map(|vm| vm.number).collect();
        let over = ended.len().saturating_sub(EXITED_KEPT_MAX);
        for number in ended.into_iter().take(over) {
            self.remove(number);
        }
    }
}

/// Ends and forgets a VM when dropped, unless it was handed over.
#[derive(Debug)]
pub struct Guard {
    fleet: Arc<Fleet>,
    vm: Arc<Vm>,
    handed_over: bool,
}

impl Guard {
    pub fn new(fleet: &Arc<Fleet>, vm: Arc<Vm>) -> Self {
        Self { fleet: Arc::clone(fleet), vm, handed_over: false }
    }

    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The VM is somebody else's from now on.
    pub fn hand_over(mut self) -> Arc<Vm> {
        self.handed_over = true;
        Arc::clone(&self.vm)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.handed_over {
            self.vm.kill("it did not start well");
            self.fleet.registry.remove(&self.vm.id);
        }
    }
}

impl Fleet {
    /// One VM, by id or name, for somebody who calls it so.
    pub fn vm(&self, id_or_name: &str) -> Result<Arc<Vm>, FleetError> {
        let vm = self.registry.get(id_or_name)?;
        vm.has_been_named();
        Ok(vm)
    }

    /// All VMs, oldest first, those that stand ready in pools among them.
    pub fn vms(&self) -> Vec<Arc<Vm>> {
        self.registry.list()
    }

    /// Asks the guest to power itself off, and ends the VM when it has not done so `within` that time. The VM stays in the
    /// list, EXITED. One whose guest cannot be asked, or is paused or still booting, is ended at once.
    pub async fn stop_vm(&self, id_or_name: &str, within: Duration) -> Result<Stopped, FleetError> {
        let vm = self.registry.get(id_or_name)?;
        let begin = Instant::now();
        vm.check_lives()?;
        let asked = match vm.command(Command::PowerButton).await {
            Ok(()) => Ok(()),
            Err(FleetError::Fault(fault)) => Err(fault.message),
            Err(FleetError::WrongState(reason)) => Err(reason),
            // It ended meanwhile.
            Err(FleetError::Ended(_)) => Ok(()),
            Err(error) => return Err(error),
        };
        let by_itself = match &asked {
            Ok(()) => tokio::time::timeout(within, vm.ended()).await.is_ok(),
            Err(_) => false,
        };
        if !by_itself {
            vm.kill(match &asked {
                Ok(()) => "stopped: the guest did not power itself off in time",
                Err(_) => "stopped: the guest could not be asked to power itself off",
            });
            vm.ended().await;
        }
        Ok(Stopped { vm, by_itself, not_asked: asked.err(), took: begin.elapsed() })
    }

    /// Ends a VM if it runs, and forgets it. Comes back when its process is gone.
    pub async fn delete_vm(&self, id_or_name: &str) -> Result<(), FleetError> {
        let begin = Instant::now();
        let vm = self.registry.get(id_or_name)?;
        let lived = vm.state() != State::Exited;
        vm.kill("deleted");
        vm.ended().await;
        if lived {
            metrics().destroyed(begin.elapsed());
        }
        self.registry.remove(&vm.id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_ends_lets_no_vm_in() {
        let registry = Registry::new(2);
        registry.check_room(2, &[]).unwrap();
        assert_eq!(registry.check_room(3, &[]).unwrap_err().reason(), "LIMIT_REACHED");
        assert!(registry.close().is_empty());
        let error = registry.check_room(1, &[]).unwrap_err();
        assert_eq!(
            (error.reason(), error.kind()),
            ("SERVICE_ENDING", crate::fleet::error::Kind::Unavailable)
        );
        assert!(error.passes());
    }
}
