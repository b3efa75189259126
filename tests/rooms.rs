//! Holds the rules between rooms: reads the table in `src/lib.rs` and every path in `src/` that names another room.
//!
//! The table is the source; nothing here knows a room by name. Paths are found in the token stream, comments and
//! strings left out, wherever they stand: in `use` trees, in code, in test modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// For each room, the path prefixes that it may name, as segments.
type Rules = BTreeMap<String, Vec<Vec<String>>>;

#[test]
fn rooms_use_only_what_the_table_allows() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let library = fs::read_to_string(source.join("lib.rs")).unwrap();
    let rules = rules(&library);
    let rooms: BTreeSet<String> = declared_modules(&library);
    assert_eq!(
        rules.keys().cloned().collect::<BTreeSet<_>>(),
        rooms,
        "the table and the modules of src/lib.rs"
    );

    let mut violations = Vec::new();
    let mut files = 0;
    for file in rust_files(&source) {
        let inside = file.strip_prefix(&source).unwrap();
        let Some((room, depth)) = room_of(inside, &rooms) else {
            let text = fs::read_to_string(&file).unwrap();
            outside_rooms(inside, &text, &mut violations);
            continue;
        };
        files += 1;
        let text = fs::read_to_string(&file).unwrap();
        for path in foreign_paths(&text, depth, &rooms) {
            if path[0] != room && rooms.contains(&path[0]) && !allowed(&rules[&room], &path) {
                violations.push(format!(
                    "src/{}: {} may not use {} (the table in src/lib.rs allows it: {})",
                    inside.display(),
                    room,
                    path.join("::"),
                    rules[&room].iter().map(|prefix| prefix.join("::")).collect::<Vec<_>>().join(", "),
                ));
            }
        }
    }
    assert!(files > rooms.len(), "found only {files} files");
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

/// Files of `src/` with unsafe code. Whoever makes this list longer says why in the change.
const UNSAFE: &[&str] = &[
    "api/auth/rules.rs",
    "api/listen.rs",
    "cli/bench/first_answer.rs",
    "cli/tiny.rs",
    "fleet/child.rs",
    "fleet/network.rs",
    "snapshot/folder.rs",
    "snapshot/layers/format.rs",
    "snapshot/layers/tests.rs",
    "snapshot/memory/fold.rs",
    "snapshot/memory/image.rs",
    "snapshot/memory/keep.rs",
    "snapshot/memory/mapped.rs",
    "snapshot/memory/pager.rs",
    "snapshot/memory/pager/served.rs",
    "snapshot/memory/pager/tests.rs",
    "snapshot/memory/touched.rs",
    "snapshot/memory/view.rs",
    "snapshot/store/tests.rs",
    "snapshot/writers.rs",
    "vmm/boot/reader.rs",
    "vmm/chipset/ioapic.rs",
    "vmm/chipset/pit.rs",
    "vmm/chipset/serial.rs",
    "vmm/host.rs",
    "vmm/hostile/mod.rs",
    "vmm/memory.rs",
    "vmm/shell.rs",
    "vmm/vcpu.rs",
    "vmm/vcpu_state.rs",
    "vmm/virtio/mmio/race.rs",
    "vmm/virtio/mmio/tests.rs",
    "vmm/virtio/net/link.rs",
    "vmm/virtio/net/tests.rs",
    "vmm/virtio/testing.rs",
    "worker/channel.rs",
    "worker/jail/attempts.rs",
    "worker/jail/spaces.rs",
    "worker/jail/violation.rs",
    "worker/process.rs",
    "worker/protocol.rs",
    "worker/vm.rs",
    "worker/warm.rs",
    "worker/zygote.rs",
];

/// The compiler refuses unsafe code where it is not allowed (`src/lib.rs`); this holds where it is, and that whole rooms are not allowed it.
#[test]
fn unsafe_code_is_in_these_files_only() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeSet::new();
    for file in rust_files(&source) {
        let text = fs::read_to_string(&file).unwrap();
        let inside = file.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
        let tokens = tokens(&text);
        if tokens.iter().any(|token| token == "unsafe") {
            found.insert(inside.clone());
        }
        let heads_a_room = inside.ends_with("/mod.rs");
        let allows_all_below = heads_a_room && text.contains("#![allow(unsafe_code)]");
        assert!(
            !allows_all_below
                || rust_files(file.parent().unwrap()).len() == 1
                || inside == "vmm/hostile/mod.rs",
            "{inside} allows unsafe code in all its files"
        );
    }
    let listed: BTreeSet<String> = UNSAFE.iter().map(|file| (*file).to_owned()).collect();
    assert_eq!(found, listed, "files with unsafe code, and the list in this test");
}

