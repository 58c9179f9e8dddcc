//! What a socket's client is told: the state of its transcript, at once when something becomes final and a few times a second
//! otherwise, until its session's chain has ended.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, stream::SplitSink};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, interval, sleep_until, timeout},
};
use voxfleet_http::axum::extract::ws::{CloseFrame, Message, WebSocket};
use voxfleet_nats::{
    Nats, ServerError,
    transcript::{self, Filter, ReadError, Reader, Said, Start},
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    id::{Kind, StreamId},
    transcript::Partial,
};

use super::{goodbye::Goodbye, uplink::Logged, view::View};

/// Between two states, unless something became final.
const EVERY: Duration = Duration::from_millis(250);
/// States grow with the transcript: a client is sent this many bytes a ms at most, finals or not.
const BYTES_PER_MS: u64 = 256;
/// For a close to be answered.
const LEAVE: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_secs(20);
/// A client that takes nothing for so long is gone.
const SEND: Duration = Duration::from_secs(10);
/// After the client's last word, without any news.
const PATIENCE: Duration = Duration::from_secs(120);
/// The same where no audio came: there is nothing to wait for but the slot's release.
const NOTHING_SAID: Duration = Duration::from_secs(5);
/// For speakers that are told after the words.
const SPEAKERS: Duration = Duration::from_secs(15);

/// How telling ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Told {
    /// All of it.
    Everything,
    /// Nobody listens any more.
    Gone,
    Failed(Failure),
}

pub(crate) struct Speaker {
    sink: SplitSink<WebSocket, Message>,
    said: Reader<Said>,
    partials: Reader<Partial>,
    logged: watch::Receiver<Logged>,
    view: View,
    /// It knows that it is heard.
    greeted: bool,
    /// There is something that the client does not know.
    news: bool,
    send_at: Instant,
    /// Last news of the session, or of its input.
    moved: Instant,
    ended: Option<Instant>,
}

impl Speaker {
    pub(crate) fn new(
        nats: &Nats,
        id: &StreamId,
        sink: SplitSink<WebSocket, Message>,
        logged: watch::Receiver<Logged>,
    ) -> Self {
        let filter = Filter::One(Kind::Session, id.clone());
        let now = Instant::now();
        Self {
            sink,
            // From the beginning: whoever comes back to a session sees what was said before.
            said: transcript::said(nats, &filter, Start::First),
            partials: transcript::partials(nats, &filter, Start::LastPerSubject),
            logged,
            view: View::default(),
            greeted: false,
            news: false,
            send_at: now,
            moved: now,
            ended: None,
        }
    }

    /// Tells until everything has been told. May be dropped between two messages.
    pub(crate) async fn run(&mut self) -> Told {
        let mut pings = interval(PING);
        pings.reset();
        loop {
            let now = Instant::now();
            if let Some(told) = self.over(now) {
                if self.news && self.state(now).await.is_err() {
                    return Told::Gone;
                }
                return told;
            }
            let sent = tokio::select! {
                read = self.said.next() => match read {
                    Ok(read) => {
                        let finals = matches!(read.value, Said::Final(_));
                        let news = match read.value {
                            Said::Final(value) => self.view.on_final(&value),
                            Said::Revision(value) => self.view.on_revision(&value),
                        };
                        self.heard(news, finals && read.pending == 0);
                        Ok(())
                    }
                    Err(error) => match is_over(error) {
                        true => return Told::Failed(lost()),
                        false => Ok(()),
                    },
                },
                read = self.partials.next() => match read {
                    Ok(read) => {
                        let news = self.view.on_partial(read.value);
                        self.heard(news, false);
                        Ok(())
                    }
                    Err(error) => match is_over(error) {
                        true => return Told::Failed(lost()),
                        false => Ok(()),
                    },
                },
                changed = self.logged.changed() => {
                    if changed.is_err() {
                        return Told::Failed(lost());
                    }
                    let is_heard = self.logged.borrow_and_update().last_audio.is_some();
                    self.news |= is_heard && !self.greeted;
                    (self.greeted, self.moved) = (is_heard, Instant::now());
                    Ok(())
                }
                () = sleep_until(self.send_at), if self.news => self.state(Instant::now()).await,
                _ = pings.tick() => self.send(Message::Ping(Bytes::new())).await,
                // Something may be over by its time alone.
                () = sleep_until(now + Duration::from_secs(1)) => Ok(()),
            };
            if sent.is_err() {
                return Told::Gone;
            }
        }
    }

    fn heard(&mut self, news: bool, at_once: bool) {
        if !news {
            return;
        }
        self.news = true;
        self.moved = Instant::now();
        if at_once && self.send_at < self.moved + EVERY {
            self.send_at = self.moved;
        }
    }

