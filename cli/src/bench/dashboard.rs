//! What looking costs: scrapes of a large fleet, and pages that stay open.
//!
//! One dispatcher, and workers that only say that they are there ([`voxfleet_harness::pretended`]). Its CPU time is read
//! without anybody looking, with one page and with many; the same machine carries server, dispatcher, workers and pages, so the
//! shares are those of one core here. A page is what a browser asks for: its files, the fleet, and the stream of events.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use voxfleet_harness::{fleet::Fleet, pretended::Pretended, wait::eventually};
use voxfleet_http::probe::Probe;

use super::{
    processes::{cpu_seconds, first_pids},
    progress, rounded, usage,
};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench dashboard
  voxfleet bench dashboard --gpus 400 --sessions 5000 --hold")]
pub(crate) struct DashboardArgs {
    /// Workers that only say that they are there
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    gpus: usize,
    /// Open sessions
    #[arg(long, default_value_t = 5_000, value_name = "N")]
    sessions: usize,
    /// Pages that stay open
    #[arg(long, default_value_t = 50, value_name = "N")]
    viewers: usize,
    /// Partials in a second, of all sessions together
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    partials: usize,
    /// Length of each stretch
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    seconds: u64,
    /// Scrapes of /metrics
    #[arg(long, default_value_t = 20, value_name = "N")]
    scrapes: usize,
    /// Measure nothing: print the address and stay until Ctrl-C
    #[arg(long)]
    hold: bool,
}

/// Until all are heard and all sessions assigned.
const READY: Duration = Duration::from_secs(240);
const ASK: Duration = Duration::from_secs(10);
const FIRST: Duration = Duration::from_secs(20);
/// Interest in a board ends after 40 s: nobody is taken for a viewer after that.
const FORGOTTEN: Duration = Duration::from_secs(45);

pub(super) async fn run(args: DashboardArgs) -> Result<Value> {
    usage(args.gpus >= 1 && args.viewers >= 1 && args.seconds >= 2 && args.scrapes >= 1, "nothing to measure")?;
    let slots = args.sessions.div_ceil(args.gpus).max(1) as u32 + 1;
    let fleet = Fleet::builder().workers(0).set("dispatcher.http.listen", "127.0.0.1:0").start().await?;
    let url = fleet.dispatchers.first().context("no dispatcher")?.http_url().await?;
    let pretended = Pretended::new(fleet.client(), args.gpus, slots);
    let stop = CancellationToken::new();
    let mut acting = JoinSet::new();
    acting.spawn({
        let (pretended, stop) = (pretended.clone(), stop.clone());
        async move { pretended.run(args.partials, stop).await }
    });
    progress(&format!("{} workers that pretend, {} sessions", args.gpus, args.sessions));
    let begun = Instant::now();
    let all_heard = || async {
        let fleet = Probe::default().get(&format!("{url}/api/fleet"), ASK).await.ok()?;
        let fleet: Value = serde_json::from_slice(&fleet.body).ok()?;
        (fleet["totals"]["alive"].as_u64()? as usize == args.gpus).then_some(())
    };
    eventually("every worker alive", READY, all_heard).await?;
    pretended.open(args.sessions).await?;
    eventually("every session assigned", READY, || async { (pretended.sessions() >= args.sessions).then_some(()) })
        .await?;
    progress(&format!("all there after {:.0} s", begun.elapsed().as_secs_f64()));
    let found = match args.hold {
        true => {
            progress(&format!("{url} until Ctrl-C"));
            std::future::pending::<()>().await;
            Value::Null
        }
        false => measure(&args, &fleet, &url).await?,
    };
    // Nobody has ended before he was told to, or what was measured is nothing.
    if let Some(ended) = acting.try_join_next() {
        anyhow::bail!("the workers have stopped pretending: {ended:?}");
    }
    stop.cancel();
    while let Some(ended) = acting.join_next().await {
        ended??;
    }
    Ok(found)
}

