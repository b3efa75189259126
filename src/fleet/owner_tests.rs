//! What becomes of a VM whose task fails.

use std::process::{Command as Program, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use rustix::process::Pid;
use tokio::net::UnixStream;

use super::*;
use crate::fleet::agent::AgentClient;
use crate::fleet::child::Ward;
use crate::fleet::console::Console;
use crate::fleet::events;
use crate::fleet::process::Process;
use crate::fleet::record::Papers;
use crate::fleet::vm::{Origin, Status};

/// A VM whose process is `child`.
fn vm(child: &mut std::process::Child, commands: mpsc::Sender<Command>) -> Arc<Vm> {
    let ward = Ward::watch(Pid::from_child(child)).unwrap();
    let stderr = Process::stderr(child.stderr.take().unwrap().into()).unwrap();
    let socket = || UnixStream::pair().unwrap().0;
    Arc::new(Vm {
        id: "vm-1".into(),
        name: OnceLock::new(),
        pool: None,
        held: AtomicBool::new(false),
        origin: Origin::Embedded,
        kernel: String::new(),
        ready: String::new(),
        vcpus: 1,
        memory_bytes: 1 << 30,
        generation: None,
        host_name: Default::default(),
        entropy: Default::default(),
        memory_mode: None,
        networks: Default::default(),
        limits: Default::default(),
        created_unix_ms: 0,
        number: 1,
        console: Console::start(socket(), b""),
        agent: AgentClient::start(socket(), None),
        process: Process::adopt(ward, stderr),
        papers: Papers::new(None, &[], None, None).unwrap(),
        trouble: Default::default(),
        status: watch::Sender::new(Status {
            state: State::Ready,
            exit_reason: None,
            protocol: None,
            start_us: 0,
            steps: Vec::new(),
            restarts: 0,
        }),
        events: events::Events::default(),
        commands,
        ready_port: watch::Sender::new(None),
    })
}

#[tokio::test]
async fn a_vm_whose_task_panics_ends_with_the_reason_and_nobody_waits_for_ever() {
    let mut child = Program::new("sleep").arg("600").stderr(Stdio::piped()).spawn().unwrap();
    let (commands, inbox) = mpsc::channel(4);
    let vm = vm(&mut child, commands);
    let had = Arc::new(());
    let kept = Arc::clone(&had);
    let task = async move {
        let (_kept, mut inbox) = (kept, inbox);
        let command: Option<Command> = inbox.recv().await;
        panic!("told {}", if command.is_some() { "to pause" } else { "nothing" });
    };
    tokio::spawn(watched(Arc::clone(&vm), task));
    // Whoever told it something is answered, and so is who waits for its end.
    let error =
        tokio::time::timeout(Duration::from_secs(60), vm.pause()).await.expect("an answer").unwrap_err();
    assert!(error.to_string().contains("its task in the service failed: told to pause"), "{error}");
    assert!(vm.ended().await.contains("told to pause"));
    assert_eq!((vm.state(), Arc::strong_count(&had)), (State::Exited, 1));
    assert!(vm.check_lives().is_err());
    assert!(!child.wait().unwrap().success(), "its process was killed");
}
