//! One trace per session or job, from the producer's context to the final that whoever reads it goes on with: what a collector
//! sees of a real fleet, and that a fleet without one, or with a bad one, does its work as ever.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::{
    audio, checker,
    collector::{Collector, Manner, Seen},
    fleet::{self, Fleet, FleetBuilder},
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_http::probe::Probe;
use voxfleet_nats::api::{self, Endpoint};
use voxfleet_schema::{
    job::{JobState, Submitted},
    trace::TraceContext,
};

use crate::jobs_fleet;

const SOON: Duration = Duration::from_secs(30);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PRODUCERS: &str = "b7ad6b7169203331";

fn context(sampled: bool) -> String {
    format!("00-{TRACE}-{PRODUCERS}-0{}", u8::from(sampled))
}

fn traced(collector: &Collector) -> FleetBuilder {
    Fleet::builder().set("tracing.endpoint", collector.url())
}

/// Speaks, with these headers on the first chunk, and ends.
async fn speak(fleet: &Fleet, session: &str, headers: &[(&str, &str)]) -> Result<()> {
    let pcm = audio::bursts(5, 6.0);
    let mut producer = Producer::named(fleet.js(), session, "s1");
    producer.stream_with(&pcm, 200, Pace::AsFastAsPossible, headers).await?;
    producer.end().await?;
    fleet.wait_end(session, SOON).await.with_context(|| fleet.logs())?;
    Ok(())
}

/// The traceparent of each final, as trace and span.
async fn headers(fleet: &Fleet, kind: &str, id: &str) -> Result<Vec<Option<(String, String)>>> {
    let finals = checker::finals_of(&fleet.js(), kind, id).await?;
    let read = |text: &String| {
        let mut parts = text.split('-').skip(1).map(str::to_owned);
        Some((parts.next()?, parts.next()?))
    };
    Ok(finals.iter().map(|f| f.headers.get("traceparent").and_then(read)).collect())
}

/// Waits until the collector has seen `count` spans of this name.
async fn seen(collector: &Collector, name: &str, count: usize) -> Result<Vec<Seen>> {
    let found = eventually(format!("{count} spans called {name}"), SOON, || async {
        let found: Vec<Seen> = collector.seen().into_iter().filter(|span| span.name == name).collect();
        (found.len() >= count).then_some(found)
    });
    found.await.with_context(|| format!("{:#?}", collector.seen()))
}

