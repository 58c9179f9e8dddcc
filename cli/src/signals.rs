//! SIGINT, SIGTERM and SIGHUP ask to stop; a second one stops at once.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::exit::Exit;

/// Cancels `shutdown` at the first signal and ends the process at the second. The listening task lives on `tracker` and
/// ends with `done`.
pub(crate) fn listen(
    tracker: &TaskTracker,
    shutdown: CancellationToken,
    done: CancellationToken,
) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // The terminal is gone: what runs in it leaves in good order all the same.
    let mut hangup = signal(SignalKind::hangup())?;
    tracker.spawn(async move {
        let mut told = false;
        loop {
            tokio::select! {
                () = done.cancelled() => return,
                name = next(&mut interrupt, &mut terminate, &mut hangup) => {
                    if told {
                        tracing::warn!(signal = name, "second signal, stopping at once");
                        std::process::exit(i32::from(Exit::Interrupted.code()));
                    }
                    told = true;
                    shutdown.cancel();
                    tracing::info!(signal = name, "stopping; once more stops at once");
                }
            }
        }
    });
    Ok(())
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal, hangup: &mut Signal) -> &'static str {
    tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
    }
}
