//! `voxfleet export`: the stored chain as a file. It asks no dispatcher and no worker, only the streams.

use voxfleet_nats::{
    Nats,
    transcript::{self, ChainError},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::Revision,
};

use super::{close, need_jetstream};
use crate::{
    Context,
    args::ExportArgs,
    deliver::{check, deliver},
    exit::{Exit, OrExit as _},
    formats::Chain,
};

pub(crate) async fn run(args: &ExportArgs, context: &Context) -> anyhow::Result<Exit> {
    check(&args.file)?;
    let (nats, _) = context.client("voxfleet-export").await?;
    let result = tokio::select! {
        biased;
        () = context.shutdown.cancelled() => Ok(Exit::Interrupted),
        result = export(args, &nats) => result,
    };
    close(nats).await;
    result
}

async fn export(args: &ExportArgs, nats: &Nats) -> anyhow::Result<Exit> {
    need_jetstream(nats).await?;
    let (kind, chain) = find(args, nats).await?;
    for note in notes(kind, &args.id, &chain) {
        eprintln!("{note}");
    }
    if let Some(document) = chain.document() {
        deliver(&args.file, &document.or_exit(Exit::Internal)?)?;
    }
    Ok(Exit::Ok)
}

async fn find(args: &ExportArgs, nats: &Nats) -> anyhow::Result<(Kind, Chain)> {
    let kinds = match (args.session, args.job) {
        (true, _) => &[Kind::Session][..],
        (_, true) => &[Kind::Job],
        (false, false) => &[Kind::Session, Kind::Job],
    };
    let mut found = Vec::new();
    for kind in kinds {
        if let Some(chain) = read(nats, *kind, &args.id).await? {
            found.push((*kind, chain));
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (Some(_), false) => Err(anyhow::anyhow!("there is a session and a job {}; say --session or --job", args.id))
            .or_exit(Exit::Usage),
        (None, _) => {
            let what = if let [kind] = kinds { kind.as_str() } else { "session and no job" };
            Err(anyhow::anyhow!("no {what} {} has a transcript here (they are kept for a day)", args.id))
                .or_exit(Exit::NotFound)
        }
    }
}

/// None where there is no final.
async fn read(nats: &Nats, kind: Kind, id: &StreamId) -> anyhow::Result<Option<Chain>> {
    let stored = transcript::Chain::new(nats);
    let mut chain = Chain::default();
    let mut from = 0;
    while let Some(next) = stored.next_final(kind, id, from).await.or_exit(Exit::Unavailable)? {
        from = next.seq + 1;
        chain.finals.push(next.value);
    }
    if chain.finals.is_empty() {
        return Ok(None);
    }
    chain.revise(revisions(&stored, kind, id).await?);
    Ok(Some(chain))
}

async fn revisions(stored: &transcript::Chain, kind: Kind, id: &StreamId) -> anyhow::Result<Vec<Revision>> {
    let (mut all, mut from) = (Vec::new(), 0);
    loop {
        match stored.next_revision(kind, id, from).await {
            Ok(Some((seq, revision))) => {
                from = seq + 1;
                all.push(revision);
            }
            Ok(None) => return Ok(all),
            Err(ChainError::Foreign { seq, source }) => {
                tracing::warn!(error = %source, "a revision cannot be read, the final stands as it was");
                from = seq + 1;
            }
            Err(error) => return Err(error).or_exit(Exit::Unavailable),
        }
    }
}

fn notes(kind: Kind, id: &StreamId, chain: &Chain) -> Vec<String> {
    let mut notes = Vec::new();
    if chain.finals.first().is_some_and(|first| first.index > 0) {
        notes.push(format!("the beginning of {kind} {id} has expired"));
    }
    if let Some(error) = chain.error() {
        notes.push(format!("{kind} {id} ended with {error}"));
    } else if !chain.ended() {
        notes.push(format!("{kind} {id} has not ended; this is what is there by now"));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transcript::view::tests::a_final;

    #[test]
    fn what_is_not_whole_is_said() {
        let id = StreamId::new("s").expect("id");
        let mut chain = Chain { finals: vec![a_final(0, 1, "g", "x"), a_final(1, 1, "g", "y")] };
        assert_eq!(notes(Kind::Session, &id, &chain), ["session s has not ended; this is what is there by now"]);
        chain.finals[1].end = true;
        assert!(notes(Kind::Session, &id, &chain).is_empty());
        chain.finals.remove(0);
        assert_eq!(notes(Kind::Job, &id, &chain), ["the beginning of job s has expired"]);
    }
}
