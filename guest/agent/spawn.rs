//! Starting a command: its user, folder, variables, pipes, and where it is found.

use crate::accounts::{self, Account, GROUPS_MAX};
use crate::streams::{Refusal, refusal};
use crate::sys::{self, Path};
use crate::wire::*;

/// Most of `/etc/passwd` and of `/etc/group` that is read.
const FILE_BYTES: usize = 64 << 10;
/// What is put beside the host's words: variables of the agent's own, candidates of a path, NULs.
const OWN_BYTES: usize = 8 << 10;
const WORDS_BYTES: usize = crate::port::REQUEST_BYTES_MAX + OWN_BYTES;
/// Variables that the agent gives.
const OWN_VARIABLES: usize = 5;
const POINTERS: usize = ARGUMENTS_MAX + OWN_VARIABLES + 1;
const PATH: &[u8] = b"/sbin:/bin:/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin";

/// Room for one start; it lies somewhere else than on the stack.
pub(crate) struct Room {
    passwd: [u8; FILE_BYTES],
    group: [u8; FILE_BYTES],
    words: Words,
    arguments: [*const u8; POINTERS],
    environment: [*const u8; POINTERS],
}

/// Strings with NULs, one after the other.
struct Words {
    length: usize,
    bytes: [u8; WORDS_BYTES],
}

/// A command that was started.
pub(crate) struct Started {
    pub(crate) pid: u32,
    /// Our ends of stdin, stdout, stderr.
    pub(crate) fds: [i32; 3],
}

/// Where a child failed, and the errno: what it writes to its parent.
#[repr(C)]
struct Trouble {
    step: i32,
    errno: i32,
}

const IN_USER: i32 = 1;
const IN_FOLDER: i32 = 2;
const IN_COMMAND: i32 = 3;

impl Words {
    /// Appends what the parts make together. `None`: no room, or a NUL.
    fn put(&mut self, parts: &[&[u8]]) -> Option<&Path> {
        let start = self.length;
        for part in parts.iter().copied().chain([&[0u8][..]]) {
            self.bytes.get_mut(self.length..self.length + part.len())?.copy_from_slice(part);
            self.length += part.len();
        }
        Path::from_bytes_with_nul(&self.bytes[start..self.length]).ok()
    }
}

impl Room {
    pub(crate) const fn new() -> Room {
        Room {
            passwd: [0; FILE_BYTES],
            group: [0; FILE_BYTES],
            words: Words { length: 0, bytes: [0; WORDS_BYTES] },
            arguments: [core::ptr::null(); POINTERS],
            environment: [core::ptr::null(); POINTERS],
        }
    }

    /// Starts a command.
    pub(crate) fn start(&mut self, start: &ExecStart) -> Result<Started, Refusal> {
        const TOO_LONG: Refusal = (STATUS_OUT_OF_RANGE, "more words than the agent has room for");
        let passwd = read_file(c"/etc/passwd", &mut self.passwd);
        let account = match start.user {
            [] => accounts::account_of(passwd, 0).unwrap_or(Account {
                name: b"root",
                uid: 0,
                gid: 0,
                home: b"/",
                shell: b"/bin/sh",
            }),
            name => accounts::account(passwd, name).ok_or((STATUS_NOT_FOUND, "there is no such user"))?,
        };
        let mut groups = [0; GROUPS_MAX];
        let count = accounts::groups(read_file(c"/etc/group", &mut self.group), &account, &mut groups);
        let become_user = (!start.user.is_empty()).then_some((account.uid, &groups[..count]));

        self.words.length = 0;
        for (place, word) in self.arguments.iter_mut().zip(start.arguments) {
            *place = self.words.put(&[word]).ok_or(TOO_LONG)?.as_ptr().cast();
        }
        self.arguments[start.arguments.count()] = core::ptr::null();
        let given = |name: &[u8]| {
            start.environment.filter_map(|word| word.strip_prefix(name)?.strip_prefix(b"=")).next()
        };
        let shell = if account.shell.is_empty() { b"/bin/sh" } else { account.shell };
        let own: [(&[u8], &[u8]); OWN_VARIABLES] = [
            (b"HOME", account.home),
            (b"USER", account.name),
            (b"LOGNAME", account.name),
            (b"SHELL", shell),
            (b"PATH", PATH),
        ];
        let mut variables = 0;
        for word in start.environment {
            self.environment[variables] = self.words.put(&[word]).ok_or(TOO_LONG)?.as_ptr().cast();
            variables += 1;
        }
        for (name, value) in own.into_iter().filter(|(name, _)| given(name).is_none()) {
            self.environment[variables] =
                self.words.put(&[name, b"=", value]).ok_or(TOO_LONG)?.as_ptr().cast();
            variables += 1;
        }
        self.environment[variables] = core::ptr::null();

        let child = Child {
            become_user,
            folder: start.folder,
            home: account.home,
            command: start.arguments.clone().next().unwrap_or_default(),
            path: given(b"PATH").unwrap_or(PATH),
            arguments: self.arguments.as_ptr(),
            environment: self.environment.as_ptr(),
        };
        child.spawn(&mut self.words)
    }
}

/// What a child needs to become the command.
struct Child<'a> {
    become_user: Option<(u32, &'a [u32])>,
    folder: &'a [u8],
    home: &'a [u8],
    command: &'a [u8],
    path: &'a [u8],
    arguments: *const *const u8,
    environment: *const *const u8,
}

