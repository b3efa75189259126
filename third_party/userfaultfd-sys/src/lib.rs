//! The `userfaultfd(2)` ABI, written out by hand.
//!
//! Crate `userfaultfd` takes these names from the published `userfaultfd-sys`, whose build script runs
//! bindgen and so needs libclang on the building machine. coldspark promises to build with a Rust toolchain
//! and a C compiler alone, so Cargo.toml patches in this crate instead: the same names, no build script.
//! Source of every constant and layout: Linux `include/uapi/linux/userfaultfd.h`. The tests at the end hold
//! the layouts against the sizes that are encoded in the ioctl numbers.

#![no_std]
#![allow(non_upper_case_globals, non_camel_case_types)]

pub const UFFD_API: u64 = 0xaa;
pub const UFFD_USER_MODE_ONLY: u32 = 1;

// Numbers within the ioctl type 0xaa; `u8`, as bindgen's callbacks in the published crate make them.
pub const UFFDIO: u8 = 0xaa;
pub const USERFAULTFD_IOC: u32 = 0xaa;
pub const _UFFDIO_REGISTER: u64 = 0x00;
pub const _UFFDIO_UNREGISTER: u64 = 0x01;
pub const _UFFDIO_WAKE: u64 = 0x02;
pub const _UFFDIO_COPY: u64 = 0x03;
pub const _UFFDIO_ZEROPAGE: u64 = 0x04;
pub const _UFFDIO_WRITEPROTECT: u64 = 0x06;
pub const _UFFDIO_CONTINUE: u64 = 0x07;
pub const _UFFDIO_API: u64 = 0x3f;

pub const UFFDIO_API: u32 = 0xc018_aa3f;
pub const UFFDIO_REGISTER: u32 = 0xc020_aa00;
pub const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;
pub const UFFDIO_WAKE: u32 = 0x8010_aa02;
pub const UFFDIO_COPY: u32 = 0xc028_aa03;
pub const UFFDIO_ZEROPAGE: u32 = 0xc020_aa04;
pub const UFFDIO_WRITEPROTECT: u32 = 0xc018_aa06;
pub const UFFDIO_CONTINUE: u32 = 0xc020_aa07;

pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
pub const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
pub const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;

pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub const UFFD_EVENT_FORK: u8 = 0x13;
pub const UFFD_EVENT_REMAP: u8 = 0x14;
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

pub const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_range {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_register {
    pub range: uffdio_range,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub copy: i64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_zeropage {
    pub range: uffdio_range,
    pub mode: u64,
    pub zeropage: i64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_writeprotect {
    pub range: uffdio_range,
    pub mode: u64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffdio_continue {
    pub range: uffdio_range,
    pub mode: u64,
    pub mapped: i64,
}

/// One message read from the descriptor. The names of the nested types are bindgen's, which crate
/// `userfaultfd` spells out.
#[repr(C, packed)]
#[derive(Copy, Clone)]
pub struct uffd_msg {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub arg: uffd_msg__bindgen_ty_1,
}

#[repr(C)]
#[derive(Copy, Clone)]
pub union uffd_msg__bindgen_ty_1 {
    pub pagefault: uffd_msg__bindgen_ty_1__bindgen_ty_1,
    pub fork: uffd_msg__bindgen_ty_1__bindgen_ty_2,
    pub remap: uffd_msg__bindgen_ty_1__bindgen_ty_3,
    pub remove: uffd_msg__bindgen_ty_1__bindgen_ty_4,
    pub reserved: uffd_msg__bindgen_ty_1__bindgen_ty_5,
}

#[repr(C)]
#[derive(Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_1 {
    pub flags: u64,
    pub address: u64,
    pub feat: uffd_msg__bindgen_ty_1__bindgen_ty_1__bindgen_ty_1,
}

#[repr(C)]
#[derive(Copy, Clone)]
pub union uffd_msg__bindgen_ty_1__bindgen_ty_1__bindgen_ty_1 {
    pub ptid: u32,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_2 {
    pub ufd: u32,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_3 {
    pub from: u64,
    pub to: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_4 {
    pub start: u64,
    pub end: u64,
}

#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_5 {
    pub reserved1: u64,
    pub reserved2: u64,
    pub reserved3: u64,
}

// An ioctl number carries its argument's size in bits 16..30 (asm-generic/ioctl.h): a layout that drifted
// from the kernel's stops the build here.
const fn argument_bytes(request: u32) -> usize {
    ((request >> 16) & 0x3fff) as usize
}
const _: () = assert!(size_of::<uffdio_api>() == argument_bytes(UFFDIO_API));
const _: () = assert!(size_of::<uffdio_register>() == argument_bytes(UFFDIO_REGISTER));
const _: () = assert!(size_of::<uffdio_range>() == argument_bytes(UFFDIO_WAKE));
const _: () = assert!(size_of::<uffdio_copy>() == argument_bytes(UFFDIO_COPY));
const _: () = assert!(size_of::<uffdio_zeropage>() == argument_bytes(UFFDIO_ZEROPAGE));
const _: () = assert!(size_of::<uffdio_writeprotect>() == argument_bytes(UFFDIO_WRITEPROTECT));
const _: () = assert!(size_of::<uffdio_continue>() == argument_bytes(UFFDIO_CONTINUE));
const _: () = assert!(size_of::<uffd_msg>() == 32);
