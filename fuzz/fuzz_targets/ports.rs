#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(
    init: coldspark::fuzzing::sow("ports", Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"))).expect("seeds"),
    |data: &[u8]| coldspark::fuzzing::run("ports", data)
);
