//! The service's configuration file, and `coldspark config`.
//!
//! The one table of settings is the command line of `coldspark serve`: each of its flags is a key of the file by the same name
//! without the dashes. So help, example and checks are the same for flag, environment and file. What the file says takes the place of
//! clap's defaults, which gives the order: flag, environment, file, default.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::builder::Resettable;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Subcommand};
use serde_json::json;
use toml::de::{DeTable, DeValue};

use super::output::{self, Table};
use super::{Cli, serve};

/// Read if it is there and no other is named.
const USUAL_FILE: &str = "/etc/coldspark/coldspark.toml";
const FILE_BYTES_MAX: u64 = 1 << 20;
/// What each setting needs at most from a misspelt key to be proposed.
const LIKENESS_MIN: f64 = 0.7;
/// Arguments of `serve` that are no settings.
const NO_SETTINGS: [&str; 3] = ["config", "help", "version"];

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read a configuration file as the service would, and the certificates and tokens that it names.
    #[command(after_help = "Examples:
  coldspark config check
  coldspark config check coldspark.toml

Exit code 1 if anything is wrong: with file, line and key.")]
    Check {
        /// [default: COLDSPARK_CONFIG, or /etc/coldspark/coldspark.toml]
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// What `coldspark serve` with the same flags would run with, and where each value comes from.
    #[command(after_help = "Example:\n  coldspark config show --config coldspark.toml --shells 8")]
    Show {
        #[command(flatten)]
        serve: Box<serve::Arguments>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print a configuration file with every setting, what it means and its default, commented out.
    #[command(after_help = "Example:\n  coldspark config example > /etc/coldspark/coldspark.toml")]
    Example,
}

/// Which file.
#[derive(Debug, Args)]
pub struct ConfigArgument {
    /// Configuration file [default: /etc/coldspark/coldspark.toml if it is there]. `coldspark config example` prints one
    #[arg(long, env = "COLDSPARK_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// One `key = value` of a file, as its flag would be given.
#[derive(Debug, PartialEq, Eq)]
struct Given {
    key: String,
    line: usize,
    values: Vec<String>,
}

/// A file that was read and checked, key by key.
#[derive(Debug)]
struct File {
    path: PathBuf,
    given: Vec<Given>,
}

/// The arguments of `coldspark serve`, with what the file says.
pub fn with_file() -> anyhow::Result<serve::Arguments> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let matches = Cli::command().get_matches_from(&words);
    let found = matches.subcommand_matches("serve").context("no `serve`")?;
    let Some(file) = File::of(found)? else { return Ok(serve::Arguments::from_arg_matches(found)?) };
    let command = Cli::command().mut_subcommand("serve", |serve| file.defaults(serve));
    let matches = command.get_matches_from(&words);
    let found = matches.subcommand_matches("serve").context("no `serve`")?;
    Ok(serve::Arguments::from_arg_matches(found)?)
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check { file } => check(file),
        Command::Show { json, .. } => show(json),
        Command::Example => {
            output::print(&example())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// `serve` alone, with all its arguments.
fn serve_command() -> clap::Command {
    serve::Arguments::augment_args(clap::Command::new("serve").no_binary_name(true))
}

/// The settings, in the order of the help.
fn settings(serve: &clap::Command) -> impl Iterator<Item = (&str, &Arg)> {
    let with_key = |arg| Some((Arg::get_long(arg)?, arg));
    serve.get_arguments().filter_map(with_key).filter(|(key, _)| !NO_SETTINGS.contains(key))
}

impl File {
    /// The file that arguments, environment or custom name, if any.
    fn of(matches: &ArgMatches) -> anyhow::Result<Option<Self>> {
        match matches.get_one::<PathBuf>("config") {
            Some(path) => Self::read(path).map(Some),
            None if Path::new(USUAL_FILE).exists() => Self::read(Path::new(USUAL_FILE)).map(Some),
            None => Ok(None),
        }
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let reading = || -> anyhow::Result<String> {
            anyhow::ensure!(
                fs::metadata(path)?.len() <= FILE_BYTES_MAX,
                "longer than {FILE_BYTES_MAX} bytes"
            );
            Ok(fs::read_to_string(path)?)
        };
        let text =
            reading().with_context(|| format!("cannot read the configuration file {}", path.display()))?;
        match parse(&text) {
            Ok(given) => Ok(Self { path: path.to_owned(), given }),
            Err((line, reason)) => anyhow::bail!("{}, line {line}: {reason}", path.display()),
        }
    }

    /// `serve` with what the file says as its defaults.
    fn defaults(&self, mut serve: clap::Command) -> clap::Command {
        let ids: Vec<_> = settings(&serve).map(|(key, arg)| (key.to_owned(), arg.get_id().clone())).collect();
        for Given { key, values, .. } in &self.given {
            for (_, id) in ids.iter().filter(|(long, _)| long == key) {
                serve = serve.mut_arg(id, |arg| arg.default_values(values.clone()));
            }
        }
        serve
    }

    fn line_of(&self, key: &str) -> Option<usize> {
        self.given.iter().find(|given| given.key == key).map(|given| given.line)
    }
}

/// Reads a file's text; the error is a line, from 1, and what is wrong there.
fn parse(text: &str) -> Result<Vec<Given>, (usize, String)> {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    let table = DeTable::parse(text).map_err(|error| {
        (
            line(error.span().map_or(0, |span| span.start)),
            error.message().lines().collect::<Vec<_>>().join("; "),
        )
    })?;
    let serve = serve_command();
    let mut given = Vec::new();
    for (key, value) in table.get_ref() {
        let at = line(key.span().start);
        let key: &str = key.get_ref();
        let failed = |reason: String| (line(value.span().start), format!("{key}: {reason}"));
        let Some((_, arg)) = settings(&serve).find(|(long, _)| *long == key) else {
            return Err((at, unknown(key, &serve)));
        };
        let many = matches!(arg.get_action(), ArgAction::Append);
        let values = match value.get_ref() {
            DeValue::Array(values) if many => {
                values.iter().map(|value| single(value.get_ref())).collect::<Result<Vec<_>, _>>()
            }
            DeValue::Array(_) => Err("takes one value, not a list".into()),
            value => single(value).map(|value| vec![value]),
        };
        let values = values.map_err(failed)?;
        for value in &values {
            try_value(arg, key, value).map_err(failed)?;
        }
        given.push(Given { key: key.to_owned(), line: at, values });
    }
    given.sort_by_key(|given| given.line);
    Ok(given)
}

fn single(value: &DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().replace('_', "")),
        DeValue::Boolean(value) => Ok(value.to_string()),
        DeValue::Table(_) => Err("is a table; settings are not in tables, write `key = value`".into()),
        DeValue::Array(_) => Err("is a list in a list".into()),
        _ => Err("takes a text, a whole number, true or false".into()),
    }
}

/// Parses one value as its flag would.
fn try_value(arg: &Arg, key: &str, value: &str) -> Result<(), String> {
    // Alone, without what the environment says about it.
    let alone = arg.clone().env(Resettable::<clap::builder::OsStr>::Reset);
    let command = clap::Command::new("serve").no_binary_name(true).arg(alone);
    match command.try_get_matches_from([format!("--{key}={value}")]) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            Err(first.trim_start_matches("error: ").to_owned())
        }
    }
}

