//! Commands and files in a guest: what opens a stream, and what both sides say on it. The rules are at the top of
//! [`wire`].

use super::frame::{self, Frame, FrameError};
use super::ops::{put32, put64, sentence};
use super::wire::{self, Reader};

/// What opens a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// Names the conversation; the one who sends it fills it in.
    pub session: u64,
    /// Bytes that the guest may send on each of stdout and stderr.
    pub window: u32,
    pub what: What,
}

/// A command or a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Exec {
        arguments: Vec<Vec<u8>>,
        /// Added to the agent's own.
        environment: Vec<(Vec<u8>, Vec<u8>)>,
        /// Empty: the user's home, or `/`.
        folder: Vec<u8>,
        /// Empty: the agent's own.
        user: Vec<u8>,
    },
    /// `mode`: permission bits.
    Put {
        path: Vec<u8>,
        mode: u32,
    },
    Get {
        path: Vec<u8>,
    },
}

/// The guest opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// `window`: bytes that may be sent on stdin.
    Exec {
        window: u32,
        pid: u32,
    },
    Put {
        window: u32,
    },
    /// `bytes`: its size, which may change while it is sent.
    Get {
        bytes: u64,
        mode: u32,
    },
}

/// What the host says on a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// At most [`wire::STREAM_BYTES_MAX`]; none: the end of stdin.
    Stdin(Vec<u8>),
    /// `pipe` may send so many bytes more.
    Grant {
        pipe: Pipe,
        bytes: u32,
    },
    Signal(u32),
}

/// What a guest says on a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// 1 to [`wire::STREAM_BYTES_MAX`] bytes.
    Output {
        pipe: Pipe,
        bytes: Vec<u8>,
    },
    /// Stdin may carry so many bytes more.
    Grant(u32),
    End(End),
}

/// Where a command's output comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipe {
    Stdout,
    Stderr,
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Exit status of a command; 0 for a file that is complete.
    Exited(u32),
    /// The number of the signal that ended it.
    Signalled(u32),
    /// The agent, or the conversation with it, failed.
    Failed(String),
}

/// Why an opening cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadOpening {
    #[error("a command needs at least its own name")]
    NoCommand,
    #[error("{0} contains a NUL byte")]
    Nul(&'static str),
    #[error("a variable's name is empty or contains \"=\"")]
    Name,
    #[error("more than {} arguments or variables", wire::ARGUMENTS_MAX)]
    TooMany,
    #[error("arguments and variables are more than {} bytes together", wire::OPENING_BYTES_MAX)]
    TooLong,
    #[error("a path has 1 to {} bytes", wire::PATH_BYTES_MAX)]
    Path,
    #[error("{0:#o} are no permission bits; the most is 0o7777")]
    Mode(u32),
}

impl Opening {
    /// A file's bytes.
    pub fn get(path: &[u8], window: u32) -> Opening {
        Opening { session: 0, window, what: What::Get { path: path.to_vec() } }
    }

    /// Refuses what an agent would call malformed.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadOpening> {
        let no_nul =
            |name, bytes: &[u8]| if bytes.contains(&0) { Err(BadOpening::Nul(name)) } else { Ok(()) };
        match &self.what {
            What::Exec { arguments, environment, folder, user } => {
                if arguments.first().is_none_or(Vec::is_empty) {
                    return Err(BadOpening::NoCommand);
                }
                if arguments.len().max(environment.len()) > wire::ARGUMENTS_MAX {
                    return Err(BadOpening::TooMany);
                }
                arguments.iter().try_for_each(|argument| no_nul("an argument", argument))?;
                for (name, value) in environment {
                    if name.is_empty() || name.contains(&b'=') {
                        return Err(BadOpening::Name);
                    }
                    no_nul("a variable's name", name)?;
                    no_nul("a variable's value", value)?;
                }
                no_nul("the working folder", folder)?;
                no_nul("the user", user)?;
                let mut bytes = Vec::new();
                self.encode(&mut bytes);
                if bytes.len() > wire::OPENING_BYTES_MAX { Err(BadOpening::TooLong) } else { Ok(()) }
            }
            What::Put { path, .. } | What::Get { path } => {
                if let What::Put { mode, .. } = self.what
                    && mode > 0o7777
                {
                    return Err(BadOpening::Mode(mode));
                }
                no_nul("the path", path)?;
                if (1..=wire::PATH_BYTES_MAX).contains(&path.len()) { Ok(()) } else { Err(BadOpening::Path) }
            }
        }
    }

    /// The kind it has on the wire.
    pub fn kind(&self) -> u16 {
        match self.what {
            What::Exec { .. } => wire::KIND_EXEC,
            What::Put { .. } => wire::KIND_FILE_PUT,
            What::Get { .. } => wire::KIND_FILE_GET,
        }
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        put64(out, self.session);
        put32(out, self.window);
        match &self.what {
            What::Exec { arguments, environment, folder, user } => {
                put32(out, 0);
                put32(out, length(arguments.len()));
                put32(out, length(environment.len()));
                for string in [folder, user].into_iter().chain(arguments) {
                    put_string(out, &[string]);
                }
                for (name, value) in environment {
                    put_string(out, &[name, b"=", value]);
                }
            }
            What::Put { path, mode } => {
                put32(out, *mode);
                put_string(out, &[path]);
            }
            What::Get { path } => {
                put32(out, 0);
                put_string(out, &[path]);
            }
        }
    }
}

