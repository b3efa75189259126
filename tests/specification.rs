//! What docs/specification.md names as holding a promise has to exist: trials in `tests/system` and `tests/crash`, and tests of modules in `src`
//! and `tests/models.rs`.

use std::fs;
use std::path::{Path, PathBuf};

/// All Rust files below.
fn sources(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
}

/// Words in backquotes in the last column of the tables.
fn names(text: &str) -> Vec<&str> {
    let lines = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| promise"));
    lines
        .flat_map(|line| {
            let last = line.trim_end_matches([' ', '|']).rsplit('|').next().unwrap_or_default();
            last.split('`').skip(1).step_by(2)
        })
        .collect()
}

#[test]
fn everything_that_holds_a_promise_exists() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(top.join("docs/specification.md")).unwrap();
    let names = names(&text);
    assert!(names.len() > 60, "only {} names", names.len());
    let (mut modules, mut trials) = (Vec::new(), Vec::new());
    sources(&top.join("src"), &mut modules);
    let models = top.join("tests/models.rs");
    let text_of_models = fs::read_to_string(&models).unwrap();
    modules.push((models, text_of_models));
    sources(&top.join("tests/system"), &mut trials);
    sources(&top.join("tests/crash"), &mut trials);
    let trials: String = trials.into_iter().map(|(_, text)| text).collect();
    let missing: Vec<&str> = names
        .into_iter()
        .filter(|name| match name.split_once("::") {
            Some((file, test)) => {
                let of_file = modules.iter().filter(|(path, _)| path.ends_with(file));
                let wanted = if test == "*" { "#[test]".to_owned() } else { format!("fn {test}(") };
                !of_file.into_iter().any(|(_, text)| text.contains(&wanted))
            }
            // A group, some of whose names are put together.
            None => match name.strip_suffix('*') {
                Some(group) => {
                    let alone = format!("\"{}\"", group.trim_end_matches('/'));
                    !trials.contains(&format!("\"{group}")) && !trials.contains(&alone)
                }
                None => !trials.contains(&format!("\"{name}\"")),
            },
        })
        .collect();
    assert!(missing.is_empty(), "docs/specification.md names what is not there: {missing:?}");
}
