#[path = "all/dispatcher_jobs.rs"]
mod dispatcher_jobs;