impl Child<'_> {
    fn spawn(&self, words: &mut Words) -> Result<Started, Refusal> {
        const NO_PIPES: &str = "the agent has no room for more pipes";
        let mut pipes = [[-1; 2]; 4];
        for index in 0..pipes.len() {
            match sys::pipe() {
                Ok(pipe) => pipes[index] = pipe,
                Err(_) => {
                    pipes[..index].iter().flatten().for_each(|fd| sys::close(*fd));
                    return Err((STATUS_LIMIT, NO_PIPES));
                }
            }
        }
        let [stdin, stdout, stderr, trouble] = pipes;
        // SAFETY: one thread; the child goes on in a function that does not come back.
        match unsafe { sys::fork() } {
            Ok(None) => self.become_command([stdin[0], stdout[1], stderr[1]], trouble[1], words),
            Ok(Some(pid)) => {
                sys::own_group(pid);
                [stdin[0], stdout[1], stderr[1], trouble[1]].into_iter().for_each(sys::close);
                let told = hear_trouble(trouble[0]);
                sys::close(trouble[0]);
                let fds = [stdin[1], stdout[0], stderr[0]];
                let outcome = match told {
                    None => fds.iter().try_for_each(|fd| sys::set_nonblocking(*fd)).map_err(refusal),
                    Some(told) => Err(told.refusal()),
                };
                match outcome {
                    Ok(()) => Ok(Started { pid, fds }),
                    Err(refusal) => {
                        fds.into_iter().for_each(sys::close);
                        let _ = sys::kill_group(pid, sys::SIGKILL);
                        Err(refusal)
                    }
                }
            }
            Err(error) => {
                pipes.iter().flatten().for_each(|fd| sys::close(*fd));
                Err(refusal(error))
            }
        }
    }

    fn become_command(&self, fds: [i32; 3], trouble: i32, words: &mut Words) -> ! {
        let (step, errno) = self.try_to_become(fds, words);
        let mut told = [0u8; size_of::<Trouble>()];
        told[..4].copy_from_slice(&step.to_le_bytes());
        told[4..].copy_from_slice(&errno.to_le_bytes());
        let _ = sys::write(trouble, &told);
        sys::exit(127)
    }

    /// Comes back only when that failed.
    fn try_to_become(&self, fds: [i32; 3], words: &mut Words) -> (i32, i32) {
        sys::own_group(0);
        for (to, from) in (0..).zip(fds) {
            if let Err(error) = sys::dup2(from, to) {
                return (IN_COMMAND, error);
            }
        }
        if let Some((uid, groups)) = self.become_user
            && let Err(error) = sys::become_user(uid, groups)
        {
            return (IN_USER, error);
        }
        if self.folder.is_empty() {
            // A user's home may not be there.
            let home = words.put(&[self.home]).map(sys::chdir);
            if !matches!(home, Some(Ok(()))) {
                let _ = sys::chdir(c"/");
            }
        } else {
            match words.put(&[self.folder]).map(sys::chdir) {
                Some(Ok(())) => {}
                Some(Err(error)) => return (IN_FOLDER, error),
                None => return (IN_FOLDER, sys::ENOENT),
            }
        }
        sys::forget_signals();
        if self.command.contains(&b'/') {
            return (IN_COMMAND, self.execute(words, &[self.command]));
        }
        let mut worst = sys::ENOENT;
        for folder in self.path.split(|byte| *byte == b':') {
            let folder = if folder.is_empty() { b"." } else { folder };
            match self.execute(words, &[folder, b"/", self.command]) {
                sys::ENOENT | sys::ENOTDIR => {}
                sys::EACCES => worst = sys::EACCES,
                other => return (IN_COMMAND, other),
            }
        }
        (IN_COMMAND, worst)
    }

    fn execute(&self, words: &mut Words, parts: &[&[u8]]) -> i32 {
        let before = words.length;
        // SAFETY: both lists end with null, and their words with NUL.
        let error = match words.put(parts) {
            Some(path) => unsafe { sys::execve(path, self.arguments, self.environment) },
            None => sys::ENOENT,
        };
        words.length = before;
        error
    }
}

impl Trouble {
    fn refusal(&self) -> Refusal {
        match (self.step, refusal(self.errno)) {
            (IN_USER, _) => (STATUS_NOT_ALLOWED, "the agent may not become that user"),
            (IN_FOLDER, (STATUS_NOT_FOUND, _)) => (STATUS_NOT_FOUND, "there is no such working folder"),
            (IN_COMMAND, (STATUS_NOT_FOUND, _)) => (STATUS_NOT_FOUND, "there is no such command"),
            (_, other) => other,
        }
    }
}

/// What the child could not do; `None` when it has become the command, which closes the pipe.
fn hear_trouble(fd: i32) -> Option<Trouble> {
    let mut told = [0u8; size_of::<Trouble>()];
    let mut have = 0;
    while have < told.len() {
        match sys::read(fd, &mut told[have..]) {
            Ok(0) => return None,
            Ok(count) => have += count,
            Err(sys::EINTR) => {}
            Err(_) => return None,
        }
    }
    let ([step, errno], _) = told.as_chunks::<4>() else { return None };
    Some(Trouble { step: i32::from_le_bytes(*step), errno: i32::from_le_bytes(*errno) })
}

/// A file's beginning; nothing if it cannot be read.
fn read_file<'a>(path: &Path, room: &'a mut [u8]) -> &'a [u8] {
    let mut have = 0;
    if let Ok(fd) = sys::open(path, sys::O_RDONLY, 0) {
        while have < room.len() {
            match sys::read(fd, &mut room[have..]) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(sys::EINTR) => {}
                Err(_) => break,
            }
        }
        sys::close(fd);
    }
    &room[..have]
}
