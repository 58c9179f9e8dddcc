//! Who is asked, and what is told of an address.

use super::*;

#[tokio::test]
async fn only_allowed_hosts_are_asked() -> Result<()> {
    let rig = Rig::start().await?;
    let plain = Server::start_plain().await?;
    for server in [&rig.web, &plain] {
        server.route("/a", [Answer::file(recording(10))]);
    }
    let port = rig.web.port();

    // Without a list: any public host, and this machine is none, however it is written.
    let open = rig.fetcher(FetchConfig { https_hosts: Vec::new(), ..rig.config() })?;
    for host in [
        "127.0.0.1",
        "localhost",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "169.254.169.254",
    ] {
        refused_as(&open, &format!("https://{host}:{port}/a"), Class::Forbidden).await?;
    }
    refused_as(&open, &plain.url("/a"), Class::Forbidden).await?;

    // With one: what is on it.
    let listed = rig.fetcher(rig.config())?;
    assert_eq!(spooled(&listed, &rig.web.url("/a")).await?, recording(10));
    refused_as(&listed, "https://example.com/a", Class::Forbidden).await?;
    refused_as(&listed, &format!("https://localhost:{port}/a"), Class::Forbidden).await?;
    refused_as(&listed, &plain.url("/a"), Class::Forbidden).await?;
    // A listed address in another notation is the same place, but has to be written plainly.
    refused_as(&listed, &format!("https://0x7f.1:{port}/a"), Class::BadRequest).await?;
    assert_eq!((rig.web.requests("/a").len(), plain.requests("/a").len()), (1, 0));

    let named = FetchConfig { https_hosts: vec!["localhost".into()], ..rig.config() };
    let named = rig.fetcher(FetchConfig { http_hosts: vec![plain.host()], ..named })?;
    assert_eq!(spooled(&named, &format!("https://localhost:{port}/a")).await?, recording(10));
    assert_eq!(spooled(&named, &plain.url("/a")).await?, recording(10));

    let trusted = Fetcher::trusted(Some(rig.web.ca_file()))?;
    assert_eq!(spooled(&trusted, &rig.web.url("/a")).await?, recording(10));
    assert_eq!(spooled(&trusted, &plain.url("/a")).await?, recording(10));
    rig.nothing_is_left()
}

#[tokio::test]
async fn every_hop_of_a_redirect_is_held_to_the_list() -> Result<()> {
    let rig = Rig::start().await?;
    let (other, plain) = (Server::start().await?, Server::start_plain().await?);
    for server in [&rig.web, &other, &plain] {
        server.route("/file", [Answer::file(recording(10))]);
    }
    let hops = [
        ("/near", "/file".to_owned()),
        ("/far", other.url("/file")),
        ("/plain", plain.url("/file")),
        ("/loop", "/loop".to_owned()),
        ("/metadata", "https://169.254.169.254/latest/meta-data".to_owned()),
        ("/disk", "file:///etc/passwd".to_owned()),
        ("/user", format!("https://user:pass@{}/file", rig.web.host())),
        ("/nowhere", "https://".to_owned()),
    ];
    for (path, to) in hops {
        rig.web.route(path, [Answer::redirect(to).header("Set-Cookie", "a=b")]);
    }
    rig.web.route("/lost", [Answer::status(302)]);
    let fetcher = rig.fetcher(rig.config())?;
    assert_eq!(spooled(&fetcher, &rig.web.url(&format!("/near?{SIGNATURE}"))).await?, recording(10));
    for path in ["/far", "/plain", "/metadata", "/disk", "/user"] {
        refused_as(&fetcher, &rig.web.url(path), Class::Forbidden).await?;
    }
    let one_try = |path| {
        let (fetcher, url) = (&fetcher, rig.web.url(path));
        async move { Ok::<_, anyhow::Error>(fetcher.open(&parsed(&url)?, 0).await.err().map(|e| e.failure().class)) }
    };
    for path in ["/loop", "/nowhere", "/lost"] {
        assert_eq!(one_try(path).await?, Some(Class::Unavailable), "{path}");
    }
    assert_eq!(rig.web.requests("/loop").len(), 6, "five redirects are followed");
    assert_eq!((other.requests("/file").len(), plain.requests("/file").len()), (0, 0));

    // Where the list says so, also from https to http; nothing is carried along.
    let wide = FetchConfig { http_hosts: vec![plain.host()], ..rig.config() };
    let wide = rig.fetcher(wide)?;
    assert_eq!(spooled(&wide, &rig.web.url(&format!("/plain?{SIGNATURE}"))).await?, recording(10));
    let request = &plain.requests("/file")[0];
    for header in ["cookie", "referer", "authorization"] {
        assert_eq!(request.header(header), None, "{header}");
    }
    rig.nothing_is_left()
}

#[tokio::test]
async fn neither_signature_nor_certificate_trouble_is_a_riddle() -> Result<()> {
    let rig = Rig::start().await?;
    for (path, answer) in [
        ("/404", Answer::status(404)),
        ("/403", Answer::status(403)),
        ("/503", Answer::status(503).header("Retry-After", "3600")),
        ("/gone", Answer::redirect("https://elsewhere.example/?token=0a1b2c3d4e5f")),
        ("/large", Answer::file(recording(10)).claiming(u64::MAX / 2)),
        ("/quiet", Answer::silence()),
    ] {
        rig.web.route(path, [answer]);
    }
    let patient = rig.fetcher(rig.config())?;
    // Only for who is silent: on a busy machine the others need their time.
    let impatient = rig.fetcher(FetchConfig { stall_timeout_ms: 100, connect_timeout_ms: 200, ..rig.config() })?;
    let mut texts = Vec::new();
    for path in ["/404", "/403", "/503", "/gone", "/large", "/quiet"] {
        let url = parsed(&rig.web.url(&format!("{path}?{SIGNATURE}#{SIGNATURE}")))?;
        let fetcher = if path == "/quiet" { &impatient } else { &patient };
        match fetcher.open(&url, 0).await {
            Ok(_) => bail!("{path} was opened"),
            Err(error) => texts.push(format!("{error} {error:?}")),
        }
    }
    // Nobody listens; a certificate nobody vouches for.
    let closed = format!("https://127.0.0.1:{}/a?{SIGNATURE}", voxfleet_harness::ports::free_port()?);
    let wide = rig.fetcher(FetchConfig { https_hosts: vec!["127.0.0.1".into()], ..rig.config() })?;
    let error = wide.open(&parsed(&closed)?, 0).await.err().context("nobody listens there")?;
    assert_eq!(error.failure().class, Class::Unavailable);
    texts.push(format!("{error} {error:?}"));
    let wary = rig.fetcher(FetchConfig { ca_file: None, ..rig.config() })?;
    let failure = refused(&wary, &rig.web.url(&format!("/404?{SIGNATURE}"))).await?;
    // A machine without any certificates says that instead.
    assert!(matches!(failure.class, Class::Unavailable | Class::Internal), "{failure}");
    assert!(failure.message.contains("certificate"), "{failure}");
    assert_eq!(rig.web.requests("/404").len(), 1, "it was asked without trust");
    texts.push(failure.to_string());
    for text in texts {
        assert!(!text.contains("0a1b2c3d4e5f"), "{text}");
        assert!(text.contains("https://"), "{text} does not say where");
    }
    rig.nothing_is_left()
}
