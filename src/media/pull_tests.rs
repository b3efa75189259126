//! Downloads from a server of the test's own, which breaks off, lies and forgets as told.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::thread;

use super::*;

/// What the server does with a request for the image.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Sends all that was asked for.
    Whole,
    /// Closes after so many bytes of the body.
    CutAfter(usize),
    /// Sends all from the start, whatever range was asked for.
    NoRanges,
    /// Sends another range than was asked for.
    WrongRange,
    Status(u16),
    /// Sends half of it, then nothing, and keeps the connection.
    Stall,
}

const NAME: &str = "FreeBSD-15.1-RELEASE-amd64-ufs.raw.xz";

struct Server {
    base: String,
    /// The `Range` header of every request for the image, in order.
    asked: Arc<Mutex<Vec<Option<String>>>>,
}

fn content() -> Vec<u8> {
    (0..200_000u32).map(|at| (at / 5) as u8).collect()
}

fn sum(bytes: &[u8]) -> String {
    ring::digest::digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Serves the list and the image; each request for the image gets the next act, the last for ever.
fn serve(list: String, acts: Vec<Act>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    thread::spawn(move || {
        let mut acts = acts.into_iter().peekable();
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let Some((path, range)) = head(&stream) else { continue };
            let folder = "/releases/VM-IMAGES/15.1-RELEASE/amd64/Latest";
            if path == format!("{folder}/{CHECKSUMS}") {
                answer(&mut stream, "200 OK", "", list.as_bytes(), list.len());
            } else if path == format!("{folder}/{NAME}") {
                let act = acts.next().unwrap();
                if acts.peek().is_none() {
                    acts = vec![act].into_iter().peekable();
                }
                seen.lock().unwrap().push(range.clone());
                if image(&mut stream, act, range.as_deref()) {
                    kept.push(stream);
                }
            } else {
                answer(&mut stream, "404 Not Found", "", b"", 0);
            }
        }
    });
    Server { base, asked }
}

fn head(stream: &TcpStream) -> Option<(String, Option<String>)> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut range = None;
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("range")
        {
            range = Some(value.to_owned());
        }
    }
    Some((path, range))
}

