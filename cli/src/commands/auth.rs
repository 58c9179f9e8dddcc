//! `voxfleet auth`: keys and permissions of the people and processes of a fleet. Talks to no server.
//!
//! Everything is written into a folder of its own beside the one that was asked for, which then takes its name: whatever
//! interrupts this leaves either all of it or nothing under that name.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde_json::json;
use voxfleet_nats::{
    NatsConfig,
    roles::{
        Role,
        conf::{self, Account, Limits, is_account_name},
        keys,
    },
    topology::TopologyConfig,
};

use crate::{
    Context,
    args::{AuthArgs, AuthCommand, AuthInitArgs},
    config::Settings,
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

/// Account of whoever names none.
const ACCOUNT: &str = "VOXFLEET";
const MIB: u64 = 1024 * 1024;

pub(crate) fn run(args: &AuthArgs, context: &Context) -> anyhow::Result<Exit> {
    let settings = context.configure(&[], "error")?.settings;
    match &args.what {
        AuthCommand::Init(args) => init(args, &settings),
        AuthCommand::Template(args) => {
            let name = account_name(&args.account)?;
            out(conf::template(name, &settings.nats.prefix).trim_end())?;
            Ok(Exit::Ok)
        }
    }
}

fn init(args: &AuthInitArgs, settings: &Settings) -> anyhow::Result<Exit> {
    let names = account_names(&args.account)?;
    let topology = super::wanted_topology(settings);
    let limits = limits(args, &topology).or_exit(Exit::Usage)?;
    let dir = std::path::absolute(&args.dir).or_exit(Exit::Usage)?;
    if fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some()) {
        let why = anyhow::anyhow!("{}: there is something in it, and nothing is written over", dir.display());
        return Err(why).or_exit(Exit::Usage);
    }
    let read = |ca: &PathBuf| fs::read_to_string(ca).with_context(|| format!("nats.tls_ca: {}", ca.display()));
    let authority = settings.nats.tls_ca.as_ref().map(read).transpose().or_exit(Exit::Config)?;
    let files = make(&names, &limits, &settings.nats, authority.as_deref()).or_exit(Exit::Internal)?;
    write(&dir, &files).with_context(|| format!("writing {}", dir.display())).or_exit(Exit::Failure)?;
    if args.json {
        let files: Vec<_> = files.iter().map(|f| json!({"file": dir.join(&f.path), "secret": f.secret})).collect();
        object(&json!({"dir": dir, "accounts": names, "files": files}))?;
    } else {
        out(&next_steps(&dir, &names, &limits, authority.is_some()))?;
    }
    Ok(Exit::Ok)
}

fn account_name(name: &str) -> anyhow::Result<&str> {
    if is_account_name(name) {
        return Ok(name);
    }
    let rule = "letters, digits, _ and -, at most 64, not SYS";
    Err(anyhow::anyhow!("--account {name:?}: a name of an account has {rule}")).or_exit(Exit::Usage)
}

