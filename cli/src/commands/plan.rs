//! `voxfleet plan`: which models and how many sessions fit on the devices here, on a card that is described, or on a
//! fleet of cards.

mod bar;
mod figures;
mod fleet;
mod text;

use serde_json::{Value, json};
use voxfleet_schema::{fleet::Device, plan::Risk};
use voxfleet_store::models::{
    Catalog, Model,
    measured::{DeviceKey, Measured},
    plan::{Card, Needs, Planned, Stance, Tenant, Wish, plan, quality},
};

use self::figures::{Known, On, SESSION_MB};
use crate::{
    Context,
    args::PlanArgs,
    config::{Role, Settings},
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

/// Where no worker can be asked: what one of a small GPU has.
#[cfg(not(feature = "worker"))]
const DEFAULTS: (u64, u64) = (4, 2);

/// What is called so that does not answer.
#[cfg(feature = "worker")]
const UNKNOWN_GPU: &str = "a gpu that does not answer";

/// A card planned for.
struct Target {
    card: Card,
    /// Under which figures of it are kept; none where nobody measured such a card.
    key: Option<DeviceKey>,
    on: On,
    /// What the driver says against it.
    trouble: Option<String>,
    /// What is in use on it may be a running worker's.
    in_use_may_be_ours: bool,
}

/// A device of this machine as it is now; and of what is in use, what engines of workers have, if the driver tells.
type Seen = (Device, Option<u64>);

/// What was found for a card.
struct Found {
    card: Card,
    options: Vec<Planned>,
    /// Variants of models better than the recommended one that are safe too.
    variants: Vec<Planned>,
    trouble: Option<String>,
    in_use_may_be_ours: bool,
}

pub(crate) async fn run(args: &PlanArgs, context: &Context) -> anyhow::Result<Exit> {
    let settings = context.configure(&[Role::Models], "error")?.settings;
    let known = known(&settings)?;
    let (sessions, states) = defaults(&settings);
    let wish = Wish {
        sessions: args.sessions.unwrap_or(sessions),
        states: args.states.unwrap_or(states),
        host_session_mb: SESSION_MB,
    };
    if let Some(path) = &args.fleet {
        return fleet::run(path, args, &known, wish);
    }
    let named = known.named(&args.models).or_exit(Exit::NotFound)?;
    let found: Vec<Found> =
        targets(args, &settings, &known).await?.into_iter().map(|t| find(t, &known, named.as_deref(), wish)).collect();
    if args.output.json {
        object(&as_json(&found, wish))?;
    } else {
        let texts: Vec<String> = found.iter().map(|found| text::card(found, wish)).collect();
        out(&texts.join("\n\n"))?;
    }
    Ok(Exit::Ok)
}

fn known(settings: &Settings) -> anyhow::Result<Known> {
    let catalog = Catalog::load(settings.models.catalog.as_deref()).or_exit(Exit::Config)?;
    #[cfg(feature = "worker")]
    let measured = settings.worker.cache_dir.as_deref().map(Measured::in_cache);
    // Only a worker measures; a build without one plans by what is published.
    #[cfg(not(feature = "worker"))]
    let measured: Option<Measured> = None;
    Ok(Known { catalog, measured, dir: settings.models.dir.clone() })
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

/// Up to which share of a card a plan is safe, and beyond which nothing is loaded: what dispatcher and worker leave free.
fn lines(settings: &Settings) -> (u8, u8) {
    #[cfg(feature = "dispatcher")]
    let safe = 100_u8.saturating_sub(settings.dispatcher.reserve_percent);
    #[cfg(not(feature = "dispatcher"))]
    let safe = voxfleet_store::models::plan::SAFE_PERCENT;
    #[cfg(feature = "worker")]
    let most = 100_u8.saturating_sub(settings.worker.memory_reserve_percent);
    #[cfg(not(feature = "worker"))]
    let most = voxfleet_store::models::plan::MOST_PERCENT;
    #[cfg(not(any(feature = "dispatcher", feature = "worker")))]
    let _unread = settings;
    (safe, most)
}

async fn targets(args: &PlanArgs, settings: &Settings, known: &Known) -> anyhow::Result<Vec<Target>> {
    let (safe_percent, most_percent) = lines(settings);
    if let Some(gpu) = &args.gpu {
        let card = Card {
            name: gpu.name.clone(),
            total_mb: gpu.total_mb,
            tenants: args.tenants.clone(),
            safe_percent,
            most_percent,
            // It is in some other machine.
            host_mb: None,
        };
        let key = known.described(&gpu.name, gpu.total_mb);
        return Ok(vec![Target { card, key, on: On::Gpu, trouble: None, in_use_may_be_ours: false }]);
    }
    let devices = look(settings).await?;
    let host_mb = match devices.iter().any(|(device, _)| device.uuid.is_some()) {
        true => look_at_host(settings).await?,
        false => None,
    };
    let target = |(device, engines_mb): Seen| {
        let on = if device.uuid.is_some() { On::Gpu } else { On::Cpu };
        // What is planned takes the place of what our engines hold.
        let others_mb = device.total_mb.saturating_sub(device.free_mb).saturating_sub(engines_mb.unwrap_or(0));
        let in_use_may_be_ours = engines_mb.is_none() && others_mb > 0 && device.trouble.is_none();
        let now = (others_mb > 0).then(|| Tenant { name: "in use now".to_owned(), mb: others_mb });
        let key = DeviceKey { name: device.name.clone(), total_mb: device.total_mb };
        let tenants = now.into_iter().chain(args.tenants.iter().cloned()).collect();
        let host_mb = host_mb.filter(|_| on == On::Gpu);
        let trouble = device.trouble.map(|t| t.message);
        let (name, total_mb) = (device.name, device.total_mb);
        let card = Card { name, total_mb, tenants, safe_percent, most_percent, host_mb };
        Target { card, key: Some(key), on, trouble, in_use_may_be_ours }
    };
    Ok(devices.into_iter().map(target).collect())
}

/// The devices that workers here would use: each GPU, unless the settings name one, or the host.
#[cfg(feature = "worker")]
async fn look(settings: &Settings) -> anyhow::Result<Vec<Seen>> {
    use voxfleet_worker::{
        config::GpuChoice,
        device::{Survey, survey, takes_gpus},
    };
    let all = settings.worker.gpu == GpuChoice::Auto && takes_gpus(&settings.worker);
    let library = settings.worker.nvml_library.clone().filter(|_| all);
    let surveyed = match all {
        true => tokio::task::spawn_blocking(move || survey(library.as_deref())).await.or_exit(Exit::Internal)?.ok(),
        false => None,
    };
    let Some(Survey { devices, troubles, .. }) = surveyed.filter(|survey| !survey.devices.is_empty()) else {
        // The one that is named, or the host in place of what is not there.
        return Ok(vec![look_at(settings, settings.worker.gpu.clone()).await?]);
    };
    let mut seen = Vec::new();
    for listed in devices {
        seen.push(look_at(settings, GpuChoice::Uuid(listed.uuid)).await?);
    }
    // Nobody can say what they are.
    seen.extend(
        troubles.into_iter().map(|trouble| {
            (Device { name: UNKNOWN_GPU.to_owned(), trouble: Some(trouble), ..Device::default() }, None)
        }),
    );
    Ok(seen)
}

#[cfg(feature = "worker")]
async fn look_at(settings: &Settings, gpu: voxfleet_worker::config::GpuChoice) -> anyhow::Result<Seen> {
    let config = voxfleet_worker::WorkerConfig { gpu, ..settings.worker.clone() };
    let looked = tokio::task::spawn_blocking(move || voxfleet_worker::device::look_apart(&config)).await;
    looked.or_exit(Exit::Internal)?.map_err(|error| {
        // A device that does not answer is no wrong setting.
        let exit = if error.class().is_some() { Exit::Failure } else { Exit::Config };
        crate::exit::coded(exit, error.into())
    })
}

/// Free memory of the host, for the buffers of sessions.
#[cfg(feature = "worker")]
async fn look_at_host(settings: &Settings) -> anyhow::Result<Option<u64>> {
    Ok(Some(look_at(settings, voxfleet_worker::config::GpuChoice::None).await?.0.free_mb))
}

#[cfg(not(feature = "worker"))]
async fn look(_settings: &Settings) -> anyhow::Result<Vec<Seen>> {
    Err(anyhow::anyhow!("this build has no worker and can not look at the device; describe it with --gpu NAME:SIZE"))
        .or_exit(Exit::Usage)
}

#[cfg(not(feature = "worker"))]
async fn look_at_host(_settings: &Settings) -> anyhow::Result<Option<u64>> {
    Ok(None)
}

fn find(target: Target, known: &Known, named: Option<&[&Model]>, wish: Wish) -> Found {
    let Target { card, key, on, trouble, in_use_may_be_ours } = target;
    if card.total_mb == 0 {
        return Found { card, options: Vec::new(), variants: Vec::new(), trouble, in_use_may_be_ours };
    }
    let needs =
        |models: &[&Model]| -> Vec<Needs> { models.iter().map(|model| known.needs(model, key.as_ref(), on)).collect() };
    // What is in the folder here says nothing of a card elsewhere.
    let here = card.host_mb.is_some() || on == On::Cpu;
    let options = plan(&card, &needs(&named.map_or_else(|| known.usual(here), <[&Model]>::to_vec)), wish);
    let variants = if named.is_some() { Vec::new() } else { variants(&card, &options, &needs, known, wish) };
    Found { card, options, variants, trouble, in_use_may_be_ours }
}

/// Of those that know many languages, for one language more is worth more than the next size.
fn variants(
    card: &Card,
    options: &[Planned],
    needs: &dyn Fn(&[&Model]) -> Vec<Needs>,
    known: &Known,
    wish: Wish,
) -> Vec<Planned> {
    let best = options.iter().find(|o| o.stance == Some(Stance::Recommended));
    let shown = |model: &Model| options.iter().any(|o| o.option.model == model.name);
    // large-v3 needs the same memory and replaced it.
    let superseded = |model: &Model| model.name.starts_with("large-v2");
    let others: Vec<&Model> = known.whisper().filter(|m| m.multilingual && !shown(m) && !superseded(m)).collect();
    let better = |o: &Planned| best.is_none_or(|best| quality(&o.figures) < quality(&best.figures));
    let mut variants = plan(card, &needs(&others), wish);
    variants.retain(|o| o.option.risk == Risk::Safe && o.option.sessions == wish.sessions && better(o));
    variants.sort_by(|a, b| quality(&a.figures).cmp(&quality(&b.figures)));
    variants
}

fn as_json(found: &[Found], wish: Wish) -> Value {
    let one = |found: &Found| {
        json!({
            "device": found.card.name, "card": found.card, "trouble": found.trouble,
            "in_use_may_be_ours": found.in_use_may_be_ours, "sessions": wish.sessions,
            "states": wish.states, "options": found.options, "variants": found.variants,
        })
    };
    let mut all: Vec<Value> = found.iter().map(one).collect();
    let mut first = if all.is_empty() { json!({}) } else { all.remove(0) };
    // Machines with one device need not know that there are others.
    first["further"] = Value::Array(all);
    first
}

#[cfg(test)]
mod tests;
