//! Telling the service manager that started this process how it is: sd_notify(3), which is a datagram to the socket that NOTIFY_SOCKET names.
//! Without such a manager nothing is told. What it cannot be told is logged and changes nothing else.
//!
//! The variable stays in the environment; workers have it too, and cannot reach a socket (docs/security.md).

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

const SOCKET: &str = "NOTIFY_SOCKET";
/// How long a manager that does not read may hold this process up.
const WITHIN: Duration = Duration::from_secs(2);

/// The service answers from now on. `status` is shown by `systemctl status`.
pub fn ready(status: &str) {
    tell(&format!("READY=1\nSTATUS={}", line(status)));
}

/// It is about to end.
pub fn stopping(status: &str) {
    tell(&format!("STOPPING=1\nSTATUS={}", line(status)));
}

/// A status is one line.
fn line(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

fn tell(words: &str) {
    let Some(socket) = env::var_os(SOCKET).filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) = send(&socket, words) {
        tracing::warn!(?socket, %error, "the service manager cannot be told: {}", words.replace('\n', "; "));
    }
}

fn send(socket: &OsStr, words: &str) -> io::Result<()> {
    let bytes = socket.as_bytes();
    let address = match bytes {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a path nor an abstract name")),
    };
    let from = UnixDatagram::unbound()?;
    from.set_write_timeout(Some(WITHIN))?;
    from.send_to_addr(words.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_is_told_by_path_and_by_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("coldspark-notify-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (listener, socket) in [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (UnixDatagram::bind_addr(&by_name).unwrap(), format!("@{name}").into()),
        ] {
            send(&socket, "READY=1\nSTATUS=well").unwrap();
            let mut bytes = [0; 64];
            let length = listener.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], b"READY=1\nSTATUS=well");
        }
        for nobody in ["relative", "/no/such/socket", "@", "vsock:2:1"] {
            assert!(send(OsStr::new(nobody), "READY=1").is_err(), "{nobody}");
        }
        assert_eq!(line("a\nMAINPID=1"), "a MAINPID=1");
    }
}