fn account_names(given: &[String]) -> anyhow::Result<Vec<String>> {
    if given.is_empty() {
        return Ok(vec![ACCOUNT.to_owned()]);
    }
    let mut names: Vec<String> = Vec::new();
    for name in given {
        let name = account_name(name)?;
        // Some file systems do not tell them apart.
        if names.iter().any(|other| other.eq_ignore_ascii_case(name)) {
            return Err(anyhow::anyhow!("--account {name} is named twice")).or_exit(Exit::Usage);
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

/// What each account may use. An error where its streams could not even be made.
fn limits(args: &AuthInitArgs, topology: &TopologyConfig) -> anyhow::Result<Limits> {
    let mut limits = Limits::for_topology(topology);
    limits.connections = args.max_connections;
    limits.subscriptions = args.max_subscriptions;
    if let Some(storage) = &mut limits.storage {
        let bytes = |mib: Option<u64>, default: u64| mib.map_or(default, |mib| mib * MIB);
        storage.memory_bytes = bytes(args.max_memory_mib, storage.memory_bytes);
        storage.file_bytes = bytes(args.max_file_mib, storage.file_bytes);
        storage.streams = args.max_streams.unwrap_or(storage.streams);
        storage.consumers = args.max_consumers.unwrap_or(storage.consumers);
        let (memory, file) = topology.reserved();
        let replicas = topology.replicas as u64;
        for (flag, given, needed) in [
            ("--max-memory-mib", storage.memory_bytes, memory * replicas),
            ("--max-file-mib", storage.file_bytes, file * replicas),
        ] {
            anyhow::ensure!(
                given >= needed,
                "{flag} {}: the streams that a dispatcher makes reserve {} MiB (dispatcher.topology.*_max_bytes)",
                given / MIB,
                needed.div_ceil(MIB)
            );
        }
    }
    Ok(limits)
}

/// One file, with its path inside the folder.
struct File {
    path: PathBuf,
    text: String,
    /// Only its owner may read it.
    secret: bool,
}

impl File {
    fn new(path: impl Into<PathBuf>, text: String) -> Self {
        Self { path: path.into(), text, secret: false }
    }

    fn secret(path: impl Into<PathBuf>, seed: &voxfleet_nats::Secret) -> Self {
        Self { path: path.into(), text: format!("{}\n", seed.reveal()), secret: true }
    }
}

/// `authority`: certificates that a server is known by, for those who come with these keys.
fn make(names: &[String], limits: &Limits, nats: &NatsConfig, authority: Option<&str>) -> anyhow::Result<Vec<File>> {
    let mut files = Vec::new();
    for name in names {
        let mut users = Vec::new();
        for role in Role::ALL {
            let key = keys::make()?;
            let seed = seed_name(role);
            let settings = settings_of(role, name, nats, authority.is_some())?;
            files.push(File::new(Path::new(name).join(format!("{role}.toml")), settings));
            files.push(File::secret(Path::new(name).join(seed), &key.seed));
            users.push((role, key.public));
        }
        if let Some(text) = authority {
            files.push(File::new(Path::new(name).join(AUTHORITY), text.to_owned()));
        }
        let account = Account { name: name.clone(), users, limits: limits.clone() };
        let head = format!("# Account {name}: written by `voxfleet auth init`, for accounts.conf. Holds no secret.\n");
        files.push(File::new(Path::new(name).join("account.conf"), head + &conf::account(&account, &nats.prefix)));
    }
    let admin = keys::make()?;
    let includes: Vec<String> = names.iter().map(|name| format!("include \"{name}/account.conf\"")).collect();
    let head = "# Written by `voxfleet auth init`: who may connect, for a server's `include \"accounts.conf\"`. Holds no secret.\n";
    files.push(File::new("accounts.conf", head.to_owned() + &conf::accounts(&includes, &admin.public)));
    files.push(File::secret("admin.nk", &admin.seed));
    Ok(files)
}

/// The copy of `nats.tls_ca` beside the settings.
const AUTHORITY: &str = "ca.pem";

fn seed_name(role: Role) -> String {
    format!("{role}.nk")
}

/// What a process of that role sets. Files are named by what lies beside these settings: both go to another machine, wherever it
/// keeps them.
fn settings_of(role: Role, account: &str, nats: &NatsConfig, authority: bool) -> anyhow::Result<String> {
    let mut text = format!("# The {role} of account {account}: {}.\n[nats]\n", role.purpose());
    text += "# Beside this file.\n";
    text += &format!("nkey_seed_file = {}\n", serde_json::to_string(&seed_name(role))?);
    text += &format!("inbox_prefix = {}\n", serde_json::to_string(&role.inbox_prefix())?);
    text += &format!("prefix = {}\n", serde_json::to_string(&nats.prefix)?);
    // An address may hold a password, and this file may be given away.
    if nats.urls != NatsConfig::default().urls && !nats.urls.iter().any(|url| url.contains('@')) {
        text += &format!("urls = {}\n", serde_json::to_string(&nats.urls)?);
    }
    if authority {
        text += &format!("tls_ca = {}\n", serde_json::to_string(AUTHORITY)?);
    }
    Ok(text)
}

fn write(dir: &Path, files: &[File]) -> io::Result<()> {
    let name = dir.file_name().ok_or_else(|| io::Error::other("a folder needs a name"))?;
    let parent = dir.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    let begun = parent.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let done = write_all(&begun, files).and_then(|()| fs::rename(&begun, dir));
    if done.is_err() {
        // It holds seeds that nobody uses.
        let _ = fs::remove_dir_all(&begun);
    }
    done
}

fn write_all(dir: &Path, files: &[File]) -> io::Result<()> {
    let private = |dir: &Path| DirBuilder::new().mode(0o700).create(dir);
    private(dir)?;
    for file in files {
        let path = dir.join(&file.path);
        if let Some(parent) = path.parent()
            && !parent.is_dir()
        {
            private(parent)?;
        }
        let mode = if file.secret { 0o600 } else { 0o644 };
        let mut to = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)?;
        to.write_all(file.text.as_bytes())?;
        to.sync_all()?;
    }
    Ok(())
}

fn next_steps(dir: &Path, names: &[String], limits: &Limits, authority: bool) -> String {
    let name = names.first().map_or(ACCOUNT, String::as_str);
    let shown = dir.display();
    let mut text = format!("{shown}: {} of five roles each, and admin.nk for the system's account\n", names.join(", "));
    let files = names.iter().map(|name| format!("{name}/account.conf")).collect::<Vec<_>>().join(", ");
    text += &format!(
        "\n1. The server gets accounts.conf and {files} (no secrets), includes accounts.conf, and reads it:\n"
    );
    text += "     nats-server -t -c nats.conf && nats-server --signal reload\n";
    if let Some(storage) = &limits.storage {
        let count = names.len() as u64;
        let gib = |bytes: u64| (bytes * count) as f64 / (1 << 30) as f64;
        text += &format!(
            "   Its jetstream needs max_file_store of {:.1} GiB and max_memory_store of {:.1} GiB for them, or it does not start.\n",
            gib(storage.file_bytes),
            gib(storage.memory_bytes)
        );
    }
    text += &format!(
        "2. Each machine gets the two files of its role and no others, into one folder: {name}/worker.nk and {name}/worker.toml{}.\n",
        if authority { ", and ca.pem" } else { "" }
    );
    text += &format!("     voxfleet --config {shown}/{name}/worker.toml worker\n");
    text += "   In a container: nats.nkey_seed_file (where it is mounted) and nats.inbox_prefix as it stands in the .toml.\n";
    text += &format!("3. See that they fit: voxfleet --config {shown}/{name}/operator.toml doctor\n");
    text += "4. Keep operator.nk and admin.nk where few get at them. Without TLS nobody needs a key to listen in.";
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn some(names: &[&str]) -> Vec<File> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let limits = Limits::for_topology(&TopologyConfig::default());
        make(&names, &limits, &NatsConfig::default(), Some("a certificate")).expect("files")
    }

    fn text<'a>(files: &'a [File], path: &str) -> &'a str {
        &files.iter().find(|file| file.path == Path::new(path)).expect(path).text
    }

    #[test]
    fn seeds_are_in_their_files_only_and_the_server_knows_their_other_halves() {
        let files = some(&["a", "b"]);
        let open: String = files.iter().filter(|file| !file.secret).map(|file| file.text.as_str()).collect();
        let seeds: Vec<&File> = files.iter().filter(|file| file.secret).collect();
        assert_eq!(seeds.len(), 11, "five roles twice, and the admin");
        for seed in seeds {
            assert!(!open.contains(seed.text.trim()), "{:?}", seed.path);
            let public = keys::public_of(&seed.text).expect("a seed");
            assert_eq!(open.matches(&public).count(), 1, "{:?}", seed.path);
        }
        assert!(text(&files, "accounts.conf").contains("include \"b/account.conf\""));
    }

    #[test]
    fn a_role_reads_its_settings_as_they_are_written() {
        let mut nats = NatsConfig { prefix: "calls".into(), ..NatsConfig::default() };
        let settings = |nats: &NatsConfig| settings_of(Role::Worker, "a", nats, true).expect("text");
        let read: toml::Table = settings(&nats).parse().expect("toml");
        let of = |key: &str| read["nats"][key].as_str().unwrap_or_default().to_owned();
        // Nothing in it is true on one machine only.
        assert_eq!(of("nkey_seed_file"), "worker.nk");
        assert_eq!(text(&some(&["a"]), "a/ca.pem"), "a certificate");
        assert_eq!(
            (of("inbox_prefix"), of("prefix"), of("tls_ca")),
            ("_INBOX_worker".into(), "calls".into(), "ca.pem".into())
        );
        nats.urls = vec!["tls://u:hunter2@hub:4222".into()];
        assert!(!settings(&nats).contains("hunter2"));
        nats.urls = vec!["tls://hub:4222".into()];
        assert!(settings(&nats).contains("urls = [\"tls://hub:4222\"]"));
    }

    #[test]
    fn files_are_for_their_owner_and_nothing_is_written_over() {
        let dir = tempfile::tempdir().expect("folder");
        let to = dir.path().join("new/keys");
        let files = some(&["a"]);
        write(&to, &files).expect("written");
        let mode = |path: &str| fs::metadata(to.join(path)).expect(path).permissions().mode() & 0o777;
        assert_eq!((mode("a/worker.nk"), mode("admin.nk"), mode("a")), (0o600, 0o600, 0o700));
        let before = fs::read(to.join("a/worker.nk")).expect("seed");
        assert!(write(&to, &some(&["a"])).is_err());
        assert_eq!(fs::read(to.join("a/worker.nk")).expect("seed"), before);
        assert_eq!(fs::read_dir(dir.path().join("new")).expect("folder").count(), 1, "nothing half done stays");
    }

    #[test]
    fn names_and_limits_are_checked() {
        let names = |given: &[&str]| account_names(&given.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&[]).expect("a name"), [ACCOUNT]);
        for bad in [&["a", "A"][..], &["SYS"], &["../a"], &[""]] {
            assert!(names(bad).is_err(), "{bad:?}");
        }
    }
}
