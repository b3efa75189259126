//! Rules, tokens and certificates as they were last read, and the decision about each request.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tonic::Status;
use tonic::codegen::http::header::AUTHORIZATION;
use tonic::codegen::http::{HeaderMap, HeaderValue};

use super::methods;
use super::rules::{Rule, Rules, SocketFor};
use super::tls::{self, CertificateNames, TlsFiles};
use super::tokens::{Found, Tokens};
use super::{AuthError, Caller, Role};
use crate::api::status::{denied, no_method, unauthenticated};

/// Where everything is read from.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    pub allow: Vec<Rule>,
    pub tokens: Option<PathBuf>,
    /// `None`: nobody is listened to by TLS.
    pub tls: Option<TlsFiles>,
}

/// The service's judgement. Shared by all connections; [`Guard::reload`] changes it under way.
#[derive(Debug)]
pub struct Guard {
    policy: Policy,
    own_uid: u32,
    read: RwLock<Arc<Read>>,
    /// One reload after the other: the last one asked for is the one that stays.
    reloading: Mutex<()>,
}

/// What was read.
#[derive(Debug)]
struct Read {
    rules: Rules,
    tokens: Option<Tokens>,
    tls: Option<Arc<ServerConfig>>,
}

impl Guard {
    /// Reads everything; blocks on the disk.
    pub fn new(policy: Policy) -> Result<Arc<Self>, AuthError> {
        let read = RwLock::new(Arc::new(Read::new(&policy)?));
        let own_uid = rustix::process::geteuid().as_raw();
        Ok(Arc::new(Self { policy, own_uid, read, reloading: Mutex::new(()) }))
    }

    /// Reads everything again. If anything is wrong, all stays as it was. Roles that connections have stay with them; tokens are
    /// looked up at each request. Blocks on the disk.
    pub fn reload(&self) -> Result<(), AuthError> {
        let _alone = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let read = Arc::new(Read::new(&self.policy)?);
        *self.read.write().unwrap_or_else(PoisonError::into_inner) = read;
        Ok(())
    }

