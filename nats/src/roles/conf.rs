//! Accounts as nats-server reads them.

use std::fmt::Write as _;

use super::{ALL_STREAMS, Grants, Role, grants};
use crate::topology::TopologyConfig;

/// What an account may use of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub connections: u32,
    pub subscriptions: u32,
    /// None: whatever the server has.
    pub storage: Option<Storage>,
}

/// Of JetStream. The server sets bytes aside for each account when it starts, and does not start without them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Of memory streams, summed over replicas.
    pub memory_bytes: u64,
    /// The same of file streams.
    pub file_bytes: u64,
    pub streams: u32,
    /// Of each stream.
    pub consumers: u32,
}

impl Limits {
    /// Room for the streams of `topology` and half as much again: for one whose limit is raised, or a copy beside it.
    pub fn for_topology(topology: &TopologyConfig) -> Self {
        let (memory, file) = topology.reserved();
        let room = |bytes: u64| (bytes + bytes / 2) * topology.replicas as u64;
        let storage = Storage {
            memory_bytes: room(memory),
            file_bytes: room(file),
            streams: ALL_STREAMS.len() as u32 + SPARE_STREAMS,
            consumers: topology.max_consumers.unsigned_abs(),
        };
        Self { storage: Some(storage), ..Self::default() }
    }
}

/// Somebody keeps a backup of one beside it.
const SPARE_STREAMS: u32 = 6;

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Three for a worker, two for a dispatcher, one for whoever else: a thousand GPUs and some.
            connections: 4_096,
            // A worker has a dozen, a viewer one for each stream that it follows.
            subscriptions: 100_000,
            storage: None,
        }
    }
}

/// One account: a tenant.
#[derive(Debug, Clone)]
pub struct Account {
    pub name: String,
    /// Public keys; or `$NAME`, which the server reads from its environment.
    pub users: Vec<(Role, String)>,
    pub limits: Limits,
}

/// Names an account may have: they are folders too.
pub fn is_account_name(name: &str) -> bool {
    voxfleet_schema::id::check(name).is_ok() && !name.starts_with('-') && !is_system(name) && !is_directive(name)
}

/// Of the account that sees all accounts' connections.
pub const SYSTEM: &str = "SYS";

/// A word that the server's configuration takes for one of its own.
fn is_directive(name: &str) -> bool {
    name.eq_ignore_ascii_case("include")
}

fn is_system(name: &str) -> bool {
    name.eq_ignore_ascii_case(SYSTEM)
}

/// The account's own block, with nothing around it. `prefix` is `nats.prefix`.
pub fn account(account: &Account, prefix: &str) -> String {
    let Limits { connections, subscriptions, storage } = &account.limits;
    let mut text = format!("{} {{\n", account.name);
    // Writing to text cannot fail.
    let _ = match storage {
        None => writeln!(text, "  jetstream: enabled"),
        Some(Storage { memory_bytes, file_bytes, streams, consumers }) => writeln!(
            text,
            "  jetstream {{ max_memory: {memory_bytes}, max_file: {file_bytes}, max_streams: {streams}, max_consumers: {consumers} }}"
        ),
    };
    let _ = writeln!(text, "  limits {{ max_connections: {connections}, max_subscriptions: {subscriptions} }}");
    text.push_str("  users: [\n");
    for (role, key) in &account.users {
        let Grants { publish, subscribe, answers } = grants(*role, prefix);
        let _ = writeln!(text, "    # {role}: {}; with nats.inbox_prefix = {:?}", role.purpose(), role.inbox_prefix());
        let _ = writeln!(text, "    {{ nkey: {key}, permissions {{");
        list(&mut text, "publish", &publish);
        list(&mut text, "subscribe", &subscribe);
        if answers {
            text.push_str("        allow_responses: true\n");
        }
        text.push_str("    } }\n");
    }
    text.push_str("  ]\n}\n");
    text
}

fn list(text: &mut String, name: &str, subjects: &[String]) {
    let _ = writeln!(text, "        {name}: [");
    for subject in subjects {
        // In quotes: a dollar sign is no variable there.
        let _ = writeln!(text, "          \"{subject}\"");
    }
    text.push_str("        ]\n");
}

/// The whole: `blocks` are what stands in `accounts {}` beside the system's own account, whose one user is `admin`.
pub fn accounts(blocks: &[String], admin: &str) -> String {
    let mut text = String::from("accounts {\n");
    for line in blocks.iter().flat_map(|block| block.lines()) {
        let _ = writeln!(text, "  {line}");
    }
    let _ = writeln!(
        text,
        "  # Servers of a cluster need it; its user sees all accounts' connections and no account's messages."
    );
    let _ = writeln!(text, "  {SYSTEM} {{ users: [ {{ nkey: {admin} }} ] }}");
    let _ = writeln!(text, "}}\nsystem_account: {SYSTEM}");
    text
}

/// One account whose keys come from the server's environment, so that the file is the same for everybody.
pub fn template(name: &str, prefix: &str) -> String {
    let users = Role::ALL.map(|role| (role, format!("$VOXFLEET_NKEY_{}", role.as_str().to_uppercase())));
    let of = Account { name: name.to_owned(), users: users.to_vec(), limits: Limits::default() };
    format!("{TEMPLATE_HEAD}\n{}", accounts(&[account(&of, prefix)], "$VOXFLEET_NKEY_ADMIN"))
}

const TEMPLATE_HEAD: &str = "\
# Who may connect, and what each role may do (docs/security.md). Written by `voxfleet auth template`.
# nkeys, so that this server holds no secret and there is no password to leave at its default: each variable is the public
# key (U...) of a role, in the environment of nats-server. A missing one is a server that does not start.
# `voxfleet auth init` makes keys and writes such a file with them in it, for one account or several.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deployed_file_is_what_the_lists_say() {
        let deployed = include_str!("../../../deploy/nats/accounts.conf");
        assert_eq!(
            deployed,
            template("VOXFLEET", "asr.v1"),
            "write it again: voxfleet auth template > deploy/nats/accounts.conf"
        );
    }

    #[test]
    fn names_are_folders_and_not_the_systems() {
        for good in ["VOXFLEET", "a", "tenant-7"] {
            assert!(is_account_name(good), "{good}");
        }
        for bad in ["", "SYS", "sys", "include", "Include", "a b", "../a", "a.b", "$G", "-a", "a\"", "a/b"] {
            assert!(!is_account_name(bad), "{bad}");
        }
    }

    #[test]
    fn streams_fit_into_the_limits_made_for_them() {
        for replicas in [1, 3] {
            let topology = TopologyConfig { replicas, ..TopologyConfig::default() };
            let storage = Limits::for_topology(&topology).storage.expect("limits");
            let (memory, file) = topology.reserved();
            assert!(memory * replicas as u64 <= storage.memory_bytes && file * replicas as u64 <= storage.file_bytes);
            assert_eq!(i64::from(storage.consumers), i64::from(topology.max_consumers));
        }
    }

    #[test]
    fn an_account_is_written_with_its_limits_and_each_role_with_its_list() {
        let limits = Limits::for_topology(&TopologyConfig::default());
        let users = Role::ALL.map(|role| (role, format!("U{}", role.as_str().to_uppercase())));
        let text = account(&Account { name: "a".into(), users: users.to_vec(), limits }, "t7.asr");
        for part in ["a {\n", "max_streams: 20", "max_connections: 4096", "nkey: UWORKER,", "\"t7.asr.audio.*\""] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert_eq!(text.matches("allow_responses").count(), 2);
        assert!(!text.contains("asr.v1") && text.matches('{').count() == text.matches('}').count());
    }
}
