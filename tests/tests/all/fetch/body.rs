//! What comes: whole, in parts, refused, too large, broken off.

use std::os::unix::fs::MetadataExt as _;

use super::*;

#[tokio::test]
async fn a_file_comes_whole_or_from_a_position() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    let file = recording(700_000);
    rig.web.route("/calls/a%20b.flac", [Answer::file(file.clone())]);
    rig.web.route("/stiff", [Answer::file(file.clone()).without_ranges()]);
    rig.web.route("/unknown-length", [Answer::status(200).body(file.clone()).chunked()]);
    rig.web.route("/empty", [Answer::file(Bytes::new())]);

    let url = rig.web.url(&format!("/calls/a%20b.flac?{SIGNATURE}"));
    let got = fetcher.spool(&parsed(&url)?).await?;
    assert_eq!((got.bytes, got.name.as_deref()), (700_000, Some("a b.flac")));
    assert_eq!(got.file.metadata()?.nlink(), 0, "the spooled file has a name");
    assert_eq!(spooled(&fetcher, &url).await?, file);
    assert_eq!(spooled(&fetcher, &rig.web.url("/stiff")).await?, file);
    assert_eq!(spooled(&fetcher, &rig.web.url("/unknown-length")).await?, file);
    assert_eq!(spooled(&fetcher, &rig.web.url("/empty")).await?, Bytes::new());

    let part = fetcher.open(&parsed(&url)?, 1_000).await?;
    assert_eq!((part.from, part.total), (1_000, Some(700_000)));
    assert_eq!(read(part).await?, file.slice(1_000..));
    let whole = fetcher.open(&parsed(&rig.web.url("/stiff"))?, 1_000).await?;
    assert_eq!((whole.from, whole.total), (0, Some(700_000)));
    assert_eq!(read(whole).await?, file);
    let rest = fetcher.open(&parsed(&url)?, 700_000).await?;
    assert_eq!((rest.from, rest.total), (700_000, Some(700_000)));
    assert_eq!(read(rest).await?, Bytes::new());

    let request = &rig.web.requests("/calls/a%20b.flac")[0];
    assert_eq!((request.method.as_str(), request.target.ends_with(SIGNATURE)), ("GET", true));
    assert_eq!(request.header("accept-encoding"), Some("identity"));
    rig.nothing_is_left()
}

#[tokio::test]
async fn what_a_server_refuses_is_told_by_class() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    for (status, class) in [
        (404, Class::NotFound),
        (410, Class::NotFound),
        (401, Class::Forbidden),
        (403, Class::Forbidden),
        (400, Class::BadRequest),
        (418, Class::BadRequest),
    ] {
        let path = format!("/{status}");
        rig.web.route(&path, [Answer::status(status)]);
        refused_as(&fetcher, &rig.web.url(&path), class).await?;
        assert_eq!(rig.web.requests(&path).len(), 1, "{status} was asked for again");
    }
    rig.web.route("/packed", [Answer::file(recording(100)).header("Content-Encoding", "gzip")]);
    refused_as(&fetcher, &rig.web.url("/packed"), Class::BadRequest).await?;

    let file = recording(1_000);
    rig.web.route("/broken", [Answer::status(500)]);
    rig.web.route("/mended", [Answer::status(500), Answer::status(503), Answer::file(file.clone())]);
    rig.web.route("/busy", [Answer::status(429).header("Retry-After", "1"), Answer::file(file.clone())]);
    rig.web.route("/closed", [Answer::status(503).header("Retry-After", "3600")]);
    let began = Instant::now();
    let urls = ["/broken", "/mended", "/busy", "/closed"].map(|path| rig.web.url(path));
    let (broken, mended, busy, closed) = tokio::join!(
        refused_as(&fetcher, &urls[0], Class::Unavailable),
        spooled(&fetcher, &urls[1]),
        async {
            let got = spooled(&fetcher, &urls[2]).await;
            (got, began.elapsed())
        },
        refused_as(&fetcher, &urls[3], Class::Unavailable),
    );
    assert!(broken?.message.contains("500"));
    assert_eq!(rig.web.requests("/broken").len(), 4);
    assert_eq!(mended?, file);
    let (busy, took) = busy;
    assert_eq!(busy?, file);
    assert!(took >= Duration::from_secs(1), "asked again after {took:?}");
    assert_eq!(closed?.retry_after_ms, Some(3_600_000));
    assert_eq!(rig.web.requests("/closed").len(), 1);
    rig.nothing_is_left()
}

