//! The same seen through the unmodified `nats` CLI: commands to copy, with what they really print.

use std::{process::Stdio, time::Duration};

use tokio::process::Command;
use voxfleet_harness::find;
use voxfleet_schema::id::StreamId;

use crate::transcript::{line::Paint, screen::out};

const PATIENCE: Duration = Duration::from_secs(10);
const SHOWN_LINES: usize = 14;
/// A final with its words is one line of JSON.
const SHOWN_COLUMNS: usize = 1_000;

/// `moved`: a session that went to another worker.
pub(crate) async fn print(
    url: &str,
    id: &StreamId,
    job: &StreamId,
    moved: Option<&StreamId>,
    paint: Paint,
) -> anyhow::Result<()> {
    out("")?;
    let Ok(nats) = find::nats_cli() else {
        out("the `nats` CLI is not here; `sh deploy/bootstrap.sh deps` brings it")?;
        return Ok(());
    };
    out(&paint.bold("the same, seen with the nats CLI:"))?;
    for arguments in commands(id, job, moved) {
        out("")?;
        out(&paint.cyan(&format!("$ nats {}", arguments.iter().map(|a| quoted(a)).collect::<Vec<_>>().join(" "))))?;
        let mut command = Command::new(&nats);
        command.arg("--server").arg(url).args(&arguments).stdin(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(PATIENCE, command.output()).await {
            Ok(Ok(output)) => {
                let both = [output.stderr, output.stdout].concat();
                out(shortened(&String::from_utf8_lossy(&both)).trim_end())?;
            }
            Ok(Err(error)) => out(&format!("({error})"))?,
            Err(_) => out("(no answer in time)")?,
        }
    }
    Ok(())
}

/// `--server` is left out of what is shown: it is this demo's, not the reader's.
fn commands(id: &StreamId, job: &StreamId, moved: Option<&StreamId>) -> Vec<Vec<String>> {
    let line = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
    let mut commands = vec![
        line(&["stream", "ls"]),
        line(&["stream", "get", "ASR_TRANSCRIPT", "--last-for", &format!("asr.v1.transcript.session.{id}.final")]),
        line(&["kv", "get", "asr_sessions", id.as_str(), "--raw"]),
        line(&["kv", "get", "asr_jobs", job.as_str(), "--raw"]),
        line(&["object", "ls", "asr_media"]),
        line(&["sub", "asr.v1.heartbeat.*", "--count", "1"]),
        line(&["micro", "list"]),
    ];
    if let Some(moved) = moved {
        let subject = format!("asr.v1.event.session.{moved}.moved");
        commands.push(line(&["stream", "get", "ASR_EVENT", "--last-for", &subject]));
    }
    commands
}

fn quoted(word: &str) -> String {
    if word.contains(['*', '>', ' ']) { format!("'{word}'") } else { word.to_owned() }
}

fn shortened(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    let mut shown: Vec<String> = lines.iter().take(SHOWN_LINES).map(|l| cut(l)).collect();
    if lines.len() > SHOWN_LINES {
        shown.push(format!("... ({} more lines)", lines.len() - SHOWN_LINES));
    }
    shown.join("\n")
}

fn cut(line: &str) -> String {
    if line.chars().count() <= SHOWN_COLUMNS {
        return line.to_owned();
    }
    line.chars().take(SHOWN_COLUMNS).collect::<String>() + " ..."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_says_that_it_was_cut() {
        let text = "x\n".repeat(20);
        assert!(shortened(&text).ends_with("... (6 more lines)"));
        assert!(cut(&"y".repeat(2_000)).ends_with(" ..."));
        assert_eq!(quoted("asr.v1.heartbeat.*"), "'asr.v1.heartbeat.*'");
    }
}
