//! Where callers come in: the Unix socket, and a TCP port if one is asked for.
//!
//! Each way in has a limit of connections of its own, so that the network cannot shut out this host. A connection that has not made
//! a request that the guard allows within [`PROVE_WITHIN`], TLS handshake included, is closed.

use std::fs;
use std::future::Future as _;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{getegid, geteuid};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::auth::guard::{Guard, Policy};
use super::auth::rules::SocketFor;
use super::auth::{AuthError, Caller, Role};
use super::server::ServeError;

/// Connections on the Unix socket.
const UNIX_CONNECTIONS_MAX: usize = 1024;
/// How long a connection may take to make its first allowed request.
pub const PROVE_WITHIN: Duration = Duration::from_secs(10);
/// After an error of accept(2), which is then mostly for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A bound socket. Its file is removed with it.
#[derive(Debug)]
pub struct Socket {
    /// Goes first: as long as somebody listens, the next service does not put its own in this place.
    _file: SocketFile,
    listener: UnixListener,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may have been removed, or its folder with it.
        let _ = fs::remove_file(&self.0);
    }
}

impl Socket {
    /// Binds `path`, for its owner only (mode 0600). A socket that a dead service left is replaced.
    pub async fn bind(path: &Path) -> Result<Self, ServeError> {
        Self::bind_for(path, SocketFor::Owner).await
    }

    /// Binds `path` for those who may connect at all; what they may do is the guard's matter. Refuses a folder in which others
    /// could put a socket of theirs in its place.
    pub async fn bind_for(path: &Path, whom: SocketFor) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Bind { path: path.to_owned(), source };
        check_folder(path)?;
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => return Err(ServeError::NoSocket(path.to_owned())),
            Ok(_) if is_served(path).await => return Err(ServeError::Taken(path.to_owned())),
            Ok(_) => fs::remove_file(path).map_err(failed)?,
            Err(_) => {}
        }
        // Bound under another name and renamed, so that nobody can connect before the mode is right.
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let _ = fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden).map_err(failed)?;
        // The group first: until then the mode is what the umask left.
        let placed = fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600)).and_then(|()| {
            let mode = match whom {
                SocketFor::Owner => 0o600,
                SocketFor::Group(group) => match chown(&hidden, None, Some(group)) {
                    Ok(()) => 0o660,
                    // Only a member of a group may give it something. Whom the guard lets in is the same.
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                        tracing::info!(group, "the socket is open to all users, and the rules decide: this service is not of the group that they name");
                        0o666
                    }
                    Err(error) => return Err(error),
                },
                SocketFor::Everybody => 0o666,
            };
            fs::set_permissions(&hidden, fs::Permissions::from_mode(mode))?;
            fs::rename(&hidden, path)
        });
        if let Err(source) = placed {
            let _ = fs::remove_file(&hidden);
            return Err(failed(source));
        }
        Ok(Self { _file: SocketFile(path.to_owned()), listener })
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<(UnixStream, tokio::net::unix::SocketAddr)> {
        self.listener.accept().await
    }
}

/// Whether the process that listens there lives. That it can be connected to is not enough: of a service that was killed, a child that is
/// between its fork and its exec has the socket open for a moment longer.
async fn is_served(path: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(path).await else { return false };
    // The kernel tells who called listen(2). Nobody that has a number here: of another pid namespace, so alive for all we know.
    let listener = stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|pid| *pid > 0);
    listener.is_none_or(lives)
}

/// Whether there is such a process and it is no zombie. Where /proc does not tell, there is.
fn lives(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // "1234 (name) Z ...": the name may hold anything.
        Ok(stat) => !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
        Err(error) => error.kind() != io::ErrorKind::NotFound || !Path::new("/proc/self/stat").exists(),
    }
}

/// A folder that others may write, without the sticky bit, lets them replace the socket.
fn check_folder(path: &Path) -> Result<(), ServeError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // A folder that is not there is told of by bind.
    let Ok(meta) = fs::metadata(folder) else { return Ok(()) };
    let mode = meta.mode();
    let (own_uid, own_gid) = (geteuid().as_raw(), getegid().as_raw());
    let sticky = mode & libc::S_ISVTX != 0;
    let open = mode & 0o002 != 0 || (mode & 0o020 != 0 && meta.gid() != own_gid && meta.gid() != 0);
    if (open && !sticky) || (meta.uid() != own_uid && meta.uid() != 0) {
        return Err(ServeError::Folder(folder.to_owned()));
    }
    Ok(())
}

/// A bound TCP port.
#[derive(Debug)]
pub struct Port {
    listener: TcpListener,
    connections_max: usize,
    plain: bool,
}

