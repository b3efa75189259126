//! What is killed: operations that change what the service keeps, each with the state before it and the way in which the service opens that state.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, ensure};
use coldspark::{
    api::auth::tokens::Tokens,
    fleet::stored::Files,
    snapshot::{
        images::{self, DiskSettings, ImageStore, ModuleKind, Part, Ready, Settings},
        manifest::{Cpu, Disk, Facts, Guest, Identity, Memory, Protocol, Region, SnapshotId},
        signing::{Signing, SigningKey, TrustedKeys},
        store::{self, SnapshotStore},
        working_set::{self, Touched, WorkingSet},
    },
};

use crate::tracer;

/// What is done, the first time or again after a failure.
type Body = Box<dyn FnMut() -> anyhow::Result<()>>;

pub struct Operation {
    pub name: &'static str,
    /// Further words of the child's command line.
    pub arguments: &'static [&'static str],
    /// Makes the state before it in an empty folder.
    pub prepare: fn(&Path) -> anyhow::Result<()>,
    /// In the child, not traced: gives what is to be traced.
    pub begin: fn(&Path) -> anyhow::Result<Body>,
    /// Opens the folder as the service does and reads all that is in it.
    pub open: fn(&Path) -> anyhow::Result<()>,
    /// Whether it is on the disk when it has come back, also if the power fails then.
    pub durable: bool,
}

pub const OPERATIONS: &[Operation] = &[
    Operation {
        name: "snapshot-publish",
        arguments: &[],
        prepare: |path| publish(&snapshots(path)?, OLD).map(drop),
        begin: |path| {
            let store = snapshots(path)?;
            Ok(Box::new(move || publish(&store, NEW)))
        },
        open: open_snapshots,
        durable: true,
    },
    Operation {
        name: "snapshot-delete",
        arguments: &[],
        prepare: |path| {
            let store = snapshots(path)?;
            publish(&store, OLD)?;
            publish(&store, NEW)
        },
        begin: |path| {
            let store = snapshots(path)?;
            Ok(Box::new(move || {
                ensure!(store.get(NEW).is_ok(), "it is not there any more");
                Ok(store.delete(NEW).map(drop)?)
            }))
        },
        open: open_snapshots,
        durable: true,
    },
    Operation {
        name: "snapshot-learn",
        arguments: &[],
        prepare: |path| {
            let store = snapshots(path)?;
            publish(&store, OLD)?;
            Ok(store.get(OLD)?.keep_working_set(&learnt(1))?)
        },
        begin: |path| {
            let snapshot = snapshots(path)?.get(OLD)?;
            Ok(Box::new(move || Ok(snapshot.keep_working_set(&learnt(2))?)))
        },
        open: open_snapshots,
        durable: false,
    },
    Operation {
        name: "store-clean",
        arguments: &[],
        prepare: |path| {
            let store = snapshots(path)?;
            publish(&store, OLD)?;
            publish(&store, NEW)?;
            drop(store);
            fs::rename(path.join(NEW), path.join(format!(".trash-{NEW}")))?;
            tree_of_leftovers(&path.join(".tmp-snap-00000000cccc"))?;
            Ok(fs::write(path.join(OLD).join("working-set.new"), "half")?)
        },
        begin: |path| {
            let (path, signing) = (path.to_owned(), signing()?);
            Ok(Box::new(move || Ok(SnapshotStore::open(&path, signing.clone()).map(drop)?)))
        },
        open: open_snapshots,
        durable: false,
    },
    Operation {
        name: "store-create",
        arguments: &[],
        prepare: |_| Ok(()),
        begin: |path| {
            let (path, signing) = (path.join("data/snapshots"), signing()?);
            Ok(Box::new(move || Ok(SnapshotStore::open(&path, signing.clone()).map(drop)?)))
        },
        open: |path| open_snapshots(&path.join("data/snapshots")),
        durable: false,
    },
    Operation {
        name: "image-import",
        arguments: &[],
        prepare: |path| import(&ImageStore::open(path)?, "old"),
        begin: |path| {
            let store = ImageStore::open(path)?;
            Ok(Box::new(move || import(&store, "new")))
        },
        open: open_images,
        durable: true,
    },
    Operation {
        name: "image-delete",
        arguments: &[],
        prepare: |path| {
            let store = ImageStore::open(path)?;
            import(&store, "old")?;
            import(&store, "new")
        },
        begin: |path| {
            let store = ImageStore::open(path)?;
            Ok(Box::new(move || {
                ensure!(store.get("new").is_ok(), "it is not there any more");
                Ok(store.delete("new").map(drop)?)
            }))
        },
        open: open_images,
        durable: true,
    },
    Operation {
        name: "pool-create",
        arguments: &[],
        prepare: |path| Ok(pools(path)?.write("web", &7)?),
        begin: |path| {
            let files = pools(path)?;
            Ok(Box::new(move || Ok(files.write("batch", &8)?)))
        },
        open: open_pools,
        durable: true,
    },
    Operation {
        name: "pool-change",
        arguments: &[],
        prepare: |path| Ok(pools(path)?.write("web", &7)?),
        begin: |path| {
            let files = pools(path)?;
            Ok(Box::new(move || Ok(files.write("web", &70)?)))
        },
        open: open_pools,
        durable: true,
    },
    Operation {
        name: "pool-delete",
        arguments: &[],
        prepare: |path| {
            pools(path)?.write("batch", &8)?;
            Ok(pools(path)?.write("web", &7)?)
        },
        begin: |path| {
            let files = pools(path)?;
            Ok(Box::new(move || Ok(files.remove("web")?)))
        },
        open: open_pools,
        durable: true,
    },
    Operation {
        name: "pools-clean",
        arguments: &[],
        prepare: |path| {
            pools(path)?.write("web", &7)?;
            fs::write(path.join("web.new"), "half")?;
            Ok(fs::write(path.join("batch.gone"), "8")?)
        },
        begin: |path| {
            let path = path.to_owned();
            Ok(Box::new(move || pools(&path).map(drop)))
        },
        open: open_pools,
        durable: false,
    },
    Operation {
        name: "token-new",
        arguments: &["token", "new", "--role", "run", "--name", "ci", "--append", TOKENS],
        prepare: |path| {
            let digest = blake3::hash(b"secret").to_hex();
            let mut file = fs::File::create(path.join(TOKENS))?;
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            // As an editor may leave it: no end of line.
            Ok(write!(file, "# ours\nread ops {digest}")?)
        },
        begin: |path| {
            std::env::set_current_dir(path)?;
            Ok(Box::new(|| match coldspark::cli::main() == ExitCode::SUCCESS {
                true => Ok(()),
                false => anyhow::bail!("the command has failed"),
            }))
        },
        open: |path| {
            let tokens = Tokens::read(&path.join(TOKENS))?;
            ensure!((1..=2).contains(&tokens.len()), "{} tokens", tokens.len());
            Ok(())
        },
        durable: true,
    },
];

