//! The engine's tests in one binary: each binary links ONNX Runtime's bindings and whisper.cpp anew.
//!
//! | module | holds |
//! |---|---|
//! | `accuracy` | what the real engine hears, and when |
//! | `card` | faults of a simulated card, and how they end a real process |
//! | `child` | the child process's loop over a real socketpair |
//! | `conformance` | what every engine promises, real and simulated |
//! | `encoders` | speaker encoders of every interface that is known |
//! | `neighbour` | turns on the device by flock(1) |
//! | `official` | models of the official shapes |
//! | `rig` | an engine child in a thread, and its supervisor's side of the socket |
//! | `speakers` | who says what, by voice |
//! | `split` | channels that are heard one by one, in the child |
//! | `suspects` | inputs that may kill the engine are decoded alone or set aside; sessions that finish |
//! | `support` | audio, logs, recognizers, detectors |

mod accuracy;
mod card;
mod child;
mod conformance;
mod encoders;
mod neighbour;
mod official;
mod rig;
mod speakers;
mod split;
mod support;
mod suspects;
