use super::*;
use proptest::prelude::*;

fn requests() -> Vec<AgentRequest> {
    let pages = Pages { first_page: 1, pages: 2, stride: 3, seed: 4 };
    vec![
        AgentRequest::Echo(b"abc".to_vec()),
        AgentRequest::Hash { first_page: 0, pages: 9 },
        AgentRequest::Touch(pages, TouchMode::Fill),
        AgentRequest::Check { pages, whole: true },
        AgentRequest::DiskInfo { disk: 0 },
        AgentRequest::DiskRead { disk: 0, first_sector: 1, sectors: u32::MAX },
        AgentRequest::DiskWrite { disk: 0, first_sector: 1, bytes: vec![1; 512], flush: true },
        AgentRequest::Time,
        AgentRequest::Cpus,
        AgentRequest::RunOnAll { seed: 1, rounds: 2 },
        AgentRequest::Random { bytes: 16 },
        AgentRequest::Generation,
        AgentRequest::Identity { generation: [1; 16], entropy: [2; 32], wall_ns: 3, host: None },
        AgentRequest::Identity { generation: [1; 16], entropy: [2; 32], wall_ns: 3, host: Some(host()) },
        AgentRequest::Identity { generation: [1; 16], entropy: [2; 32], wall_ns: 3, host: Some(clone()) },
        AgentRequest::Settle { on: true },
        AgentRequest::SetClock { wall_ns: 4 },
        AgentRequest::Compute { nonce: 1, bytes: 4096 },
        AgentRequest::Serial(b"x".to_vec()),
        AgentRequest::SerialEcho { bytes: 7 },
        AgentRequest::Reset,
        AgentRequest::Hush { on: true },
        AgentRequest::Stats,
        AgentRequest::Open(Opening::get(b"/etc/passwd", 1)),
    ]
}

fn host() -> Host {
    Host { name: "web-1".into(), macs: vec![(0, [2, 0, 0, 0, 0, 1]), (3, [2, 0, 0, 0, 0, 2])], more: None }
}

fn address(interface: u32, six: bool, bits: u8, gateway: bool, front: &[u8]) -> Address {
    let mut bytes = [0; 16];
    bytes[..front.len()].copy_from_slice(front);
    Address { interface, six, bits, gateway, bytes }
}

fn clone() -> Host {
    let addresses = vec![
        address(0, false, 24, false, &[10, 0, 0, 5]),
        address(0, false, 32, true, &[10, 0, 0, 1]),
        address(1, true, 64, false, &[0xfd; 16]),
    ];
    Host { more: Some(More { reseed: true, addresses }), ..host() }
}

fn reply(request: &AgentRequest, payload: Vec<u8>) -> Frame {
    Frame { kind: request.kind() | wire::REPLY, status: 0, id: 1, payload }
}

#[test]
fn kinds_are_distinct_and_fit_hello() {
    let mut kinds: Vec<u16> = requests().iter().map(AgentRequest::kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), requests().len());
    assert!(kinds.iter().all(|kind| *kind < 64 && *kind != wire::KIND_HELLO));
}

#[test]
fn touch_has_the_documented_layout() {
    let pages = Pages { first_page: 1, pages: 2, stride: 3, seed: 4 };
    let bytes = AgentRequest::Touch(pages, TouchMode::Write).encode(0x0102_0304).unwrap();
    let mut reader = Reader::new(&bytes[wire::HEADER_BYTES..]);
    assert_eq!(bytes[8..12], [4, 3, 2, 1]);
    assert_eq!(
        [reader.u64(), reader.u64(), reader.u64(), reader.u64()],
        [Some(1), Some(2), Some(3), Some(4)]
    );
    assert_eq!((reader.u32(), reader.u32(), reader.end()), (Some(wire::TOUCH_WRITE), Some(0), Some(())));
}

#[test]
fn identity_is_confirmed() {
    let request = AgentRequest::Identity { generation: [9; 16], entropy: [0; 32], wall_ns: 0, host: None };
    let mut payload = vec![9; 16];
    put64(&mut payload, 2);
    let got = AgentReply::decode(&request, reply(&request, payload.clone())).unwrap();
    assert_eq!(got, AgentReply::Generation { generation: [9; 16], count: 2 });
    payload.push(0);
    let error = AgentReply::decode(&request, reply(&request, payload)).unwrap_err();
    assert_eq!(error, AgentError::Layout { kind: wire::KIND_IDENTITY | wire::REPLY });
}

#[test]
fn a_clone_is_told_its_name_and_addresses() {
    let request =
        AgentRequest::Identity { generation: [9; 16], entropy: [7; 32], wall_ns: 5, host: Some(host()) };
    let bytes = request.encode(1).unwrap();
    let payload = &bytes[wire::HEADER_BYTES..];
    let told = wire::Become::decode(wire::KIND_BECOME, payload).unwrap();
    assert_eq!((told.generation, told.entropy, told.wall_ns), ([9; 16], [7; 32], 5));
    assert_eq!((told.host_name, told.interfaces.collect::<Vec<_>>()), (&b"web-1"[..], host().macs));
    // Neither shorter nor longer, nor as the other kind.
    for cut in 0..payload.len() {
        assert!(wire::Become::decode(wire::KIND_BECOME, &payload[..cut]).is_none(), "{cut}");
    }
    assert!(wire::Become::decode(wire::KIND_BECOME, &[payload, &[0]].concat()).is_none());
    assert!(wire::Become::decode(wire::KIND_IDENTITY, payload).is_none());

    let mut answer = vec![9; 16];
    put64(&mut answer, 2);
    put_string(&mut answer, b"web-1");
    let got = AgentReply::decode(&request, reply(&request, answer.clone())).unwrap();
    assert_eq!(
        got,
        AgentReply::Become { generation: [9; 16], count: 2, host_name: "web-1".into(), more: None }
    );
    answer.push(0);
    assert!(AgentReply::decode(&request, reply(&request, answer)).is_err());
}