impl Opened {
    pub(super) fn decode(opening: &Opening, reader: &mut Reader) -> Option<Opened> {
        let opened = match opening.what {
            What::Exec { .. } => Opened::Exec { window: reader.u32()?, pid: reader.u32()? },
            What::Put { .. } => {
                let window = reader.u32()?;
                reader.u32()?;
                Opened::Put { window }
            }
            What::Get { .. } => {
                let (bytes, mode) = (reader.u64()?, reader.u32()?);
                reader.u32()?;
                Opened::Get { bytes, mode }
            }
        };
        (opened.window() <= wire::WINDOW_BYTES_MAX).then_some(opened)
    }

    /// Bytes that may be sent on stdin.
    pub fn window(&self) -> u32 {
        match self {
            Opened::Exec { window, .. } | Opened::Put { window } => *window,
            Opened::Get { .. } => 0,
        }
    }
}

impl Word {
    /// The whole frame, for the stream with this id.
    pub fn encode(&self, id: u32) -> Result<Vec<u8>, FrameError> {
        let mut out = Vec::new();
        let kind = match self {
            Word::Stdin(bytes) => {
                put32(&mut out, wire::PIPE_STDIN);
                out.extend_from_slice(bytes);
                wire::KIND_STREAM_DATA
            }
            Word::Grant { pipe, bytes } => {
                put32(&mut out, pipe.number());
                put32(&mut out, *bytes);
                wire::KIND_STREAM_WINDOW
            }
            Word::Signal(signal) => {
                put32(&mut out, *signal);
                wire::KIND_SIGNAL
            }
        };
        frame::encode(kind, wire::STATUS_OK, id, &out)
    }
}

impl Said {
    /// True if frames of this kind come unasked, on a stream.
    pub fn is_said(kind: u16) -> bool {
        matches!(kind, wire::KIND_STREAM_DATA | wire::KIND_STREAM_WINDOW | wire::KIND_END)
    }

    /// Reads such a frame. `None`: it does not have its kind's layout.
    pub fn decode(frame: &Frame) -> Option<Said> {
        let mut reader = Reader::new(&frame.payload);
        match frame.kind {
            wire::KIND_STREAM_DATA => {
                let pipe = match reader.u32()? {
                    wire::PIPE_STDOUT => Pipe::Stdout,
                    wire::PIPE_STDERR => Pipe::Stderr,
                    _ => return None,
                };
                let bytes = reader.rest().to_vec();
                (1..=wire::STREAM_BYTES_MAX).contains(&bytes.len()).then_some(Said::Output { pipe, bytes })
            }
            wire::KIND_STREAM_WINDOW => {
                let (pipe, bytes) = (reader.u32()?, reader.u32()?);
                reader.end()?;
                (pipe == wire::PIPE_STDIN).then_some(Said::Grant(bytes))
            }
            wire::KIND_END => {
                let (how, value, words) = (reader.u32()?, reader.u32()?, reader.rest());
                Some(Said::End(match how {
                    wire::END_EXITED => End::Exited(value),
                    wire::END_SIGNALLED => End::Signalled(value),
                    wire::END_FAILED => End::Failed(sentence(words)),
                    _ => return None,
                }))
            }
            _ => None,
        }
    }
}

impl Pipe {
    fn number(self) -> u32 {
        match self {
            Pipe::Stdout => wire::PIPE_STDOUT,
            Pipe::Stderr => wire::PIPE_STDERR,
        }
    }
}

