#[path = "../../tests/tests/all/nats_topology.rs"]
mod nats_topology;
#[path = "../../tests/tests/all/nats_log.rs"]
mod nats_log;
#[path = "../../tests/tests/all/nats_chain.rs"]
mod nats_chain;
#[path = "../../tests/tests/all/nats_claim.rs"]
mod nats_claim;
#[path = "../../tests/tests/all/nats_fleet.rs"]
mod nats_fleet;