impl Port {
    /// Binds `address` for TLS.
    pub async fn bind(address: SocketAddr, connections_max: usize) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Port { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        Ok(Self { listener, connections_max, plain: false })
    }

    /// Without TLS, and everybody who reaches it is an admin.
    pub fn insecure(mut self) -> Self {
        self.plain = true;
        self
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// All ways in.
#[derive(Debug)]
pub struct Listeners {
    socket: Socket,
    port: Option<Port>,
    pub(super) guard: Arc<Guard>,
}

impl Listeners {
    pub fn new(socket: Socket, port: Option<Port>, guard: Arc<Guard>) -> Self {
        Self { socket, port, guard }
    }

    /// The socket alone, for its own user and root.
    pub fn own(socket: Socket) -> Result<Self, AuthError> {
        Ok(Self { socket, port: None, guard: Guard::new(Policy::default())? })
    }

    /// Accepts for as long as the future is polled; what comes in goes to `connections`.
    pub(super) async fn accept(self, connections: mpsc::Sender<io::Result<Connection>>) {
        let Self { socket, port, guard } = self;
        let unix = accept_unix(&socket, &guard, &connections);
        match port {
            None => unix.await,
            Some(port) => {
                tokio::join!(unix, accept_tcp(port, Arc::clone(&guard), connections.clone()));
            }
        }
    }
}

async fn accept_unix(socket: &Socket, guard: &Guard, connections: &mpsc::Sender<io::Result<Connection>>) {
    let room = Room::new("the Unix socket", UNIX_CONNECTIONS_MAX);
    loop {
        let Some(stream) = taken(socket.listener.accept().await).await else { continue };
        let Some(permit) = room.enter() else { continue };
        let caller = match stream.peer_cred() {
            Ok(peer) => guard.peer(peer.uid(), &groups_of(&stream, peer.gid())),
            Err(error) => {
                tracing::warn!(%error, "a caller's credentials cannot be told");
                continue;
            }
        };
        let deadline = Instant::now() + PROVE_WITHIN;
        let connection = Connection::new(Stream::Unix(stream), caller, deadline, permit);
        if connections.send(Ok(connection)).await.is_err() {
            return;
        }
    }
}

async fn accept_tcp(port: Port, guard: Arc<Guard>, connections: mpsc::Sender<io::Result<Connection>>) {
    let room = Room::new("the TCP port", port.connections_max);
    loop {
        let Some(stream) = taken(port.listener.accept().await).await else { continue };
        let Some(permit) = room.enter() else { continue };
        let deadline = Instant::now() + PROVE_WITHIN;
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "a connection that was gone at once");
            continue;
        }
        if port.plain {
            let caller = Caller::new("anybody (--insecure)", Some(Role::Admin));
            let connection = Connection::new(Stream::Tcp(stream), caller, deadline, permit);
            if connections.send(Ok(connection)).await.is_err() {
                return;
            }
            continue;
        }
        let (guard, connections) = (Arc::clone(&guard), connections.clone());
        // At most as many of these as connections.
        tokio::spawn(async move {
            let Some(config) = guard.tls() else { return };
            let handshake = TlsAcceptor::from(config).accept(stream).into_fallible();
            match timeout_at(deadline, handshake).await {
                Ok(Ok(stream)) => {
                    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                    let caller = guard.tls_client(certificate);
                    let stream = Stream::Tls(Box::new(stream));
                    let _ = connections.send(Ok(Connection::new(stream, caller, deadline, permit))).await;
                }
                Ok(Err((error, stream))) => {
                    tracing::debug!(%error, "a TLS handshake failed");
                    let _ = timeout_at(deadline, linger(stream)).await;
                    drop(permit);
                }
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            }
        });
    }
}

/// Ends a connection so that its other end reads what was said last, which is why it was refused: what it has sent meanwhile is
/// read and dropped, else the kernel would reset the connection.
async fn linger(mut stream: TcpStream) -> io::Result<()> {
    const LEFT_BYTES_MAX: u64 = 64 << 10;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LEFT_BYTES_MAX), &mut tokio::io::sink()).await.map(|_| ())
}

/// What was accepted. After an error, which is mostly for want of descriptors, it waits a little: nobody announces that there are some.
pub(super) async fn taken<S, A>(accepted: io::Result<(S, A)>) -> Option<S> {
    match accepted {
        Ok((stream, _)) => Some(stream),
        Err(error) => {
            tracing::warn!(%error, "a connection could not be accepted");
            tokio::time::sleep(ACCEPT_AGAIN).await;
            None
        }
    }
}