/// Every span hangs below another one of its trace, or below `root`.
fn hangs_together(spans: &[Seen], trace: &str, root: &str) -> Result<()> {
    let ours: Vec<&Seen> = spans.iter().filter(|span| span.trace == trace).collect();
    let ids: BTreeSet<&str> = ours.iter().map(|span| span.span.as_str()).collect();
    ensure!(ids.len() == ours.len(), "an id is used twice: {ours:#?}");
    for span in &ours {
        ensure!(span.parent == root || ids.contains(span.parent.as_str()), "{span:?} hangs on nothing: {ours:#?}");
        ensure!(span.start_ns <= span.end_ns && span.start_ns > 1_600_000_000_000_000_000, "{span:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_with_its_producers_trace_and_hands_it_on() -> Result<()> {
    let _place = fleet::place().await;
    let collector = Collector::start(Manner::Takes).await?;
    let fleet = traced(&collector).workers(1).start().await?;
    speak(&fleet, "call-1", &[("traceparent", &context(true))]).await?;
    let finals = headers(&fleet, "session", "call-1").await?;
    seen(&collector, "session.close", 1).await?;
    let told = seen(&collector, "final", finals.len()).await?;
    let spans = collector.seen();
    hangs_together(&spans, TRACE, PRODUCERS)?;
    ensure!(spans.iter().all(|span| span.trace == TRACE), "another trace: {spans:#?}");
    let one =
        |name: &str| spans.iter().find(|span| span.name == name).with_context(|| format!("no {name}: {spans:#?}"));
    let (open, assign, take) = (one("session.open")?, one("session.assign")?, one("session.take")?);
    ensure!(open.parent == PRODUCERS && open.service == "voxfleet-dispatcher" && open.attribute("session") == "call-1");
    ensure!(assign.parent == open.span && take.parent == assign.span, "{assign:?} {take:?}");
    ensure!(
        take.service == "voxfleet-worker"
            && take.attribute("gpu") == assign.attribute("gpu")
            && take.attribute("epoch") == "1"
    );
    for (n, header) in finals.iter().enumerate() {
        let (trace, span) = header.as_ref().context("a final without a trace")?;
        let told = told.iter().find(|told| told.span == *span).with_context(|| format!("final {n}: {told:#?}"))?;
        ensure!(*trace == TRACE && told.parent == assign.span && told.attribute("index") == n.to_string(), "{told:?}");
        ensure!(!told.attribute("model").is_empty() && told.attributes.contains_key("queued_ms"), "{told:?}");
        let parts: BTreeSet<&str> =
            spans.iter().filter(|part| part.parent == *span).map(|part| part.name.as_str()).collect();
        ensure!(parts == BTreeSet::from(["queued", "decode", "publish"]), "{parts:?}");
    }
    Ok(())
}

/// Speaks in two halves; between them `between` happens, once a final of the first half stands.
async fn speak_around<F: AsyncFnOnce(&mut Fleet, &str) -> Result<()>>(
    fleet: &mut Fleet,
    session: &str,
    headers: &[(&str, &str)],
    between: F,
) -> Result<()> {
    let mut producer = Producer::named(fleet.js(), session, "s1");
    producer.stream_with(&audio::bursts(6, 6.0), 200, Pace::AsFastAsPossible, headers).await?;
    let js = fleet.js();
    let first = eventually("a first final", SOON, || async {
        checker::finals(&js, session).await.ok()?.first()?.json["gpu_id"].as_str().map(str::to_owned)
    });
    let gpu = first.await.with_context(|| fleet.logs())?;
    between(fleet, &gpu).await?;
    producer.stream(&audio::bursts(7, 6.0), 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    fleet.wait_end(session, SOON).await.with_context(|| fleet.logs())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_over_goes_on_with_the_trace() -> Result<()> {
    let _place = fleet::place().await;
    let collector = Collector::start(Manner::Takes).await?;
    let mut fleet = traced(&collector).workers(2).start().await?;
    speak_around(&mut fleet, "moved", &[("traceparent", &context(true))], async |fleet, gpu| {
        // What it did before is told half a second later, if it lives that long.
        seen(&collector, "session.take", 1).await?;
        let holder = fleet.workers.iter_mut().find(|worker| worker.gpu_id() == gpu).context("its worker")?;
        holder.kill9()?;
        seen(&collector, "session.move", 1).await?;
        // The key carries the trace: the next dispatcher knows no more than that.
        fleet.dispatchers[0].kill9()?;
        fleet.restart_dispatcher(0)?;
        Ok(())
    })
    .await?;
    seen(&collector, "session.close", 1).await?;
    let spans = collector.seen();
    ensure!(spans.iter().all(|span| span.trace == TRACE), "another trace: {spans:#?}");
    let of = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let gpus: BTreeSet<&str> = of("session.take").iter().map(|span| span.attribute("gpu")).collect();
    ensure!(gpus.len() == 2, "{gpus:?}: {:#?}", of("session.take"));
    let moved = of("session.move")[0];
    ensure!(moved.attribute("why") == "dead" && moved.attribute("from_gpu") != moved.attribute("gpu"), "{moved:?}");
    let assigns = of("session.assign");
    let second = assigns.iter().find(|span| span.attribute("epoch") == "2").with_context(|| format!("{assigns:#?}"))?;
    ensure!(second.attribute("gpu") == moved.attribute("gpu"), "{second:?}");
    let late: Vec<_> = of("final").into_iter().filter(|span| span.attribute("epoch") == "2").collect();
    ensure!(!late.is_empty() && late.iter().all(|span| span.parent == second.span), "{late:#?}");
    let finals = headers(&fleet, "session", "moved").await?;
    ensure!(finals.iter().flatten().filter(|(trace, _)| trace == TRACE).count() == finals.len(), "{finals:?}");
    // Of the first worker's last moments something may be missing, of everything else nothing.
    let ids: BTreeSet<&str> = spans.iter().map(|span| span.span.as_str()).chain([PRODUCERS]).collect();
    let lost = spans.iter().filter(|span| !ids.contains(span.parent.as_str()));
    ensure!(lost.clone().all(|span| span.attribute("epoch") != "2"), "{:#?}", lost.collect::<Vec<_>>());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_one_trace_from_its_submit_to_its_aggregate() -> Result<()> {
    let _place = fleet::place().await;
    let collector = Collector::start(Manner::Takes).await?;
    let fleet = traced(&collector).workers(1).start().await?;
    let nats = jobs_fleet::connect(&fleet).await?;
    let request = jobs_fleet::request("rec-1", audio::bursts(8, 6.0).wav())?;
    let trace = TraceContext::parse(&context(true)).context("a context")?;
    let _: Submitted = api::request_traced(&nats, Endpoint::JobSubmit, &request, Some(&trace), SOON).await?;
    let status = jobs_fleet::ended(&nats, &fleet, "rec-1").await?;
    ensure!(status.record.state == JobState::Done, "{status:?}");
    for name in ["job.end", "job.run", "job.publish"] {
        seen(&collector, name, 1).await?;
    }
    let finals = headers(&fleet, "job", "rec-1").await?;
    let told = seen(&collector, "final", finals.len()).await?;
    let spans = collector.seen();
    hangs_together(&spans, TRACE, PRODUCERS)?;
    ensure!(spans.iter().all(|span| span.trace == TRACE), "another trace: {spans:#?}");
    let one =
        |name: &str| spans.iter().find(|span| span.name == name).with_context(|| format!("no {name}: {spans:#?}"));
    let (submit, assign) = (one("job.submit")?, one("job.assign")?);
    ensure!(submit.parent == PRODUCERS && assign.parent == submit.span, "{submit:?} {assign:?}");
    for name in ["job.run", "job.fetch", "job.decode_audio", "job.transcribe", "job.publish"] {
        let span = one(name)?;
        ensure!(span.parent == assign.span && span.attribute("job") == "rec-1" && span.error.is_none(), "{span:?}");
    }
    ensure!(one("job.end")?.attribute("state") == "done" && one("job.end")?.parent == submit.span);
    for header in finals {
        let (trace, span) = header.context("a final without a trace")?;
        ensure!(trace == TRACE && told.iter().any(|told| told.span == span && told.parent == assign.span));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_producers_trace_each_session_has_one_of_its_own() -> Result<()> {
    let _place = fleet::place().await;
    let collector = Collector::start(Manner::Takes).await?;
    let fleet = traced(&collector).workers(1).start().await?;
    // What is no context is none: neither a mistake nor a trace.
    speak(&fleet, "own-1", &[]).await?;
    speak(&fleet, "own-2", &[("traceparent", "00-nonsense")]).await?;
    seen(&collector, "session.close", 2).await?;
    let mut traces = BTreeSet::new();
    for session in ["own-1", "own-2"] {
        let finals = headers(&fleet, "session", session).await?;
        let told: BTreeSet<String> = finals.into_iter().flatten().map(|(trace, _)| trace).collect();
        let [trace] = &told.into_iter().collect::<Vec<_>>()[..] else { anyhow::bail!("{session} has not one trace") };
        seen(&collector, "final", 2).await?;
        hangs_together(&collector.seen(), trace, "")?;
        let opened = seen(&collector, "session.open", 2).await?;
        ensure!(opened.iter().any(|span| span.trace == *trace && span.attribute("session") == session), "{opened:#?}");
        traces.insert(trace.clone());
    }
    ensure!(traces.len() == 2, "both are {traces:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_producer_did_not_sample_is_passed_on_and_not_told() -> Result<()> {
    let _place = fleet::place().await;
    let collector = Collector::start(Manner::Takes).await?;
    let fleet = traced(&collector).workers(1).set("tracing.sample_ratio", 0).start().await?;
    speak(&fleet, "unsampled", &[("traceparent", &context(false))]).await?;
    speak(&fleet, "ours", &[]).await?;
    // Sent later than the others would have been.
    speak(&fleet, "sampled", &[("traceparent", &context(true))]).await?;
    seen(&collector, "session.close", 1).await?;
    let finals = checker::finals(&fleet.js(), "unsampled").await?;
    ensure!(finals.iter().all(|f| f.headers.get("traceparent") == Some(&context(false))), "{finals:#?}");
    ensure!(collector.seen().iter().all(|span| span.attributes.get("session").is_none_or(|of| of == "sampled")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn off_is_off_and_a_producers_trace_is_passed_on_all_the_same() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = Fleet::builder().workers(1).start().await?;
    speak(&fleet, "bare", &[]).await?;
    speak(&fleet, "given", &[("traceparent", &context(true))]).await?;
    let bare = checker::finals(&fleet.js(), "bare").await?;
    ensure!(bare.iter().all(|f| !f.headers.contains_key("traceparent")), "{bare:#?}");
    let given = checker::finals(&fleet.js(), "given").await?;
    ensure!(given.iter().all(|f| f.headers.get("traceparent") == Some(&context(true))), "{given:#?}");
    ensure!(!fleet.logs().contains("traces are told"));
    Ok(())
}

/// Spans that were lost, as a process counts them.
async fn lost(url: &str) -> Option<f64> {
    let answer = Probe::default().get(&format!("{url}/metrics"), SOON).await.ok()?;
    let text = String::from_utf8(answer.body).ok()?;
    let lost = text.lines().filter(|line| {
        line.starts_with("voxfleet_trace_spans_total") && (line.contains("queue_full") || line.contains("not_taken"))
    });
    Some(lost.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_hangs_or_is_not_there_costs_spans_and_nothing_else() -> Result<()> {
    let _place = fleet::place().await;
    let hanging = Collector::start(Manner::Hangs).await?;
    let refusing = Collector::start(Manner::Refuses(400)).await?;
    let gone = Collector::start(Manner::Takes).await?.url();
    for url in [hanging.url(), refusing.url(), gone] {
        let builder = Fleet::builder().workers(1).set("tracing.endpoint", &url).set("tracing.queue", 2);
        let builder = builder.set("tracing.timeout_ms", 300).set("worker.http.listen", "127.0.0.1:0");
        let mut fleet = builder.start().await?;
        for n in 0..3 {
            speak(&fleet, &format!("unheard-{n}"), &[]).await?;
            checker::check(&fleet.js(), &format!("unheard-{n}")).await?.clean()?;
        }
        let at = fleet.workers[0].http_url().await?;
        eventually("lost spans", SOON, || async { lost(&at).await.filter(|lost| *lost > 0.0) })
            .await
            .with_context(|| fleet.logs())?;
        // It ends in its time, and says once what was lost; a second time at the end, if more was.
        let status = fleet.workers[0].terminate(SOON).await?;
        ensure!(status.success(), "{status}");
        let log = fleet.workers[0].log();
        let said = log.matches("spans were lost").count();
        ensure!((1..=2).contains(&said), "said {said} times\n{log}");
    }
    ensure!(hanging.connections() > 0 && refusing.connections() > 0, "nobody asked");
    Ok(())
}
