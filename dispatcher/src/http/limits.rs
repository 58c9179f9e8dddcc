//! How much audio comes in over HTTP at once, and how fast: settings of `dispatcher.uploads` and `dispatcher.sockets`.

use serde::{Deserialize, Serialize};

/// Of `POST /api/transcribe`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UploadLimits {
    /// Recordings on their way in at once; more are asked to come again.
    pub max_at_once: usize,
    /// Largest recording, in bytes.
    pub max_bytes: u64,
    /// Slower than this over a minute is given up; 0 = any speed.
    pub min_bytes_per_s: u64,
    /// Longest time for a whole recording, in s: meanwhile it holds a place.
    pub total_timeout_s: u64,
}

impl Default for UploadLimits {
    fn default() -> Self {
        Self {
            // Each holds a MB or two on its way into the object store.
            max_at_once: 64,
            // These three are what workers allow a URL.
            max_bytes: 4 << 30,
            min_bytes_per_s: 2_048,
            total_timeout_s: 3_600,
        }
    }
}

impl UploadLimits {
    /// Every mistake, `section` before each.
    pub fn problems(&self, section: &str) -> Vec<String> {
        outside(
            section,
            [
                ("max_at_once", self.max_at_once as u64, 1..=10_000),
                ("max_bytes", self.max_bytes, 1..=1 << 44),
                ("min_bytes_per_s", self.min_bytes_per_s, 0..=1 << 30),
                ("total_timeout_s", self.total_timeout_s, 1..=604_800),
            ],
        )
    }
}

/// Of `/asr`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SocketLimits {
    /// Sockets that one dispatcher serves: each reads two streams through consumers of its own.
    pub max_at_once: usize,
    /// Recorders that it decodes for: a process each.
    pub max_recorders: usize,
    /// Audio that may come at once, in s: what somebody recorded while he had no connection.
    pub burst_s: u32,
    /// Audio taken faster than it can be spoken once the burst is spent, in multiples of real time.
    pub max_speed: u32,
}

impl Default for SocketLimits {
    fn default() -> Self {
        Self { max_at_once: 1_000, max_recorders: 64, burst_s: 60, max_speed: 4 }
    }
}

impl SocketLimits {
    /// Every mistake, `section` before each.
    pub fn problems(&self, section: &str) -> Vec<String> {
        outside(
            section,
            [
                ("max_at_once", self.max_at_once as u64, 1..=100_000),
                ("max_recorders", self.max_recorders as u64, 0..=10_000),
                ("burst_s", u64::from(self.burst_s), 1..=3_600),
                // Slower than speech would be an ever longer wait.
                ("max_speed", u64::from(self.max_speed), 1..=1_000),
            ],
        )
    }
}

fn outside<const N: usize>(section: &str, fields: [(&str, u64, std::ops::RangeInclusive<u64>); N]) -> Vec<String> {
    let wrong = fields.into_iter().filter(|(_, value, range)| !range.contains(value));
    wrong
        .map(|(name, value, range)| {
            format!("{section}.{name}: {value} is outside {} to {}", range.start(), range.end())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_is_named() {
        assert_eq!(UploadLimits::default().problems("u"), [""; 0]);
        assert_eq!(SocketLimits::default().problems("s"), [""; 0]);
        let uploads = UploadLimits { max_at_once: 0, max_bytes: 0, min_bytes_per_s: u64::MAX, total_timeout_s: 0 };
        let sockets = SocketLimits { max_at_once: 0, max_recorders: 20_000, burst_s: 0, max_speed: 0 };
        let told = [uploads.problems("u"), sockets.problems("s")].concat().join("\n");
        for part in [
            "u.max_at_once: 0",
            "u.max_bytes: 0",
            "u.min_bytes_per_s",
            "u.total_timeout_s: 0",
            "s.max_at_once: 0",
            "s.max_recorders: 20000",
            "s.burst_s: 0",
            "s.max_speed: 0 is outside 1 to 1000",
        ] {
            assert!(told.contains(part), "{part} in {told}");
        }
    }
}
