//! Rules of others on this host that drop what guests in slots send and are sent: found, and told with what lets it through. A packet is
//! forwarded only if every table lets it; ours cannot speak for the others. iptables has two kinds: one keeps its rules in tables of nftables, the
//! older one, `legacy`, beside them, apart for IPv4 and IPv6.
//!
//! Docker is the usual one: it gives the chain FORWARD the policy *drop*, and the chain DOCKER-USER to those who want exceptions.
//!
//! Facts: nft(8), iptables-nft(8); docs.docker.com, "Packet filtering and firewalls". Rules of nft's with nothing but an interface and a verdict
//! are ones that iptables-nft understands.

use std::fs;

use super::error::SlotError;
use super::tools;

/// Tables that are looked at.
const TABLES_MAX: usize = 64;
/// Where Docker wants others' rules.
const DOCKER_USER: &str = "DOCKER-USER";

/// iptables' older kind, which nft does not see: where the kernel lists its tables, and the program.
const LEGACY: [(&str, &str); 2] =
    [("/proc/net/ip_tables_names", "iptables-legacy"), ("/proc/net/ip6_tables_names", "ip6tables-legacy")];

/// Who keeps a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Keeper {
    /// A table of nftables, as `ip filter`.
    Table(String),
    /// One of [`LEGACY`].
    Legacy(&'static str),
}

/// A chain that drops packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Barrier {
    keeper: Keeper,
    chain: String,
    /// Where an exception goes.
    before: String,
}

impl Barrier {
    /// For people.
    pub fn text(&self) -> String {
        match &self.keeper {
            Keeper::Table(table) => {
                format!("the chain {} (table {table}) drops what it does not know", self.chain)
            }
            Keeper::Legacy(program) => {
                format!("the chain {} ({program}) drops what it does not know", self.chain)
            }
        }
    }

    /// Commands that let packets of interfaces pass whose names begin so, one for each direction.
    pub fn remedies(&self, prefix: &str) -> [String; 2] {
        let chain = &self.before;
        match &self.keeper {
            Keeper::Table(table) => ["iifname", "oifname"]
                .map(|which| format!("nft insert rule {table} {chain} {which} \"{prefix}*\" accept")),
            Keeper::Legacy(program) => {
                ["-i", "-o"].map(|which| format!("{program} -I {chain} {which} {prefix}+ -j ACCEPT"))
            }
        }
    }
}

/// What drops packets of interfaces whose names begin so. `own`: the table that is no other's. Blocks.
pub fn find(prefix: &str, own: &str) -> Result<Vec<Barrier>, SlotError> {
    let mut found = Vec::new();
    let mut tables: Vec<String> = Vec::new();
    for chain in forward_chains(&tools::said("nft", &["list", "chains"])?) {
        if chain.table.split_whitespace().nth(1) == Some(own) || tables.len() >= TABLES_MAX {
            continue;
        }
        if !tables.contains(&chain.table) {
            tables.push(chain.table.clone());
        }
        let mut arguments = vec!["list", "table"];
        arguments.extend(chain.table.split_whitespace());
        let rules = tools::said("nft", &arguments)?;
        if (chain.drops || ends_in_drop(&rules, &chain.name)) && !lets_through(&rules, prefix) {
            found.push(chain.barrier(rules.contains(&format!("chain {DOCKER_USER} "))));
        }
    }
    for (names, program) in LEGACY {
        // Looking makes these tables where there are none.
        let tables = fs::read_to_string(names).unwrap_or_default();
        if tables.lines().any(|table| table == "filter") && tools::find(program).is_some() {
            found.extend(legacy_barrier(program, &tools::said(program, &["-S"])?, prefix));
        }
    }
    Ok(found)
}

/// Of what iptables' older kind says of its rules.
fn legacy_barrier(program: &'static str, rules: &str, prefix: &str) -> Option<Barrier> {
    let last = rules.lines().rfind(|line| line.starts_with("-A FORWARD ")).unwrap_or_default();
    let drops = rules.lines().any(|line| line == "-P FORWARD DROP")
        || ["-A FORWARD -j DROP", "-A FORWARD -j REJECT"].iter().any(|end| last.starts_with(end));
    let known = ["-i", "-o"].iter().all(|which| {
        let about = format!(" {which} {prefix}");
        rules.lines().any(|line| line.contains(&about) && line.ends_with("+ -j ACCEPT"))
    });
    (drops && !known).then(|| {
        let docker = rules.lines().any(|line| line == format!("-N {DOCKER_USER}"));
        let before = if docker { DOCKER_USER } else { "FORWARD" };
        Barrier { keeper: Keeper::Legacy(program), chain: "FORWARD".to_owned(), before: before.to_owned() }
    })
}

/// A base chain that forwarded packets pass.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    table: String,
    name: String,
    /// Its policy.
    drops: bool,
}

impl Chain {
    fn barrier(self, docker: bool) -> Barrier {
        let before = if docker { DOCKER_USER.to_owned() } else { self.name.clone() };
        Barrier { keeper: Keeper::Table(self.table), chain: self.name, before }
    }
}