/// Small messages at once, and peers that are gone without a word are noticed in two minutes.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (idle, again) = (Duration::from_secs(60), Duration::from_secs(15));
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(again).with_retries(4);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// The groups of the program at the other end, as they were when it connected.
#[allow(unsafe_code)]
fn groups_of(stream: &UnixStream, first: u32) -> Vec<u32> {
    /// asm-generic/socket.h, since Linux 4.13; see socket(7).
    const SO_PEERGROUPS: libc::c_int = 59;
    /// NGROUPS_MAX of Linux.
    const GROUPS_MAX: usize = 65_536;
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = libc::socklen_t::try_from(size_of_val(&groups[..])).unwrap_or(0);
        // SAFETY: the buffer is valid for writes of `bytes`, which is its length, and `bytes` is valid too.
        let result = unsafe {
            let (level, fd) = (libc::SOL_SOCKET, stream.as_raw_fd());
            libc::getsockopt(fd, level, SO_PEERGROUPS, groups.as_mut_ptr().cast(), &mut bytes)
        };
        let count = bytes as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            groups.push(first);
            return groups;
        }
        let too_short = io::Error::last_os_error().raw_os_error() == Some(libc::ERANGE);
        if !too_short || count <= groups.len() || count > GROUPS_MAX {
            // The main group alone: fewer rights, not more.
            return vec![first];
        }
        groups.resize(count, 0);
    }
}

/// Limits the connections of one way in.
pub(super) struct Room {
    what: &'static str,
    most: usize,
    left: Arc<Semaphore>,
    told: AtomicBool,
}

impl Room {
    pub(super) fn new(what: &'static str, most: usize) -> Self {
        Self { what, most, left: Arc::new(Semaphore::new(most)), told: AtomicBool::new(false) }
    }

    /// A place for one more connection, or `None`, told in the log once each time that it is full.
    pub(super) fn enter(&self) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.left).try_acquire_owned().ok();
        let full = permit.is_none();
        if full && !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{} connections on {}, the most there can be: others are closed at once",
                self.most,
                self.what
            );
        } else if !full {
            self.told.store(false, Ordering::Relaxed);
        }
        permit
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that has come in, whichever way, and who is at its other end.
pub struct Connection {
    stream: Stream,
    caller: Caller,
    /// When it is closed unless its caller has proved to be somebody.
    unproven: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: Stream, caller: Caller, deadline: Instant, permit: OwnedSemaphorePermit) -> Self {
        let unproven = (!caller.is_proven()).then(|| Box::pin(sleep_until(deadline)));
        Self { stream, caller, unproven, _permit: permit }
    }

    fn stream(self: Pin<&mut Self>) -> &mut Stream {
        &mut self.get_mut().stream
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.caller.is_proven() {
            self.unproven = None;
        }
        if let Some(deadline) = &mut self.unproven
            && deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        match self.stream() {
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.stream() {
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.stream() {
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.stream() {
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.stream() {
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

    use super::*;

    const CHILD: &str = "COLDSPARK_TEST_LISTEN";

    #[test]
    #[ignore = "the second half of a_socket_whose_service_is_gone_is_free_though_somebody_has_it_open, which starts it"]
    fn listening_child() {
        if std::env::var_os(CHILD).is_some() {
            rustix::net::listen(io::stdin(), 4).unwrap();
        }
    }

    #[tokio::test]
    async fn a_socket_whose_service_is_gone_is_free_though_somebody_has_it_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        // A process listens there and ends; we have the same socket open, as a child of it would.
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "api::listen::tests::listening_child", "--ignored"]).env(CHILD, "1");
        child.stdin(Stdio::from(socket.try_clone().unwrap())).stdout(Stdio::null());
        assert!(child.status().unwrap().success());
        assert!(UnixStream::connect(&path).await.is_ok(), "it listens");
        assert!(!is_served(&path).await);
        drop(child);
        let served = Socket::bind(&path).await.unwrap();
        assert!(matches!(Socket::bind(&path).await, Err(ServeError::Taken(_))));
        drop(served);
        assert!(!is_served(&path).await);
    }

    #[test]
    fn who_lives_is_told() {
        assert!(lives(std::process::id().try_into().unwrap()));
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id().try_into().unwrap();
        // Awaited without being reaped: a zombie.
        let status = rustix::process::waitid(
            rustix::process::WaitId::Pid(rustix::process::Pid::from_raw(pid).unwrap()),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        );
        assert!(status.unwrap().is_some());
        assert!(!lives(pid));
        child.wait().unwrap();
        assert!(!lives(pid));
    }
}