#[tokio::test]
async fn too_large_is_refused_before_or_while_it_comes() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(FetchConfig { max_bytes: 100_000, ..rig.config() })?;
    rig.web.route("/exact", [Answer::file(recording(100_000))]);
    rig.web.route("/announced", [Answer::file(recording(100_001)).silent_after(0)]);
    rig.web.route("/endless", [Answer::status(200).body(recording(400_000)).chunked()]);
    assert_eq!(spooled(&fetcher, &rig.web.url("/exact")).await?.len(), 100_000);
    let began = Instant::now();
    refused_as(&fetcher, &rig.web.url("/announced"), Class::TooLarge).await?;
    assert!(began.elapsed() < Duration::from_secs(2), "its body was waited for");
    refused_as(&fetcher, &rig.web.url("/endless"), Class::TooLarge).await?;
    rig.nothing_is_left()
}

#[tokio::test]
async fn a_body_that_breaks_off_is_resumed_or_begun_again() -> Result<()> {
    let rig = Rig::start().await?;
    let fetcher = rig.fetcher(rig.config())?;
    let (file, newer) = (recording(300_000), recording(300_001));
    let whole = || Answer::file(file.clone());
    let changed = Answer::file(newer.clone()).etag(Some("\"2\""));
    let part = |range: &str, etag: &str, body: Bytes| {
        Answer::status(206).header("Content-Range", format!("bytes {range}/300000")).header("ETag", etag).body(body)
    };
    // Served as a part though the file is another one: a server that does not know If-Range.
    let mixed = part("100000-299999", "\"2\"", Bytes::from(vec![7; 200_000]));
    let displaced = part("150000-299999", "\"1\"", file.slice(150_000..));
    // Whole as HTTP counts it, but less than the part it says it is.
    let dwindled = part("100000-299999", "\"1\"", file.slice(100_000..101_000));
    let swollen = part("100000-299999", "\"1\"", recording(900_000));
    let cut = |n| whole().cut_after(n);
    rig.web.route("/resumed", [cut(100_000), cut(50_000), whole()]);
    rig.web.route("/changed", [cut(100_000), changed]);
    rig.web.route("/mixed", [cut(100_000), mixed, whole()]);
    rig.web.route("/displaced", [cut(100_000), displaced, whole()]);
    rig.web.route("/dwindled", [cut(100_000), dwindled, whole()]);
    rig.web.route("/swollen", [cut(100_000), swollen]);
    rig.web.route("/stiff", [cut(100_000).without_ranges(), whole().without_ranges()]);
    rig.web.route("/unmarked", [cut(100_000).etag(None), whole().etag(None)]);
    rig.web.route("/weak", [cut(100_000).etag(Some("W/\"1\"")), whole().etag(Some("W/\"1\""))]);
    rig.web.route("/chunks", [cut(100_000).chunked(), whole().chunked()]);
    rig.web.route("/short", [Answer::file(recording(1_000)).without_ranges().claiming(5_000)]);
    rig.web.route("/longer", [Answer::file(recording(5_000)).claiming(1_000)]);

    let paths = ["resumed", "changed", "mixed", "displaced", "dwindled", "stiff", "unmarked", "weak", "chunks"];
    let mut running = JoinSet::new();
    for path in paths {
        let (fetcher, url) = (fetcher.clone(), rig.web.url(&format!("/{path}")));
        running.spawn(async move { (path, spooled(&fetcher, &url).await) });
    }
    let urls = (rig.web.url("/short"), rig.web.url("/swollen"));
    let (short, swollen) = tokio::join!(
        refused_as(&fetcher, &urls.0, Class::Unavailable),
        refused_as(&fetcher, &urls.1, Class::TooLarge),
    );
    short?;
    swollen?;
    while let Some(done) = running.join_next().await {
        let (path, got) = done?;
        let expected = if path == "changed" { &newer } else { &file };
        ensure!(got.with_context(|| path)? == *expected, "{path} is another file");
    }
    // HTTP ends a body at its announced length; what follows is not part of it.
    assert_eq!(spooled(&fetcher, &rig.web.url("/longer")).await?, recording(1_000));

    let asked = |path| rig.web.requests(path).iter().map(|r| r.header("range").map(str::to_owned)).collect::<Vec<_>>();
    let range = |from: u32| Some(format!("bytes={from}-"));
    assert_eq!(asked("/resumed"), [None, range(100_000), range(150_000)]);
    assert_eq!(rig.web.requests("/resumed")[1].header("if-range"), Some("\"1\""));
    assert_eq!(asked("/unmarked"), [None, None], "nothing proves that it is the same file");
    assert_eq!(asked("/short").len(), 4);
    rig.nothing_is_left()
}