fn unknown(key: &str, serve: &clap::Command) -> String {
    let likeness = |other: &str| strsim::jaro_winkler(&key.replace('_', "-"), other);
    let nearest = settings(serve).map(|(other, _)| other).max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|nearest| likeness(nearest) >= LIKENESS_MIN) {
        Some(nearest) => format!("there is no setting {key:?}; did you mean {nearest:?}?"),
        None => format!("there is no setting {key:?}; `coldspark config example` lists them"),
    }
}

fn check(file: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let words: Vec<OsString> = match &file {
        Some(path) => vec!["--config".into(), path.into()],
        None => Vec::new(),
    };
    let matches = serve_command().try_get_matches_from(&words)?;
    let Some(file) = File::of(&matches)? else {
        anyhow::bail!("there is no {USUAL_FILE} and COLDSPARK_CONFIG is not set; name a file");
    };
    let matches = file.defaults(serve_command()).try_get_matches_from(&words)?;
    serve::Arguments::from_arg_matches(&matches)?.check().with_context(|| file.path.display().to_string())?;
    output::line(&format!("{}: good, {} settings", file.path.display(), file.given.len()))?;
    Ok(ExitCode::SUCCESS)
}

fn show(as_json: bool) -> anyhow::Result<ExitCode> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let matches = |command: clap::Command| -> anyhow::Result<ArgMatches> {
        let matches = command.get_matches_from(&words);
        let found = matches.subcommand_matches("config").and_then(|config| config.subcommand_matches("show"));
        found.cloned().context("no `config show`")
    };
    let mut found = matches(Cli::command())?;
    let file = File::of(&found)?;
    if let Some(file) = &file {
        found =
            matches(Cli::command().mut_subcommand("config", |config| {
                config.mut_subcommand("show", |show| file.defaults(show))
            }))?;
    }
    let mut table = Table::new(&["SETTING", "VALUE", "FROM"]);
    let mut all = serde_json::Map::new();
    for (key, arg) in settings(&serve_command()) {
        let id = arg.get_id().as_str();
        let values: Vec<String> = found
            .get_raw(id)
            .into_iter()
            .flatten()
            .map(|value| value.to_string_lossy().into_owned())
            .collect();
        let line = file.as_ref().and_then(|file| Some((file, file.line_of(key)?)));
        let from = match (found.value_source(id), line) {
            (Some(ValueSource::CommandLine), _) => "flag".to_owned(),
            (Some(ValueSource::EnvVariable), _) => {
                arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
            }
            (_, Some((file, line))) => format!("{}:{line}", file.path.display()),
            _ => "default".to_owned(),
        };
        table.row([key.to_owned(), values.join(","), from.clone()]);
        all.insert(key.to_owned(), json!({ "value": values.join(","), "from": from }));
    }
    if as_json {
        output::json(&all.into())?
    } else {
        output::print(&table.text())?
    }
    Ok(ExitCode::SUCCESS)
}

