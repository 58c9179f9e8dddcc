//! `voxfleet config check|show`.

use std::path::Path;

use serde_json::json;

use crate::{
    Context,
    args::{ConfigArgs, ConfigCommand},
    config::{Role, SEARCH, load, load_configured, show::table},
    env::ProcessEnv,
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

pub(crate) fn run(args: &ConfigArgs, context: &Context) -> anyhow::Result<Exit> {
    match &args.what {
        ConfigCommand::Check(check) => {
            let search = search();
            let result = if check.roles.is_empty() {
                load_configured(&context.overrides, &ProcessEnv, &search)
            } else {
                load(&context.overrides, &ProcessEnv, &search, &check.roles).map(|l| (l, check.roles.clone()))
            };
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
            let loaded = load(&context.overrides, &ProcessEnv, &search(), &[]).or_exit(Exit::Config)?;
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

fn search() -> Vec<&'static Path> {
    SEARCH.iter().map(Path::new).collect()
}
