//! Which slots of a worker are taken.

use std::collections::HashSet;

use voxfleet_schema::id::StreamId;

/// Sessions (or jobs) that fill a worker's slots: those the book gave to it, and those it says it holds.
#[derive(Debug, Default)]
pub struct Load {
    assigned: HashSet<StreamId>,
    held: HashSet<StreamId>,
    union: u32,
}

impl Load {
    /// Slots taken, pending assignments included.
    pub fn used(&self) -> u32 {
        self.union
    }

    pub fn assigned(&self) -> impl Iterator<Item = &StreamId> {
        self.assigned.iter()
    }

    pub fn assign(&mut self, id: &StreamId) {
        if self.assigned.insert(id.clone()) && !self.held.contains(id) {
            self.union += 1;
        }
    }

    /// The book takes it away; the slot stays taken while the worker holds it.
    pub fn unassign(&mut self, id: &StreamId) {
        if self.assigned.remove(id) && !self.held.contains(id) {
            self.union -= 1;
        }
    }

    /// The worker said it let go.
    pub fn let_go(&mut self, id: &StreamId) {
        if self.held.remove(id) && !self.assigned.contains(id) {
            self.union -= 1;
        }
    }

    pub(super) fn hold(&mut self, held: HashSet<StreamId>) {
        self.held = held;
        self.union = self.held.union(&self.assigned).count() as u32;
    }
}
