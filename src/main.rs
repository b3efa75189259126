//! The program `coldspark`: parse the command line, hand over.

use std::process::ExitCode;

fn main() -> ExitCode {
    coldspark::cli::main()
}
