//! Pulls hints, no more than there is room for, and gives each to its session.

use std::sync::Arc;

use voxfleet_nats::claim::{ClaimError, LivePull};

use crate::{
    capacity::{HintPermit, HintPool},
    session::WaitingHint,
    supervisor::holdings::Holdings,
};

/// Hints asked for at once, at most.
const MAX_BATCH: usize = 64;

/// Runs until the connection is closed; drop it to stop.
pub(crate) async fn run(mut pull: LivePull, pool: HintPool, max_entry: u64, holdings: Arc<Holdings>) -> ClaimError {
    // What may be on its way: each of these pays for one message of the largest size.
    let mut permits: Vec<HintPermit> = Vec::new();
    loop {
        while permits.len() < MAX_BATCH
            && let Some(permit) = pool.try_take(max_entry)
        {
            permits.push(permit);
        }
        let mut permit = match permits.pop() {
            Some(permit) => permit,
            None => pool.take(max_entry).await,
        };
        let hint = match pull.next(permits.len() + 1).await {
            Ok(hint) => hint,
            Err(error) => return error,
        };
        permit.shrink(hint.entry.payload.len() as u64);
        holdings.hint(WaitingHint { hint, _bytes: permit });
    }
}
