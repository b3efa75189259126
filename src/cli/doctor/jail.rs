//! Which layers the jail of workers has here: a worker is started, as the service does it, and tells.

use super::Finding;
use crate::fleet::process::WorkerProgram;
use crate::fleet::{Jail, JailMode, jail};

const NAME: &str = "jail";

pub fn check() -> Finding {
    match ask() {
        Ok(jail) => found(&jail),
        Err(error) => Finding::warn(
            NAME,
            format!("no worker could be asked: {error:#}"),
            "put right what fails above; `coldspark serve` tells the layers in its log, too",
        ),
    }
}

fn ask() -> anyhow::Result<Jail> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    // Whether it may have a VM is told by the other checks.
    let (_, jail) = runtime.block_on(jail::probe(WorkerProgram::jailed(JailMode::Best)))?;
    Ok(jail)
}

fn found(jail: &Jail) -> Finding {
    if jail.missing.is_empty() {
        return Finding::ok(NAME, format!("workers have all layers: {}", jail.names()));
    }
    let missing: Vec<String> =
        jail.missing.iter().map(|(layer, why)| format!("{} ({why})", layer.name())).collect();
    Finding::warn(
        NAME,
        format!("workers have {}; they lack {}", jail.names(), missing.join(", ")),
        "docs/security.md tells what each layer is for, and what it needs; --jail required refuses to serve without one that is needed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Level;
    use crate::fleet::Layer;

    #[test]
    fn what_is_missing_is_told_with_its_reason() {
        let whole = Jail { active: Layer::ALL.to_vec(), missing: Vec::new() };
        assert_eq!(found(&whole).level, Level::Ok);
        let part = Jail { active: vec![Layer::SystemCalls], missing: vec![(Layer::User, "not root".into())] };
        let finding = found(&part);
        assert_eq!(finding.level, Level::Warn);
        assert!(finding.found.contains("lack user (not root)"), "{}", finding.found);
    }
}
