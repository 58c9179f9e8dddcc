//! The hands that break things and mend them again.

use std::time::Duration;

use futures_util::TryStreamExt;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::schedule::{Fault, Process, Shape};
use crate::{
    Error, Result,
    child::{children_of, describe},
    fleet::{Fleet, Servers},
    relay::Way,
};

/// A process that was asked to end is killed after this long.
const END_WAIT: Duration = Duration::from_secs(20);
const CALL_WAIT: Duration = Duration::from_secs(3);
/// How long a purge waits for hints to be there.
const PURGE_WAIT: Duration = Duration::from_secs(1);

/// What a process is up to, as far as it is our doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Well,
    /// Dead, stopped, or on its way out.
    Broken,
}

#[derive(Debug, Clone)]
enum Mend {
    StartWorker(usize),
    StartDispatcher(usize),
    StartServer(usize),
    ContinueWorker(usize),
    ContinueDispatcher(usize),
    ContinueServer(usize),
    /// Of this worker, if it still has this one.
    ContinueEngine(usize, u32),
    /// The way is open again; connections that lost bytes are cut.
    Open(String, bool),
    /// Started again once it has ended, or at this time whatever it does.
    WorkerEnds(usize, Instant),
    DispatcherEnds(usize, Instant),
}

/// Applies faults to a fleet and takes them back.
pub struct Hands {
    pub fleet: Fleet,
    workers: Vec<Condition>,
    dispatchers: Vec<Condition>,
    servers: Vec<Condition>,
    mends: Vec<(Instant, Mend)>,
    /// Processes that ended although nobody had killed them.
    pub unexpected: Vec<String>,
    /// Hints that a purge has taken from somebody who had not read them.
    pub hints_purged: u64,
}

impl Hands {
    pub fn new(fleet: Fleet) -> Self {
        let servers = match &fleet.servers {
            Servers::Many(cluster) => cluster.servers().len(),
            _ => 1,
        };
        Self {
            workers: vec![Condition::Well; fleet.workers.len()],
            dispatchers: vec![Condition::Well; fleet.dispatchers.len()],
            servers: vec![Condition::Well; servers],
            mends: Vec::new(),
            unexpected: Vec::new(),
            hints_purged: 0,
            fleet,
        }
    }

    pub fn shape(&self) -> Shape {
        Shape { workers: self.workers.len(), dispatchers: self.dispatchers.len(), servers: self.servers.len() }
    }

    fn later(&mut self, after: Duration, mend: Mend) {
        self.mends.push((Instant::now() + after, mend));
    }

    /// The worker meant, or the next one that is well.
    fn worker(&self, wanted: usize) -> Option<usize> {
        let n = self.workers.len();
        (0..n).map(|k| (wanted + k) % n).find(|i| self.workers[*i] == Condition::Well)
    }

    async fn dispatcher(&self, active: bool) -> Option<usize> {
        self.dispatcher_under(self.fleet.leader().await, active)
    }

    /// The same where this one leads.
    fn dispatcher_under(&self, leader: Option<usize>, active: bool) -> Option<usize> {
        let well = |i: &usize| self.dispatchers[*i] == Condition::Well;
        let others = || (0..self.dispatchers.len()).filter(|i| Some(*i) != leader).find(well);
        if active { leader.filter(well).or_else(others) } else { others() }
    }

    async fn process(&self, process: Process) -> Option<Process> {
        match process {
            Process::Worker(i) => self.worker(i).map(Process::Worker),
            Process::Dispatcher { active } => {
                let i = self.dispatcher(active).await?;
                Some(Process::Worker(self.workers.len() + i))
            }
        }
    }

    /// Workers first, then dispatchers.
    fn name(&self, at: usize) -> String {
        match at.checked_sub(self.workers.len()) {
            None => self.fleet.workers[at].gpu_id().to_owned(),
            Some(i) => format!("dispatcher-{}", i + 1),
        }
    }

