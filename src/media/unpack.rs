//! Disk and kernel files as they are distributed: raw, compressed with xz, zstd or gzip, or qcow2, or two of these at once.
//!
//! [`open`] gives the bytes of the disk itself as a stream. Compressed files are unpacked on the way; a qcow2 image is converted
//! by `qemu-img`, which must be installed, into a file that goes when the stream does. What a file is, is told by its
//! first bytes, not by its name.
//!
//! A qcow2 image can name other files of this host (a backing file, an external data file), which would then be read and
//! become part of the image: such images are refused.
//!
//! Facts: the formats' magic numbers; QEMU's `docs/interop/qcow2.rst` (header).

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::NamedTempFile;

use super::partitions::SECTOR_BYTES;

/// Memory that unpacking an xz file may take: four times what its highest level needs.
const XZ_MEMORY_BYTES_MAX: u64 = 256 << 20;
/// Bytes by which a file is recognised.
const HEAD_BYTES: usize = 512;
const QCOW2_HEADER_BYTES: usize = 104;
/// Incompatible feature: the data lies in another file.
const QCOW2_EXTERNAL_DATA: u64 = 1 << 2;

/// Why a file cannot be taken as a disk.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("{path}: {what}: {source}")]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error("{0} is empty; was the download or copy broken off?")]
    Empty(PathBuf),
    #[error("{path} is {what}, which is not read here; convert it with `qemu-img convert -O raw`")]
    Format { path: PathBuf, what: &'static str },
    #[error(
        "{0} is a qcow2 image, and there is no `qemu-img` to convert it: install it (Debian: qemu-utils, FreeBSD: qemu-tools), or give the raw image"
    )]
    NoQemuImg(PathBuf),
    #[error(
        "{path} is a qcow2 image that {what}; make one that stands for itself with `qemu-img convert -O raw`"
    )]
    Qcow2 { path: PathBuf, what: &'static str },
    #[error("{path}: `qemu-img` failed: {output}")]
    QemuImg { path: PathBuf, output: String },
}

/// What a file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Xz,
    Zstd,
    Gzip,
    Qcow2,
}

impl Format {
    /// Told from a file's first bytes.
    fn of(head: &[u8]) -> Result<Self, &'static str> {
        Ok(match head {
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Format::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Format::Zstd,
            [0x1f, 0x8b, 8, ..] => Format::Gzip,
            [b'Q', b'F', b'I', 0xfb, ..] => Format::Qcow2,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => return Err("compressed with bzip2"),
            [b'K', b'D', b'M', b'V', ..] => return Err("a VMDK image"),
            [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..] => return Err("a VHDX image"),
            [b'c', b'o', b'n', b'e', b'c', b't', b'i', b'x', ..] => return Err("a VHD image"),
            [b'P', b'K', 3, 4, ..] => return Err("a zip archive"),
            _ => Format::Raw,
        })
    }

    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Xz => "xz",
            Format::Zstd => "zstd",
            Format::Gzip => "gzip",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// A disk file's content as a stream.
pub struct Unpacked {
    reader: Box<dyn Read + Send>,
    /// From the outside in: what was unpacked. Empty for a raw file.
    pub formats: Vec<Format>,
    /// Bytes of the stream, where they are known before its end.
    pub bytes: Option<u64>,
    /// Bytes of the file that the stream is made of, and how many of them are read.
    pub stored_bytes: u64,
    pub done: Arc<AtomicU64>,
    path: PathBuf,
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer).map_err(|error| {
            let what = match self.formats.last() {
                None | Some(Format::Raw) => "cannot be read",
                Some(_) => "is damaged or cut off",
            };
            io::Error::new(error.kind(), format!("{} {what}: {error}", self.path.display()))
        })
    }
}

impl std::fmt::Debug for Unpacked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacked").field("path", &self.path).field("formats", &self.formats).finish()
    }
}

/// Counts the bytes that are read.
struct Counted<R> {
    inner: R,
    done: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.done.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Opens a disk file. A qcow2 image is converted now, into a temporary file. Blocks.
pub fn open(path: &Path) -> Result<Unpacked, UnpackError> {
    open_with(path, Path::new("qemu-img"))
}

/// Opens a file whose bytes are handed over as they are.
pub fn open_as_it_is(path: &Path) -> Result<Unpacked, UnpackError> {
    let failed = |what| move |source| UnpackError::Io { path: path.to_owned(), what, source };
    let mut file = File::open(path).map_err(failed("cannot be opened"))?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed("has no length"))?;
    file.seek(SeekFrom::Start(0)).map_err(failed("cannot be read"))?;
    let done = Arc::new(AtomicU64::new(0));
    Ok(Unpacked {
        reader: Box::new(Counted { inner: file, done: Arc::clone(&done) }),
        formats: Vec::new(),
        bytes: Some(bytes),
        stored_bytes: bytes,
        done,
        path: path.to_owned(),
    })
}

