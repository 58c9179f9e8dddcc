//! The engine called directly on a log: no process, no NATS, no threads. Tests and measurements compare the real thing
//! with it.

use voxfleet_schema::{audio::RawEntry, session::SessionOptions, transcript::Timings};

use super::{
    EngineError, Recognizer,
    diarize::{Listened, Listener},
    pool::{ends_session, hear},
    stream::{SessionStream, Step},
    vad::VadFactory,
};
use crate::ipc::{FinalDraft, PartialDraft, StartPoint};

/// Transcribes a whole log from `start` on and gives its finals in order. With `partials`, a pass over the growing window
/// is made whenever one is due, as an engine with nothing better to do would.
pub fn transcribe_log(
    log: &[RawEntry],
    options: &SessionOptions,
    start: StartPoint,
    recognizer: &mut dyn Recognizer,
    vads: &dyn VadFactory,
    partials: Option<&mut dyn FnMut(PartialDraft)>,
) -> Result<Vec<FinalDraft>, EngineError> {
    transcribe_with_speakers(log, options, start, recognizer, vads, None, partials)
}

/// The same with somebody who listens to who speaks, as in a recording: words wait for their speakers.
pub fn transcribe_with_speakers(
    log: &[RawEntry],
    options: &SessionOptions,
    start: StartPoint,
    recognizer: &mut dyn Recognizer,
    vads: &dyn VadFactory,
    mut listener: Option<&mut Listener>,
    mut partials: Option<&mut dyn FnMut(PartialDraft)>,
) -> Result<Vec<FinalDraft>, EngineError> {
    let first_seq = start.first_seq();
    let mut stream = SessionStream::new(options, start, vads.create());
    let mut finals = Vec::new();
    for entry in log.iter().filter(|e| e.seq >= first_seq) {
        stream.push(entry.clone());
        if step_all(&mut stream, recognizer, listener.as_deref_mut(), &mut finals)? {
            break;
        }
        if let Some(report) = partials.as_mut()
            && let Some(window) = stream.partial_window()
        {
            let to_sample = window.from_sample + window.samples.len() as u64;
            match hear(recognizer, &window) {
                Ok(judged) => {
                    if let Some(partial) = stream.partial_heard(&judged.hypothesis, to_sample) {
                        report(partial);
                    }
                }
                Err(_) => stream.partial_failed(),
            }
        }
    }
    Ok(finals)
}

/// Works off what has been pushed; says whether the session has ended.
fn step_all(
    stream: &mut SessionStream,
    recognizer: &mut dyn Recognizer,
    mut listener: Option<&mut Listener>,
    finals: &mut Vec<FinalDraft>,
) -> Result<bool, EngineError> {
    loop {
        match stream.step()? {
            Step::Starved => return Ok(false),
            Step::Ended => return Ok(true),
            Step::Draft(draft) => finals.push(*draft),
            Step::Final(windows) => {
                for (part, window) in windows.iter().enumerate() {
                    let begin = std::time::Instant::now();
                    let (heard, guards) = match hear(recognizer, window) {
                        Ok(judged) => (Ok(judged.hypothesis), judged.guards.into_iter().map(str::to_owned).collect()),
                        Err(error) if ends_session(&error) => return Err(error),
                        Err(error) => (Err(error), Vec::new()),
                    };
                    let decode_ms = begin.elapsed().as_millis() as u64;
                    let timings = Timings { decode_ms, ..Timings::default() };
                    let listened = match (&window.hearing, listener.as_deref_mut()) {
                        (Some(hearing), Some(listener)) => Listened::Heard(listener.hear(hearing, &window.cancel)),
                        _ => Listened::NotAsked,
                    };
                    let draft = stream.complete(part, heard, guards, listened, recognizer.info(), timings);
                    finals.extend(draft.map(|draft| *draft));
                }
            }
        }
    }
}
