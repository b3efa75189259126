//! What commands print: text that survives a closed stdout, tables, and errors of one line.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use crate::api::client;

/// Prints to stdout. The error of a closed stdout ends the command quietly (see [`failed`]).
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints a line to stdout.
pub fn line(text: &str) -> io::Result<()> {
    print(&format!("{text}\n"))
}

/// Prints one JSON value, indented.
pub fn json(value: &Value) -> io::Result<()> {
    line(&format!("{value:#}"))
}

/// Says something on stderr, if there is one.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Shows guest output on stderr as it is.
pub fn note_bytes(bytes: &[u8]) {
    let mut err = io::stderr().lock();
    let _ = err.write_all(bytes).and_then(|()| err.flush());
}

/// Tells an error in one line (and those that a message brings) and gives the exit code.
pub fn failed(error: &anyhow::Error) -> ExitCode {
    if is_closed_stdout(error) {
        return ExitCode::SUCCESS;
    }
    let text = match error.downcast_ref::<tonic::Status>() {
        Some(status) => client::connection_lost(status)
            .unwrap_or_else(|| format!("{} ({})", status.message(), code_name(status.code()))),
        None => format!("{error:#}"),
    };
    note(&format!("error: {}", shown(&text)));
    ExitCode::FAILURE
}

/// Whether our reader has gone away. A service that has gone away is a broken pipe too, and is told.
fn is_closed_stdout(error: &anyhow::Error) -> bool {
    let of_the_service = |cause: &&(dyn std::error::Error + 'static)| {
        cause.is::<tonic::Status>() || cause.is::<tonic::transport::Error>()
    };
    let own = error.chain().take_while(|cause| !of_the_service(cause));
    own.filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Text as it may be shown on a terminal: part of it may come from a guest.
pub fn shown(text: &str) -> String {
    text.replace(|c: char| c.is_control() && !matches!(c, '\n' | '\t'), "?")
}

/// A gRPC code as the documentation spells it.
pub fn code_name(code: tonic::Code) -> String {
    let mut name = String::new();
    for (n, c) in format!("{code:?}").chars().enumerate() {
        if n > 0 && c.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, Args)]
pub struct Shape {
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Print ids (or names, where there are no ids) only, one per line
    #[arg(short, long)]
    pub quiet: bool,
}

/// Prints one of each line.
pub fn lines<'a>(lines: impl IntoIterator<Item = &'a str>) -> io::Result<()> {
    lines.into_iter().try_for_each(line)
}

/// A table: one row per line, columns padded, no borders.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| cell.replace(char::is_control, "?")).collect());
    }

    /// The table as lines.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |n: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(n));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["ID", "STATE"]);
        table.row(["vm-1".into(), "READY".into()]);
        assert_eq!(table.text(), "ID    STATE\nvm-1  READY\n");
        table.row(["\x1b[2J\n".into()]);
        assert_eq!(table.text(), "ID     STATE\nvm-1   READY\n?[2J?\n");
        assert_eq!(shown("a\n\tb\x1b\u{9b}\r"), "a\n\tb???");
    }

    #[test]
    fn a_closed_stdout_is_no_failure_and_a_service_that_is_gone_is() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        let stdout = anyhow::Error::from(broken()).context("cannot print");
        assert!(is_closed_stdout(&stdout));
        let service = anyhow::Error::from(tonic::Status::from_error(Box::new(broken())));
        assert!(std::error::Error::source(service.downcast_ref::<tonic::Status>().unwrap()).is_some());
        assert!(!is_closed_stdout(&service) && !is_closed_stdout(&service.context("cannot delete it")));
        assert!(!is_closed_stdout(&anyhow::anyhow!("another")));
    }

    #[test]
    fn codes_are_spelled_as_in_the_documentation() {
        assert_eq!(code_name(tonic::Code::FailedPrecondition), "FAILED_PRECONDITION");
        assert_eq!(code_name(tonic::Code::NotFound), "NOT_FOUND");
    }
}
