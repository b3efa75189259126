use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// A sound manifest with a hole between its regions and a disk with two layers.
pub(in crate::snapshot) fn sample() -> Manifest {
    let entry = |path: &str, bytes| FileEntry {
        path: path.into(),
        bytes,
        sum: if path == STATE_FILE { SumKind::Whole } else { SumKind::Chunks },
        blake3: Sum::of_bytes(path.as_bytes()),
    };
    Manifest {
        format: FORMAT,
        id: "snap-0123456789ab".parse().unwrap(),
        created: "2026-11-22T12:00:00Z".into(),
        facts: Facts {
            name: Some("web-1".into()),
            labels: BTreeMap::from([("team".into(), "infra".into())]),
            guest: Guest {
                kernel: "GENERIC".into(),
                protocol: Protocol::FreeBsd,
                ready: "console: login:".into(),
            },
            vcpus: 2,
            memory: Memory {
                bytes: 8 << 20,
                regions: vec![
                    Region { guest_address: 0, bytes: 6 << 20, file_offset: 0 },
                    Region { guest_address: 4 << 30, bytes: 2 << 20, file_offset: 6 << 20 },
                ],
            },
            cpu: Cpu {
                vendor: "AuthenticAMD".into(),
                features: vec!["sse2".into(), "avx2".into()],
                tsc_khz: 2_000_000,
            },
            kvm_capabilities: vec!["KVM_CAP_SPLIT_IRQCHIP".into()],
            parent: None,
            identity: Identity { agent: true },
            devices: vec!["serial 1".into()],
            disks: vec![Disk {
                bytes: 1 << 20,
                read_only: false,
                serial: "root".into(),
                base: "base.img".into(),
                layers: vec!["layer-0.img".into(), "layer-1.img".into()],
            }],
            networks: vec![Network { mac: "02:00:00:00:00:01".into(), mtu: Some(1400) }],
        },
        files: vec![
            entry(STATE_FILE, 1000),
            entry(MEMORY_FILE, 8 << 20),
            entry("disks/base.img", 1 << 20),
            entry("disks/layer-0.img", 4096),
            entry("disks/layer-1.img", 4096),
        ],
    }
}

fn host() -> HostFacts {
    HostFacts {
        cpu_vendor: "AuthenticAMD".into(),
        cpu_features: ["sse2", "avx2", "avx512f"].map(String::from).into(),
        tsc_khz: 2_000_100,
        tsc_scaling: false,
        kvm_capabilities: ["KVM_CAP_SPLIT_IRQCHIP"].map(String::from).into(),
    }
}

#[test]
fn a_manifest_survives_the_round_trip() {
    let manifest = sample();
    let json = manifest.to_json().unwrap();
    assert_eq!(Manifest::parse(&json).unwrap(), manifest);
    // What DESIGN and docs promise to people and tools.
    let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(value["guest"]["protocol"], "freebsd");
    assert_eq!(value["files"][1]["sum"], "chunks-16k");
    assert_eq!(value["files"][0]["sum"], "whole");
}

#[test]
fn another_format_is_refused_by_its_number_whatever_else_it_says() {
    for (json, format) in [(r#"{"format": 2, "new": {}}"#, 2), (r#"{"format": 0}"#, 0)] {
        let error = Manifest::parse(json.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Format { has, reads: FORMAT } if has == format));
        assert_eq!(error.cause(), Cause::Unsupported);
    }
    for json in ["{}", "", "[]", r#"{"format": -1}"#, r#"{"format": "1"}"#] {
        assert!(matches!(Manifest::parse(json.as_bytes()), Err(ManifestError::Json(_))), "{json}");
    }
}

#[test]
fn an_unknown_field_is_refused() {
    for path in ["", "/guest", "/cpu", "/memory/regions/0", "/disks/0", "/files/0"] {
        let mut value = serde_json::to_value(sample()).unwrap();
        value.pointer_mut(path).unwrap().as_object_mut().unwrap().insert("extra".into(), 1.into());
        assert!(Manifest::parse(value.to_string().as_bytes()).is_err(), "{path}");
    }
}

