//! Every end-to-end test: real nats-servers, real processes, no mocks.
//!
//! | module | what it holds to |
//! |---|---|
//! | [`floors`] | who may depend on whom |
//! | [`live_simulated`], [`live_micro`] | many sessions at once; text as the engine gives it when called directly |
//! | [`ct2`] | the batched engine in a fleet, and beside the other one |
//! | [`third_party`] | what somebody sees who has only the `nats` command |
//! | [`doctor_fleet`] | what `voxfleet doctor` says of a fleet that is broken |
//! | [`operator`], [`dead_letters`] | why something is where it is, a drain, what failed found and tried again |
//! | [`viewer`], [`full_log`] | who watches a move or stalls; a log at its limit |
//! | [`nats_pub`], [`examples`] | producers that know nothing of us: the `nats` command, shell, Python, Rust |
//! | [`bad_input`] | every bad input gets its typed error and costs nobody else anything |
//! | [`cluster_r3`] | the same on three servers |
//! | [`nats_topology`], [`nats_log`], [`nats_chain`], [`nats_claim`], [`nats_jobs`], [`nats_media`], [`nats_fleet`] | what the `nats` crate promises, on one server and on three |
//! | [`cli`], [`cli_jobs`] | what people type, with its output and exit codes |
//! | [`models`] | models brought here over breaks, kills, wrong bytes and full disks; what fits on a device |
//! | [`dispatcher_sessions`] | the dispatcher without a worker's code: open, wait, move, end, go on, take over |
//! | [`dispatcher_jobs`] | the same for file jobs: submit, queue, give out, fail, cancel, expire, take over |
//! | [`fleet_map`] | who serves, who stands in, who gives back |
//! | [`fleet_routing`] | where sessions land on a whole fleet, who is refused, and a burst of opens |
//! | [`recipes`], [`pages`] | every command of `docs/nats-recipes.md`, as it stands there |
//! | [`runbook`], [`operations`], [`upgrade`], [`units`] | every command of `docs/runbook.md`; backup, restore, growing, moving and two versions at once while sessions speak |
//! | [`speakers`] | who said what: live, recordings, workers killed at every final |
//! | [`standby`] | dispatchers that stop, die and come back |
//! | [`worker_supervisor`] | one worker without a dispatcher: hints, log, crash, refusals, stop |
//! | [`long_jobs`] | long recordings whose parts are done by all workers |
//! | [`load_progress`], [`measured`] | how far a load is, while it goes on; how fast a model is, for whoever plans |
//! | [`device_ladder`], [`device_idle`] | a device that fails or is needed elsewhere: less runs meanwhile, and nothing where nobody needs it |
//! | [`device_site`] | workers on GPUs behind a library of NVIDIA's interface: pinned, watched, lost, one for each card |
//! | [`drain`] | leaving: begun finals, hand-over, one budget, preemption notices |
//! | [`poison`] | inputs that kill or hang the engine are set aside and cost nobody else a word |
//! | [`pressure`] | slow engines, engines that stand still, workers silent together, a producer faster than the log |
//! | [`audio_decoder`] | recordings are decoded by a confined process whose every death is a typed failure |
//! | [`faults_r1`], [`faults_r3`] | what may break at any moment, on one server and on three ([`faults`]) |
//! | [`mutants`] | the checker sees a broken fence and a broken resume position |
//! | [`device_sharing`] | a card with a foreign tenant: what it grows by, turns, nothing left behind |
//! | [`metrics_page`] | labels in `/metrics` are those of the page that lists them |
//! | [`roles`], [`tls`], [`tenants`] | who may do what, who is let in, and what one account sees of another |
//! | [`at_rest`] | an encrypted store tells nothing, and is opened with its own key only |
//! | [`purge`] | what a purge removes and what it leaves, read stream by stream |
//! | [`fetch`] | recordings come from allowed places only, whole or not at all |
//! | [`asr_socket`], [`transcribe_http`] | browsers and programs without NATS: WebSocket clients, recordings over HTTP |
//! | [`direct`] | the engine without a fleet, for comparison |

// Tests may unwrap; what is forbidden in the product is forbidden here too.
mod asr_socket;
mod at_rest;
mod audio_decoder;
mod bad_input;
mod cli;
mod cli_jobs;
mod cli_speakers;
mod cluster_r3;
mod ct2;
mod dead_letters;
mod device_faults;
mod device_idle;
mod device_ladder;
mod device_memory;
mod device_sharing;
mod device_site;
mod direct;
mod dispatcher_jobs;
mod dispatcher_sessions;
mod doctor_fleet;
mod drain;
mod examples;
mod faults;
mod faults_r1;
mod faults_r3;
mod fetch;
mod fleet_map;
mod fleet_routing;
mod floors;
mod full_log;
mod http;
mod http_door;
mod jobs_fleet;
mod jobs_sources;
mod live_micro;
mod live_simulated;
mod load_progress;
mod logs;
mod long_jobs;
mod long_speakers;
mod measured;
mod metrics_page;
mod models;
mod mutants;
mod nats_chain;
mod nats_claim;
mod nats_events;
mod nats_fleet;
mod nats_jobs;
mod nats_log;
mod nats_media;
mod nats_pub;
mod nats_topology;
mod operations;
mod operator;
mod page;
mod pages;
mod poison;
mod prefetch;
mod pressure;
mod purge;
mod recipes;
mod roles;
mod runbook;
mod speakers;
mod split;
mod standby;
mod tenants;
mod third_party;
mod tls;
mod tracing;
mod transcribe_http;
mod units;
mod upgrade;
mod viewer;
mod worker_supervisor;