const OLD: &str = "snap-00000000aaaa";
const NEW: &str = "snap-00000000bbbb";
const TOKENS: &str = "tokens";

/// The child: does the operation of this name, and again, without harm, if it fails.
pub fn child(name: &str, folder: &Path) -> ExitCode {
    let Some(operation) = OPERATIONS.iter().find(|operation| operation.name == name) else {
        eprintln!("there is no operation {name}");
        return ExitCode::from(2);
    };
    let mut body = match (operation.begin)(folder) {
        Ok(body) => body,
        Err(error) => {
            eprintln!("before the operation: {error:#}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = tracer::stop(true) {
        eprintln!("ptrace is refused: {error}");
        return ExitCode::from(tracer::NOT_TRACED as u8);
    }
    match body() {
        Ok(()) => return ExitCode::SUCCESS,
        Err(error) => eprintln!("failed: {error:#}"),
    }
    if let Err(error) = tracer::stop(false).map_err(anyhow::Error::from).and_then(|()| body()) {
        eprintln!("again: {error:#}");
        return ExitCode::from(FAILED_AGAIN);
    }
    ExitCode::from(FAILED_ONCE)
}

/// Exit statuses of the child: failed, and then not; and twice.
pub const FAILED_ONCE: u8 = 10;
pub const FAILED_AGAIN: u8 = 11;

fn tree_of_leftovers(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path.join("disks"))?;
    for name in ["state.bin", "memory.img", "disks/base.img", "manifest.json"] {
        fs::write(path.join(name), "half")?;
    }
    Ok(())
}

// === snapshots ===

/// Signs, and takes only what is signed, so that signatures are tried too.
fn signing() -> anyhow::Result<Signing> {
    const SECRET: &str =
        "ours ed25519-secret:9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60\n";
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("key");
    let write = |text: &str| -> anyhow::Result<()> {
        fs::write(&path, text)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?)
    };
    write(SECRET)?;
    let key = SigningKey::read(&path)?;
    write(&key.trusted_line())?;
    Ok(Signing { key: Some(Arc::new(key)), trusted: Some(Arc::new(TrustedKeys::read(&path)?)) })
}

fn snapshots(path: &Path) -> anyhow::Result<Arc<SnapshotStore>> {
    Ok(Arc::new(SnapshotStore::open(path, signing()?)?))
}

