//! `voxfleet decode`: see [`crate::decode`].

use std::io::Read as _;

use crate::{args::DecodeArgs, decode::readable, exit::Exit, transcript::screen::out};

pub(crate) fn run(args: &DecodeArgs) -> anyhow::Result<Exit> {
    let mut payload = Vec::new();
    // What could be read is shown even when the rest could not.
    let read = std::io::stdin().lock().read_to_end(&mut payload);
    out(&readable(&payload, args.format))?;
    read?;
    Ok(Exit::Ok)
}