fn put_string(out: &mut Vec<u8>, parts: &[&[u8]]) {
    put32(out, length(parts.iter().map(|part| part.len()).sum()));
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// Lengths that [`Opening::check`] has let through fit.
fn length(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::wire::{ExecStart, FileStart};
    use super::*;
    use proptest::prelude::*;

    fn string() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(1..=255u8, 0..20)
    }

    fn name() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(b'A'..=b'Z', 1..9)
    }

    proptest! {
        #[test]
        fn the_guest_reads_what_the_host_writes(
            session in any::<u64>(), window in 0..=wire::WINDOW_BYTES_MAX, command in name(),
            more in prop::collection::vec(string(), 0..9), environment in prop::collection::vec((name(), string()), 0..9),
            folder in string(), user in string(), mode in 0u32..=0o7777,
        ) {
            let arguments: Vec<_> = std::iter::once(command.clone()).chain(more).collect();
            let what = What::Exec { arguments: arguments.clone(), environment: environment.clone(), folder: folder.clone(), user: user.clone() };
            let opening = Opening { session, window, what };
            prop_assert_eq!(opening.check(), Ok(()));
            let mut bytes = Vec::new();
            opening.encode(&mut bytes);
            let start = ExecStart::decode(&bytes).unwrap();
            prop_assert_eq!((start.session, start.window, start.folder, start.user), (session, window, &folder[..], &user[..]));
            prop_assert!(start.arguments.eq(arguments));
            let joined = environment.iter().map(|(name, value)| [&name[..], b"=", value].concat());
            prop_assert!(start.environment.eq(joined));
            // Every byte counts.
            prop_assert!(ExecStart::decode(&bytes[..bytes.len() - 1]).is_none());
            bytes.push(0);
            prop_assert!(ExecStart::decode(&bytes).is_none());

            let put = Opening { session, window: 0, what: What::Put { path: command.clone(), mode } };
            let mut bytes = Vec::new();
            put.encode(&mut bytes);
            let start = FileStart::decode(&bytes).unwrap();
            prop_assert_eq!((start.session, start.mode, start.path), (session, mode, &command[..]));
        }

        #[test]
        fn anything_else_is_refused_or_within_its_bounds(kind in 0u16..64, payload in prop::collection::vec(any::<u8>(), 0..120)) {
            if let Some(start) = ExecStart::decode(&payload) {
                prop_assert!(start.arguments.count() + start.environment.count() <= payload.len());
            }
            let _ = FileStart::decode(&payload);
            let said = Said::decode(&Frame { kind, status: 0, id: 1, payload });
            prop_assert!(said.is_none() || Said::is_said(kind));
        }
    }

    fn exec(arguments: Vec<Vec<u8>>, environment: Vec<(Vec<u8>, Vec<u8>)>) -> Opening {
        let what = What::Exec { arguments, environment, folder: vec![], user: vec![] };
        Opening { session: 1, window: 1, what }
    }

    #[test]
    fn what_no_system_could_start_is_refused_here() {
        assert_eq!(exec(vec![], vec![]).check(), Err(BadOpening::NoCommand));
        assert_eq!(exec(vec![b"a\0".to_vec()], vec![]).check(), Err(BadOpening::Nul("an argument")));
        assert_eq!(exec(vec![b"a".to_vec()], vec![(b"A=".to_vec(), vec![])]).check(), Err(BadOpening::Name));
        assert_eq!(
            exec(vec![b"a".to_vec(); wire::ARGUMENTS_MAX + 1], vec![]).check(),
            Err(BadOpening::TooMany)
        );
        assert_eq!(exec(vec![vec![b'a'; wire::OPENING_BYTES_MAX]], vec![]).check(), Err(BadOpening::TooLong));
        assert_eq!(Opening::get(b"", 0).check(), Err(BadOpening::Path));
        let put = Opening { session: 0, window: 0, what: What::Put { path: b"a".to_vec(), mode: 0o10000 } };
        assert_eq!(put.check(), Err(BadOpening::Mode(0o10000)));
    }

    #[test]
    fn a_guest_may_not_send_empty_or_long_data_or_on_stdin() {
        let data = |pipe: u32, count: usize| {
            let mut payload = pipe.to_le_bytes().to_vec();
            payload.resize(4 + count, b'x');
            Said::decode(&Frame { kind: wire::KIND_STREAM_DATA, status: 0, id: 1, payload })
        };
        let one = Said::Output { pipe: Pipe::Stderr, bytes: b"x".to_vec() };
        assert_eq!(data(wire::PIPE_STDERR, 1), Some(one));
        assert_eq!(data(wire::PIPE_STDOUT, 0), None);
        assert_eq!(data(wire::PIPE_STDOUT, wire::STREAM_BYTES_MAX + 1), None);
        assert_eq!(data(wire::PIPE_STDIN, 1), None);
    }

    #[test]
    fn an_end_keeps_its_words_printable() {
        let mut payload = wire::END_FAILED.to_le_bytes().to_vec();
        payload.extend_from_slice(b"\0\0\0\0no\x1bspace");
        let said = Said::decode(&Frame { kind: wire::KIND_END, status: 0, id: 1, payload });
        assert_eq!(said, Some(Said::End(End::Failed("no space".into()))));
    }
}
