use std::fs;

use proptest::prelude::*;

use super::*;
use crate::snapshot::{cause::Cause, memory::extents::Extents};

fn settings(name: &str) -> Settings {
    Settings {
        name: name.into(),
        protocol: Some(Protocol::FreeBsd),
        hardware: None,
        agent_port: Some(AgentPort::Serial),
        module: Some(ModuleKind::MemoryDisk),
        command_line: "boot_serial=YES".into(),
        vcpus: 1,
        memory_bytes: 128 << 20,
        ready: Ready::Console("login:".into()),
        disks: vec![
            DiskSettings { read_only: false, serial: "root".into() },
            DiskSettings { read_only: true, serial: String::new() },
        ],
        embedded: false,
    }
}

fn import(store: &ImageStore, name: &str) -> Result<Arc<Image>, StoreError> {
    let mut draft = store.begin(settings(name))?;
    draft.write(Part::Kernel, b"\x7fELF")?;
    draft.write(Part::Kernel, b"kernel")?;
    draft.write(Part::Module, &[1; 10_000])?;
    for chunk in [&[0; 300_000][..], &[7; 4096], &[0; 96], &[0; 4096]] {
        draft.write(Part::Disk(0), chunk)?;
    }
    draft.write(Part::Disk(0), &[0; (300_000usize + 4096 + 96 + 4096).next_multiple_of(512) - 308_288])?;
    draft.write(Part::Disk(1), &[9; 512])?;
    draft.publish()
}

#[test]
fn an_imported_image_is_found_and_opened_also_by_the_next_daemon() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let store = ImageStore::open(folder.path()).unwrap();
        if round == 0 {
            import(&store, "FreeBSD-14.1").unwrap();
        }
        let image = store.get("FreeBSD-14.1").unwrap();
        assert_eq!(image.manifest().settings, settings("FreeBSD-14.1"));
        assert!(Arc::ptr_eq(&image, &store.get(image.id()).unwrap()));
        let open = image.open().unwrap();
        assert!(Arc::ptr_eq(&open, &image.open().unwrap()));
        let read = |file: &File| {
            let mut content = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut content, 0).unwrap();
            content
        };
        assert_eq!(read(&open.kernel), b"\x7fELFkernel");
        assert_eq!(read(open.module.as_ref().unwrap()), [1; 10_000]);
        let disk = read(&open.disks[0]);
        assert_eq!(disk.len() % 512, 0);
        assert!(
            disk.iter()
                .enumerate()
                .all(|(at, &byte)| byte == if (300_000..304_096).contains(&at) { 7 } else { 0 })
        );
        assert!(Extents::of_file(&open.disks[0]).unwrap().data_bytes() <= 8192);
        assert_eq!(read(&open.disks[1]), [9; 512]);
        store.verify("FreeBSD-14.1").unwrap();
        assert_eq!(image.manifest().file(Part::Disk(1)).unwrap().bytes, 512);
    }
}

#[test]
fn a_name_is_kept_from_the_beginning_of_an_import() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    let draft = store.begin(settings("a")).unwrap();
    assert_eq!(import(&store, "a").unwrap_err().cause(), Cause::AlreadyExists);
    drop(draft);
    import(&store, "a").unwrap();
    assert_eq!(store.begin(settings("a")).unwrap_err().cause(), Cause::AlreadyExists);
    store.delete("a").unwrap();
    assert_eq!(store.get("a").unwrap_err().cause(), Cause::NotFound);
    import(&store, "a").unwrap();
}

