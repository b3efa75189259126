//! What is in a folder, in a form in which two moments can be compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::ffi::OsStrExt,
    path::Path,
};

use anyhow::Context;

/// Path in the folder, and what is there. Ids that are made at random are called `img-new`, and what tells the moment of its making does not
/// count; sums and signatures of documents are left to the store, which checks them, and of tokens there are only lengths.
pub type Tree = BTreeMap<String, String>;

const RANDOM_PREFIX: &str = "img-";

/// Reads a folder. `old`: names at its top that were there before.
pub fn read(folder: &Path, old: &BTreeSet<String>) -> anyhow::Result<Tree> {
    let mut tree = Tree::new();
    read_into(&mut tree, folder, "", old)?;
    Ok(tree)
}

fn read_into(tree: &mut Tree, folder: &Path, inside: &str, old: &BTreeSet<String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().into_string().map_err(|name| anyhow::anyhow!("{name:?}"))?;
        let new = inside.is_empty() && name.starts_with(RANDOM_PREFIX) && !old.contains(&name);
        let shown = if new { format!("{RANDOM_PREFIX}new") } else { name.clone() };
        let path = if inside.is_empty() { shown } else { format!("{inside}/{shown}") };
        if entry.file_type()?.is_dir() {
            read_into(tree, &entry.path(), &path, old)?;
            tree.insert(path, "folder".into());
            continue;
        }
        let content = fs::read(entry.path()).with_context(|| path.clone())?;
        let what = match name.as_str() {
            "manifest.b3" | "settings.b3" | "manifest.sig" => "sum".into(),
            "manifest.json" | "settings.json" => document(&content)?,
            "tokens" => tokens(&String::from_utf8_lossy(&content)),
            _ => format!("{} bytes, {}", content.len(), blake3::hash(&content).to_hex()),
        };
        tree.insert(path, what);
    }
    Ok(())
}

fn document(content: &[u8]) -> anyhow::Result<String> {
    let mut value: serde_json::Value = serde_json::from_slice(content)?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove("created");
        fields.remove("id");
    }
    Ok(value.to_string())
}

/// Without the digests, of tokens that are random.
fn tokens(text: &str) -> String {
    let lines =
        text.split_inclusive('\n').map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [role, name, digest] => {
                format!("{role} {name} {} digits{}", digest.len(), &line[line.trim_end().len()..])
            }
            _ => line.to_owned(),
        });
    lines.collect()
}

/// Names at the top of a folder.
pub fn top(folder: &Path) -> anyhow::Result<BTreeSet<String>> {
    let names = fs::read_dir(folder)?.map(|entry| {
        let name = entry?.file_name();
        Ok(String::from_utf8_lossy(name.as_bytes()).into_owned())
    });
    names.collect()
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}

/// Where two differ, for people.
pub fn difference(a: &Tree, b: &Tree) -> String {
    let mut lines = String::new();
    for path in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
        if a.get(path) != b.get(path) {
            lines += &format!("\n  {path}: {:?}, not {:?}", a.get(path), b.get(path));
        }
    }
    lines
}
