//! `--allow`: who has which role by what the connection shows.
//!
//! `WHO=ROLE`, where WHO is one of
//!
//! * `user:NAME-OR-UID`, `group:NAME-OR-GID`: a program of this host, on the Unix socket;
//! * `cn:NAME`, `dns:NAME`, `uri:NAME`: a TLS client whose certificate has it as its subject's common name, or among its
//!   alternative names; `cert:any`: every certificate of the client CA.
//!
//! Whoever several rules name has the highest of their roles. The service's own user and root need no rule.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::str::FromStr;

use super::tls::CertificateNames;
use super::{AuthError, Role};

/// One line of `--allow`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    who: Who,
    role: Role,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    User(String),
    Group(String),
    CommonName(String),
    Dns(String),
    Uri(String),
    AnyCertificate,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str =
            "WHO=ROLE with WHO one of user:NAME, group:NAME, cn:NAME, dns:NAME, uri:NAME, cert:any";
        // A URI may have an `=`, a role has none.
        let (who, role) = text.rsplit_once('=').ok_or_else(|| format!("{text:?} is not {FORM}"))?;
        let role = role.parse()?;
        let (kind, name) = who.split_once(':').ok_or_else(|| format!("{text:?} is not {FORM}"))?;
        if name.is_empty() || name.contains('\0') {
            return Err(format!("{text:?} names nobody"));
        }
        let name = name.to_owned();
        let who = match kind {
            "user" => Who::User(name),
            "group" => Who::Group(name),
            "cn" => Who::CommonName(name),
            "dns" => Who::Dns(name.to_ascii_lowercase()),
            "uri" => Who::Uri(name),
            "cert" if name == "any" => Who::AnyCertificate,
            _ => return Err(format!("{text:?} is not {FORM}")),
        };
        Ok(Self { who, role })
    }
}

/// All rules, with users and groups looked up.
#[derive(Debug, Default)]
pub struct Rules {
    users: Vec<(u32, Role)>,
    groups: Vec<(u32, Role)>,
    certificates: Vec<(Who, Role)>,
}

impl Rules {
    pub fn new(rules: &[Rule]) -> Result<Self, AuthError> {
        let mut all = Self::default();
        for Rule { who, role } in rules {
            match who {
                Who::User(name) => all.users.push((number("user", name, user_id)?, *role)),
                Who::Group(name) => all.groups.push((number("group", name, group_id)?, *role)),
                _ => all.certificates.push((who.clone(), *role)),
            }
        }
        Ok(all)
    }

    /// Of a program of this host. `own`: the user that the service runs as.
    pub fn of_peer(&self, uid: u32, groups: &[u32], own: u32) -> Option<Role> {
        if uid == own || uid == 0 {
            return Some(Role::Admin);
        }
        let by_user = self.users.iter().filter(|(user, _)| *user == uid);
        let by_group = self.groups.iter().filter(|(group, _)| groups.contains(group));
        by_user.chain(by_group).map(|(_, role)| *role).max()
    }

    /// Of a certificate that the client CA has signed.
    pub fn of_certificate(&self, names: &CertificateNames) -> Option<Role> {
        let matches = |who: &Who| match who {
            Who::CommonName(name) => names.common_names.contains(name),
            Who::Dns(name) => names.dns.contains(name),
            Who::Uri(name) => names.uris.contains(name),
            Who::AnyCertificate => true,
            Who::User(_) | Who::Group(_) => false,
        };
        self.certificates.iter().filter(|(who, _)| matches(who)).map(|(_, role)| *role).max()
    }

    pub fn name_certificates(&self) -> bool {
        !self.certificates.is_empty()
    }

    /// Who must be able to reach the socket besides the service's own user.
    pub fn socket_for(&self) -> SocketFor {
        match (&self.users[..], &self.groups[..]) {
            ([], []) => SocketFor::Owner,
            ([], [(first, _), rest @ ..]) if rest.iter().all(|(group, _)| group == first) => {
                SocketFor::Group(*first)
            }
            _ => SocketFor::Everybody,
        }
    }
}

/// What the socket's mode has to let through; who is let in is decided by the peer's credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketFor {
    /// 0600.
    Owner,
    /// 0660, and the socket's group is this.
    Group(u32),
    /// 0666.
    Everybody,
}

