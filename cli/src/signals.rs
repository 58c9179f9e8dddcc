//! SIGINT, SIGTERM and SIGHUP ask to stop; a second one stops at once.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::exit::Exit;

const HANGUP: &str = "SIGHUP";

/// Cancels `shutdown` at the first signal and ends the process at the second. The listening task lives on `tracker` and
/// ends with `done`.
pub(crate) fn listen(
    tracker: &TaskTracker,
    shutdown: CancellationToken,
    done: CancellationToken,
) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // The terminal is gone: what runs in it leaves in good order all the same. Under `nohup` it is to stay.
    let mut hangup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
    tracker.spawn(async move {
        let mut told = false;
        loop {
            tokio::select! {
                () = done.cancelled() => return,
                name = next(&mut interrupt, &mut terminate, hangup.as_mut()) => {
                    // A terminal that closes may say so more than once; that is nobody's impatience.
                    if told && name == HANGUP {
                        continue;
                    }
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

async fn next(interrupt: &mut Signal, terminate: &mut Signal, hangup: Option<&mut Signal>) -> &'static str {
    let hangup = async {
        match hangup {
            Some(hangup) => hangup.recv().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup => HANGUP,
    }
}

/// Whoever started this process has told it to (`nohup`).
fn ignores_hangup() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| is_ignored(&status, SignalKind::hangup()))
}

/// `SigIgn` of a process's status: bit n - 1 is signal n.
fn is_ignored(status: &str, signal: SignalKind) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal.as_raw_value() - 1)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(is_ignored(status, SignalKind::hangup()) && is_ignored(status, SignalKind::pipe()));
        assert!(!is_ignored(status, SignalKind::interrupt()));
        assert!(!is_ignored("nothing of the kind", SignalKind::hangup()));
    }
}
