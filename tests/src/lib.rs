//! End-to-end tests, with the audio and the small models they use. Everything is in `tests/`: one test binary, since each
//! would link the whole product again.
