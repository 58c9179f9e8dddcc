//! The same on three servers with three replicas of everything ([`crate::faults`]).

use crate::faults::{Ground, tests_on};

tests_on! {
    Ground::ThreeServers;
    a_worker_is_killed,
    a_worker_stands_still_and_goes_on,
    an_engine_is_killed_and_another_stands_still,
    the_active_dispatcher_is_killed_then_the_other,
    the_active_dispatcher_stands_still_longer_than_its_lease,
    the_dispatchers_are_asked_to_end_one_after_the_other,
    every_stream_loses_its_leader,
    a_server_in_lame_duck_mode_leaves,
    a_server_stands_still,
    workers_and_servers_lose_sight_of_each_other,
    lines_are_late_and_stall,
    hints_are_purged_and_consumers_deleted_by_hand,
    hints_are_dropped_doubled_late_and_out_of_order,
    two_faults_at_once,
    the_heir_is_killed_while_a_worker_drains,
    the_server_dies_while_a_worker_drains,
    the_next_owner_of_the_same_session_is_killed_too,
    fifty_workers_start_at_one_instant,
    clocks_are_wrong,
}
