//! Draws news: redrawn in place on a terminal, plain lines in a pipe, one object a line for machines.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write as _},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use voxfleet_schema::id::StreamId;

use super::{
    line::{self, Paint},
    view::{Move, News},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Terminal,
    Plain,
    Json,
    /// Nothing at all: somebody else reports.
    Silent,
}

impl Style {
    /// A terminal gets a drawing, a pipe lines.
    pub(crate) fn of_stdout(json: bool) -> Self {
        match (json, io::stdout().is_terminal()) {
            (true, _) => Style::Json,
            (false, true) => Style::Terminal,
            (false, false) => Style::Plain,
        }
    }
}

/// What to show beside the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Detail {
    /// Session ids in front: for more than one session.
    pub(crate) names: bool,
    pub(crate) words: bool,
    pub(crate) partials: bool,
}

pub(crate) struct Screen {
    style: Style,
    detail: Detail,
    paint: Paint,
    multi: MultiProgress,
    /// The line of each session's current hypothesis.
    open: BTreeMap<StreamId, ProgressBar>,
}

impl Screen {
    pub(crate) fn new(style: Style, detail: Detail) -> Self {
        let terminal = style == Style::Terminal;
        let target = if terminal { ProgressDrawTarget::stdout() } else { ProgressDrawTarget::hidden() };
        Self {
            style,
            detail,
            paint: Paint { colour: terminal },
            multi: MultiProgress::with_draw_target(target),
            open: BTreeMap::new(),
        }
    }

    /// `lag_ms` = from the moment its last sound was published until now, where the caller knows it.
    pub(crate) fn show(&mut self, news: &News<'_>, lag_ms: Option<u64>) -> io::Result<()> {
        if self.style == Style::Json {
            return self.objects(news, lag_ms);
        }
        if self.style == Style::Silent {
            return Ok(());
        }
        match news {
            News::Final { new, moved_from } => {
                self.moved(moved_from.as_deref(), &new.id, new.gpu_id.as_str(), new.epoch)?;
                if let Some(bar) = self.open.remove(&new.id) {
                    bar.finish_and_clear();
                }
                if let Some(text) = line::of_final(new, self.paint, lag_ms) {
                    self.line(&self.named(&new.id, &text, "final  "))?;
                }
                match line::of_words(&new.segments, self.paint).filter(|_| self.detail.words) {
                    Some(words) => self.line(&format!("    {words}")),
                    None => Ok(()),
                }
            }
            News::Partial { new, moved_from } => {
                self.moved(moved_from.as_deref(), &new.id, new.gpu_id.as_str(), new.epoch)?;
                if !self.detail.partials || (new.committed.is_empty() && new.tentative.is_empty()) {
                    return Ok(());
                }
                let text = self.named(&new.id, &line::of_partial(new, self.paint), "partial");
                if self.style == Style::Plain {
                    return self.line(&text);
                }
                let bar = self.open.entry(new.id.clone()).or_insert_with(|| {
                    let style =
                        ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
                    self.multi.add(ProgressBar::new_spinner().with_style(style))
                });
                bar.set_message(text);
                bar.tick();
                Ok(())
            }
            News::Revision(new) => {
                let Some(text) = line::of_revision(new, self.paint) else { return Ok(()) };
                let text = match self.style {
                    Style::Terminal => format!("{} {text}", self.paint.yellow("revised")),
                    _ => text,
                };
                self.line(&self.named(&new.id, &text, "revised"))?;
                match line::of_words(&new.segments, self.paint).filter(|_| self.detail.words) {
                    Some(words) => self.line(&format!("    {words}")),
                    None => Ok(()),
                }
            }
            News::Moved(told) => {
                if let Some(bar) = self.open.remove(&told.id) {
                    bar.finish_and_clear();
                }
                let from = told.from.as_deref().unwrap_or("-");
                self.moved(Some(from), &told.id, &told.to, told.epoch)
            }
            News::Event(event) => self.line(&line::of_event(event, self.paint)),
        }
    }

    fn moved(&self, from: Option<&str>, id: &StreamId, to: &str, epoch: u64) -> io::Result<()> {
        match from {
            Some(from) => self.line(&self.paint.yellow(&format!("moved {id} {from} -> {to} epoch={epoch}"))),
            None => Ok(()),
        }
    }

    fn named(&self, id: &StreamId, text: &str, tag: &str) -> String {
        let tag = if self.style == Style::Plain { format!("{tag} ") } else { String::new() };
        let name = if self.detail.names { format!("{} ", self.paint.green(id.as_str())) } else { String::new() };
        format!("{tag}{name}{text}")
    }

    /// A line that stays, above whatever is redrawn.
    pub(crate) fn line(&self, text: &str) -> io::Result<()> {
        self.voice().line(text)
    }

    pub(crate) fn voice(&self) -> Voice {
        Voice { style: self.style, multi: self.multi.clone() }
    }

    #[cfg(feature = "bench")]
    pub(crate) fn paint(&self) -> Paint {
        self.paint
    }

    fn objects(&self, news: &News<'_>, lag_ms: Option<u64>) -> io::Result<()> {
        let moved = |from: &Option<String>, id: &StreamId, to: &str, epoch: u64| match from {
            Some(from) => object(&json!({"type": "moved", "id": id, "from": from, "to": to, "epoch": epoch})),
            None => Ok(()),
        };
        match news {
            News::Final { new, moved_from } => {
                moved(moved_from, &new.id, new.gpu_id.as_str(), new.epoch)?;
                let mut value = json!({"type": "final", "final": new});
                if let Some(lag) = lag_ms {
                    value["lag_ms"] = lag.into();
                }
                object(&value)
            }
            News::Partial { new, moved_from } => {
                moved(moved_from, &new.id, new.gpu_id.as_str(), new.epoch)?;
                if self.detail.partials { object(&json!({"type": "partial", "partial": new})) } else { Ok(()) }
            }
            News::Moved(Move { id, from, to, epoch }) => {
                object(&json!({"type": "moved", "id": id, "from": from, "to": to, "epoch": epoch}))
            }
            News::Revision(new) => object(&json!({"type": "revision", "revision": new})),
            News::Event(event) => object(&json!({"type": "event", "event": event})),
        }
    }
}

/// Says lines beside a [`Screen`] that somebody else draws on.
#[derive(Clone)]
pub(crate) struct Voice {
    style: Style,
    multi: MultiProgress,
}

impl Voice {
    /// A line that stays, above whatever is redrawn.
    pub(crate) fn line(&self, text: &str) -> io::Result<()> {
        match self.style {
            Style::Terminal => self.multi.println(text),
            Style::Plain | Style::Json => out(text),
            Style::Silent => Ok(()),
        }
    }
}

/// One object on a line of standard output.
pub(crate) fn object(value: &Value) -> io::Result<()> {
    out(&value.to_string())
}

/// A line on standard output. Unlike `println!` it does not panic when the reader has gone.
pub(crate) fn out(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}
