//! Every worker's reason as a person reads it.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use super::{Refusal, Request, Roster, Score, Slot};

/// How many workers are told of one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    All,
    /// All of a fleet of at most [`FULL`]; of a larger one those that matter, and how many the others are.
    Short,
}

/// With a thousand GPUs every event would carry more than 100 kB.
const FULL: usize = 64;
/// The chosen one and those that came next.
const BEST: usize = 8;

impl Roster {
    /// The reasons for `chosen`, or for none, in order of (host, device index, name).
    pub fn explain(&self, request: &Request<'_>, chosen: Option<Slot>, now: Duration, rows: Rows) -> Value {
        let terms = self.terms(request, now);
        let mut judged: Vec<(Slot, Result<Score, Refusal>)> =
            self.rows.iter().enumerate().map(|(slot, row)| (slot, self.judge(&terms, slot, row))).collect();
        judged.sort_unstable_by_key(|(slot, _)| self.rows[*slot].rank);
        if rows == Rows::All || judged.len() <= FULL {
            return judged.into_iter().map(|(slot, reason)| self.told(slot, reason, chosen)).collect();
        }
        let mut good: Vec<(Slot, Score)> = Vec::new();
        let mut refused: BTreeMap<Refusal, (Slot, usize)> = BTreeMap::new();
        for (slot, reason) in judged {
            match reason {
                Ok(score) => good.push((slot, score)),
                Err(refusal) => refused.entry(refusal).or_insert((slot, 0)).1 += 1,
            }
        }
        good.sort_by(|(_, a), (_, b)| a.compare(b));
        let more = good.len().saturating_sub(BEST);
        let mut told: Vec<Value> =
            good.into_iter().take(BEST).map(|(slot, score)| self.told(slot, Ok(score), chosen)).collect();
        told.extend(refused.into_iter().map(|(refusal, (slot, count))| {
            let mut row = self.told(slot, Err(refusal), chosen);
            row["count"] = count.into();
            row
        }));
        told.push(json!({ "gpus": self.len(), "more_with_room": more }));
        Value::Array(told)
    }

    fn told(&self, slot: Slot, reason: Result<Score, Refusal>, chosen: Option<Slot>) -> Value {
        let name = self.name(slot);
        let mut row = json!({ "gpu_id": name.gpu_id, "incarnation": name.incarnation });
        match reason {
            Ok(score) => {
                row["used"] = score.used.into();
                row["slots"] = score.slots.into();
                row["warm"] = score.warm.into();
                if score.smaller > 0 {
                    row["sizes_smaller"] = score.smaller.into();
                }
                row["free_mb"] = score.free_mb.into();
                row["pressure_permille"] = score.pressure.into();
                row["chosen"] = (chosen == Some(slot)).into();
            }
            Err(refusal) => row["refused"] = refusal.as_str().into(),
        }
        if self.rows[slot].promised_mb > 0 {
            row["promised_mb"] = self.rows[slot].promised_mb.into();
        }
        row
    }
}