fn open_with(path: &Path, qemu_img: &Path) -> Result<Unpacked, UnpackError> {
    let failed = |what| move |source| UnpackError::Io { path: path.to_owned(), what, source };
    let mut file = File::open(path).map_err(failed("cannot be opened"))?;
    // Also of a block device, which has no length of its own.
    let stored_bytes = file.seek(SeekFrom::End(0)).map_err(failed("has no length"))?;
    file.seek(SeekFrom::Start(0)).map_err(failed("cannot be read"))?;
    if stored_bytes == 0 {
        return Err(UnpackError::Empty(path.to_owned()));
    }
    let refused = |what| UnpackError::Format { path: path.to_owned(), what };
    let head = head_of(&mut file).map_err(failed("cannot be read"))?;
    file.seek(SeekFrom::Start(0)).map_err(failed("cannot be read"))?;
    let format = Format::of(&head).map_err(refused)?;
    let done = Arc::new(AtomicU64::new(0));
    let mut new = Unpacked {
        reader: Box::new(io::empty()),
        formats: Vec::new(),
        bytes: None,
        stored_bytes,
        done: Arc::clone(&done),
        path: path.to_owned(),
    };
    if format == Format::Qcow2 {
        new.formats.push(format);
        check_qcow2(&file, path)?;
        return convert(new, path, path, qemu_img);
    }
    let counted = Counted { inner: file, done };
    if format == Format::Raw {
        new.bytes = Some(stored_bytes);
        new.reader = Box::new(counted);
        return Ok(new);
    }
    new.formats.push(format);
    let mut inner: Box<dyn Read + Send> = match format {
        Format::Xz => Box::new(liblzma::read::XzDecoder::new_stream(
            counted,
            liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES_MAX, liblzma::stream::CONCATENATED)
                .map_err(|error| failed("cannot be unpacked")(error.into()))?,
        )),
        Format::Zstd => {
            Box::new(zstd::stream::read::Decoder::new(counted).map_err(failed("cannot be unpacked"))?)
        }
        _ => Box::new(flate2::read::MultiGzDecoder::new(counted)),
    };
    let head = head_of(&mut inner).map_err(failed("is damaged or cut off"))?;
    if head.is_empty() {
        return Err(UnpackError::Empty(path.to_owned()));
    }
    let within = Format::of(&head).map_err(refused)?;
    new.reader = Box::new(Cursor::new(head).chain(inner));
    match within {
        Format::Raw => Ok(new),
        Format::Qcow2 => {
            new.formats.push(within);
            let mut unpacked = NamedTempFile::new().map_err(failed("has no place to be unpacked to"))?;
            io::copy(&mut new, unpacked.as_file_mut()).map_err(failed("cannot be unpacked"))?;
            unpacked.as_file_mut().flush().map_err(failed("cannot be unpacked"))?;
            check_qcow2(unpacked.as_file(), path)?;
            convert(new, path, unpacked.path(), qemu_img)
        }
        _ => Err(UnpackError::Format { path: path.to_owned(), what: "compressed twice" }),
    }
}

/// The first bytes of a stream, as many as there are.
fn head_of(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    reader.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Refuses an image that would have other files read. Numbers in the header are big endian.
fn check_qcow2(file: &File, path: &Path) -> Result<(), UnpackError> {
    let refused = |what| Err(UnpackError::Qcow2 { path: path.to_owned(), what });
    let mut header = [0u8; QCOW2_HEADER_BYTES];
    if file.read_exact_at(&mut header, 0).is_err() {
        return refused("is cut off");
    }
    let long = |at: usize| {
        u64::from_be_bytes(header.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; 8]))
    };
    let version = long(0) as u32;
    if !(2..=3).contains(&version) {
        return refused("has a version that is not known here");
    }
    if long(8) != 0 {
        return refused("is a difference to another file");
    }
    if version == 3 && long(72) & QCOW2_EXTERNAL_DATA != 0 {
        return refused("has its data in another file");
    }
    Ok(())
}

/// Has `qemu-img` convert `from` and reads the result.
fn convert(mut new: Unpacked, path: &Path, from: &Path, qemu_img: &Path) -> Result<Unpacked, UnpackError> {
    let failed = |what| move |source| UnpackError::Io { path: path.to_owned(), what, source };
    // Absolute, so that no name is taken for an option or a protocol.
    let from = std::path::absolute(from).map_err(failed("has no absolute path"))?;
    let raw = NamedTempFile::new().map_err(failed("has no place to be converted to"))?;
    let run = Command::new(qemu_img)
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(&from)
        .arg(raw.path())
        .stdin(Stdio::null())
        .output();
    let output = match run {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(UnpackError::NoQemuImg(path.to_owned()));
        }
        other => other.map_err(failed("`qemu-img` cannot be started"))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("it did not say why").chars().take(300).collect();
        return Err(UnpackError::QemuImg { path: path.to_owned(), output: said });
    }
    let bytes = raw.as_file().metadata().map_err(failed("cannot be read"))?.len();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(UnpackError::Qcow2 { path: path.to_owned(), what: "holds no whole disk" });
    }
    new.bytes = Some(bytes);
    new.stored_bytes = bytes;
    new.done = Arc::new(AtomicU64::new(0));
    new.reader = Box::new(Converted {
        file: Counted { inner: raw.reopen().map_err(failed("cannot be read"))?, done: Arc::clone(&new.done) },
        _raw: raw,
    });
    Ok(new)
}

