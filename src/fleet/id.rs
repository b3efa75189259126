//! Ids, names and random bytes.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use super::error::FleetError;
use super::limits::NAME_BYTES_MAX;

/// What every VM id begins with.
pub const VM_PREFIX: &str = "vm-";

/// Fills an array from the kernel's generator.
pub fn random<const N: usize>() -> Result<[u8; N], FleetError> {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, GetRandomFlags::empty()) {
            Ok(got) => filled += got,
            Err(Errno::INTR) => {}
            Err(error) => {
                return Err(FleetError::Io { what: "cannot get random bytes".into(), source: error.into() });
            }
        }
    }
    Ok(bytes)
}

/// A new VM id: `vm-` and 12 hexadecimal digits.
pub fn vm_id() -> Result<String, FleetError> {
    let bytes = random::<6>()?;
    Ok(bytes.iter().fold(VM_PREFIX.to_owned(), |id, byte| format!("{id}{byte:02x}")))
}

/// Checks a name that a user chose; `what` is "a VM" or "an image".
pub fn check_name(what: &'static str, name: &str) -> Result<(), FleetError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let good = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !(what == "a VM" && name.starts_with(VM_PREFIX));
    match good {
        true => Ok(()),
        false => Err(FleetError::BadName { what, name: name.chars().take(NAME_BYTES_MAX).collect() }),
    }
}

/// Now, in Unix milliseconds.
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_form_and_differ() {
        let (one, two) = (vm_id().unwrap(), vm_id().unwrap());
        assert_ne!(one, two);
        assert!(one.len() == 15 && one.starts_with("vm-"));
        assert!(one.bytes().skip(3).all(|byte| byte.is_ascii_hexdigit()));
    }

    #[test]
    fn names_that_could_be_paths_or_ids_are_refused() {
        for name in ["", ".", "..", "-x", "a/b", "a b", "A", "vm-1", "ä", &"x".repeat(64)] {
            assert!(check_name("a VM", name).is_err(), "{name:?}");
        }
        for name in ["a", "web-1-2x", &"x".repeat(63)] {
            check_name("a VM", name).unwrap();
        }
        check_name("an image", "vm-1").unwrap();
    }
}