/// A file with every setting.
fn example() -> String {
    let mut text = String::from(
        "# Configuration of `coldspark serve`. Each setting is a flag of it too (--key), and can be set in the environment; the order is\n\
         # flag, environment, this file, default. `coldspark config check FILE` checks it, `coldspark config show` tells what is in force.\n",
    );
    let mut heading = None;
    for (key, arg) in settings(&serve_command()) {
        if arg.get_help_heading() != heading {
            heading = arg.get_help_heading();
            text += &format!("\n## {}\n", heading.unwrap_or("The service"));
        }
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let environment = arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        text += &format!("\n# {help}. Environment: {environment}\n# {key} = {}\n", sample(arg));
    }
    text
}

/// The default, or what a value could look like.
fn sample(arg: &Arg) -> String {
    let default = arg.get_default_values().first().map(|value| value.to_string_lossy().into_owned());
    let value = default.unwrap_or_else(|| sample_of(arg.get_long().unwrap_or_default()).to_owned());
    let bare = value == "true" || value == "false" || value.parse::<u64>().is_ok();
    let value = if bare { value } else { format!("{value:?}") };
    if matches!(arg.get_action(), ArgAction::Append) { format!("[{value}]") } else { value }
}

/// For settings without a default; a test holds that all of them are here, and good.
fn sample_of(key: &str) -> &'static str {
    match key {
        "socket" => "/run/coldspark/coldspark.sock",
        "allow" => "group:coldspark=run",
        "listen" => "0.0.0.0:7443",
        "tls-cert" => "/etc/coldspark/service.crt",
        "tls-key" => "/etc/coldspark/service.key",
        "client-ca" => "/etc/coldspark/clients.pem",
        "tokens" => "/etc/coldspark/tokens",
        "memory-reserve" => "2G",
        "metrics" => "127.0.0.1:9464",
        "sign-key" => "/etc/coldspark/signing.key",
        "trusted-keys" => "/etc/coldspark/trusted-keys",
        "otlp" => "http://127.0.0.1:4318",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_says_nothing_until_its_comments_are_taken_off() {
        let text = example();
        assert_eq!(parse(&text), Ok(Vec::new()));
        let all: String = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) => {
                    format!("{rest}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let given = parse(&all).expect("every setting is good");
        let keys: Vec<&str> = given.iter().map(|given| given.key.as_str()).collect();
        let serve = serve_command();
        let settings: Vec<&str> = settings(&serve).map(|(key, _)| key).collect();
        assert_eq!(keys, settings);
        assert!(given.iter().all(|given| given.values.iter().all(|value| !value.is_empty())), "{given:?}");
    }

    #[test]
    fn every_setting_has_an_environment_variable_and_a_description() {
        for (key, arg) in settings(&serve_command()) {
            let name = arg.get_env().and_then(|name| name.to_str()).unwrap_or_default();
            assert!(name.starts_with("COLDSPARK_"), "{key}: {name}");
            assert!(arg.get_help().is_some(), "{key}");
        }
    }

    #[test]
    fn errors_name_line_and_key() {
        for (text, line, words) in [
            ("shells = 4\nshels = 5\n", 2, "no setting \"shels\"; did you mean \"shells\""),
            ("data_dir = \"/x\"", 1, "did you mean \"data-dir\""),
            ("quux = 1", 1, "config example"),
            ("\nshells = \"many\"", 2, "shells: invalid value 'many'"),
            ("shells = [1]", 1, "shells: takes one value"),
            ("shells = 1.5", 1, "whole number"),
            ("[serve]\nshells = 1", 1, "no setting \"serve\""),
            (
                "vms-max = 5\nallow = [\"user:x=run\",\n\"user:y=king\"]",
                2,
                "allow: invalid value 'user:y=king'",
            ),
            ("shells = 4\nshells = 5", 2, "duplicate key"),
            ("shells = ", 1, ""),
            ("insecure = \"maybe\"", 1, "insecure: invalid value"),
            ("config = \"x\"", 1, "no setting"),
        ] {
            let (at, reason) = parse(text).expect_err(text);
            assert_eq!(at, line, "{text}: {reason}");
            assert!(reason.contains(words), "{text}: {reason}");
        }
    }

    #[test]
    fn a_flag_is_over_the_file_and_the_file_over_the_default() {
        let text =
            "shells = 7\nvms-max = 9\nallow = [\"user:1=run\", \"group:2=read\"]\nno-working-sets = true";
        let file = File { path: "x".into(), given: parse(text).expect("a good file") };
        let matches = file
            .defaults(serve_command())
            .try_get_matches_from(["--shells", "8", "--no-working-sets=false"])
            .expect("good arguments");
        assert_eq!(matches.get_one::<usize>("shells"), Some(&8));
        assert_eq!(matches.get_one::<usize>("vms_max"), Some(&9));
        assert_eq!(matches.get_one::<bool>("no_working_sets"), Some(&false));
        assert_eq!(matches.get_raw("allow").map(Iterator::count), Some(2));
        assert_eq!(matches.get_one::<usize>("connections_max"), Some(&256));
    }
}
