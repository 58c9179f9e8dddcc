//! Hosts and their units, for pages that say `ssh HOST systemctl ...`: the same words, with the processes of a test's fleet in
//! place of systemd's. `d1`, `d2` run dispatchers, `w1`, `w2` workers, `n1` a nats-server.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use voxfleet_harness::fleet::Fleet;

use crate::pages::{Block, Shell};

/// How long a unit may take to end: a worker hands over what it has.
const END: Duration = Duration::from_secs(40);

/// `ssh HOST WORDS`: the words by a shell of one's own that knows where it is.
const SSH: &str = "#!/bin/bash\nexport UNIT_HOST=$1\nshift\nexec bash -c \"$*\"\n";

/// Leaves a note for the test and waits for its answer, an exit code.
const SYSTEMCTL: &str = r#"#!/bin/bash
note=$(mktemp -p "$UNITS")
printf '%s\n' "$UNIT_HOST" "$@" > "$note"
mv "$note" "$note.asked"
until [ -e "$note.done" ]; do sleep 0.02; done
exit "$(cat "$note.done")"
"#;

/// Puts both commands in front of the system's, and says where each host's settings are.
pub(crate) fn install(shell: &mut Shell) -> Result<()> {
    let (bin, units, settings) = (shell.path().join("bin"), shell.path().join("units"), shell.path().join("etc"));
    for folder in [&bin, &units, &settings] {
        std::fs::create_dir_all(folder)?;
    }
    for (name, text) in [("ssh", SSH), ("systemctl", SYSTEMCTL)] {
        let path = bin.join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    shell.set("UNITS", &units.display().to_string());
    shell.set("SETTINGS", &settings.display().to_string());
    Ok(())
}

/// Runs a block of a page; what it asks of units is done to this fleet.
pub(crate) async fn run(shell: &Shell, fleet: &mut Fleet, block: &Block) -> Result<String> {
    tokio::select! {
        said = shell.run(block) => said,
        failed = serve(shell.path(), fleet) => match failed {
            Err(error) => Err(error).with_context(|| block.commands.clone()),
            Ok(never) => match never {},
        },
    }
}

async fn serve(dir: &Path, fleet: &mut Fleet) -> Result<std::convert::Infallible> {
    loop {
        for asked in notes(&dir.join("units"))? {
            let text = std::fs::read_to_string(&asked)?;
            let words: Vec<&str> = text.lines().collect();
            let [host, verb, unit] = words[..] else { bail!("a test knows no systemctl {words:?}") };
            read_settings(&dir.join("etc/dispatcher.env"), fleet)?;
            act(fleet, host, verb, unit).await.with_context(|| format!("{host}: systemctl {verb} {unit}"))?;
            std::fs::remove_file(&asked)?;
            // Written under another name first: whoever waits must not read half of it.
            let (draft, done) = (asked.with_extension("draft"), asked.with_extension("done"));
            std::fs::write(&draft, "0")?;
            std::fs::rename(draft, done)?;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn notes(folder: &Path) -> Result<Vec<PathBuf>> {
    let all = std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    Ok(all.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "asked")).collect())
}

/// `VOXFLEET__A__B=value` is a setting of whatever is started from now on.
fn read_settings(file: &Path, fleet: &mut Fleet) -> Result<()> {
    for line in std::fs::read_to_string(file).unwrap_or_default().lines() {
        let (name, value) = line.split_once('=').with_context(|| format!("{line:?} sets nothing"))?;
        let name = name.strip_prefix("VOXFLEET__").with_context(|| format!("{name} is no setting"))?;
        fleet.set_later(&name.to_lowercase().replace("__", "."), value);
    }
    Ok(())
}

async fn act(fleet: &mut Fleet, host: &str, verb: &str, unit: &str) -> Result<()> {
    let number = |kind: char| -> Result<usize> {
        let number: usize = host.strip_prefix(kind).with_context(|| format!("{host} runs no {unit}"))?.parse()?;
        number.checked_sub(1).context("hosts are counted from 1")
    };
    let (stops, starts) = match verb {
        "restart" => (true, true),
        "stop" => (true, false),
        "start" => (false, true),
        other => bail!("{other} is not tested"),
    };
    if unit == "nats-server" {
        let server = fleet.server_at(number('n')?)?;
        if stops {
            server.shut_down().await?;
        }
        if starts {
            server.start_again().await?;
        }
    } else if unit == "voxfleet-dispatcher" {
        let i = number('d')?;
        // One that is dead already has nothing left to stop.
        if stops && fleet.dispatchers[i].ended().is_none() {
            let ended = fleet.dispatchers[i].terminate(END).await?;
            ensure!(ended.success(), "the dispatcher ended with {ended}");
        }
        if starts {
            fleet.restart_dispatcher(i)?;
        }
    } else if unit.starts_with("voxfleet-worker@") {
        let i = number('w')?;
        if stops {
            let ended = fleet.workers[i].terminate(END).await?;
            ensure!(ended.success(), "the worker ended with {ended}");
        }
        if starts {
            fleet.restart_worker(i)?;
        }
    } else {
        bail!("there is no unit {unit}");
    }
    Ok(())
}