fn answer(stream: &mut TcpStream, status: &str, more: &str, body: &[u8], length: usize) {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n");
    // Whoever has gone away wants no answer.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

/// True: the connection is to be kept.
fn image(stream: &mut TcpStream, act: Act, range: Option<&str>) -> bool {
    let content = content();
    let from: usize =
        range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    let partial =
        |from: usize| format!("Content-Range: bytes {from}-{}/{}\r\n", content.len() - 1, content.len());
    let rest = content.get(from..).unwrap_or(&[]);
    let (status, more) = match range {
        Some(_) => ("206 Partial Content", partial(from)),
        None => ("200 OK", String::new()),
    };
    match act {
        Act::Whole if range.is_some() && rest.is_empty() => {
            let more = format!("Content-Range: bytes */{}\r\n", content.len());
            answer(stream, "416 Range Not Satisfiable", &more, b"", 0);
        }
        Act::Whole => answer(stream, status, &more, rest, rest.len()),
        Act::CutAfter(count) => answer(stream, status, &more, &rest[..count.min(rest.len())], rest.len()),
        Act::NoRanges => answer(stream, "200 OK", "", &content, content.len()),
        Act::WrongRange => answer(stream, "206 Partial Content", &partial(from + 1), &[], 0),
        Act::Status(code) => answer(stream, &format!("{code} Whatever"), "", b"", 0),
        Act::Stall => {
            answer(stream, status, &more, &rest[..rest.len() / 2], rest.len());
            return true;
        }
    }
    false
}

fn list(sum: &str) -> String {
    format!(
        "SHA256 (FreeBSD-15.1-RELEASE-amd64-zfs.raw.xz) = {}\nSHA256 ({NAME}) = {sum}\nnoise\n",
        "0".repeat(64)
    )
}

fn pull(server: &Server, folder: &Path) -> Result<Vec<u8>, PullError> {
    // With the patience of a real one: a machine under load serves late.
    let mirror = Mirror::new(&server.base)?;
    let published = mirror.find(&Release::parse("freebsd-15.1")?, Kind::Vm)?;
    assert!(published.note.is_some(), "plain HTTP is said");
    let progress = Arc::new(Progress::default());
    let file = mirror.download(&published, folder, &progress)?;
    assert_eq!(file.file_name().unwrap(), NAME);
    Ok(fs::read(file).unwrap())
}

fn asked(server: &Server) -> Vec<Option<String>> {
    server.asked.lock().unwrap().clone()
}

fn range(from: usize) -> Option<String> {
    Some(format!("bytes={from}-"))
}

#[test]
fn a_whole_download_is_not_repeated() {
    let server = serve(list(&sum(&content())), vec![Act::Whole]);
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        assert_eq!(pull(&server, folder.path()).unwrap(), content());
    }
    assert_eq!(asked(&server), [None]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else stays");
}

#[test]
fn a_broken_download_goes_on_where_it_broke() {
    let cuts = vec![Act::CutAfter(70_000), Act::CutAfter(1), Act::Status(503), Act::Whole];
    let server = serve(list(&sum(&content())), cuts);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
    assert_eq!(asked(&server), [None, range(70_000), range(70_001), range(70_001)]);
}

#[test]
fn a_connection_on_which_nothing_comes_is_given_up_for_another() {
    let server = serve(list(&sum(&content())), vec![Act::Stall, Act::Whole]);
    let folder = tempfile::tempdir().unwrap();
    let published =
        Mirror::new(&server.base).unwrap().find(&Release::parse("15.1").unwrap(), Kind::Vm).unwrap();
    let impatient = Mirror::with_timeout(&server.base, Duration::from_millis(500)).unwrap();
    let file = impatient.download(&published, folder.path(), &Arc::default()).unwrap();
    assert_eq!(fs::read(file).unwrap(), content());
    // Under load more than one may be given up.
    assert!(asked(&server).len() >= 2, "{:?}", asked(&server));
}

#[test]
fn two_do_not_download_into_one_file() {
    let server = serve(list(&sum(&content())), vec![Act::Whole]);
    let folder = tempfile::tempdir().unwrap();
    let other = File::create(folder.path().join(format!("{NAME}.part"))).unwrap();
    other.lock().unwrap();
    let error = pull(&server, folder.path()).unwrap_err();
    assert!(matches!(&error, PullError::Busy(_)) && error.to_string().contains("--downloads"), "{error}");
    drop(other);
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
}

#[test]
fn a_list_that_was_to_come_by_https_does_not_come_by_http() {
    let server = serve(list(&sum(&content())), vec![Act::Whole]);
    // As if a mirror with HTTPS had sent us here: each address on the way is held against the same setting.
    let mirror = Mirror { secure: true, ..Mirror::new(&server.base).unwrap() };
    let error = mirror.find(&Release::parse("15.1").unwrap(), Kind::Vm).unwrap_err();
    assert!(error.to_string().contains("https only"), "{error}");
}

#[test]
fn what_an_earlier_run_left_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join(format!("{NAME}.part"));
    let server = serve(list(&sum(&content())), vec![Act::Whole]);
    fs::write(&part, &content()[..50_000]).unwrap();
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
    assert_eq!(asked(&server), [range(50_000)]);
    // All of it was there, only its checksum had not been looked at.
    fs::rename(folder.path().join(NAME), &part).unwrap();
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
    // What was there is damaged: once more from the start.
    fs::remove_file(folder.path().join(NAME)).unwrap();
    fs::write(&part, vec![9; 50_000]).unwrap();
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
    // What was there is longer than the file.
    fs::remove_file(folder.path().join(NAME)).unwrap();
    fs::write(&part, vec![9; 300_000]).unwrap();
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
}

