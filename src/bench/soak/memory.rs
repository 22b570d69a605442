//! Whether memory stays flat.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::super::network::{Member, Town};

/// Bytes that a node needs for a packet that it remembers, at most.
const BYTES_PER_TAG: f64 = 11.3;
const MIB: f64 = 1024.0 * 1024.0;

/// What memory may grow by from the third quarter to the fourth and still be flat: so many MiB, or
/// this part, if that is more. Replay tags of clients and providers are among it: they grow for the
/// first ten minutes, some 2 MiB a minute.
const FLAT_MIB: f64 = 8.0;
const FLAT_PART: f64 = 0.1;

/// In a shorter time windows, buffers and replay tags have not grown to what they come to.
const LEAST_COMPARED: Duration = Duration::from_secs(20 * 60);

/// Resident memory of the processes in the course of a soak, without the replay tags of nodes.
#[derive(Default)]
pub(super) struct Watch {
    roles: BTreeMap<String, RoleMemory>,
}

/// One of them, in MiB; what was not seen is null.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct RoleMemory {
    pub(super) start: Option<f64>,
    pub(super) middle: Option<f64>,
    pub(super) end: Option<f64>,
    /// The most in the third and in the fourth quarter. Null when it was started anew in this time.
    third_quarter: Option<f64>,
    fourth_quarter: Option<f64>,
    /// Packets that a node remembers at the end.
    pub(super) replay_tags: Option<u64>,
    started_anew: bool,
}

impl Watch {
    /// Notes what all have before there is traffic.
    pub(super) async fn start(&mut self, town: &Town) {
        for member in town.members() {
            let (mib, _) = measure(&member).await;
            self.role(&member).start = mib;
        }
    }

    /// Notes what all have when this part of the time has passed.
    pub(super) async fn look(&mut self, town: &Town, passed: f64) {
        if passed < 0.5 {
            return;
        }
        for member in town.members() {
            let (mib, _) = measure(&member).await;
            self.role(&member).note(mib, passed);
        }
    }

    /// One was started anew: its memory cannot be compared with that of its last life.
    pub(super) fn forget(&mut self, name: &str, passed: f64) {
        if let Some(role) = self.roles.get_mut(name)
            && passed >= 0.5
        {
            (role.third_quarter, role.fourth_quarter) = (None, None);
            role.started_anew = true;
        }
    }

    /// Notes what all have after the traffic.
    pub(super) async fn end(&mut self, town: &Town) {
        for member in town.members() {
            let (mib, replay_tags) = measure(&member).await;
            let role = self.role(&member);
            (role.end, role.replay_tags) = (mib, replay_tags);
        }
    }

    /// All of them. A soak of `duration` may be too short to compare anything.
    pub(super) fn into_roles(mut self, duration: Duration) -> BTreeMap<String, RoleMemory> {
        if duration < LEAST_COMPARED {
            self.roles.values_mut().for_each(|role| role.third_quarter = None);
        }
        self.roles
    }

    fn role(&mut self, member: &Member) -> &mut RoleMemory {
        self.roles.entry(member.name.clone()).or_default()
    }
}

impl RoleMemory {
    fn note(&mut self, mib: Option<f64>, passed: f64) {
        self.middle = self.middle.or(mib);
        if self.started_anew {
            return;
        }
        let quarter =
            if passed < 0.75 { &mut self.third_quarter } else { &mut self.fourth_quarter };
        *quarter = quarter.iter().copied().chain(mib).reduce(f64::max);
    }

    /// Whether it has stayed flat; `None` if that cannot be told.
    pub(super) fn is_flat(&self) -> Option<bool> {
        let third = self.third_quarter?;
        Some(self.fourth_quarter? <= third + FLAT_MIB.max(FLAT_PART * third))
    }
}

/// Resident memory in MiB without replay tags, and how many of these there are.
async fn measure(member: &Member) -> (Option<f64>, Option<u64>) {
    let tags = member.replay_tags().await;
    #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 tags")]
    let of_tags = tags.map_or(0.0, |tags| tags as f64 * BYTES_PER_TAG / MIB);
    (member.memory().map(|memory| (memory.resident_mib - of_tags).max(0.0)), tags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(looks: &[(f64, f64)]) -> RoleMemory {
        let mut role = RoleMemory::default();
        looks.iter().for_each(|(mib, passed)| role.note(Some(*mib), *passed));
        role
    }

    #[test]
    fn what_grows_is_not_flat() {
        assert_eq!(
            role(&[(20.0, 0.5), (30.0, 0.6), (25.0, 0.8), (38.0, 0.9)]).is_flat(),
            Some(true)
        );
        assert_eq!(role(&[(20.0, 0.5), (30.0, 0.6), (38.1, 0.9)]).is_flat(), Some(false));
        assert_eq!(role(&[(200.0, 0.5), (220.0, 0.9)]).is_flat(), Some(true));
        assert_eq!(role(&[(200.0, 0.5), (220.1, 0.9)]).is_flat(), Some(false));
        assert_eq!(role(&[(20.0, 0.5)]).is_flat(), None);
        assert_eq!(role(&[(20.0, 0.5), (30.0, 0.6)]).middle, Some(20.0));
    }

    #[test]
    fn a_short_soak_compares_nothing() {
        for (duration, is_flat) in
            [(LEAST_COMPARED, Some(false)), (LEAST_COMPARED - Duration::from_secs(1), None)]
        {
            let mut watch = Watch::default();
            watch.roles.insert("mix-1".to_owned(), role(&[(20.0, 0.5), (90.0, 0.9)]));
            assert_eq!(watch.into_roles(duration)["mix-1"].is_flat(), is_flat);
        }
    }

    #[test]
    fn lives_are_not_compared_with_each_other() {
        let mut watch = Watch::default();
        watch.roles.insert("mix-1".to_owned(), role(&[(20.0, 0.5)]));
        watch.forget("mix-1", 0.6);
        let role = watch.roles.get_mut("mix-1").unwrap();
        role.note(Some(90.0), 0.9);
        assert_eq!(role.is_flat(), None);
    }
}