#[test]
fn more_than_a_mebibyte_is_refused_unread() {
    let json = vec![b' '; (1 << 20) + 1];
    assert!(matches!(Manifest::parse(&json), Err(ManifestError::TooLarge(_))));
}

/// One change, and the field that the error must name.
type Spoil = (&'static str, fn(&mut Manifest));

#[test]
fn every_lie_is_named() {
    let spoils: &[Spoil] = &[
        ("created", |m| m.created = "yesterday".into()),
        ("created", |m| m.created = "2026-11-22 12:00:00Z".into()),
        ("name", |m| m.facts.name = Some("../x".into())),
        ("name", |m| m.facts.name = Some("snap-0123456789ab".into())),
        ("labels", |m| m.facts.labels = BTreeMap::from([(String::new(), String::new())])),
        ("labels", |m| m.facts.labels = BTreeMap::from([("a".into(), "\u{1b}[2J".into())])),
        ("guest.kernel", |m| m.facts.guest.kernel = "x".repeat(1025)),
        ("vcpus", |m| m.facts.vcpus = 0),
        ("vcpus", |m| m.facts.vcpus = 33),
        ("memory.regions", |m| m.facts.memory.regions.clear()),
        ("memory.regions", |m| m.facts.memory.regions = vec![m.facts.memory.regions[0]; 9]),
        ("memory.regions", |m| m.facts.memory.regions[0].bytes = 0),
        ("memory.regions", |m| m.facts.memory.regions[0].bytes += 1),
        ("memory.regions", |m| m.facts.memory.regions[1].guest_address = 4096),
        ("memory.regions", |m| m.facts.memory.regions[1].guest_address = u64::MAX - 4095),
        ("memory.regions", |m| m.facts.memory.regions[1].file_offset = 4096),
        ("memory.regions", |m| m.facts.memory.regions[1].file_offset = u64::MAX - 4095),
        ("memory.regions", |m| m.facts.memory.regions[1].file_offset = 7),
        ("memory.regions", |m| m.facts.memory.regions.reverse()),
        ("memory.regions", |m| m.facts.memory.regions[0].bytes = u64::MAX - 4095),
        ("memory.bytes", |m| m.facts.memory.bytes += 4096),
        ("cpu.features", |m| m.facts.cpu.features = vec![String::new(); 1025]),
        ("devices", |m| m.facts.devices = vec!["\n".into()]),
        ("disks", |m| m.facts.disks = vec![m.facts.disks[0].clone(); 9]),
        ("disks", |m| m.facts.disks[0].bytes = 0),
        ("disks", |m| m.facts.disks[0].bytes += 1),
        ("disks", |m| m.facts.disks[0].bytes = 1 << 60),
        ("disks", |m| m.facts.disks[0].bytes = 512),
        ("disks", |m| m.facts.disks[0].serial = "x".repeat(21)),
        ("disks", |m| m.facts.disks[0].base = "../state.bin".into()),
        ("disks", |m| m.facts.disks[0].base = "..".into()),
        ("disks", |m| m.facts.disks[0].base = "/etc/passwd".into()),
        ("disks", |m| m.facts.disks[0].base = String::new()),
        ("disks", |m| m.facts.disks[0].layers = vec!["l".into(); 17]),
        ("files", |m| m.files.clear()),
        ("files", |m| drop(m.files.remove(3))),
        ("files", |m| m.files.push(m.files[0].clone())),
        ("files", |m| m.files[2].path = "disks/../../x".into()),
        ("files", |m| m.files[0].bytes = 0),
        ("files", |m| m.files[0].bytes = limits::STATE_BYTES_MAX + 1),
        ("files", |m| m.files[1].bytes -= 4096),
        ("files", |m| m.files[3].bytes = u64::MAX),
    ];
    for (at, (field, spoil)) in spoils.iter().enumerate() {
        let mut manifest = sample();
        spoil(&mut manifest);
        let json = serde_json::to_vec(&manifest).unwrap();
        match Manifest::parse(&json) {
            Err(ManifestError::Field { field: named, .. }) => assert_eq!(named, *field, "spoil {at}"),
            other => panic!("spoil {at} ({field}): {other:?}"),
        }
    }
}

#[test]
fn a_bad_id_is_no_id() {
    for bad in [
        "",
        "snap-",
        "snap-0123456789aB",
        "snap-0123456789abc",
        "snap-0123456789a",
        "img-0123456789ab",
        "../snap",
    ] {
        assert!(bad.parse::<SnapshotId>().is_err(), "{bad}");
    }
    let (a, b) = (SnapshotId::random(), SnapshotId::random());
    assert_ne!(a, b);
    assert_eq!(a.as_str().parse::<SnapshotId>().unwrap(), a);
}

#[test]
fn what_the_host_lacks_is_named() {
    let facts = sample().facts;
    assert_eq!(facts.fits(&host()), Ok(()));
    let refusal = |change: fn(&mut Facts, &mut HostFacts)| {
        let (mut facts, mut host) = (sample().facts, host());
        change(&mut facts, &mut host);
        facts.fits(&host).unwrap_err().to_string()
    };
    assert_eq!(
        refusal(|facts, host| {
            facts.cpu.features.push("avx512f".into());
            host.cpu_features.remove("avx512f");
        }),
        "needs avx512f, host has not"
    );
    assert_eq!(
        refusal(|_, host| host.cpu_vendor = "GenuineIntel".into()),
        "needs a AuthenticAMD CPU, host has GenuineIntel"
    );
    assert_eq!(
        refusal(|_, host| host.kvm_capabilities.clear()),
        "needs KVM capability KVM_CAP_SPLIT_IRQCHIP, host has not"
    );
    assert!(refusal(|_, host| host.tsc_khz = 2_000_501).contains("2000501 kHz"));
    // 250 ppm of 2 GHz is 500 kHz.
    assert_eq!(facts.fits(&HostFacts { tsc_khz: 2_000_500, ..host() }), Ok(()));
    assert_eq!(facts.fits(&HostFacts { tsc_khz: 3_000_000, tsc_scaling: true, ..host() }), Ok(()));
    assert_eq!(facts.fits(&HostFacts { tsc_khz: 0, ..host() }), Ok(()));
}

#[test]
fn times_are_told_as_rfc_3339() {
    let at = |seconds| rfc3339_utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    // Reference: date -u -d @N +%FT%TZ
    assert_eq!(at(0), "1970-01-01T00:00:00Z");
    assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
    assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
    assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
    assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
    assert_eq!(at(1_795_348_800), "2026-11-22T12:00:00Z");
    assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    assert!(is_rfc3339_utc(&at(1_795_348_800)));
}

proptest! {
    /// Numbers anywhere in the manifest, replaced by any other: an answer, never a panic.
    #[test]
    fn any_numbers_are_answered(
        guest_address in any::<u64>(), bytes in any::<u64>(), file_offset in any::<u64>(), total in any::<u64>(),
        disk in any::<u64>(), file in any::<u64>(), region in 0usize..2, entry in 0usize..5,
    ) {
        let mut manifest = sample();
        manifest.facts.memory.regions[region] = Region { guest_address, bytes, file_offset };
        manifest.facts.memory.bytes = total;
        manifest.facts.disks[0].bytes = disk;
        manifest.files[entry].bytes = file;
        let _ = Manifest::parse(&serde_json::to_vec(&manifest).unwrap());
    }

    #[test]
    fn any_bytes_are_answered(json in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Manifest::parse(&json);
    }
}