async fn measure(args: &DashboardArgs, fleet: &Fleet, url: &str) -> Result<Value> {
    let [_, dispatcher, ..] = first_pids(fleet);
    let stretch = Duration::from_secs(args.seconds);
    let cores = |before: f64, took: Duration| rounded((cpu_seconds(dispatcher) - before) / took.as_secs_f64());

    progress("nobody looks");
    tokio::time::sleep(FORGOTTEN).await;
    let (before, begun) = (cpu_seconds(dispatcher), Instant::now());
    tokio::time::sleep(stretch).await;
    let alone = cores(before, begun.elapsed());

    progress(&format!("{} scrapes", args.scrapes));
    let (mut took_ms, mut bytes) = (Vec::new(), 0);
    // The first one after a while waits for the loop's next tick: told by itself.
    let first = scrape(url).await?;
    let before = cpu_seconds(dispatcher);
    for _ in 0..args.scrapes {
        let (took, answer) = scrape(url).await?;
        took_ms.push(took);
        bytes = answer;
    }
    let scrape_cpu_ms = (cpu_seconds(dispatcher) - before) * 1e3 / args.scrapes as f64;
    took_ms.sort_by(f64::total_cmp);
    let at = |share: f64| took_ms[((took_ms.len() - 1) as f64 * share).round() as usize];

    let mut rows = Vec::new();
    for viewers in [1, args.viewers] {
        progress(&format!("{viewers} pages open for {} s", args.seconds));
        let mut pages = JoinSet::new();
        for _ in 0..viewers {
            let url = url.to_owned();
            pages.spawn(async move { page(&url, stretch).await });
        }
        let (before, begun) = (cpu_seconds(dispatcher), Instant::now());
        let mut seen = Vec::new();
        while let Some(page) = pages.join_next().await {
            seen.push(page??);
        }
        let with = cores(before, begun.elapsed());
        let most = |figure: fn(&Seen) -> f64| seen.iter().map(figure).fold(0.0, f64::max);
        let mean = |figure: fn(&Seen) -> f64| seen.iter().map(figure).sum::<f64>() / seen.len() as f64;
        rows.push(json!({
            "viewers": viewers,
            "dispatcher_cores": with,
            "dispatcher_cores_more": rounded(with - alone),
            "first_fleet_ms_max": rounded(most(|seen| seen.first_ms)),
            "first_fleet_bytes": mean(|seen| seen.first_bytes as f64).round(),
            "bytes_per_s_each": mean(|seen| seen.bytes_per_s).round(),
        }));
    }
    Ok(json!({
        "gpus": args.gpus,
        "sessions": args.sessions,
        "partials_per_s": args.partials,
        "dispatcher_cores_alone": alone,
        "metrics": {
            "bytes": bytes, "first_ms": rounded(first.0), "p50_ms": rounded(at(0.5)), "p95_ms": rounded(at(0.95)),
            "cpu_ms": rounded(scrape_cpu_ms),
        },
        "page_bytes": files(url).await?,
        "rows": rows,
    }))
}

/// How long one took, in ms, and how much it was.
async fn scrape(url: &str) -> Result<(f64, usize)> {
    let begun = Instant::now();
    let answer = Probe::default().get(&format!("{url}/metrics"), ASK).await?;
    ensure!(answer.status == 200, "/metrics answers {}", answer.status);
    Ok((begun.elapsed().as_secs_f64() * 1e3, answer.body.len()))
}

/// The page's own files, by what its index names.
async fn files(url: &str) -> Result<usize> {
    let index = Probe::default().get(&format!("{url}/"), ASK).await?.body;
    let text = String::from_utf8_lossy(&index).into_owned();
    let mut bytes = index.len();
    for path in
        text.split('"').filter(|word| word.starts_with('/') && (word.ends_with(".js") || word.ends_with(".css")))
    {
        bytes += Probe::default().get(&format!("{url}{path}"), ASK).await?.body.len();
    }
    Ok(bytes)
}

/// What one open page was sent.
struct Seen {
    /// From the connection to the whole fleet.
    first_ms: f64,
    first_bytes: usize,
    bytes_per_s: f64,
}

/// Follows the fleet and the first page of sessions for `stretch`.
async fn page(url: &str, stretch: Duration) -> Result<Seen> {
    let host = url.strip_prefix("http://").context("not http")?;
    let begun = Instant::now();
    let mut stream = TcpStream::connect(host).await?;
    let request = format!("GET /api/stream?limit=50 HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let (mut buffer, mut bytes, mut head) = (vec![0; 1 << 16], 0, Vec::new());
    let mut first = None;
    while begun.elapsed() < stretch {
        let left = stretch.saturating_sub(begun.elapsed());
        let Ok(read) = tokio::time::timeout(left, stream.read(&mut buffer)).await else { break };
        let read = read?;
        ensure!(read > 0, "the stream ended");
        bytes += read;
        if first.is_none() {
            head.extend_from_slice(&buffer[..read]);
            ensure!(begun.elapsed() < FIRST, "no fleet came: {}", String::from_utf8_lossy(&head));
            // An event ends with an empty line; chunks of the transfer lie between.
            let text = String::from_utf8_lossy(&head);
            if text.find("event: fleet").is_some_and(|at| text[at..].contains("\n\n")) {
                first = Some((begun.elapsed().as_secs_f64() * 1e3, bytes));
            }
        }
    }
    let (first_ms, first_bytes) = first.context("no fleet came")?;
    let rest = stretch.as_secs_f64() - first_ms / 1e3;
    Ok(Seen { first_ms, first_bytes, bytes_per_s: (bytes - first_bytes) as f64 / rest })
}
