//! A real S3 service on this machine: moto, which `deploy/bootstrap.sh deps` brings.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{Error, Result, child::Child, find, wait::eventually};

/// Starts the service's web server. Only a part of it that is not asked for here needs the compiled package, which would
/// have to fit the Python that runs.
const PROGRAM: &str = r#"
import sys
from unittest import mock
for name in ("", ".x509", ".hazmat", ".hazmat.backends"):
    sys.modules["cryptography" + name] = mock.MagicMock()
from moto.server import main
main(sys.argv[1:])
"#;

/// Importing half of Python takes seconds on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(60);
const REQUEST_DEADLINE: Duration = Duration::from_secs(20);

/// Runs until dropped. It takes any key pair, but wants requests to be signed.
pub struct Server {
    address: String,
    child: Child,
    _dir: TempDir,
}

/// Where the service's files are, or why there is none.
pub fn installed() -> Result<PathBuf, String> {
    let folder = find::cache().join("s3-server");
    if !folder.join("moto/server.py").is_file() {
        return Err(format!("no S3 server in {}; get it with: sh deploy/bootstrap.sh deps", folder.display()));
    }
    match Command::new("python3").arg("--version").output() {
        Ok(found) if found.status.success() => Ok(folder),
        _ => Err("no python3 here, which the S3 server needs".to_owned()),
    }
}

impl Server {
    /// `folder` as [`installed`] gives it.
    pub async fn start(folder: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(Error::io("folder of the S3 server"))?;
        let port = crate::ports::free_port()?.to_string();
        let mut command = Command::new("python3");
        // Without the packages of this machine's Python: what was installed is all that counts.
        command.args(["-S", "-c", PROGRAM, "-H", "127.0.0.1", "-p", &port]);
        command.env("PYTHONPATH", folder).env("PYTHONDONTWRITEBYTECODE", "1").env("PYTHONNOUSERSITE", "1");
        let mut child = Child::start("S3 server", command, &dir.path().join("log"))?;
        let address = format!("127.0.0.1:{port}");
        let answers = eventually("the S3 server answers", START_DEADLINE, || async {
            request(&address, "GET", "/", &[]).await.ok().map(drop)
        });
        let outcome = answers.await;
        if let Some(status) = child.ended() {
            let (name, status, log) = (child.name().to_owned(), status.to_string(), child.log_tail());
            return Err(Error::EndedEarly { name, status, log });
        }
        outcome?;
        Ok(Self { address, child, _dir: dir })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub async fn make_bucket(&self, bucket: &str) -> Result<()> {
        self.put(&format!("/{bucket}"), &[]).await
    }

    /// `key` as it is to stand in a URL's path.
    pub async fn put_object(&self, bucket: &str, key: &str, body: &[u8]) -> Result<()> {
        self.put(&format!("/{bucket}/{key}"), body).await
    }

    async fn put(&self, path: &str, body: &[u8]) -> Result<()> {
        match request(&self.address, "PUT", path, body).await? {
            200 => Ok(()),
            status => Err(Error::Wrong(format!("the S3 server answers {status} to PUT {path}"))),
        }
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        self.child.log()
    }
}

/// One request by hand; its status.
async fn request(address: &str, method: &str, path: &str, body: &[u8]) -> Result<u16> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = match tokio::time::timeout(REQUEST_DEADLINE, exchange).await {
        Ok(answer) => answer.map_err(Error::io(format!("{method} {path} of the S3 server")))?,
        Err(_) => return Err(Error::Wrong(format!("{method} {path}: the S3 server does not answer"))),
    };
    let text = String::from_utf8_lossy(&answer);
    let status = text.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    status.ok_or_else(|| Error::Wrong(format!("{method} {path}: that is no HTTP answer")))
}
