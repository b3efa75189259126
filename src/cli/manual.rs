//! `coldspark completions`, `coldspark man`: made from the command line's own definition.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;

use super::{Cli, output};

pub fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "coldspark", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

pub fn pages(folder: &Path) -> anyhow::Result<ExitCode> {
    fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .with_context(|| format!("cannot write manual pages to {}", folder.display()))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let folder = tempfile::tempdir().expect("a folder");
        pages(folder.path()).expect("pages");
        for name in ["coldspark.1", "coldspark-serve.1", "coldspark-vm-clone.1", "coldspark-config-check.1"] {
            let page = fs::read_to_string(folder.path().join(name)).expect(name);
            assert!(page.contains(".SH"), "{name}");
        }
    }
}
