//! The process around one VM: `coldspark worker`. No tokio here. See [`protocol`] for what it is told.

pub mod channel;
pub mod protocol;
