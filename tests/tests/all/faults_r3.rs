//! The same on three servers with three replicas of everything ([`crate::faults`]).

use crate::faults::{Ground, all_on};

all_on!(Ground::ThreeServers);
