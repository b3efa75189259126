//! Disks with kernels on them.

use std::io::Write;

use crate::media::testing::{self, BOOT, UFS, ZFS};

const MIB: u64 = 1 << 20;

fn kernel_file(machine: u16) -> Vec<u8> {
    let mut file: Vec<u8> = (0..200_000).map(|at| (at % 253) as u8).collect();
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    file
}

/// A GPT disk with a file system of these files in its second partition.
fn gpt_disk(label: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut disk = vec![0; (16 * MIB) as usize];
    let wanted: [testing::Wanted<'_>; 2] = [(&BOOT, MIB, MIB, ""), (&UFS, 4 * MIB, 8 * MIB, "rootfs")];
    testing::put(&mut disk, &testing::gpt(16 * MIB, &wanted));
    testing::put(&mut disk, &[(4 * MIB, testing::ufs2(8 * MIB, label, files))]);
    disk
}

fn found(disk: &Vec<u8>) -> Result<(String, Vec<u8>), String> {
    let inspection = super::disk(disk, disk.len() as u64).unwrap();
    let kernel = super::kernel(&inspection).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let read = kernel.read(1 << 20, |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    });
    read.map_err(|error| error.to_string())?;
    Ok((kernel.volume, bytes))
}

#[test]
fn a_kernel_is_found_on_partitions_and_bare_disks() {
    let file = kernel_file(62);
    let disk = gpt_disk("", &[("/boot/kernel/kernel", &file)]);
    assert_eq!(found(&disk), Ok(("p2".into(), file.clone())));
    let inspection = super::disk(&disk, disk.len() as u64).unwrap();
    assert_eq!(inspection.describe(), "GPT: p1 freebsd-boot 1.0 MiB, p2 freebsd-ufs (UFS2) 8.0 MiB");
    let bare = testing::ufs2(4 * MIB, "rootfs", &[("/boot/kernel/kernel", &file)]);
    assert_eq!(found(&bare), Ok(("the whole disk".into(), file)));
}

#[test]
fn a_compressed_kernel_is_unpacked_within_the_limit() {
    let file = kernel_file(62);
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let disk = gpt_disk("", &[("/boot/kernel/kernel.gz", &gzip(&file))]);
    assert_eq!(found(&disk), Ok(("p2".into(), file)));
    let bomb = gpt_disk("", &[("/boot/kernel/kernel.gz", &gzip(&vec![0; 4 << 20]))]);
    assert!(found(&bomb).unwrap_err().contains("more than 1048576 bytes"));
    let cut = gpt_disk("", &[("/boot/kernel/kernel.gz", &gzip(&[1; 5000])[..15])]);
    assert!(found(&cut).is_err());
}

#[test]
fn what_keeps_a_kernel_from_being_found_is_said() {
    let arm = kernel_file(183);
    assert!(found(&gpt_disk("", &[("/boot/kernel/kernel", &arm)])).unwrap_err().contains("aarch64"));
    assert!(found(&gpt_disk("", &[("/boot/kernel/kernel", b"text")])).unwrap_err().contains("not an ELF"));
    assert!(found(&gpt_disk("", &[("/etc/fstab", b"")])).unwrap_err().contains("p2 looked through"));
    assert!(found(&vec![0; 4 << 20]).unwrap_err().contains("no UFS"));
    let mut zfs = vec![0; 4 << 20];
    testing::put(&mut zfs, &testing::gpt(4 * MIB, &[(&ZFS, MIB, MIB, "")]));
    assert!(found(&zfs).unwrap_err().contains("ZFS"));
}

#[test]
fn the_file_system_that_is_called_root_is_looked_into_first() {
    let (data, root) = (kernel_file(62), {
        let mut file = kernel_file(62);
        file[100] = 9;
        file
    });
    let mut disk = vec![0; (16 * MIB) as usize];
    let wanted: [testing::Wanted<'_>; 2] = [(&UFS, MIB, 4 * MIB, ""), (&UFS, 8 * MIB, 4 * MIB, "")];
    testing::put(&mut disk, &testing::gpt(16 * MIB, &wanted));
    let file_system = |label, file: &[u8]| testing::ufs2(4 * MIB, label, &[("/boot/kernel/kernel", file)]);
    testing::put(&mut disk, &[(MIB, file_system("data", &data)), (8 * MIB, file_system("root", &root))]);
    assert_eq!(found(&disk), Ok(("p2".into(), root)));
}
