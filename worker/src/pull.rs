//! Pulls hints, no more than there is room for, and gives each to its session.

use std::sync::Arc;

use voxfleet_nats::claim::{ClaimError, LivePull};

use crate::{
    capacity::{HintPermit, HintPool, HintPrice},
    session::WaitingHint,
    supervisor::holdings::Holdings,
};

/// Hints asked for at once, at most.
const MAX_BATCH: usize = 64;

/// Runs until the connection is closed; drop it to stop.
pub(crate) async fn run(mut pull: LivePull, pool: HintPool, max_entry: u64, holdings: Arc<Holdings>) -> ClaimError {
    let mut price = HintPrice::new(max_entry);
    // What may be on its way: each of these pays for one message.
    let mut permits: Vec<HintPermit> = Vec::new();
    loop {
        while permits.len() < MAX_BATCH
            && let Some(permit) = pool.try_take(price.price())
        {
            permits.push(permit);
        }
        let mut permit = match permits.pop() {
            Some(permit) => permit,
            None => pool.take(price.price()).await,
        };
        let hint = match pull.next(permits.len() + 1).await {
            Ok(hint) => hint,
            Err(error) => return error,
        };
        let len = hint.entry.payload.len() as u64;
        price.observe(len);
        permit.resize(len);
        holdings.hint(WaitingHint { hint, _bytes: permit });
    }
}
