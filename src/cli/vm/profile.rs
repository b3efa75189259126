//! A boot profile as a table and as JSON.

use serde_json::{Value, json};

use crate::api::proto;
use crate::cli::output::Table;

/// Milliseconds with three decimals: a table of one unit is easier to read down.
fn ms(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

/// A row for each phase, and our part.
pub fn table(profile: &proto::BootProfile) -> String {
    let mut table = Table::new(&["PHASE", "MS SINCE REQUEST", "MS", "GUEST TSC"]);
    let mut before = 0;
    for phase in &profile.phases {
        table.row([
            phase.name.clone(),
            ms(phase.us),
            format!("+{}", ms(phase.us.saturating_sub(before))),
            phase.guest_tsc.map_or_else(|| "-".to_owned(), |tsc| tsc.to_string()),
        ]);
        before = phase.us;
    }
    let mut text = table.text();
    if let Some(own) = profile.own_us {
        text.push_str(&format!("our part (request to kernel entry): {} ms\n", ms(own)));
        let end = profile.phases.last().map_or(own, |phase| phase.us);
        text.push_str(&format!("the guest's (kernel entry to ready): {} ms\n", ms(end.saturating_sub(own))));
    }
    text
}

/// The same as JSON.
pub fn value(profile: &proto::BootProfile) -> Value {
    let phase = |phase: &proto::ProfilePhase| json!({ "name": phase.name, "us": phase.us, "guest_tsc": phase.guest_tsc });
    json!({
        "own_us": profile.own_us,
        "tsc_khz": profile.tsc_khz,
        "phases": profile.phases.iter().map(phase).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_part_and_each_phase_are_told() {
        let phase = |name: &str, us, guest_tsc| proto::ProfilePhase { name: name.into(), us, guest_tsc };
        let profile = proto::BootProfile {
            phases: vec![phase("kernel entry", 3_210, None), phase("ready", 20_042, Some(7))],
            own_us: Some(3_210),
            tsc_khz: 1,
        };
        let text = table(&profile);
        for wanted in ["kernel entry", "20.042", "+16.832", "our part (request to kernel entry): 3.210 ms"] {
            assert!(text.contains(wanted), "{wanted} not in\n{text}");
        }
        assert_eq!(value(&profile)["phases"][1]["guest_tsc"], 7);
        assert!(value(&profile)["phases"][0]["guest_tsc"].is_null());
    }
}
