//! Which models and how many sessions a device can hold. Pure.
//!
//! Weights lie on the device once for each model, a small pool of decode states serves all sessions, and a session costs
//! buffers in the memory of the host, not a state. A tenth of the device stays free; what others use now is theirs.

use serde::Serialize;

/// Share of the device that stays free.
const RESERVE: f64 = 0.1;
/// Where a plan begins to be tight, and where one more tenant breaks it.
const MEDIUM: f64 = 0.7;
const HIGH: f64 = 0.85;

/// A device as a plan sees it, in MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Room {
    pub total_mb: u64,
    /// Used by everybody else.
    pub others_mb: u64,
    /// What the runtime takes before any model: a CUDA context; nothing on a CPU.
    pub context_mb: u64,
    /// Memory for the buffers of sessions; None where that is the device's own memory.
    pub host_mb: Option<u64>,
}

/// A model as a plan sees it, in MB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    pub model: String,
    pub weights_mb: u64,
    pub state_mb: u64,
}

/// What is wished for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    pub sessions: u64,
    pub states: u64,
    /// Buffers of one session, in MB of the host.
    pub session_mb: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Risk {
    Low,
    Medium,
    High,
}

impl Risk {
    pub fn as_str(self) -> &'static str {
        match self {
            Risk::Low => "low",
            Risk::Medium => "medium",
            Risk::High => "high",
        }
    }
}

/// What becomes of one model on this device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanOption {
    pub model: String,
    /// How many of the wished sessions fit; 0 = the model does not.
    pub sessions: u64,
    /// The most that memory alone would allow.
    pub sessions_by_memory: u64,
    pub states: u64,
    /// Device memory for it and its sessions.
    pub used_mb: u64,
    /// Of the whole device, others included; a fraction.
    pub utilization: f64,
    pub risk: Risk,
}

/// One row for each model, in the order given.
pub fn plan(room: Room, models: &[Weight], wish: Wish) -> Vec<PlanOption> {
    models.iter().map(|model| option(room, model, wish)).collect()
}

fn option(room: Room, model: &Weight, wish: Wish) -> PlanOption {
    let reserve = (room.total_mb as f64 * RESERVE).ceil() as u64;
    let budget = room.total_mb.saturating_sub(room.others_mb).saturating_sub(reserve);
    let fixed = room.context_mb + model.weights_mb + wish.states * model.state_mb;
    let session_mb = wish.session_mb.max(1);
    let fits = fixed <= budget;
    let by_memory = match (fits, room.host_mb) {
        (false, _) => 0,
        (true, None) => (budget - fixed) / session_mb,
        (true, Some(host)) => host / session_mb,
    };
    let sessions = by_memory.min(wish.sessions);
    let buffers = if room.host_mb.is_none() { sessions * session_mb } else { 0 };
    let used_mb = fixed + buffers;
    let utilization = (room.others_mb + used_mb) as f64 / (room.total_mb.max(1)) as f64;
    let risk = match (sessions, utilization) {
        (0, _) => Risk::High,
        (_, u) if u > HIGH => Risk::High,
        (_, u) if u > MEDIUM => Risk::Medium,
        _ => Risk::Low,
    };
    PlanOption {
        model: model.model.clone(),
        sessions,
        sessions_by_memory: by_memory,
        states: wish.states,
        used_mb,
        utilization: (utilization * 1e4).round() / 1e4,
        risk,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GPU: Room = Room { total_mb: 8_000, others_mb: 0, context_mb: 530, host_mb: Some(1_000) };
    const WISH: Wish = Wish { sessions: 4, states: 2, session_mb: 5 };

    fn small() -> Weight {
        Weight { model: "small".to_owned(), weights_mb: 466, state_mb: 386 }
    }

    #[test]
    fn rows_say_what_fits() {
        let cpu = Room { total_mb: 2_000, others_mb: 500, context_mb: 0, host_mb: None };
        for (room, wish, sessions, by_memory, used_mb, risk) in [
            // 530 + 466 + 2 x 386 = 1,768
            (GPU, WISH, 4, 200, 1_768, Risk::Low),
            (GPU, Wish { sessions: 500, ..WISH }, 200, 200, 1_768, Risk::Low),
            (Room { others_mb: 4_500, ..GPU }, WISH, 4, 200, 1_768, Risk::Medium),
            (Room { others_mb: 5_200, ..GPU }, WISH, 4, 200, 1_768, Risk::High),
            // 7,200 - 5,432 is just enough, one more is not.
            (Room { others_mb: 5_432, ..GPU }, WISH, 4, 200, 1_768, Risk::High),
            (Room { others_mb: 5_433, ..GPU }, WISH, 0, 0, 1_768, Risk::High),
            (Room { host_mb: Some(12), ..GPU }, WISH, 2, 2, 1_768, Risk::Low),
            (Room { host_mb: Some(0), ..GPU }, WISH, 0, 0, 1_768, Risk::High),
            // 1,300 - 1,238 = 62 MB of buffers
            (cpu, WISH, 4, 12, 1_258, Risk::High),
            (cpu, Wish { states: 1, ..WISH }, 4, 89, 872, Risk::Low),
            (Room { others_mb: 3_000, ..cpu }, WISH, 0, 0, 1_238, Risk::High),
            (Room { total_mb: 0, ..cpu }, WISH, 0, 0, 1_238, Risk::High),
        ] {
            let row = option(room, &small(), wish);
            let found = (row.sessions, row.sessions_by_memory, row.used_mb, row.risk);
            assert_eq!(found, (sessions, by_memory, used_mb, risk), "{room:?} {wish:?} {row:?}");
        }
    }

    #[test]
    fn weights_are_counted_once_and_states_by_number() {
        let used = |states, sessions| option(GPU, &small(), Wish { states, sessions, ..WISH }).used_mb;
        assert_eq!(used(2, 16), used(2, 1));
        assert_eq!(used(3, 1) - used(2, 1), 386);
    }

    proptest! {
        #[test]
        fn what_fits_leaves_the_reserve(
            total_mb in 0u64..200_000, others_mb in 0u64..200_000, weights_mb in 0u64..5_000, state_mb in 0u64..1_000,
            sessions in 0u64..20_000, states in 1u64..9, session_mb in 1u64..50, host in proptest::option::of(0u64..100_000),
        ) {
            let room = Room { total_mb, others_mb, context_mb: 530, host_mb: host };
            let model = Weight { model: "m".to_owned(), weights_mb, state_mb };
            let row = option(room, &model, Wish { sessions, states, session_mb });
            prop_assert!(row.sessions <= sessions && row.sessions <= row.sessions_by_memory);
            if row.sessions > 0 {
                prop_assert!((others_mb + row.used_mb) as f64 <= total_mb as f64 * (1.0 - RESERVE) + 1e-6, "{row:?}");
            }
        }
    }
}