    /// Breaks it; says what was done, or none if there is nothing left to break.
    pub async fn apply(&mut self, fault: Fault) -> Result<Option<String>> {
        let dispatcher_at = self.workers.len();
        let index = |process: Option<Process>| match process {
            Some(Process::Worker(i)) => Some(i),
            _ => None,
        };
        let done = match fault {
            Fault::Kill(process, back) => {
                let Some(at) = index(self.process(process).await) else { return Ok(None) };
                match at.checked_sub(dispatcher_at) {
                    None => {
                        self.fleet.workers[at].kill9()?;
                        self.workers[at] = Condition::Broken;
                        self.later(back, Mend::StartWorker(at));
                    }
                    Some(i) => {
                        self.fleet.dispatchers[i].kill9()?;
                        self.dispatchers[i] = Condition::Broken;
                        self.later(back, Mend::StartDispatcher(i));
                    }
                }
                format!("kill {} for {back:?}", self.name(at))
            }
            Fault::KillEngine(i) => {
                let engine = |i: &usize| self.fleet.workers[*i].engine_pid().map(|pid| (*i, pid));
                let n = self.workers.len();
                let all = (0..n).map(|k| (i + k) % n).filter(|i| self.workers[*i] == Condition::Well);
                let Some((i, pid)) = all.collect::<Vec<_>>().iter().find_map(engine) else { return Ok(None) };
                signal(pid, Signal::KILL)?;
                format!("kill the engine of {}", self.name(i))
            }
            Fault::KillServer(stream, back) => {
                if self.servers.contains(&Condition::Broken) {
                    return Ok(None);
                }
                let leader = tokio::time::timeout(CALL_WAIT, self.fleet.leader_of(stream)).await;
                let Ok(Ok(i)) = leader else { return Ok(None) };
                self.fleet.server_at(i)?.kill9()?;
                self.servers[i] = Condition::Broken;
                self.later(back, Mend::StartServer(i));
                format!("kill server {} ({stream}) for {back:?}", i + 1)
            }
            Fault::StopServer(stream, lasting) => {
                if self.servers.contains(&Condition::Broken) {
                    return Ok(None);
                }
                let leader = tokio::time::timeout(CALL_WAIT, self.fleet.leader_of(stream)).await;
                let Ok(Ok(i)) = leader else { return Ok(None) };
                self.fleet.server_at(i)?.stop()?;
                self.servers[i] = Condition::Broken;
                self.later(lasting, Mend::ContinueServer(i));
                format!("stop server {} ({stream}) for {lasting:?}", i + 1)
            }
            Fault::LameDuck(i, back) => {
                if self.servers.contains(&Condition::Broken) {
                    return Ok(None);
                }
                self.fleet.server_at(i)?.lame_duck()?;
                self.servers[i] = Condition::Broken;
                self.later(back, Mend::StartServer(i));
                format!("lame duck mode of server {} for {back:?}", i + 1)
            }
            Fault::Stop(process, lasting) => {
                let Some(at) = index(self.process(process).await) else { return Ok(None) };
                match at.checked_sub(dispatcher_at) {
                    None => {
                        self.fleet.workers[at].stop()?;
                        self.workers[at] = Condition::Broken;
                        self.later(lasting, Mend::ContinueWorker(at));
                    }
                    Some(i) => {
                        self.fleet.dispatchers[i].stop()?;
                        self.dispatchers[i] = Condition::Broken;
                        self.later(lasting, Mend::ContinueDispatcher(i));
                    }
                }
                format!("stop {} for {lasting:?}", self.name(at))
            }
            Fault::StopEngine(i, lasting) => {
                let Some(i) = self.worker(i) else { return Ok(None) };
                let Some(pid) = self.fleet.workers[i].engine_pid() else { return Ok(None) };
                signal(pid, Signal::STOP)?;
                self.later(lasting, Mend::ContinueEngine(i, pid));
                format!("stop the engine of {} for {lasting:?}", self.name(i))
            }
            Fault::Terminate(process) => {
                let at = match process {
                    // While nobody is known to lead it would meet a standby, and nothing would change hands.
                    Process::Dispatcher { active: true } => {
                        let Some(leader) = self.fleet.leader().await else { return Ok(None) };
                        self.dispatcher_under(Some(leader), true).map(|i| dispatcher_at + i)
                    }
                    _ => index(self.process(process).await),
                };
                let Some(at) = at else { return Ok(None) };
                let until = Instant::now() + END_WAIT;
                match at.checked_sub(dispatcher_at) {
                    None => {
                        self.fleet.workers[at].signal(Signal::TERM)?;
                        self.workers[at] = Condition::Broken;
                        self.later(Duration::ZERO, Mend::WorkerEnds(at, until));
                    }
                    Some(i) => {
                        self.fleet.dispatchers[i].signal(Signal::TERM)?;
                        self.dispatchers[i] = Condition::Broken;
                        self.later(Duration::ZERO, Mend::DispatcherEnds(i, until));
                    }
                }
                format!("terminate {}", self.name(at))
            }
            Fault::Pause(p, lasting) => return self.way(p, (Way::Pause, Way::Pause), lasting, false).await,
            Fault::OneWay(p, to_server, lasting) => {
                let ways = if to_server { (Way::Blackhole, Way::Pass) } else { (Way::Pass, Way::Blackhole) };
                return self.way(p, ways, lasting, true).await;
            }
            Fault::Delay(p, lasting) => {
                let by = Way::Delay(Duration::from_millis(200));
                return self.way(p, (by, by), lasting, false).await;
            }
            Fault::Stall(p, lasting) => {
                let by = Way::Stall { share: 0.03, lasting: Duration::from_millis(500) };
                return self.way(p, (by, by), lasting, false).await;
            }
            Fault::Reset(p) => {
                let Some(at) = index(self.process(p).await) else { return Ok(None) };
                let name = self.name(at);
                // It would end a fault that this way already has, before its time.
                if self.mends.iter().any(|(_, m)| matches!(m, Mend::Open(n, _) if *n == name)) {
                    return Ok(None);
                }
                self.fleet.relay(&name)?.reset();
                format!("reset the connections of {}", self.name(at))
            }
            Fault::PurgeLive => {
                // They are taken within a millisecond or so: a purge that found none has broken nothing.
                let purged = tokio::time::timeout(PURGE_WAIT, self.purge_live()).await.ok().flatten();
                let Some(purged @ 1..) = purged else { return Ok(None) };
                self.hints_purged += purged;
                format!("purge ASR_LIVE of {purged} hints")
            }
            Fault::DeleteConsumers(i) => {
                let gpu = self.fleet.workers[i].gpu_id().to_owned();
                let deleted = tokio::time::timeout(CALL_WAIT, self.delete_consumers(&gpu)).await;
                let Ok(Ok(1..)) = deleted else { return Ok(None) };
                format!("delete the consumers of {gpu}")
            }
        };
        Ok(Some(done))
    }

