//! Who may call what.
//!
//! | module | what it holds |
//! |---|---|
//! | [`methods`] | the role that each method needs: the one table |
//! | [`rules`] | `--allow`: which users, groups and certificates have which role |
//! | [`tokens`] | the token file |
//! | [`tls`] | the service's certificate, and the names in those of callers |
//! | [`guard`] | all of these as they were last read, and the decision |
//! | [`layer`] | where every request meets the guard |
//!
//! A caller's role comes from its connection (a Unix peer's user and groups, a TLS client's certificate) and is decided when the
//! connection begins. A request that brings a bearer token has the token's role instead, decided each time.

pub mod guard;
pub mod layer;
pub mod methods;
pub mod rules;
pub mod tls;
pub mod tokens;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a caller may do; each may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// Look: lists, descriptions, figures.
    Read,
    /// Make, use and end VMs and snapshots.
    Run,
    /// Everything: also what others depend on, such as images and pools, and files of the host.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "read" => Ok(Self::Read),
            "run" => Ok(Self::Run),
            "admin" => Ok(Self::Admin),
            _ => Err(format!("{text:?} is no role; there are read, run and admin")),
        }
    }
}

/// Who is at the other end of a connection. Goes with every request of it.
#[derive(Debug, Clone)]
pub struct Caller(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// For logs and refusals: `user alice (1000)`, `certificate ci`.
    who: String,
    role: Option<Role>,
    proven: AtomicBool,
}

impl Caller {
    pub fn new(who: impl Into<String>, role: Option<Role>) -> Self {
        Self(Arc::new(Inner { who: who.into(), role, proven: AtomicBool::new(role.is_some()) }))
    }

    pub fn who(&self) -> &str {
        &self.0.who
    }

    /// What the connection alone allows.
    pub fn role(&self) -> Option<Role> {
        self.0.role
    }

    /// A request on this connection was allowed: it may stay. One that has a role of its own may from the beginning.
    fn prove(&self) {
        self.0.proven.store(true, Ordering::Relaxed);
    }

    pub fn is_proven(&self) -> bool {
        self.0.proven.load(Ordering::Relaxed)
    }
}

/// Why the service's rules, tokens or certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{}, line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
    #[error("--allow {rule}: {reason}")]
    Rule { rule: String, reason: String },
    #[error("{0}")]
    Settings(String),
}

impl AuthError {
    fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }
}