/// Of what `nft list chains` says.
fn forward_chains(text: &str) -> Vec<Chain> {
    let (mut table, mut name, mut found) = ("", "", Vec::new());
    for line in text.lines().map(str::trim) {
        let named = |what| line.strip_prefix(what).and_then(|rest: &str| rest.strip_suffix(" {"));
        if let Some(of) = named("table ") {
            table = of;
        } else if let Some(of) = named("chain ") {
            name = of;
        } else if line.starts_with("type filter hook forward ") {
            let drops = line.contains("policy drop");
            found.push(Chain { table: table.to_owned(), name: name.to_owned(), drops });
        }
    }
    found
}

/// Whether a chain's last rule is one that nothing passes: of what `nft list table` says.
fn ends_in_drop(rules: &str, chain: &str) -> bool {
    let begin = format!("chain {chain} {{");
    let inside = rules.lines().map(str::trim).skip_while(|line| *line != begin).skip(1);
    let last = inside.take_while(|line| *line != "}").last().unwrap_or_default();
    let verdict = match last.strip_prefix("counter packets ") {
        Some(counted) => counted.splitn(4, ' ').nth(3).unwrap_or_default(),
        None => last,
    };
    ["drop", "reject"].contains(&verdict.split_whitespace().next().unwrap_or_default())
}

/// Whether there are rules about these interfaces, both ways.
fn lets_through(rules: &str, prefix: &str) -> bool {
    ["iifname", "oifname"].iter().all(|which| {
        let about = format!("{which} \"{prefix}");
        rules.lines().any(|line| line.contains(&about) && line.trim_end().ends_with("accept"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAINS: &str = "table inet coldspark_0a1b2c {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n}\n\
        table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\tchain DOCKER-USER {\n\t}\n}\n\
        table ip nat {\n\tchain POSTROUTING {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n\t}\n}\n";

    #[test]
    fn chains_that_forwarded_packets_pass_are_found() {
        let chain = |table: &str, name: &str, drops| Chain { table: table.into(), name: name.into(), drops };
        let found = forward_chains(CHAINS);
        assert_eq!(
            found,
            [chain("inet coldspark_0a1b2c", "forward", false), chain("ip filter", "FORWARD", true)]
        );
        assert!(forward_chains("table {\ntype filter hook\n}}}").is_empty());
        let docker = chain("ip filter", "FORWARD", true).barrier(true);
        assert_eq!(
            docker.remedies("cs0a1b2cn")[1],
            "nft insert rule ip filter DOCKER-USER oifname \"cs0a1b2cn*\" accept"
        );
        assert!(
            chain("ip6 filter", "FORWARD", true).barrier(false).remedies("cs")[0]
                .contains("ip6 filter FORWARD")
        );
    }

    #[test]
    fn what_drops_and_what_lets_through_is_told_apart() {
        let rules = |last: &str| {
            format!(
                "table ip filter {{\n\tchain OTHER {{\n\t\tdrop\n\t}}\n\n\tchain FORWARD {{\n\t\ttype filter hook forward priority filter; policy accept;\n\t\t{last}\n\t}}\n}}\n"
            )
        };
        for last in ["drop", "reject with icmp port-unreachable", "counter packets 1 bytes 60 drop"] {
            assert!(ends_in_drop(&rules(last), "FORWARD"), "{last}");
        }
        for last in ["accept", "iifname \"eth0\" drop", "counter packets 1 bytes 60 accept", "jump OTHER"] {
            assert!(!ends_in_drop(&rules(last), "FORWARD"), "{last}");
        }
        let both = "iifname \"cs0a1b2cn*\" counter packets 0 bytes 0 accept\noifname \"cs0a1b2cn*\" accept\n";
        assert!(lets_through(both, "cs0a1b2cn") && lets_through(both, "cs"));
        assert!(!lets_through(both, "cs111111n") && !lets_through(&both[..60], "cs0a1b2cn"));
    }

    #[test]
    fn rules_of_the_older_kind_are_read() {
        const DOCKER: &str = "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N DOCKER\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n\
            -A FORWARD -o docker0 -j DOCKER\n-A DOCKER-USER -j RETURN\n";
        let found = legacy_barrier("ip6tables-legacy", DOCKER, "cs0a1b2cn").unwrap();
        assert_eq!(
            found.remedies("cs0a1b2cn"),
            ["-i", "-o"].map(|which| format!("ip6tables-legacy -I DOCKER-USER {which} cs0a1b2cn+ -j ACCEPT"))
        );
        let mended = format!(
            "{DOCKER}-A DOCKER-USER -i cs0a1b2cn+ -j ACCEPT\n-A DOCKER-USER -o cs0a1b2cn+ -j ACCEPT\n"
        );
        assert_eq!(legacy_barrier("iptables-legacy", &mended, "cs0a1b2cn"), None);
        // As `doctor` asks, which knows no service.
        assert_eq!(legacy_barrier("iptables-legacy", &mended, "cs"), None);
        assert!(legacy_barrier("iptables-legacy", &mended, "cs111111n").is_some());
        let firewall = "-P FORWARD ACCEPT\n-A FORWARD -i eth0 -j ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n";
        let found = legacy_barrier("iptables-legacy", firewall, "cs").unwrap();
        assert_eq!(found.remedies("cs")[0], "iptables-legacy -I FORWARD -i cs+ -j ACCEPT");
        assert_eq!(legacy_barrier("iptables-legacy", "-P FORWARD ACCEPT\n", "cs"), None);
    }
}
