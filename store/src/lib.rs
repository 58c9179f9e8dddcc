//! Recordings and models are brought here.
//!
//! | module | holds |
//! |---|---|
//! | [`fetch`] | bodies by URL: https, s3, the object store, files; what a stranger may name and what not |
//! | [`models`] | models by name: the catalog and the folder of what is here |

pub mod fetch;
pub mod models;
