//! Why a worker cannot take a session or a job, and what can be said of a fleet by the reasons that were met. Pure.

use voxfleet_schema::fleet::WorkerHealth;

/// Why a worker cannot take a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    Joining,
    Suspect,
    Dead,
    Draining,
    Unhealthy,
    NotAlive,
    /// The fleet map gives it to others, or does not name it.
    OtherService,
    /// A reserve, and no GPU it stands in for has failed.
    Reserved,
    /// The session keeps the VAD kind of its finals.
    OtherVad,
    /// It may not change the engine that its finals came from.
    OtherEngine,
    NoSpeakers,
    /// The policy keeps it off CPUs, or on them.
    WrongDevice,
    ModelNotHere,
    /// Listed, but its file is not there and cannot be fetched.
    ModelMissing,
    /// Its file is there and cannot be used.
    ModelFailed,
    ModelBeingFetched,
    /// The device had no memory for it when its worker tried.
    ModelHasNoRoom,
    /// Not even with all memory free.
    ModelTooLarge,
    ModelDoesNotFitNow,
    /// Others on the card have grown into what the worker uses.
    TenantPressure,
    NoSlot,
    TooSlow,
    TooHot,
    RefusedBefore,
    /// The newer incarnation on the same GPU takes it.
    Superseded,
}

impl Refusal {
    const ALL: [Refusal; 25] = [
        Refusal::Joining,
        Refusal::Suspect,
        Refusal::Dead,
        Refusal::Draining,
        Refusal::Unhealthy,
        Refusal::NotAlive,
        Refusal::OtherService,
        Refusal::Reserved,
        Refusal::OtherVad,
        Refusal::OtherEngine,
        Refusal::NoSpeakers,
        Refusal::WrongDevice,
        Refusal::ModelNotHere,
        Refusal::ModelMissing,
        Refusal::ModelFailed,
        Refusal::ModelBeingFetched,
        Refusal::ModelHasNoRoom,
        Refusal::ModelTooLarge,
        Refusal::ModelDoesNotFitNow,
        Refusal::TenantPressure,
        Refusal::NoSlot,
        Refusal::TooSlow,
        Refusal::TooHot,
        Refusal::RefusedBefore,
        Refusal::Superseded,
    ];

    pub(super) fn of(health: WorkerHealth) -> Self {
        match health {
            WorkerHealth::Joining => Refusal::Joining,
            WorkerHealth::Suspect => Refusal::Suspect,
            WorkerHealth::Dead => Refusal::Dead,
            WorkerHealth::Draining => Refusal::Draining,
            WorkerHealth::Unhealthy => Refusal::Unhealthy,
            WorkerHealth::Alive | WorkerHealth::Unknown => Refusal::NotAlive,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::Joining => "joining",
            Refusal::Suspect => "suspect",
            Refusal::Dead => "dead",
            Refusal::Draining => "draining",
            Refusal::Unhealthy => "unhealthy",
            Refusal::NotAlive => "not alive",
            Refusal::OtherService => "serves another service",
            Refusal::Reserved => "held in reserve",
            Refusal::OtherVad => "other vad kind",
            Refusal::OtherEngine => "other engine, which its policy excludes",
            Refusal::NoSpeakers => "cannot tell speakers apart",
            Refusal::WrongDevice => "policy excludes this device",
            Refusal::ModelNotHere => "model not here",
            Refusal::ModelMissing => "model missing",
            Refusal::ModelFailed => "model cannot be loaded",
            Refusal::ModelBeingFetched => "model is being fetched",
            Refusal::ModelHasNoRoom => "model has no room there now",
            Refusal::ModelTooLarge => "model larger than the device",
            Refusal::TenantPressure => "another tenant presses on the card",
            Refusal::ModelDoesNotFitNow => "model does not fit in free memory",
            Refusal::NoSlot => "no free slot",
            Refusal::TooSlow => "decodes slower than speech",
            Refusal::TooHot => "too hot",
            Refusal::RefusedBefore => "refused it just now",
            Refusal::Superseded => "newer incarnation on this gpu",
        }
    }

    /// For this request the worker is not there at all.
    pub(super) fn is_absence(self) -> bool {
        matches!(
            self,
            Refusal::Joining
                | Refusal::Suspect
                | Refusal::Dead
                | Refusal::Draining
                | Refusal::Unhealthy
                | Refusal::NotAlive
                | Refusal::OtherService
                | Refusal::Reserved
        )
    }

    /// A policy that excludes whole devices never comes free, no more than memory that is not there.
    pub(super) fn is_for_good(self) -> bool {
        self.is_no_file() || matches!(self, Refusal::ModelTooLarge | Refusal::WrongDevice)
    }

    /// There is nothing there that could be loaded.
    fn is_no_file(self) -> bool {
        matches!(self, Refusal::ModelNotHere | Refusal::ModelMissing | Refusal::ModelFailed)
    }

    /// The model, or one that may stand in for it, was found there.
    pub(super) fn comes_after_model(self) -> bool {
        use Refusal::{ModelBeingFetched, ModelDoesNotFitNow, ModelHasNoRoom, ModelTooLarge};
        use Refusal::{NoSlot, Superseded, TenantPressure, TooHot, TooSlow};
        matches!(
            self,
            ModelBeingFetched
                | ModelHasNoRoom
                | ModelTooLarge
                | ModelDoesNotFitNow
                | TenantPressure
                | NoSlot
                | TooSlow
                | TooHot
                | Superseded
        )
    }

    /// It could take it once a slot is free, its file has come, or its neighbours have let go.
    pub fn is_for_now(self) -> bool {
        use Refusal::{ModelBeingFetched, ModelHasNoRoom, NoSlot, RefusedBefore, TenantPressure};
        matches!(self, NoSlot | RefusedBefore | ModelBeingFetched | ModelHasNoRoom | TenantPressure)
    }
}

/// Which refusals were met on the way.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refusals(u32);

impl Refusals {
    pub(super) fn add(&mut self, refusal: Refusal) {
        self.0 |= 1 << refusal as u32;
    }

    pub(super) fn any(self, what: impl Fn(Refusal) -> bool) -> bool {
        Refusal::ALL.into_iter().any(|refusal| self.0 & (1 << refusal as u32) != 0 && what(refusal))
    }
}
