//! The same on three servers with three replicas of everything ([`crate::faults`]): where servers come into it. Which engine
//! dies, what time a worker believes it is, and what becomes of a hint is no different there: those are tried here by hand
//! (`cargo test -p voxfleet-tests --test all faults_r3 -- --ignored`), and `voxfleet bench chaos --replicas 3` mixes them in.

use crate::faults::{Ground, tests_on};

tests_on! {
    Ground::ThreeServers;
    a_worker_is_killed,
    the_active_dispatcher_is_killed_then_the_other,
    the_active_dispatcher_stands_still_longer_than_its_lease,
    every_stream_loses_its_leader,
    a_server_in_lame_duck_mode_leaves,
    a_server_stands_still,
    workers_and_servers_lose_sight_of_each_other,
    hints_are_purged_and_consumers_deleted_by_hand,
    two_faults_at_once,
    the_server_dies_while_a_worker_drains,
    the_next_owner_of_the_same_session_is_killed_too,
}

tests_on! {
    by hand, Ground::ThreeServers;
    a_worker_stands_still_and_goes_on,
    an_engine_is_killed_and_another_stands_still,
    the_dispatchers_are_asked_to_end_one_after_the_other,
    lines_are_late_and_stall,
    hints_are_dropped_doubled_late_and_out_of_order,
    the_heir_is_killed_while_a_worker_drains,
    fifty_workers_start_at_one_instant,
    clocks_are_wrong,
}
