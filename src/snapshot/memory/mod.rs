//! Guest memory as a file: writing it out ([`mod@image`]), mapping it for a guest ([`mod@mapped`]), having it ready in huge
//! pages ([`mod@fold`], [`mod@keep`]), answering the page faults of clones from it ([`mod@pager`]), seeing what a clone needs of it ([`mod@touched`]).
//!
//! `memory.img` holds the guest's regions one after the other, page for page, zero pages as holes. Two lazy
//! sources give the same memory: *mapped* (the kernel faults from the page cache) and *userfault* (the pager
//! copies). In both, a page that the guest has changed is anonymous memory of the worker, and one that it has not
//! is still what the file says; [`image`] leans on exactly that when it freezes a clone.

pub mod extents;
pub mod fold;
pub mod image;
pub mod keep;
pub mod mapped;
pub mod pager;
pub mod touched;
mod view;