#[test]
fn files_that_cannot_be_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    let refused = |fill: fn(&mut ImageDraft) -> Result<(), StoreError>| {
        let mut draft = store.begin(settings("bad")).unwrap();
        let error = fill(&mut draft).and_then(|()| draft.publish().map(drop)).unwrap_err();
        assert_eq!(error.cause(), Cause::InvalidInput);
        error.to_string()
    };
    assert!(refused(|_| Ok(())).contains("the kernel is empty"));
    assert!(
        refused(|draft| {
            draft.write(Part::Kernel, b"k")?;
            draft.write(Part::Module, b"m")?;
            draft.write(Part::Disk(0), &[1; 513])
        })
        .contains("disk 0 has 513 bytes")
    );
    assert!(refused(|draft| draft.write(Part::Kernel, b"k")).contains("the module is empty"));
    assert!(refused(|draft| draft.write(Part::Disk(2), b"x")).contains("do not speak of disk 2"));
    let too_long = refused(|draft| {
        draft.files[0].bytes = limits::KERNEL_BYTES_MAX;
        draft.write(Part::Kernel, b"k")
    });
    assert!(too_long.contains("the kernel has more than"), "{too_long}");
    let names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [".lock"]);
}

/// The field that the error must name, and one change.
type Spoil = (&'static str, fn(&mut Settings));

#[test]
fn settings_that_make_no_sense_are_refused_by_their_field() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    let spoils: &[Spoil] = &[
        ("name", |s| s.name = "a/b".into()),
        ("name", |s| s.name = ".hidden".into()),
        ("name", |s| s.name = "img-0123456789ab".into()),
        ("command_line", |s| s.command_line = "x".repeat(limits::COMMAND_LINE_BYTES_MAX + 1)),
        ("command_line", |s| s.command_line = "a\0b".into()),
        ("vcpus", |s| s.vcpus = 0),
        ("memory_bytes", |s| s.memory_bytes = 0),
        ("memory_bytes", |s| s.memory_bytes = (2 << 20) + 4096),
        ("memory_bytes", |s| s.memory_bytes = 2 << 40),
        ("ready", |s| s.ready = Ready::Console(String::new())),
        ("ready", |s| s.ready = Ready::Port(0)),
        ("disks", |s| s.disks = vec![s.disks[0].clone(); 9]),
        ("disks", |s| s.disks[0].serial = "has space".into()),
    ];
    for (at, (field, spoil)) in spoils.iter().enumerate() {
        let mut settings = settings("fine");
        spoil(&mut settings);
        let error = store.begin(settings).unwrap_err();
        assert!(error.to_string().contains(&format!("{field}:")), "spoil {at}: {error}");
        assert_eq!(error.cause(), Cause::InvalidInput);
    }
}

#[test]
fn damage_is_noticed_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    let id = import(&store, "image").unwrap().id().to_string();
    drop(store);
    let path = folder.path().join(&id);
    let disk = path.join("disks/0.img");
    let mut content = fs::read(&disk).unwrap();
    content[5] ^= 1;
    fs::write(&disk, &content).unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    store.get("image").unwrap().open().unwrap();
    let error = store.verify("image").unwrap_err();
    assert!(error.cause() == Cause::Damaged && error.to_string().contains("disks/0.img"), "{error}");
    fs::write(&disk, &content[512..]).unwrap();
    store.get("image").unwrap().close();
    let error = store.get("image").unwrap().open().unwrap_err();
    assert!(error.cause() == Cause::Damaged && error.to_string().contains("disks/0.img"), "{error}");
    drop(store);
    fs::write(path.join("settings.json"), "{}").unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    assert_eq!(store.get(&id).unwrap_err().cause(), Cause::Damaged);
    assert!(matches!(&store.list()[..], [Listed::Damaged { .. }]));
    store.delete(&id).unwrap();
}

proptest! {
    /// Any cutting of any content into chunks gives the content back.
    #[test]
    fn chunks_of_any_size_make_the_same_file(
        runs in prop::collection::vec((0u8..2, 1usize..9000), 1..12),
        cuts in prop::collection::vec(1usize..7000, 1..12),
    ) {
        let content: Vec<u8> = runs.iter().flat_map(|&(byte, bytes)| std::iter::repeat_n(byte, bytes)).collect();
        let file = tempfile::tempfile().unwrap();
        let (mut at, mut cut) = (0, cuts.iter().cycle());
        while at < content.len() {
            let end = content.len().min(at + cut.next().unwrap());
            write_sparse(&file, at as u64, &content[at..end]).unwrap();
            at = end;
        }
        file.set_len(content.len() as u64).unwrap();
        let mut read = vec![0; content.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        prop_assert!(read == content);
    }
}
