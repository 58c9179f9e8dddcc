//! The same on three servers with three replicas of everything ([`crate::faults`]).

use crate::faults::{Ground, tests_on};

tests_on!(Ground::ThreeServers);
