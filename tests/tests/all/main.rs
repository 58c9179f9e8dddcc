//! Every end-to-end test: real nats-servers, real processes, no mocks.
//!
//! | module | what it holds to |
//! |---|---|
//! | [`floors`] | who may depend on whom |
//! | [`live_simulated`], [`live_micro`] | many sessions at once; text as the engine gives it when called directly |
//! | [`nats_pub`], [`examples`] | producers that know nothing of us: the `nats` command, shell, Python |
//! | [`bad_input`] | every bad input gets its typed error and costs nobody else anything |
//! | [`cluster_r3`] | the same on three servers |
//! | [`direct`] | the engine without a fleet, for comparison |

// Tests may unwrap; what is forbidden in the product is forbidden here too.
mod bad_input;
mod cluster_r3;
mod direct;
mod examples;
mod floors;
mod live_micro;
mod live_simulated;
mod nats_pub;