    /// Whether there is nothing more to tell.
    fn over(&mut self, now: Instant) -> Option<Told> {
        let stands = {
            let logged = self.logged.borrow();
            stands(&logged, self.view.end(), now.saturating_duration_since(self.moved))
        };
        match stands {
            Stands::GoesOn => return None,
            Stands::Failed(failure) => return Some(Told::Failed(failure)),
            Stands::Ended => {}
        }
        let since = *self.ended.get_or_insert(now);
        (!self.view.waits_for_speakers() || now >= since + SPEAKERS).then_some(Told::Everything)
    }

    async fn state(&mut self, now: Instant) -> Result<(), ()> {
        let text = self.view.state().to_string();
        self.news = false;
        self.send_at = now + EVERY + Duration::from_millis(text.len() as u64 / BYTES_PER_MS);
        self.send(Message::Text(text.into())).await
    }

    pub(crate) async fn tell(&mut self, value: &Value) -> Result<(), ()> {
        self.send(Message::Text(value.to_string().into())).await
    }

    pub(crate) async fn ready_to_stop(&mut self) -> Result<(), ()> {
        self.tell(&json!({ "type": "ready_to_stop" })).await
    }

    pub(crate) async fn close(&mut self, goodbye: &Goodbye) {
        if let Some(told) = goodbye.told()
            && self.tell(&told).await.is_err()
        {
            return;
        }
        let frame = CloseFrame { code: goodbye.code, reason: goodbye.reason().into() };
        // Whoever is gone needs no goodbye.
        let _ = self.send(Message::Close(Some(frame))).await;
    }

    /// Answers a client's own close, where there was one.
    pub(crate) async fn leave(&mut self) {
        // Whoever is gone needs no answer.
        let _ = timeout(LEAVE, self.sink.close()).await;
    }

    async fn send(&mut self, message: Message) -> Result<(), ()> {
        match timeout(SEND, self.sink.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(()),
        }
    }
}

/// How far a session is, seen from its client.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stands {
    GoesOn,
    Ended,
    Failed(Failure),
}

/// `end`: where the chain ends; `quiet`: since the last news of the session or of its input. Pure.
fn stands(logged: &Logged, end: Option<u64>, quiet: Duration) -> Stands {
    if let Some(failure) = &logged.failed {
        return Stands::Failed(failure.clone());
    }
    if logged.input_over.is_none() {
        return Stands::GoesOn;
    }
    let ended = match (logged.end, end, logged.last_audio) {
        (None, _, _) => false,
        (Some(_), Some(end), Some(last)) => end >= last,
        (Some(_), Some(_), None) => true,
        (Some(_), None, None) => quiet >= NOTHING_SAID,
        (Some(_), None, Some(_)) => false,
    };
    if ended {
        return Stands::Ended;
    }
    if quiet < PATIENCE {
        return Stands::GoesOn;
    }
    let message = match logged.end {
        Some(_) => "the rest of the transcript did not come in time; the audio is kept and will be transcribed",
        None => "the rest of the audio was not taken in time",
    };
    Stands::Failed(Failure::new(FailureClass::Timeout, message))
}

fn lost() -> Failure {
    Failure::new(FailureClass::Unavailable, "the connection to the transcript is lost")
}

/// Only the connection's end is; everything else is read past, or again.
fn is_over(error: ReadError) -> bool {
    match error {
        ReadError::Server(ServerError::Closed) => true,
        error => {
            tracing::debug!(%error, "transcript not readable now");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_ever_after_his_last_word() {
        let nothing = Logged::default();
        let audio = Logged { last_audio: Some(7), ..nothing.clone() };
        let over = Logged { input_over: Some(""), ..audio.clone() };
        let ended = Logged { end: Some(8), ..over.clone() };
        let silent = Logged { last_audio: None, ..ended.clone() };
        let long = PATIENCE - Duration::from_millis(1);
        for (what, logged, end, quiet, expected) in [
            ("he still speaks", &audio, None, PATIENCE * 9, "goes on"),
            ("his audio is on its way", &over, None, long, "goes on"),
            ("it stays on its way", &over, None, PATIENCE, "timeout"),
            ("the chain ended before it", &over, Some(3), PATIENCE, "timeout"),
            ("the transcript is on its way", &ended, None, long, "goes on"),
            ("it does not come", &ended, None, PATIENCE, "timeout"),
            ("an older end", &ended, Some(6), long, "goes on"),
            ("all of it", &ended, Some(8), Duration::ZERO, "ended"),
            ("nothing was said", &silent, None, Duration::ZERO, "goes on"),
            ("and nothing comes of it", &silent, None, NOTHING_SAID, "ended"),
        ] {
            let told = match stands(logged, end, quiet) {
                Stands::GoesOn => "goes on",
                Stands::Ended => "ended",
                Stands::Failed(failure) if failure.class == FailureClass::Timeout => "timeout",
                Stands::Failed(_) => "failed",
            };
            assert_eq!(told, expected, "{what}");
        }
        let full = Failure::new(FailureClass::Unavailable, "full");
        let failed = Logged { failed: Some(full.clone()), ..nothing };
        assert_eq!(stands(&failed, None, Duration::ZERO), Stands::Failed(full));
    }
}