#[test]
fn a_clone_is_told_its_addresses_and_tells_what_became_of_it() {
    let host = clone();
    let More { addresses, .. } = host.more.clone().unwrap();
    let request =
        AgentRequest::Identity { generation: [9; 16], entropy: [7; 32], wall_ns: 5, host: Some(host) };
    let bytes = request.encode(1).unwrap();
    let payload = &bytes[wire::HEADER_BYTES..];
    let told = wire::Become::decode(wire::KIND_CLONE, payload).unwrap();
    assert_eq!((told.host_name, told.flags), (&b"web-1"[..], wire::CLONE_RESEED));
    assert_eq!(told.addresses.collect::<Vec<_>>(), addresses);
    for cut in 0..payload.len() {
        assert!(wire::Become::decode(wire::KIND_CLONE, &payload[..cut]).is_none(), "{cut}");
    }
    // An older agent, which knows BECOME, takes it for nothing.
    assert!(wire::Become::decode(wire::KIND_BECOME, payload).is_none());

    let mut answer = vec![9; 16];
    put64(&mut answer, 2);
    put_string(&mut answer, b"web-1");
    put32(&mut answer, wire::ENTROPY_DRAWN);
    put32(&mut answer, 3);
    addresses.iter().for_each(|address| answer.extend_from_slice(&address.encode()));
    let decode = |payload: &[u8]| AgentReply::decode(&request, reply(&request, payload.to_vec()));
    let AgentReply::Become { more: Some(more), .. } = decode(&answer).unwrap() else { panic!("no more") };
    assert_eq!(more, Confirmed { drawn: true, addresses });
    for cut in 0..answer.len() {
        assert!(decode(&answer[..cut]).is_err(), "{cut}");
    }
    // A family, a prefix, a kind, a rest that there cannot be; a count that is too large.
    let at = answer.len() - 3 * Address::BYTES;
    for (place, value) in [(at + 4, 5), (at + 5, 33), (at + 6, 2), (at + 7, 1), (at + 12, 1), (at - 4, 65)] {
        let mut wrong = answer.clone();
        wrong[place] = value;
        assert!(decode(&wrong).is_err(), "{place}");
    }
}

#[test]
fn cpus_may_not_claim_more_than_they_send() {
    let mut payload = Vec::new();
    for word in [4u32, u32::MAX, 0, 0] {
        put32(&mut payload, word);
    }
    let error = AgentReply::decode(&AgentRequest::Cpus, reply(&AgentRequest::Cpus, payload)).unwrap_err();
    assert!(matches!(error, AgentError::Layout { .. }));
}

#[test]
fn a_refusal_is_told_without_control_characters() {
    let request = AgentRequest::Time;
    let mut frame = reply(&request, b"no\x1b[2J clock".to_vec());
    frame.status = wire::STATUS_FAILED;
    let error = AgentReply::decode(&request, frame).unwrap_err();
    assert_eq!(error.refusal(), Some(wire::STATUS_FAILED));
    assert_eq!(error.to_string(), "the guest's agent refused the request (failed): no [2J clock");
}

#[test]
fn a_reply_of_another_kind_is_refused() {
    let frame = reply(&AgentRequest::Time, vec![0; 32]);
    let error = AgentReply::decode(&AgentRequest::Cpus, frame).unwrap_err();
    assert_eq!(error, AgentError::Kind { expected: 0x800a, got: 0x8009 });
}

pub fn hello() -> Hello {
    Hello {
        version: wire::PROTOCOL_VERSION,
        agent: wire::AGENT_TEST_GUEST,
        boot: wire::BOOT_NATIVE,
        cpus_found: 4,
        cpus_alive: 4,
        tsc_khz: 2_000_000,
        checks_run: 0b111,
        checks_failed: 0b101,
        kinds: 1 << wire::KIND_ECHO,
        memory_bytes: 512 << 20,
        arena_bytes: 500 << 20,
        filled_bytes: 4 << 20,
        disks: 1,
        request_bytes: 7,
        name: "test".to_owned(),
    }
}

#[test]
fn hello_round_trip() {
    let bytes = hello().encode().unwrap();
    assert_eq!(bytes.len(), wire::HEADER_BYTES + wire::HELLO_BYTES + 4);
    let frames = frame::FrameDecoder::new().push(&bytes).unwrap();
    let got = Hello::decode(&frames[0]).unwrap();
    assert_eq!(got, hello());
    assert_eq!(got.failed_checks(), ["native.modulep", "native.kernel"]);
    assert!(got.serves(&AgentRequest::Echo(vec![])) && !got.serves(&AgentRequest::Reset));
}

#[test]
fn hello_of_another_version_is_refused() {
    let bytes = Hello { version: 9, ..hello() }.encode().unwrap();
    let frames = frame::FrameDecoder::new().push(&bytes).unwrap();
    assert_eq!(Hello::decode(&frames[0]), Err(AgentError::Version(9)));
}

proptest! {
    #[test]
    fn any_payload_decodes_or_fails(which in 0..requests().len(), status in 0u16..2, payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let request = &requests()[which];
        let mut frame = reply(request, payload.clone());
        frame.status = status;
        let _ = AgentReply::decode(request, frame);
        let _ = Hello::decode(&Frame { kind: wire::KIND_HELLO, status: 0, id: 0, payload });
    }
}
