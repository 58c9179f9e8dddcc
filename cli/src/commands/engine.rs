//! `voxfleet engine`: the hidden child of a worker.

use crate::{args::EngineArgs, exit::Exit};

pub(crate) fn run(args: &EngineArgs) -> anyhow::Result<Exit> {
    voxfleet_worker::engine::child::main(args.fd)?;
    Ok(Exit::Ok)
}
