//! Servers that take their time, and callers that do not wait for them.

use super::*;

#[tokio::test]
async fn a_server_that_dawdles_is_left() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(FetchConfig { connect_timeout_ms: 300, stall_timeout_ms: 300, ..rig.config() })?;
    rig.web.route("/silent", [Answer::silence()]);
    rig.web.route("/headers", [Answer::endless_headers()]);
    rig.web.route("/body", [Answer::file(recording(1_000)).silent_after(0)]);
    rig.web.route("/recovers", [Answer::file(recording(1_000)).silent_after(500), Answer::file(recording(1_000))]);
    let began = Instant::now();
    let urls = ["/silent", "/headers", "/body", "/recovers"].map(|path| rig.web.url(path));
    let (silent, headers, body, recovers) = tokio::join!(
        refused_as(&fetcher, &urls[0], Class::Timeout),
        refused_as(&fetcher, &urls[1], Class::Timeout),
        refused_as(&fetcher, &urls[2], Class::Timeout),
        spooled(&fetcher, &urls[3]),
    );
    silent?;
    headers?;
    body?;
    assert_eq!(recovers?, recording(1_000));
    // Four tries of 600 ms each and the delays between them.
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    eventually("connections are closed", SOON, || async { (rig.web.open_connections() == 0).then_some(()) }).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_server_that_drips_has_its_time() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(FetchConfig { total_timeout_s: 1, ..rig.config() })?;
    rig.web.route("/drip", [Answer::file(recording(100_000)).paced(500, Duration::from_millis(100))]);
    let url = rig.web.url("/drip");
    let failure = refused(&fetcher, &format!("{url}?{SIGNATURE}")).await?;
    assert_eq!(failure.class, Class::Timeout);
    assert!(failure.message.starts_with(&url) && failure.message.contains("total_timeout_s"), "{failure}");
    assert!(!failure.message.contains(SIGNATURE), "{failure}");
    eventually("its connection is closed", SOON, || async { (rig.web.open_connections() == 0).then_some(()) }).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_dropped_fetch_leaves_nothing() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    rig.web.route("/slow", [Answer::file(recording(1_000_000)).paced(1_000, Duration::from_millis(10))]);
    let url = parsed(&rig.web.url("/slow"))?;
    let mut running = JoinSet::new();
    running.spawn(async move { fetcher.spool(&url).await.map(|s| s.bytes) });
    eventually("it is on its way", SOON, || async { (rig.web.open_connections() == 1).then_some(()) }).await?;
    eventually("it was asked for", SOON, || async { rig.web.requests("/slow").pop() }).await?;
    running.shutdown().await;
    eventually("its connection is closed", SOON, || async { (rig.web.open_connections() == 0).then_some(()) }).await?;
    rig.nothing_is_left()
}
