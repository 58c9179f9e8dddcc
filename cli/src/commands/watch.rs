//! `voxfleet watch`.

use voxfleet_nats::transcript::Filter;
use voxfleet_schema::id::Kind;

use super::{close, need_jetstream};
use crate::{
    Context,
    args::{From, WatchArgs},
    exit::Exit,
    transcript::{
        follow::{Follow, Followed, follow},
        screen::{Detail, Screen, Style},
    },
};

pub(crate) async fn run(args: &WatchArgs, context: &Context) -> anyhow::Result<Exit> {
    let (nats, _) = context.client("voxfleet-watch").await?;
    if let Err(error) = need_jetstream(&nats).await {
        close(nats).await;
        return Err(error);
    }
    let filter = match &args.session {
        Some(id) => Filter::One(Kind::Session, id.clone()),
        None => Filter::All,
    };
    let what = Follow { filter, from_start: args.from == From::Start, until_end: args.until_end };
    let detail = Detail { names: args.session.is_none(), words: args.words, partials: !args.no_partials };
    let mut screen = Screen::new(Style::of_stdout(args.json), detail);
    let followed = follow(&nats, &what, &mut screen, &|_| None, &mut |_| (), &context.shutdown).await;
    close(nats).await;
    Ok(match followed? {
        Followed::Ended(end) if end.error.is_some() => Exit::Failure,
        Followed::Ended(_) => Exit::Ok,
        // Watching has no end of its own: Ctrl-C is how one leaves. Asked to wait for an end, it did not come.
        Followed::Stopped if args.until_end => Exit::Interrupted,
        Followed::Stopped => Exit::Ok,
    })
}