/// `main.rs` hands over to the command line and knows nothing else.
fn outside_rooms(file: &Path, text: &str, violations: &mut Vec<String>) {
    if file == Path::new("main.rs") {
        for path in paths_after(&tokens(text), "coldspark") {
            if path.first().is_none_or(|room| room != "cli") {
                violations
                    .push(format!("src/main.rs: may use coldspark::cli only, uses {}", path.join("::")));
            }
        }
    } else if file != Path::new("lib.rs") {
        violations.push(format!("src/{}: belongs to no room of the table", file.display()));
    }
}

fn allowed(prefixes: &[Vec<String>], path: &[String]) -> bool {
    prefixes.iter().any(|prefix| path.len() >= prefix.len() && path[..prefix.len()] == prefix[..])
}

/// Rows of the table: `//! | [`room`] | what for | may use |`.
fn rules(library: &str) -> Rules {
    let mut rules = Rules::new();
    for line in library.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["//!", room, _, uses, ""] = cells[..] else { continue };
        // A room that is not in the documentation is not linked.
        let room = room.strip_prefix('[').and_then(|room| room.strip_suffix(']')).unwrap_or(room);
        let Some(room) = room.strip_prefix('`').and_then(|room| room.strip_suffix('`')) else { continue };
        // What is in backquotes is a path, or a path with a group: `snapshot::{state, codec}`.
        let prefixes = uses
            .split('`')
            .skip(1)
            .step_by(2)
            .flat_map(|path| paths_after(&tokens(&format!("crate::{path}")), "crate"))
            .collect();
        assert!(rules.insert(room.to_string(), prefixes).is_none(), "{room} is twice in the table");
    }
    rules
}

