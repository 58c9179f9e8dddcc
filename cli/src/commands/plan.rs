//! `voxfleet plan`: which models and how many sessions fit on this machine, or on one that is described.

use serde_json::json;
use voxfleet_schema::fleet::Device;
use voxfleet_store::models::{
    Catalog, ModelKind,
    plan::{PlanOption, Room, Weight, Wish, plan},
};

use super::status::table;
use crate::{
    Context,
    args::PlanArgs,
    config::{Role, Settings},
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

/// A CUDA context on a current GPU, published.
const CONTEXT_MB: u64 = 530;
/// What a session costs the host: four guaranteed MB of audio, and its window in the engine.
const SESSION_MB: u64 = 6;
/// Where no worker can be asked: what one of a small GPU has.
#[cfg(not(feature = "worker"))]
const DEFAULTS: (u64, u64) = (4, 2);

/// The device planned for.
struct Target {
    name: String,
    room: Room,
}

pub(crate) async fn run(args: &PlanArgs, context: &Context) -> anyhow::Result<Exit> {
    let settings = context.configure(&[Role::Models], "error")?.settings;
    let catalog = Catalog::load(settings.models.catalog.as_deref()).or_exit(Exit::Config)?;
    let target = target(args, &settings).await?;
    let (sessions, states) = defaults(&settings);
    let wish = Wish {
        sessions: args.sessions.unwrap_or(sessions),
        states: args.states.unwrap_or(states),
        session_mb: SESSION_MB,
    };
    let whisper = catalog.models().iter().filter(|m| m.kind == ModelKind::Whisper);
    let weights: Vec<Weight> =
        whisper.map(|m| Weight { model: m.name.clone(), weights_mb: m.weights_mb(), state_mb: m.state_mb }).collect();
    let options = plan(target.room, &weights, wish);
    if args.output.json {
        object(&json!({
            "device": target.name, "room": target.room, "sessions": wish.sessions, "states": wish.states, "options": options,
        }))?;
    } else {
        out(&text(&target, wish, &options))?;
    }
    Ok(Exit::Ok)
}

fn defaults(settings: &Settings) -> (u64, u64) {
    #[cfg(feature = "worker")]
    return (u64::from(settings.worker.slots), settings.worker.decode_states as u64);
    #[cfg(not(feature = "worker"))]
    {
        // Only a worker's settings say more.
        let _unread = settings;
        DEFAULTS
    }
}

async fn target(args: &PlanArgs, settings: &Settings) -> anyhow::Result<Target> {
    if let Some(total_mb) = args.device_mb {
        let others_mb = args.others_mb.unwrap_or(0);
        let host = look(settings, true).await.ok();
        let room = Room { total_mb, others_mb, context_mb: CONTEXT_MB, host_mb: host.map(|h| h.free_mb) };
        return Ok(Target { name: format!("a GPU of {total_mb} MB"), room });
    }
    let device = look(settings, false).await?;
    let is_gpu = device.uuid.is_some();
    let host_mb = if is_gpu { look(settings, true).await.ok().map(|host| host.free_mb) } else { None };
    Ok(Target {
        room: Room {
            total_mb: device.total_mb,
            others_mb: args.others_mb.unwrap_or(device.total_mb.saturating_sub(device.free_mb)),
            context_mb: if is_gpu { CONTEXT_MB } else { 0 },
            host_mb,
        },
        name: device.name,
    })
}

/// The device a worker here would use, or the memory of the host.
#[cfg(feature = "worker")]
async fn look(settings: &Settings, host: bool) -> anyhow::Result<Device> {
    use voxfleet_worker::{config::GpuChoice, device};
    let mut config = settings.worker.clone();
    if host {
        config.gpu = GpuChoice::None;
    }
    let looked = tokio::task::spawn_blocking(move || device::look(&config)).await.or_exit(Exit::Internal)?;
    looked.or_exit(Exit::Config)
}

#[cfg(not(feature = "worker"))]
async fn look(_settings: &Settings, _host: bool) -> anyhow::Result<Device> {
    Err(anyhow::anyhow!("this build has no worker and can not look at the device; describe it with --device-mb"))
        .or_exit(Exit::Usage)
}

fn text(target: &Target, wish: Wish, options: &[PlanOption]) -> String {
    let Room { total_mb, others_mb, .. } = target.room;
    let mut text = format!(
        "{}: {total_mb} MB, {others_mb} used by others; {} sessions, {} decode states\n",
        target.name, wish.sessions, wish.states
    );
    let mut rows = vec![["MODEL", "SESSIONS", "USED MB", "UTILIZATION", "RISK"].map(str::to_owned).to_vec()];
    rows.extend(options.iter().map(|option| match option.sessions {
        0 => vec![option.model.clone(), "0".to_owned(), option.used_mb.to_string(), "does not fit".to_owned()],
        sessions => vec![
            option.model.clone(),
            sessions.to_string(),
            option.used_mb.to_string(),
            format!("{:.0} %", option.utilization * 100.0),
            option.risk.as_str().to_owned(),
        ],
    }));
    text.push_str(&table(&rows));
    text.push_str("by memory; whether the device is fast enough, `voxfleet bench` tells");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_says_so() {
        let room = Room { total_mb: 4_000, others_mb: 0, context_mb: CONTEXT_MB, host_mb: None };
        let weights = ["small", "large"].map(|name| Weight {
            model: name.to_owned(),
            weights_mb: if name == "small" { 466 } else { 2_952 },
            state_mb: 386,
        });
        let wish = Wish { sessions: 4, states: 2, session_mb: 6 };
        let target = Target { name: "a GPU".to_owned(), room };
        let text = text(&target, wish, &plan(room, &weights, wish));
        assert!(text.contains("small  4         1792     45 %          low"), "{text}");
        assert!(text.contains("large  0         4254     does not fit"), "{text}");
    }
}
