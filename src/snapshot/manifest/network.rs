//! Network interfaces in a manifest.

use serde::{Deserialize, Serialize};

use super::{ManifestError, wrong};
use crate::snapshot::limits;

/// One network interface of the guest. What it is plugged into is each clone's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The address that the guest was given, six pairs of hexadecimal digits with colons.
    pub mac: String,
    /// The MTU that the guest was told, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

pub(super) fn check(networks: &[Network]) -> Result<(), ManifestError> {
    if networks.len() > limits::NETWORKS_MAX {
        return wrong("networks", format!("more than {}", limits::NETWORKS_MAX));
    }
    let pair = |part: &str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    for network in networks {
        if network.mac.split(':').count() != 6 || !network.mac.split(':').all(pair) {
            return wrong("networks", "an address is not six pairs of hexadecimal digits");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_their_form() {
        let with = |mac: &str, count| check(&vec![Network { mac: mac.into(), mtu: None }; count]);
        with("02:00:00:00:00:ff", 4).unwrap();
        assert!(with("02:00:00:00:00:ff", 5).is_err());
        for mac in ["", "02:00:00:00:00", "02:00:00:00:00:1", "02:00:00:00:00:zz", "02:00:00:00:00:00:00"] {
            assert!(with(mac, 1).is_err(), "{mac:?}");
        }
    }
}