/// `pub mod NAME;` of the library.
fn declared_modules(library: &str) -> BTreeSet<String> {
    let tokens = tokens(library);
    tokens
        .windows(3)
        .filter(|three| three[0] == "mod" && three[2] == ";")
        .map(|three| three[1].clone())
        .collect()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The room that a file belongs to, and how many modules deep it lies (the room itself: 1).
fn room_of(inside: &Path, rooms: &BTreeSet<String>) -> Option<(String, usize)> {
    let mut modules: Vec<String> =
        inside.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if modules.last().is_some_and(|last| last == "mod") {
        modules.pop();
    }
    rooms.contains(modules.first()?).then(|| (modules[0].clone(), modules.len()))
}

/// Paths from the crate's root that a file names: `crate::...`, and `super::...` chains that climb out of the room.
fn foreign_paths(text: &str, depth: usize, rooms: &BTreeSet<String>) -> Vec<Vec<String>> {
    let tokens = tokens(text);
    let mut paths = paths_after(&tokens, "crate");
    for path in paths_after(&tokens, "super") {
        // The first `super` was taken off. Modules written inside the file lie deeper than the file, so a chain that is
        // long enough is taken to leave the room only when a room's name comes next.
        let climbs = 1 + path.iter().take_while(|segment| *segment == "super").count();
        let rest = &path[climbs - 1..];
        if climbs >= depth && rest.first().is_some_and(|name| rooms.contains(name)) {
            paths.push(rest.to_vec());
        }
    }
    paths
}

/// All paths that begin with `root ::`, without the root; a `use` tree gives one path for each leaf.
fn paths_after(tokens: &[String], root: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let mut at = 0;
    while at + 1 < tokens.len() {
        let begins = tokens[at] == root && tokens[at + 1] == "::" && (at == 0 || tokens[at - 1] != "::");
        at += 1;
        if begins {
            at += 1;
            tree(tokens, &mut at, &mut Vec::new(), &mut paths);
        }
    }
    paths
}

/// One `use` tree (or plain path) from `tokens[*at]` on.
fn tree(tokens: &[String], at: &mut usize, prefix: &mut Vec<String>, paths: &mut Vec<Vec<String>>) {
    let outer = prefix.len();
    loop {
        match tokens.get(*at).map(String::as_str) {
            Some("{") => {
                *at += 1;
                while *at < tokens.len() && tokens[*at] != "}" {
                    let before = *at;
                    tree(tokens, at, prefix, paths);
                    if tokens.get(*at).is_some_and(|token| token == "as") {
                        *at += 2;
                    }
                    if tokens.get(*at).is_some_and(|token| token == ",") || *at == before {
                        *at += 1;
                    }
                }
                *at += 1;
                break;
            }
            Some(name) if is_name(name) => {
                if name != "self" {
                    prefix.push(name.to_string());
                }
                *at += 1;
                if tokens.get(*at).is_some_and(|token| token == "::") {
                    *at += 1;
                    continue;
                }
                paths.push(prefix.clone());
                break;
            }
            // A glob, or generic arguments.
            other => {
                *at += usize::from(other == Some("*"));
                paths.push(prefix.clone());
                break;
            }
        }
    }
    prefix.truncate(outer);
}

fn is_name(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Names, `::` and single other characters; without comments, strings and character literals.
fn tokens(text: &str) -> Vec<String> {
    let text: Vec<char> = text.chars().collect();
    let at = |index: usize| text.get(index).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < text.len() {
        match (at(i), at(i + 1)) {
            ('/', '/') => i += text[i..].iter().take_while(|c| **c != '\n').count(),
            ('/', '*') => {
                let mut open = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (open, i) = (open + 1, i + 2),
                        ('*', '/') => (open, i) = (open - 1, i + 2),
                        _ => i += 1,
                    }
                    if open == 0 || i >= text.len() {
                        break;
                    }
                }
            }
            ('r', '"' | '#') if raw_string(&text[i + 1..]).is_some() => {
                i += 1 + raw_string(&text[i + 1..]).unwrap_or(0);
            }
            ('"', _) => {
                i += 1;
                while i < text.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            // A character, not a lifetime.
            ('\'', '\\') => {
                i += 3;
                while i < text.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            ('\'', _) if at(i + 2) == '\'' => i += 3,
            (':', ':') => {
                tokens.push("::".to_string());
                i += 2;
            }
            (first, _) if first.is_alphanumeric() || first == '_' => {
                let name: String =
                    text[i..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
                i += name.chars().count();
                tokens.push(name);
            }
            (other, _) => {
                if !other.is_whitespace() {
                    tokens.push(other.to_string());
                }
                i += 1;
            }
        }
    }
    tokens
}

/// Length of a raw string's `#"..."#`, if one begins here.
fn raw_string(text: &[char]) -> Option<usize> {
    let hashes = text.iter().take_while(|c| **c == '#').count();
    if text.get(hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = &text[hashes + 1..];
    let length = body.windows(end.len()).position(|window| window == end)?;
    Some(hashes + 1 + length + end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        paths_after(&tokens(text), "crate").into_iter().map(|path| path.join("::")).collect()
    }

    #[test]
    fn every_form_of_a_path_is_found() {
        assert_eq!(found("use crate::a::b;"), ["a::b"]);
        assert_eq!(found("use crate::a::{self, b::{c, d as e}, f::*};"), ["a", "a::b::c", "a::b::d", "a::f"]);
        assert_eq!(found("use crate::{\n    a::b,\n    c,\n};\nuse crate::d;"), ["a::b", "c", "d"]);
        assert_eq!(
            found("fn f(x: &crate::a::B<crate::c::D>) { crate::e::f::<u8>() }"),
            ["a::B", "c::D", "e::f"]
        );
        assert_eq!(found("pub(crate) fn f() {} pub(in crate::a) struct B;"), ["a"]);
    }

    #[test]
    fn what_is_no_path_is_not_found() {
        assert_eq!(found("// crate::a\n/* crate::b /* crate::c */ */ \"crate::d \\\" crate::e\""), [""; 0]);
        assert_eq!(found("r#\"crate::a \" crate::b\"# 'c' '\\'' '\"' \"crate::c\" x::crate::d"), [""; 0]);
    }

    #[test]
    fn the_table_is_read() {
        let library = "//! | room | for | may use |\n//! |---|---|---|\n\
                       //! | [`a`] | x | `b::{c, d}`, `e` |\n//! | `b` | y | nothing of ours |\n";
        let rules = rules(library);
        assert_eq!(rules.keys().collect::<Vec<_>>(), ["a", "b"]);
        let path = |text: &str| text.split("::").map(str::to_string).collect::<Vec<_>>();
        assert!(allowed(&rules["a"], &path("b::c::X")) && allowed(&rules["a"], &path("e::Y")));
        assert!(!allowed(&rules["a"], &path("b")) && !allowed(&rules["a"], &path("b::x")));
        assert!(!allowed(&rules["b"], &path("a")));
    }

    #[test]
    fn climbing_out_of_a_room_is_seen() {
        let rooms = BTreeSet::from(["a".to_string(), "b".to_string()]);
        assert_eq!(foreign_paths("use super::b::X;", 1, &rooms), [["b", "X"]]);
        assert_eq!(foreign_paths("use super::super::b::X;", 2, &rooms), [["b", "X"]]);
        assert_eq!(foreign_paths("use super::b::X;", 2, &rooms), Vec::<Vec<String>>::new());
    }
}