    async fn way(
        &mut self,
        process: Process,
        (up, down): (Way, Way),
        lasting: Duration,
        cut: bool,
    ) -> Result<Option<String>> {
        let Some(Process::Worker(at)) = self.process(process).await else { return Ok(None) };
        let name = self.name(at);
        if self.mends.iter().any(|(_, m)| matches!(m, Mend::Open(n, _) if *n == name)) {
            return Ok(None);
        }
        self.fleet.relay(&name)?.set_ways(up, down);
        self.later(lasting, Mend::Open(name.clone(), cut));
        Ok(Some(format!("{name} to server {up:?}, from server {down:?} for {lasting:?}")))
    }

    /// Purges until something was there; how much.
    async fn purge_live(&self) -> Option<u64> {
        let stream = self.fleet.js().get_stream_no_info("ASR_LIVE").await.ok()?;
        loop {
            match stream.purge().await.ok()?.purged {
                0 => tokio::time::sleep(Duration::from_millis(5)).await,
                purged => return Some(purged),
            }
        }
    }

    /// Pieces of all connections that have stood still so far.
    pub fn stalls(&self) -> u64 {
        self.fleet.relays().map(|(_, relay)| relay.stalls()).sum()
    }

    async fn delete_consumers(&self, gpu: &str) -> Result<usize> {
        let mut deleted = 0;
        for name in ["ASR_LIVE", "ASR_WORK"] {
            let stream = self.fleet.js().get_stream_no_info(name).await.map_err(Error::nats(name))?;
            let all: Vec<String> = stream.consumer_names().try_collect().await.map_err(Error::nats(name))?;
            for consumer in all.iter().filter(|c| c.contains(gpu)) {
                deleted += usize::from(stream.delete_consumer(consumer).await.is_ok_and(|d| d.success));
            }
        }
        Ok(deleted)
    }

