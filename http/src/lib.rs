//! HTTP as every part of voxfleet serves it: who may ask what, over which certificate, and figures for Prometheus.
//!
//! It knows no NATS and none of our types; dispatcher and worker bring their routes. Nobody below them may call it.
//!
//! | module | what for |
//! |---|---|
//! | [`config`] | address, certificate, tokens |
//! | [`access`] | a request's headers -> which roles it has; pure |
//! | [`guard`] | the layer around every route: hosts, origins, roles, headers of every answer |
//! | [`refusal`] | errors as JSON with a fitting status |
//! | [`server`] | sockets: TLS, limits, shutdown |
//! | [`room`] | who may be connected at once |
//! | `patience` | how long the other end is waited for |
//! | [`tls`] | the certificate, read again when its file changes; when it expires |
//! | [`exposition`] | Prometheus' text format for figures that are computed when somebody asks |
//! | [`recorder`] | counters of the whole process |
//! | [`probe`] | one GET, for health checks |
//! | [`process`] | memory, descriptors and CPU time of this process |

pub mod access;
pub mod config;
pub mod exposition;
pub mod guard;
mod patience;
pub mod probe;
pub mod process;
pub mod recorder;
pub mod refusal;
pub mod room;
pub mod server;
pub mod tls;

pub use access::{Access, Role, Roles};
pub use axum;
pub use config::HttpConfig;
pub use guard::{Exceptions, Granted, Operator, Producer, Viewer};
pub use refusal::Refusal;
pub use room::Seat;
pub use server::{HttpError, Server};
