//! Pages whose commands are run as they stand: each fenced block of `sh`, by bash, in the order of the page.
//!
//! A page may hold other blocks only as `text` or `toml`; one without a language is a mistake, so that no command escapes.

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use voxfleet_harness::{find, wait::eventually};

/// How long one block may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// One block of commands and the heading above it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) title: String,
    pub(crate) commands: String,
}

/// The blocks of a page of ours, by its path from the root.
pub(crate) fn read(page: &str) -> Result<Vec<Block>> {
    let path = find::root().join(page);
    parse(&std::fs::read_to_string(&path).with_context(|| path.display().to_string())?).context(page.to_owned())
}

fn parse(text: &str) -> Result<Vec<Block>> {
    let (mut blocks, mut title, mut open) = (Vec::new(), String::new(), None::<(bool, String)>);
    for line in text.lines() {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (None, Some("sh")) => open = Some((true, String::new())),
            (None, Some("text" | "toml")) => open = Some((false, String::new())),
            (None, Some(other)) => bail!("a block of {other:?} under {title:?}: sh is run, text and toml are not"),
            (Some((commands, body)), Some("")) => {
                if *commands {
                    blocks.push(Block { title: title.clone(), commands: std::mem::take(body) });
                }
                open = None;
            }
            (Some((_, body)), _) => body.extend([line, "\n"]),
            (None, None) => {
                if let Some(heading) = line.strip_prefix('#') {
                    heading.trim_start_matches('#').trim().clone_into(&mut title);
                }
            }
        }
    }
    ensure!(open.is_none(), "a block under {title:?} has no end");
    Ok(blocks)
}

/// Where the blocks of a page are run: a folder, a server and variables.
pub(crate) struct Shell {
    pub(crate) dir: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

impl Shell {
    pub(crate) fn new(url: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Ours in front of what somebody has installed.
        let tools = [find::voxfleet()?, find::nats_cli()?, find::nats_server()?];
        let tools = tools.iter().filter_map(|tool| tool.parent().map(Path::to_owned));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let bin = dir.path().join("bin");
        let path = std::env::join_paths(std::iter::once(bin).chain(tools).chain(std::env::split_paths(&path)))?;
        let home = dir.path().display().to_string();
        let variables = [
            ("PATH", path.to_string_lossy().into_owned()),
            ("NATS_URL", url.to_owned()),
            ("VOXFLEET__NATS__URLS", url.to_owned()),
            ("HOME", home.clone()),
            ("XDG_CONFIG_HOME", home),
            ("NO_COLOR", "1".to_owned()),
        ];
        Ok(Self { dir, variables: variables.map(|(name, value)| (name.to_owned(), value)).to_vec() })
    }

    /// For all blocks from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Of another server from now on.
    pub(crate) fn at(&mut self, url: &str) {
        self.set("NATS_URL", url);
        self.set("VOXFLEET__NATS__URLS", url);
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs a block to its end; what it printed, on both ways. An error where it fails.
    pub(crate) async fn run(&self, block: &Block) -> Result<String> {
        let mut running = self.start(block)?;
        let ended = eventually(format!("end of {:?}", block.title), PATIENCE, || {
            std::future::ready(running.child.try_wait().ok().flatten())
        });
        let status = ended.await.with_context(|| running.said())?;
        ensure!(status.success(), "{:?}: {status}\n{}\n{}", block.title, block.commands, running.said());
        Ok(running.said())
    }

    /// Runs it until it has said all of this, and ends it then.
    pub(crate) async fn run_until(&self, block: &Block, wanted: &[&str]) -> Result<String> {
        let running = self.start(block)?;
        let said = eventually(format!("{wanted:?} from {:?}", block.title), PATIENCE, || {
            let said = running.said();
            std::future::ready(wanted.iter().all(|part| said.contains(part)).then_some(said))
        });
        said.await.with_context(|| format!("{}\n{}", block.commands, running.said()))
    }

    /// Runs it again and again until it succeeds and has said all of this: what it asks for may still be on its way.
    pub(crate) async fn sees(&self, block: &Block, wanted: &[&str]) -> Result<String> {
        let seen = eventually(format!("{wanted:?} from {:?}", block.title), PATIENCE, || async {
            self.run(block).await.ok().filter(|said| wanted.iter().all(|part| said.contains(part)))
        });
        match seen.await {
            Ok(said) => Ok(said),
            Err(error) => {
                let last = self.run(block).await;
                Err(error).with_context(|| format!("{}\nlast: {last:?}", block.commands))
            }
        }
    }

    fn start(&self, block: &Block) -> Result<Running> {
        let log = tempfile::NamedTempFile::new_in(self.path())?.into_temp_path().keep()?;
        let out = File::create(&log)?;
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", &block.commands]).current_dir(self.path());
        command.stdin(Stdio::null()).stderr(out.try_clone()?).stdout(out);
        // A group of its own: a pipeline ends as one.
        command.envs(self.variables.iter().cloned()).env_remove("NATS_CONTEXT").process_group(0);
        Ok(Running { child: command.spawn()?, log })
    }
}

struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            // The group of a child that was not reaped is still its own.
            let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.child.id())]).status();
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

#[test]
fn blocks_are_found_under_their_headings_and_nothing_escapes() -> Result<()> {
    let page = "# A\n```sh\none\ntwo\n```\ntext\n### B c\n```text\nshown\n```\n```sh\nthree\n```\n";
    let block = |title: &str, commands: &str| Block { title: title.to_owned(), commands: commands.to_owned() };
    ensure!(parse(page)? == [block("A", "one\ntwo\n"), block("B c", "three\n")]);
    for wrong in ["```\nhidden\n```\n", "```bash\nhidden\n```\n", "```sh\nno end\n"] {
        ensure!(parse(wrong).is_err(), "{wrong}");
    }
    Ok(())
}

#[tokio::test]
async fn a_block_that_fails_in_the_middle_fails() -> Result<()> {
    let shell = Shell::new("nats://127.0.0.1:1")?;
    let block = |commands: &str| Block { title: "t".to_owned(), commands: commands.to_owned() };
    ensure!(shell.run(&block("echo $NATS_URL")).await?.trim() == "nats://127.0.0.1:1");
    for failing in ["false\ntrue", "false | true", "echo $NOBODY_HAS_SET_THIS"] {
        ensure!(shell.run(&block(failing)).await.is_err(), "{failing}");
    }
    ensure!(shell.run_until(&block("echo ready; sleep 600 | cat"), &["ready"]).await?.contains("ready"));
    Ok(())
}
