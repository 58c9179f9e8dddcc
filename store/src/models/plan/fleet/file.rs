//! The file in which somebody describes a fleet. Every mistake in it is reported, not only the first.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{Fleet, FleetCard, Kind, Service};
use crate::models::plan::{GpuSpec, Needs, SAFE_PERCENT, Size, Tenant};

/// What a file may name: enough for every pair of cards to be thought through.
const MOST_CARDS: usize = 64;
const MOST_SERVICES: usize = 64;
const MOST_SESSIONS: u64 = 1_000_000;

#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("{0}")]
    Syntax(String),
    #[error("{} mistake{}:{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, list(.0))]
    Content(Vec<String>),
}

fn list(problems: &[String]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetFile {
    #[serde(default, rename = "card")]
    cards: Vec<CardEntry>,
    #[serde(default, rename = "service")]
    services: Vec<ServiceEntry>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct CardEntry {
    id: String,
    gpu: GpuSpec,
    /// Others on it that are nobody's service: name and memory.
    #[serde(default)]
    tenants: BTreeMap<String, Size>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceEntry {
    pub name: String,
    gpus: Vec<String>,
    #[serde(default)]
    reserves: Vec<String>,
    /// Of each card, everything on it counted. As in the dispatcher's settings.
    #[serde(default = "limit", alias = "memory_limit_percent")]
    limit_percent: u8,
    /// Ours: models of the catalog.
    #[serde(default)]
    pub models: Vec<String>,
    /// Over all of its cards.
    sessions: Option<u64>,
    states: Option<u64>,
    /// Not ours: what it takes of all its cards together.
    memory: Option<Size>,
}

fn limit() -> u8 {
    SAFE_PERCENT
}

impl FleetFile {
    pub fn parse(text: &str) -> Result<Self, FleetError> {
        let file: Self = toml::from_str(text).map_err(|e| FleetError::Syntax(e.to_string().trim().to_owned()))?;
        let problems = file.problems();
        if problems.is_empty() { Ok(file) } else { Err(FleetError::Content(problems)) }
    }

    /// Our services: whoever reads the file says what their models need on each card.
    pub fn services(&self) -> &[ServiceEntry] {
        &self.services
    }

    /// `needs` of a service's models on a card like this, in their order; `sessions` and `states` for services that name none.
    pub fn fleet(&self, needs: impl Fn(&ServiceEntry, &GpuSpec) -> Vec<Needs>, sessions: u64, states: u64) -> Fleet {
        let place = |id: &String| self.cards.iter().position(|c| c.id == *id);
        let places = |ids: &[String]| ids.iter().filter_map(place).collect::<Vec<_>>();
        let service = |entry: &ServiceEntry| Service {
            name: entry.name.clone(),
            gpus: places(&entry.gpus),
            reserves: places(&entry.reserves),
            limit_percent: entry.limit_percent,
            kind: match entry.memory {
                Some(size) => Kind::Foreign { mb: size.mb },
                None => Kind::Ours {
                    needs: self.cards.iter().map(|card| needs(entry, &card.gpu)).collect(),
                    sessions: entry.sessions.unwrap_or(sessions.saturating_mul(entry.gpus.len() as u64)),
                    states: entry.states.unwrap_or(states),
                },
            },
        };
        let card = |entry: &CardEntry| FleetCard {
            id: entry.id.clone(),
            gpu: entry.gpu.name.clone(),
            total_mb: entry.gpu.total_mb,
            tenants: entry.tenants.iter().map(|(name, size)| Tenant { name: name.clone(), mb: size.mb }).collect(),
        };
        Fleet { cards: self.cards.iter().map(card).collect(), services: self.services.iter().map(service).collect() }
    }

    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.cards.is_empty() {
            found.push("no [[card]]: a fleet has at least one".to_owned());
        }
        if self.cards.len() > MOST_CARDS {
            found.push(format!("{} cards, the most is {MOST_CARDS}", self.cards.len()));
        }
        if self.services.len() > MOST_SERVICES {
            found.push(format!("{} services, the most is {MOST_SERVICES}", self.services.len()));
        }
        let mut ids = BTreeSet::new();
        for card in &self.cards {
            if !good_name(&card.id) {
                found.push(format!("card {:?}: letters, digits, - and _, 64 at most", card.id));
            }
            if !ids.insert(card.id.as_str()) {
                found.push(format!("card {:?} comes twice", card.id));
            }
        }
        let mut names = BTreeSet::new();
        for service in &self.services {
            if !names.insert(service.name.as_str()) {
                found.push(format!("service {:?} comes twice", service.name));
            }
            found.extend(service.problems(&ids).into_iter().map(|p| format!("service {:?}: {p}", service.name)));
        }
        found.extend(self.shared_cards());
        found
    }

    /// Cards that two of our services name, and reserves that serve.
    fn shared_cards(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut ours: BTreeMap<&str, &str> = BTreeMap::new();
        for service in self.services.iter().filter(|s| s.memory.is_none()) {
            for gpu in &service.gpus {
                if let Some(other) = ours.insert(gpu, &service.name).filter(|other| *other != service.name) {
                    found.push(format!(
                        "card {gpu:?}: a worker serves one service, not {other:?} and {:?}",
                        service.name
                    ));
                }
            }
        }
        for service in &self.services {
            for gpu in &service.reserves {
                if let Some(other) = self.services.iter().find(|s| s.gpus.contains(gpu)) {
                    found.push(format!("service {:?}: its reserve {gpu:?} serves {:?}", service.name, other.name));
                }
            }
        }
        found
    }
}

impl ServiceEntry {
    fn problems(&self, cards: &BTreeSet<&str>) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |good: bool, text: String| {
            if !good {
                found.push(text);
            }
        };
        check(good_name(&self.name), "a name has letters, digits, - and _, 64 at most".to_owned());
        check(!self.gpus.is_empty(), "gpus is empty".to_owned());
        for (field, list) in [("gpus", &self.gpus), ("reserves", &self.reserves)] {
            let mut seen = BTreeSet::new();
            for id in list {
                check(cards.contains(id.as_str()), format!("{field}: {id:?} is no card"));
                check(seen.insert(id), format!("{field}: {id:?} comes twice"));
            }
        }
        check(
            self.memory.is_some() == self.models.is_empty(),
            "name its models, or the memory of a service that is not ours".to_owned(),
        );
        let ours = self.memory.is_none();
        check(
            ours || (self.sessions.is_none() && self.states.is_none()),
            "only ours has sessions and states".to_owned(),
        );
        check(
            (1..=100).contains(&self.limit_percent),
            format!("limit_percent: {} is outside 1 to 100", self.limit_percent),
        );
        let sessions = self.sessions.unwrap_or(1);
        check((1..=MOST_SESSIONS).contains(&sessions), format!("sessions: {sessions} is outside 1 to {MOST_SESSIONS}"));
        let states = self.states.unwrap_or(1);
        check((1..=8).contains(&states), format!("states: {states} is outside 1 to 8"));
        let mut seen = BTreeSet::new();
        for model in &self.models {
            check(seen.insert(model), format!("models: {model:?} comes twice"));
        }
        found
    }
}

fn good_name(name: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    !name.is_empty() && name.len() <= 64 && name.bytes().all(fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> String {
        FleetFile::parse(text).expect_err(text).to_string()
    }

    const CARDS: &str = "[[card]]\nid = \"a\"\ngpu = \"T4:15GB\"\n[[card]]\nid = \"b\"\ngpu = \"T4:15GB\"\n";

    #[test]
    fn mistakes_are_named() {
        let service = |rest: &str| told(&format!("{CARDS}[[service]]\nname = \"s\"\n{rest}\n"));
        for (rest, wanted) in [
            ("gpus = [\"a\"]", "name its models"),
            ("gpus = [\"a\"]\nmodels = [\"m\"]\nmemory = \"1GB\"", "name its models"),
            ("gpus = [\"c\"]\nmodels = [\"m\"]", "gpus: \"c\" is no card"),
            ("gpus = [\"a\", \"a\"]\nmodels = [\"m\"]", "gpus: \"a\" comes twice"),
            ("gpus = []\nmodels = [\"m\"]", "gpus is empty"),
            ("gpus = [\"a\"]\nreserves = [\"a\"]\nmodels = [\"m\"]", "its reserve \"a\" serves \"s\""),
            ("gpus = [\"a\"]\nmodels = [\"m\"]\nlimit_percent = 0", "limit_percent: 0"),
            ("gpus = [\"a\"]\nmodels = [\"m\"]\nlimit_percent = 101", "limit_percent: 101"),
            ("gpus = [\"a\"]\nmodels = [\"m\", \"m\"]", "\"m\" comes twice"),
            ("gpus = [\"a\"]\nmodels = [\"m\"]\nsessions = 0", "sessions: 0"),
            ("gpus = [\"a\"]\nmodels = [\"m\"]\nstates = 9", "states: 9"),
            ("gpus = [\"a\"]\nmemory = \"1GB\"\nsessions = 4", "only ours"),
            ("gpus = [\"a\"]\nmemory = \"1\"", "not a size of memory"),
            ("gpus = [\"a\"]\nmodels = [\"m\"]\ncolour = 1", "unknown field"),
        ] {
            assert!(service(rest).contains(wanted), "{rest}: {}", service(rest));
        }
        assert!(told("").contains("no [[card]]"));
        assert!(told(&format!("{CARDS}{CARDS}")).contains("card \"a\" comes twice"));
        assert!(told("[[card]]\nid = \"a b\"\ngpu = \"T4:15GB\"").contains("card \"a b\""));
        assert!(told("[[card]]\nid = \"a\"\ngpu = \"T4\"").contains("is no card: say its name"));
        let two =
            "[[service]]\nname = \"s\"\ngpus = [\"a\"]\nmodels = [\"m\"]\n[[service]]\nname = \"t\"\ngpus = [\"a\"]\n";
        assert!(told(&format!("{CARDS}{two}models = [\"n\"]")).contains("serves one service, not \"s\" and \"t\""));
        assert!(told(&format!("{CARDS}{two}")).contains("2 mistakes:\n  service \"t\": name its models"));
        // What is not ours may lie beside what is.
        FleetFile::parse(&format!("{CARDS}{two}memory = \"1GB\"")).expect("a neighbour");
        let many: String = (0..65).map(|n| format!("[[card]]\nid = \"c{n}\"\ngpu = \"T4:15GB\"\n")).collect();
        assert!(told(&many).contains("65 cards"));
    }

    #[test]
    fn the_dispatchers_name_of_the_limit_is_taken_too() {
        let text =
            format!("{CARDS}[[service]]\nname = \"s\"\ngpus = [\"a\"]\nmemory = \"1GB\"\nmemory_limit_percent = 80\n");
        let fleet = FleetFile::parse(&text).expect("valid").fleet(|_, _| Vec::new(), 4, 2);
        assert_eq!((fleet.services[0].limit_percent, fleet.services[0].gpus.as_slice()), (80, &[0][..]));
    }
}
