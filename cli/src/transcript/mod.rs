//! Showing transcripts: [`view`] decides what is news, [`screen`] draws it.

pub(crate) mod follow;
pub(crate) mod line;
pub(crate) mod screen;
pub(crate) mod view;