fn facts(name: &str) -> Facts {
    const MEMORY_BYTES: u64 = 128 << 10;
    Facts {
        name: Some(name.into()),
        labels: BTreeMap::new(),
        guest: Guest { kernel: "GENERIC".into(), protocol: Protocol::FreeBsd, ready: "agent".into() },
        vcpus: 1,
        memory: Memory {
            bytes: MEMORY_BYTES,
            regions: vec![Region { guest_address: 0, bytes: MEMORY_BYTES, file_offset: 0 }],
        },
        cpu: Cpu { vendor: "AuthenticAMD".into(), features: vec!["sse2".into()], tsc_khz: 2_000_000 },
        kvm_capabilities: Vec::new(),
        parent: None,
        identity: Identity { agent: true },
        devices: vec!["serial 1".into()],
        disks: vec![Disk {
            bytes: 64 << 10,
            read_only: false,
            serial: "root".into(),
            base: "base.img".into(),
            layers: vec!["layer-0.img".into()],
        }],
        networks: Vec::new(),
    }
}

/// Makes and publishes a snapshot of this id, with a disk whose base is the old one's, if there is one, and whose layer has no name.
fn publish(store: &Arc<SnapshotStore>, id: &str) -> anyhow::Result<()> {
    let facts = facts(&id[5..]);
    let mut draft = store.begin(id.parse::<SnapshotId>()?)?;
    // What a worker does.
    draft.state().write_all_at(b"machine state", 0).context("state.bin")?;
    draft.memory().set_len(facts.memory.bytes).context("memory.img")?;
    draft.memory().write_all_at(b"memory", 80 << 10).context("memory.img")?;
    match store.get(OLD) {
        Ok(old) => {
            let open = old.open_for_restore()?;
            let base = &open.disks.first().context("the old one has a disk")?.base;
            draft.link_disk(base, "base.img", old.manifest().disk_file("base.img"))?;
        }
        Err(_) => draft.link_disk(&nameless(&[3; 64 << 10])?, "base.img", None)?,
    }
    draft.copy_disk(&nameless(&[5; 4096])?, "layer-0.img")?;
    draft.publish(facts)?;
    Ok(())
}

fn nameless(content: &[u8]) -> anyhow::Result<fs::File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(content)?;
    Ok(file)
}

/// What was learnt of `recordings` clones.
fn learnt(recordings: u32) -> WorkingSet {
    let mut set = WorkingSet::default();
    for at in 0..recordings {
        let mut touched = Touched::default();
        working_set::push(&mut touched.pieces, 0, 1);
        working_set::push(&mut touched.written, at, at + 1);
        set.learn(&touched, true);
    }
    set
}

fn open_snapshots(path: &Path) -> anyhow::Result<()> {
    let store = SnapshotStore::open(path, signing()?)?;
    for listed in store.list() {
        match listed {
            store::Listed::Whole(snapshot) => {
                store.verify(snapshot.id().as_str())?;
                snapshot.open_for_restore()?;
                snapshot.working_set()?;
            }
            store::Listed::Damaged { id, problem } => anyhow::bail!("{id}: {problem}"),
        }
    }
    Ok(())
}

// === images ===

fn import(store: &ImageStore, name: &str) -> anyhow::Result<()> {
    let mut draft = store.begin(Settings {
        name: name.into(),
        protocol: None,
        hardware: None,
        agent_port: None,
        module: Some(ModuleKind::MemoryDisk),
        command_line: String::new(),
        vcpus: 1,
        memory_bytes: 64 << 20,
        ready: Ready::Agent,
        disks: vec![DiskSettings { read_only: false, serial: String::new() }],
        embedded: false,
    })?;
    draft.write(Part::Kernel, b"\x7fELF kernel")?;
    draft.write(Part::Module, &[1; 5000])?;
    draft.write(Part::Disk(0), &[7; 4096])?;
    draft.write(Part::Disk(0), &[0; 8192])?;
    draft.write(Part::Disk(0), &[9; 512])?;
    draft.write_zeros(Part::Disk(0), 4096)?;
    draft.publish()?;
    Ok(())
}

fn open_images(path: &Path) -> anyhow::Result<()> {
    let store = ImageStore::open(path)?;
    for listed in store.list() {
        match listed {
            images::Listed::Whole(image) => {
                store.verify(image.id())?;
                image.open()?;
            }
            images::Listed::Damaged { id, problem } => anyhow::bail!("{id}: {problem}"),
        }
    }
    Ok(())
}

// === pools ===

fn pools(path: &Path) -> anyhow::Result<Files> {
    Ok(Files::open(path.to_owned(), "a pool")?)
}

fn open_pools(path: &Path) -> anyhow::Result<()> {
    let found = pools(path)?.read_all(|_: &u32| Ok(()));
    ensure!(found.problems.is_empty(), "{:?}", found.problems);
    Ok(())
}
