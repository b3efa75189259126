//! (being built)

pub mod acpi;