    /// Mends what is due, and starts again what ended by itself. Gives what was done.
    pub async fn mend(&mut self) -> Result<Vec<String>> {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.mends).into_iter().partition(|(at, _)| *at <= now);
        self.mends = later;
        let mut done = Vec::new();
        for (_, mend) in due {
            done.extend(self.mend_one(mend).await?);
        }
        for i in 0..self.workers.len() {
            if self.workers[i] == Condition::Well
                && let Some(status) = self.fleet.workers[i].ended()
            {
                let name = self.name(i);
                self.unexpected.push(format!(
                    "{name}: {}; {}",
                    describe(status),
                    last_line(&self.fleet.workers[i].log_tail())
                ));
                done.push(format!("{name} had ended by itself ({})", describe(status)));
                self.fleet.restart_worker(i)?;
            }
        }
        for i in 0..self.dispatchers.len() {
            if self.dispatchers[i] == Condition::Well
                && let Some(status) = self.fleet.dispatchers[i].ended()
            {
                let name = format!("dispatcher-{}", i + 1);
                let tail = last_line(&self.fleet.dispatchers[i].log_tail());
                self.unexpected.push(format!("{name}: {}; {tail}", describe(status)));
                done.push(format!("{name} had ended by itself ({})", describe(status)));
                self.fleet.restart_dispatcher(i)?;
            }
        }
        Ok(done)
    }

    async fn mend_one(&mut self, mend: Mend) -> Result<Option<String>> {
        let soon = Duration::from_millis(100);
        Ok(Some(match mend {
            Mend::StartWorker(i) => {
                self.fleet.restart_worker(i)?;
                self.workers[i] = Condition::Well;
                format!("{} starts again", self.name(i))
            }
            Mend::StartDispatcher(i) => {
                self.fleet.restart_dispatcher(i)?;
                self.dispatchers[i] = Condition::Well;
                format!("dispatcher-{} starts again", i + 1)
            }
            Mend::StartServer(i) => {
                self.fleet.server_at(i)?.restart().await?;
                self.servers[i] = Condition::Well;
                format!("server {} starts again", i + 1)
            }
            Mend::ContinueWorker(i) => {
                self.fleet.workers[i].cont()?;
                self.workers[i] = Condition::Well;
                format!("{} goes on", self.name(i))
            }
            Mend::ContinueDispatcher(i) => {
                self.fleet.dispatchers[i].cont()?;
                self.dispatchers[i] = Condition::Well;
                format!("dispatcher-{} goes on", i + 1)
            }
            Mend::ContinueServer(i) => {
                self.fleet.server_at(i)?.cont()?;
                self.servers[i] = Condition::Well;
                format!("server {} goes on", i + 1)
            }
            Mend::ContinueEngine(i, pid) => {
                // It may be dead by now, and its number somebody else's.
                if children_of(self.fleet.workers[i].pid()).contains(&pid) {
                    signal(pid, Signal::CONT)?;
                }
                format!("the engine of {} goes on", self.name(i))
            }
            Mend::Open(name, cut) => {
                let relay = self.fleet.relay(&name)?;
                match cut {
                    true => relay.reset(),
                    false => relay.set_ways(Way::Pass, Way::Pass),
                }
                format!("{name} reaches its server again")
            }
            Mend::WorkerEnds(i, until) => {
                if self.fleet.workers[i].ended().is_none() && Instant::now() < until {
                    self.later(soon, Mend::WorkerEnds(i, until));
                    return Ok(None);
                }
                let ended = self.fleet.workers[i].ended().map_or("did not end".to_owned(), describe);
                self.fleet.restart_worker(i)?;
                self.workers[i] = Condition::Well;
                if ended != "exit code 0" {
                    self.unexpected.push(format!("{} was asked to end: {ended}", self.name(i)));
                }
                format!("{} ended ({ended}) and starts again", self.name(i))
            }
            Mend::DispatcherEnds(i, until) => {
                if self.fleet.dispatchers[i].ended().is_none() && Instant::now() < until {
                    self.later(soon, Mend::DispatcherEnds(i, until));
                    return Ok(None);
                }
                let ended = self.fleet.dispatchers[i].ended().map_or("did not end".to_owned(), describe);
                self.fleet.restart_dispatcher(i)?;
                self.dispatchers[i] = Condition::Well;
                if ended != "exit code 0" {
                    self.unexpected.push(format!("dispatcher-{} was asked to end: {ended}", i + 1));
                }
                format!("dispatcher-{} ended ({ended}) and starts again", i + 1)
            }
        }))
    }

    /// When something is to be mended next.
    pub fn next_mend(&self) -> Option<Instant> {
        self.mends.iter().map(|(at, _)| *at).min()
    }

    /// Mends everything at once.
    pub async fn mend_all(&mut self) -> Result<()> {
        let now = Instant::now();
        for (at, mend) in &mut self.mends {
            // What is asked to end has its time.
            if !matches!(mend, Mend::WorkerEnds(..) | Mend::DispatcherEnds(..)) {
                *at = now;
            }
        }
        while !self.mends.is_empty() {
            self.mend().await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    match kill_process(pid, signal) {
        // It ended by itself in the meantime.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(Error::Io { what: "signal to an engine".to_owned(), source: e.into() }),
    }
}

fn last_line(log: &str) -> String {
    log.trim_end().lines().last().unwrap_or_default().to_owned()
}
