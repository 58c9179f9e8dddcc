//! `voxfleet config check|show`.

use std::path::Path;

use serde_json::json;

use crate::{
    Context,
    args::{ConfigArgs, ConfigCommand},
    config::{ConfigProblems, Loaded, Role, SEARCH, load, show::table},
    env::ProcessEnv,
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

pub(crate) fn run(args: &ConfigArgs, context: &Context) -> anyhow::Result<Exit> {
    match &args.what {
        ConfigCommand::Check(check) => {
            let result = read(context, &[]).and_then(|loaded| {
                let roles = if check.roles.is_empty() { configured(&loaded) } else { check.roles.clone() };
                read(context, &roles).map(|loaded| (loaded, roles))
            });
            match result {
                Ok((loaded, roles)) => {
                    let checked: Vec<&str> = std::iter::once("nats")
                        .chain(roles.iter().filter(|r| **r != Role::Nats).map(|r| r.as_str()))
                        .collect();
                    if check.output.json {
                        object(&json!({"ok": true, "file": loaded.file, "checked": checked, "problems": []}))?;
                    } else {
                        let file = loaded.file.map_or_else(|| "no file".to_owned(), |f| f.display().to_string());
                        out(&format!("ok: {} ({file})", checked.join(", ")))?;
                    }
                    Ok(Exit::Ok)
                }
                Err(problems) if check.output.json => {
                    object(&json!({"ok": false, "problems": problems.problems}))?;
                    Ok(Exit::Config)
                }
                Err(problems) => Err(problems).or_exit(Exit::Config),
            }
        }
        ConfigCommand::Show(output) => {
            let loaded = read(context, &[]).or_exit(Exit::Config)?;
            let rows = loaded.rows();
            if output.json {
                object(&json!({"file": loaded.file, "settings": rows}))?;
            } else {
                out(table(&rows).trim_end())?;
            }
            Ok(Exit::Ok)
        }
    }
}

fn read(context: &Context, roles: &[Role]) -> Result<Loaded, ConfigProblems> {
    let search: Vec<&Path> = SEARCH.iter().map(Path::new).collect();
    load(&context.overrides, &ProcessEnv, &search, roles)
}

/// The parts that somebody configured here: a machine that runs no worker needs no model.
fn configured(loaded: &Loaded) -> Vec<Role> {
    use clap::ValueEnum as _;
    Role::value_variants().iter().copied().filter(|role| loaded.mentions(role.as_str())).collect()
}
