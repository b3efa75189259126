//! The port that carries the agent protocol: a virtio-console, or the second serial port.

use crate::serial::{AgentPort, say};
use crate::virtio::{Console, Devices, Failure};

pub(crate) enum Port {
    Virtio(Console),
    /// Is looked at instead of waited for: this guest takes no interrupts from it.
    Serial(AgentPort),
}

impl Port {
    /// The one that there is.
    pub(crate) fn find(devices: &mut Devices) -> Option<Port> {
        if let Some(console) = devices.console.take() {
            return Some(Port::Virtio(console));
        }
        let port = AgentPort::find()?;
        say!("no virtio-console: the agent talks through the second serial port");
        Some(Port::Serial(port))
    }

    /// Fills `out` from the stream, waiting while there is nothing.
    pub(crate) fn read(&mut self, out: &mut [u8]) -> Result<(), Failure> {
        match self {
            Port::Virtio(console) => console.read(out),
            Port::Serial(port) => {
                port.read(out);
                Ok(())
            }
        }
    }

    /// Whether [`Port::read`] has something to give at once.
    pub(crate) fn has_bytes(&self) -> bool {
        match self {
            Port::Virtio(console) => console.has_bytes(),
            Port::Serial(port) => port.has_bytes(),
        }
    }

    /// Whether bytes have come; if not, those that come interrupt. A port that does not interrupt is always due.
    pub(crate) fn is_due(&mut self) -> bool {
        match self {
            Port::Virtio(console) => console.is_due(),
            Port::Serial(_) => true,
        }
    }

    /// After a halt.
    pub(crate) fn woken(&mut self) {
        if let Port::Virtio(console) = self {
            console.woken();
        }
    }

    /// Sends bytes; returns when the device has taken them.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match self {
            Port::Virtio(console) => console.write(bytes),
            Port::Serial(port) => {
                port.write(bytes);
                Ok(())
            }
        }
    }
}
