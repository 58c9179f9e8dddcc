//! A stretch of a live session that kills engines is set aside: what `ASR_DEAD` and the events say about it.
//!
//! Its final, without segments and with the error, keeps the chain whole; the letter says which log entries to look at.

use voxfleet_nats::{publish::PublishError, retry::Backoff};
use voxfleet_schema::{
    dead::{DeadLetter, Origin},
    event::What,
    transcript::Final,
};

use super::{Session, unix_ms};

/// Tries to store a letter: about ten seconds. The session's next finals wait for it.
const ATTEMPTS: u32 = 10;

/// Writes the letter for `value`, which is about to be stored: better two letters than none.
pub(super) async fn write_letter(session: &Session, value: &Final) {
    let Some(error) = value.error.clone() else { return };
    let names = &session.names;
    let letter = DeadLetter {
        kind: names.kind,
        id: names.id.clone(),
        error,
        at_ms: unix_ms(),
        origin: Origin {
            gpu_id: Some(names.gpu_id.clone()),
            incarnation: Some(session.shared.name.borrow().incarnation.clone()),
            epoch: Some(value.epoch),
            dispatcher: None,
        },
        attempts: session.shared.engine.suspected(names.kind, &names.id).crashes,
        audio: Some(value.audio),
        record: None,
        request: None,
    };
    let mut backoff = Backoff::default();
    for attempt in 1..=ATTEMPTS {
        match session.shared.publisher.dead(names.kind, &names.id, &letter).await {
            Ok(()) => return,
            Err(PublishError::Server(error)) if error.is_transient() && attempt < ATTEMPTS => backoff.wait().await,
            Err(error) => {
                // The final says it too; the session is worth more than the letter.
                say!(
                    error,
                    names,
                    from_seq = value.audio.from_seq,
                    to_seq = value.audio.to_seq,
                    error = &error as &dyn std::error::Error,
                    "dead letter not stored"
                );
                return;
            }
        }
    }
}

/// Says that it is done.
pub(super) fn tell(session: &Session, value: &Final) {
    let names = &session.names;
    say!(warn, names, index = value.index, "a stretch that kills the engine was set aside");
    let mut event = names.event(What::Parked, value.epoch);
    event.seq = Some(value.audio.from_seq);
    event.error = value.error.clone();
    event.detail = serde_json::json!({ "audio": value.audio, "index": value.index });
    session.shared.events.tell(event, Some(format!("{}-parked-{}", names.id, value.from_sample)));
}
