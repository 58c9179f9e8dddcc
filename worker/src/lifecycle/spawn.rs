//! Starts the engine child: one end of a socketpair and the choice of its device.

use std::{path::PathBuf, sync::Arc};

use tokio::{
    net::UnixStream,
    process::{Child, ChildStderr},
    task::JoinError,
};

pub(crate) use voxfleet_audio::spawner::SpawnError;
use voxfleet_audio::spawner::{Environment, Launch, launch, number, socketpair};

use crate::device::{Cores, Share};

/// What runs as the engine child.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// None = this executable.
    pub(crate) exe: Option<PathBuf>,
    /// Before `--fd N`.
    pub(crate) args: Vec<String>,
    /// `CUDA_VISIBLE_DEVICES`.
    pub(crate) visible_device: String,
    pub(crate) cores: Cores,
    /// Whose engine it is, for the log.
    pub(crate) gpu: Arc<str>,
}

/// A started child.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) stderr: Option<ChildStderr>,
    pub(crate) socket: UnixStream,
}

/// Its share of the cores, among the workers that are here now.
pub(crate) async fn share(program: &Program, on_cpu: bool) -> Result<Share, JoinError> {
    let cores = program.cores.clone();
    tokio::task::spawn_blocking(move || cores.share(!on_cpu)).await
}

/// `on_cpu`: it sees no device at all.
pub(crate) async fn spawn(program: &Program, on_cpu: bool) -> Result<Spawned, SpawnError> {
    let (socket, theirs) = socketpair()?;
    let args = program.args.iter().map(Into::into).chain(["--fd".into(), number(&theirs)]).collect();
    let visible = if on_cpu { "" } else { &program.visible_device };
    let environment = Environment::With("CUDA_VISIBLE_DEVICES", visible.into());
    let mut child = launch(Launch { exe: program.exe.clone(), args, environment, inherited: vec![theirs] }).await?;
    let stderr = child.stderr.take();
    Ok(Spawned { child, stderr, socket })
}
