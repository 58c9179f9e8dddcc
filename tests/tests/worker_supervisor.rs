#[path = "all/direct.rs"]
mod direct;
#[path = "all/worker_supervisor.rs"]
mod worker_supervisor;