#[test]
fn a_server_without_ranges_begins_again() {
    let server = serve(list(&sum(&content())), vec![Act::CutAfter(1000), Act::NoRanges]);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(pull(&server, folder.path()).unwrap(), content());
}

#[test]
fn a_wrong_checksum_is_refused_and_nothing_stays() {
    let server = serve(list(&"a".repeat(64)), vec![Act::Whole]);
    let folder = tempfile::tempdir().unwrap();
    let error = pull(&server, folder.path()).unwrap_err();
    assert!(matches!(&error, PullError::Checksum { .. }), "{error}");
    assert!(error.to_string().contains(NAME) && error.to_string().contains("--mirror"), "{error}");
    assert_eq!(asked(&server), [None, None], "downloaded twice");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_mirror_that_cannot_help_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let error = |server: &Server| pull(server, folder.path()).unwrap_err().to_string();
    let good = list(&sum(&content()));
    assert!(
        error(&serve("SHA256 (other) = 00".into(), vec![Act::Whole])).contains("lists no UFS disk image")
    );
    assert!(error(&serve(good.clone(), vec![Act::Status(404)])).contains("404"));
    assert!(
        error(&serve(good.clone(), vec![Act::CutAfter(10_000), Act::WrongRange])).contains("another range")
    );
    let always = error(&serve(good.clone(), vec![Act::Status(500)]));
    assert!(always.contains("500") && always.contains("bytes are kept"), "{always}");
    let server = serve(good, vec![Act::Whole]);
    let mirror = Mirror::new(&server.base).unwrap();
    let missing = mirror.find(&Release::parse("14.0").unwrap(), Kind::Vm).unwrap_err();
    assert!(matches!(missing, PullError::NotThere { .. }), "{missing}");
    assert!(missing.to_string().contains("14.0-RELEASE"), "{missing}");
    for base in ["ftp://x", "download.freebsd.org", "https://x y", ""] {
        assert!(matches!(Mirror::new(base), Err(PullError::Mirror(_))));
    }
}

#[test]
fn releases_are_read_and_named() {
    for (text, full, image) in [
        ("freebsd-15.1", "15.1-RELEASE", "freebsd-15-1"),
        ("FreeBSD-14.3-RELEASE", "14.3-RELEASE", "freebsd-14-3"),
        ("15.1-rc2", "15.1-RC2", "freebsd-15-1-rc2"),
    ] {
        let release = Release::parse(text).unwrap();
        assert_eq!((release.name(), release.image_name().as_str()), (full, image));
    }
    for text in
        ["", "freebsd", "freebsd-15", "15.x", "15.1-../..", "15.1-RC", "15.1-STABLE", "1234.1", "15.1/2"]
    {
        assert!(matches!(Release::parse(text), Err(PullError::Release(_))), "{text}");
    }
    let names = Release::parse("15.1").unwrap().candidates(Kind::Vm);
    assert_eq!(names[..2], [NAME, "FreeBSD-15.1-RELEASE-amd64.raw.xz"]);
    assert_eq!(
        Release::parse("15.1").unwrap().candidates(Kind::Ci)[0],
        "FreeBSD-15.1-RELEASE-amd64-BASIC-CI-ufs.raw.xz"
    );
}

#[test]
fn both_forms_of_checksum_lists_are_read() {
    let sum = "AB".repeat(32);
    for line in [format!("SHA256 (x.xz) = {sum}"), format!("{sum}  x.xz"), format!("{sum} *x.xz")] {
        assert_eq!(sum_of(&line, "x.xz").as_deref(), Some(sum.to_lowercase().as_str()), "{line}");
    }
    for line in ["SHA256 (x.xz) = short", "SHA256 (y.xz) = ", "", "x.xz", "SHA256 (x.xz)"] {
        assert_eq!(sum_of(line, "x.xz"), None, "{line}");
    }
}
