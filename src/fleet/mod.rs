//! The daemon's domain: images, VMs, snapshots. One owner task per VM.