/// A converted image; its file goes with it.
struct Converted {
    file: Counted<File>,
    _raw: NamedTempFile,
}

impl Read for Converted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn content() -> Vec<u8> {
        (0..300_000u32).map(|at| (at / 3) as u8).collect()
    }

    fn write(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn read(path: &Path) -> Result<(Vec<u8>, Vec<Format>), String> {
        let mut unpacked = open(path).map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        unpacked.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
        assert_eq!(unpacked.done.load(Ordering::Relaxed), unpacked.stored_bytes);
        Ok((bytes, unpacked.formats))
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zst(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn qcow2(version: u32, backing: u64, features: u64) -> Vec<u8> {
        let mut image = vec![0; 512];
        image[..4].copy_from_slice(b"QFI\xfb");
        image[4..8].copy_from_slice(&version.to_be_bytes());
        image[8..16].copy_from_slice(&backing.to_be_bytes());
        image[72..80].copy_from_slice(&features.to_be_bytes());
        image
    }

    #[test]
    fn every_compression_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let plain = content();
        // Two frames one after the other are one file, for all three.
        let (first, second) = plain.split_at(100_000);
        for (name, packed, format) in [
            ("x.xz", [xz(first), xz(second)].concat(), Format::Xz),
            ("x.zst", [zst(first), zst(second)].concat(), Format::Zstd),
            ("x.gz", [gz(first), gz(second)].concat(), Format::Gzip),
        ] {
            // The name says nothing.
            for name in [name, "disk.img"] {
                let path = write(&folder, name, &packed);
                assert_eq!(read(&path).unwrap(), (plain.clone(), vec![format]), "{name}");
            }
            let cut = write(&folder, "cut", &packed[..packed.len() / 2]);
            let error = read(&cut).unwrap_err();
            assert!(error.contains("cut is damaged or cut off"), "{error}");
        }
        assert_eq!(read(&write(&folder, "raw", &plain)).unwrap(), (plain, vec![]));
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes, says) in [
            ("empty", vec![], "is empty"),
            ("empty.xz", xz(b""), "is empty"),
            ("x.bz2", b"BZh91AY".to_vec(), "bzip2"),
            ("x.vmdk", b"KDMV....".to_vec(), "VMDK"),
            ("twice.xz", xz(&gz(b"x")), "compressed twice"),
            ("backing.qcow2", qcow2(3, 512, 0), "difference to another file"),
            ("external.qcow2", qcow2(3, 0, 4), "data in another file"),
            ("future.qcow2", qcow2(9, 0, 0), "version"),
            ("short.qcow2", b"QFI\xfb\0\0\0\x03".to_vec(), "cut off"),
            ("backing.qcow2.zst", zst(&qcow2(2, 512, 0)), "difference to another file"),
        ] {
            let error = read(&write(&folder, name, &bytes)).unwrap_err();
            assert!(error.contains(says) && error.contains(name), "{error}");
        }
        assert!(read(&folder.path().join("missing")).unwrap_err().contains("cannot be opened"));
    }

    #[test]
    fn without_qemu_img_a_qcow2_image_is_refused_with_what_to_install() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(&folder, "x.qcow2", &qcow2(3, 0, 0));
        let error = open_with(&path, &folder.path().join("no-such-program")).unwrap_err();
        assert!(matches!(error, UnpackError::NoQemuImg(_)) && error.to_string().contains("qemu-utils"));
        // One that fails, and one that makes nothing.
        let error = open_with(&path, Path::new("/bin/false")).unwrap_err();
        assert!(matches!(error, UnpackError::QemuImg { .. }), "{error}");
        let error = open_with(&path, Path::new("/bin/true")).unwrap_err();
        assert!(matches!(error, UnpackError::Qcow2 { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn random_files_are_survived(
            magic in 0usize..5,
            mut bytes in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let magics: [&[u8]; 5] = [b"", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"QFI\xfb"];
            bytes.splice(..0, magics[magic].iter().copied());
            let folder = tempfile::tempdir().unwrap();
            let path = write(&folder, "random", &bytes);
            if let Ok(unpacked) = open_with(&path, Path::new("/bin/false")) {
                let mut limited = unpacked.take(1 << 20);
                let _ = io::copy(&mut limited, &mut io::sink());
            }
        }
    }
}