    fn read(&self) -> Arc<Read> {
        Arc::clone(&self.read.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// For the next TLS handshake.
    pub fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.read().tls.clone()
    }

    pub fn socket_for(&self) -> SocketFor {
        self.read().rules.socket_for()
    }

    /// The program at the other end of a Unix connection.
    pub fn peer(&self, uid: u32, groups: &[u32]) -> Caller {
        Caller::new(format!("user {uid}"), self.read().rules.of_peer(uid, groups, self.own_uid))
    }

    /// The client of a TLS connection, by its certificate if it has shown one.
    pub fn tls_client(&self, certificate: Option<&CertificateDer<'_>>) -> Caller {
        match certificate {
            None => Caller::new("a caller without a certificate", None),
            Some(certificate) => {
                let names = CertificateNames::of(certificate);
                // Chosen by the client, within what its CA signs.
                let name: String = names.one().chars().filter(|c| !c.is_control()).take(100).collect();
                Caller::new(format!("certificate {name}"), self.read().rules.of_certificate(&names))
            }
        }
    }

    /// Whether `caller` may make this request, and with which role it is made.
    pub fn check(&self, caller: &Caller, headers: &HeaderMap, path: &str) -> Result<Role, Status> {
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let role = match (given.next(), given.next()) {
            (Some(value), None) => Some(self.of_token(value)?),
            (Some(_), Some(_)) => return Err(unauthenticated("more than one authorization header")),
            (None, _) => caller.role(),
        };
        let Some(needed) = methods::role_of(path) else {
            // Here, and not by the router: a method that is not in the table is nobody's to call. Strangers are not told.
            return Err(role.map_or_else(|| self.stranger(caller), |_| no_method(path)));
        };
        match role {
            Some(role) if role >= needed => {
                caller.prove();
                Ok(role)
            }
            Some(role) => Err(denied(format!(
                "{} needs the role {needed}, and {} has {role}; use another token or certificate, or ask the service's admin",
                path.rsplit('/').next().unwrap_or(path),
                if headers.contains_key(AUTHORIZATION) { "this token" } else { caller.who() },
            ))),
            None => Err(self.stranger(caller)),
        }
    }

    fn of_token(&self, value: &HeaderValue) -> Result<Role, Status> {
        let read = self.read();
        let Some(tokens) = &read.tokens else {
            return Err(unauthenticated("this service takes no tokens: it was started without --tokens"));
        };
        let token = value.to_str().ok().and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let Some(token) = token else {
            return Err(unauthenticated("the authorization header is not `Bearer TOKEN`"));
        };
        match tokens.find(token, SystemTime::now()) {
            Found::Good(entry) => Ok(entry.role),
            Found::Expired(entry) => {
                tracing::info!(token = entry.name, "a token that has expired was used");
                Err(unauthenticated(format!(
                    "the token {} has expired; ask the service's admin for a new one",
                    entry.name
                )))
            }
            Found::Unknown => Err(unauthenticated(
                "the service does not know this token; was it cut, or withdrawn? `coldspark token new` makes one",
            )),
        }
    }

    /// Somebody who has no role at all.
    fn stranger(&self, caller: &Caller) -> Status {
        let read = self.read();
        let who = caller.who();
        if who.starts_with("user ") {
            return denied(format!(
                "{who} may not use this service; its admin lets users and groups in with `coldspark serve --allow group:NAME=run`"
            ));
        }
        if who.starts_with("certificate ") {
            return denied(format!(
                "no rule of the service names this {who}; its admin adds one: `coldspark serve --allow cn:NAME=run`"
            ));
        }
        unauthenticated(if read.tokens.is_some() {
            "a bearer token is needed: --token-file FILE, or COLDSPARK_TOKEN"
        } else {
            "a client certificate is needed: --cert FILE --key FILE"
        })
    }
}

impl Read {
    fn new(policy: &Policy) -> Result<Self, AuthError> {
        let rules = Rules::new(&policy.allow)?;
        let tokens = policy.tokens.as_deref().map(Tokens::read).transpose()?;
        let tls = match &policy.tls {
            None => None,
            Some(files) => {
                if files.client_ca.is_some() && !rules.name_certificates() {
                    return Err(AuthError::Settings(
                        "--client-ca without a rule for certificates lets nobody in: add --allow cn:NAME=ROLE, dns:, uri: or cert:any"
                            .into(),
                    ));
                }
                if files.client_ca.is_none() && tokens.is_none() {
                    return Err(AuthError::Settings(
                        "TLS alone tells nobody apart: add --tokens FILE (`coldspark token new`), or --client-ca FILE with --allow"
                            .into(),
                    ));
                }
                Some(tls::server_config(files, tokens.is_none())?)
            }
        };
        Ok(Self { rules, tokens, tls })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tonic::Code;

    use super::super::tokens;
    use super::*;

    const CREATE: &str = "/coldspark.v1.VmService/CreateVm";
    const LIST: &str = "/coldspark.v1.VmService/ListVms";

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().expect("a value"));
        }
        headers
    }

    #[test]
    fn a_token_decides_over_the_connection_and_is_read_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokens");
        let made = tokens::make(Role::Read, "ci", None, SystemTime::now()).expect("a token");
        fs::write(&path, &made.line).expect("written");
        let guard = Guard::new(Policy { tokens: Some(path.clone()), ..Policy::default() }).expect("a guard");
        let bearer = headers(&[&format!("Bearer {}", made.token)]);
        let (admin, stranger) = (Caller::new("user 0", Some(Role::Admin)), Caller::new("somebody", None));

        assert_eq!(guard.check(&admin, &headers(&[]), CREATE).expect("allowed"), Role::Admin);
        assert!(!stranger.is_proven());
        assert_eq!(guard.check(&stranger, &bearer, LIST).expect("allowed"), Role::Read);
        assert!(stranger.is_proven());
        let denied = guard.check(&admin, &bearer, CREATE).expect_err("the token only reads");
        assert_eq!(denied.code(), Code::PermissionDenied);
        for path in ["/coldspark.v1.VmService/NotInTheTable", "", "/x"] {
            let unknown = guard.check(&admin, &headers(&[]), path).expect_err("no such method");
            assert_eq!(unknown.code(), Code::Unimplemented, "{path}");
        }
        assert!(denied.message().contains("CreateVm needs the role run"), "{denied}");

        // Another role, while the connection lives.
        fs::write(&path, made.line.replacen("read", "run", 1)).expect("written");
        guard.reload().expect("read again");
        guard.check(&stranger, &bearer, CREATE).expect("the token runs now");
        // A broken file changes nothing.
        fs::write(&path, "garbage").expect("written");
        guard.reload().expect_err("a bad file");
        guard.check(&stranger, &bearer, CREATE).expect("as before");
        fs::write(&path, "").expect("written");
        guard.reload().expect("an empty file");
        let gone = guard.check(&stranger, &bearer, LIST).expect_err("withdrawn");
        assert_eq!(gone.code(), Code::Unauthenticated);
    }

    #[test]
    fn strangers_learn_what_to_do_and_nothing_else() {
        let guard = Guard::new(Policy::default()).expect("a guard");
        let code = |caller: &Caller, values: &[&str], path: &str| {
            guard.check(caller, &headers(values), path).expect_err("refused").code()
        };
        let peer = guard.peer(guard.own_uid.wrapping_add(4_000), &[7]);
        for path in [LIST, "/no.Such/Method", ""] {
            assert_eq!(code(&peer, &[], path), Code::PermissionDenied);
        }
        let nobody = guard.tls_client(None);
        assert_eq!(code(&nobody, &[], LIST), Code::Unauthenticated);
        for values in [&["Bearer x"][..], &["Basic eDp5"], &["Bearer"], &["Bearer a", "Bearer a"]] {
            assert_eq!(code(&nobody, values, LIST), Code::Unauthenticated, "{values:?}");
        }
        assert!(!nobody.is_proven() && !peer.is_proven());
    }
}