fn number(kind: &str, name: &str, look_up: fn(&CStr) -> Option<u32>) -> Result<u32, AuthError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let found = CString::new(name).ok().and_then(|name| look_up(&name));
    found.ok_or_else(|| AuthError::Rule {
        rule: format!("{kind}:{name}"),
        reason: format!(
            "this host has no such {kind}; `getent {}` lists them",
            if kind == "user" { "passwd" } else { "group" }
        ),
    })
}

/// Longest entry of the host's databases that is read: groups have many members.
const ENTRY_BYTES: usize = 256 << 10;

fn user_id(name: &CStr) -> Option<u32> {
    let mut buffer = vec![0; ENTRY_BYTES];
    // SAFETY: all zeros is a valid passwd: numbers and null pointers.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are valid for the call, the buffer's length is its own.
    unsafe { libc::getpwnam_r(name.as_ptr(), &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    (!found.is_null()).then_some(entry.pw_uid)
}

fn group_id(name: &CStr) -> Option<u32> {
    let mut buffer = vec![0; ENTRY_BYTES];
    // SAFETY: all zeros is a valid group: numbers and null pointers.
    let mut entry: libc::group = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are valid for the call, the buffer's length is its own.
    unsafe { libc::getgrnam_r(name.as_ptr(), &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    (!found.is_null()).then_some(entry.gr_gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Rules {
        let parsed: Vec<Rule> = texts.iter().map(|text| text.parse().expect(text)).collect();
        Rules::new(&parsed).expect("rules")
    }

    #[test]
    fn the_service_s_user_and_root_are_admins_and_others_what_rules_say() {
        let rules = rules(&["user:1001=read", "group:50=run", "group:51=admin"]);
        assert_eq!(rules.of_peer(7, &[7], 7), Some(Role::Admin));
        assert_eq!(rules.of_peer(0, &[], 7), Some(Role::Admin));
        assert_eq!(rules.of_peer(8, &[8, 9], 7), None);
        assert_eq!(rules.of_peer(1001, &[1001], 7), Some(Role::Read));
        assert_eq!(rules.of_peer(1001, &[50], 7), Some(Role::Run), "the highest");
        assert_eq!(rules.of_peer(8, &[50, 51], 7), Some(Role::Admin));
    }

    #[test]
    fn names_of_users_and_groups_are_looked_up() {
        assert_eq!(rules(&["user:root=read"]).users, [(0, Role::Read)]);
        assert_eq!(rules(&["group:root=read"]).groups, [(0, Role::Read)]);
        let missing = Rules::new(&["group:no-such-group-here=run".parse().expect("a rule")]);
        let text = missing.expect_err("no such group").to_string();
        assert!(text.contains("no-such-group-here") && text.contains("getent group"), "{text}");
    }

    #[test]
    fn certificates_are_matched_by_the_kind_of_name() {
        let rules = rules(&["cn:ops=admin", "dns:CI.example.org=run", "uri:spiffe://x/a=b=read"]);
        let names = |cn: &str, dns: &str, uri: &str| CertificateNames {
            common_names: vec![cn.into()],
            dns: vec![dns.into()],
            uris: vec![uri.into()],
        };
        assert_eq!(rules.of_certificate(&names("ops", "", "")), Some(Role::Admin));
        assert_eq!(rules.of_certificate(&names("x", "ci.example.org", "")), Some(Role::Run));
        assert_eq!(rules.of_certificate(&names("x", "", "spiffe://x/a=b")), Some(Role::Read));
        assert_eq!(rules.of_certificate(&names("ci.example.org", "ops", "ops")), None);
        assert_eq!(rules.of_peer(1, &[], 7), None);
    }

    #[test]
    fn the_socket_is_open_only_as_far_as_rules_need() {
        assert_eq!(rules(&["cn:a=run"]).socket_for(), SocketFor::Owner);
        assert_eq!(rules(&["group:50=run", "group:50=read"]).socket_for(), SocketFor::Group(50));
        assert_eq!(rules(&["group:50=run", "group:51=run"]).socket_for(), SocketFor::Everybody);
        assert_eq!(rules(&["user:50=run"]).socket_for(), SocketFor::Everybody);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in ["", "alice", "user:alice", "user:=run", "user:alice=root", "cert:x=run", "host:a=run"] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
