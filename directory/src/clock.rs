//! The time by which documents and epochs are judged.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mixsocks_common::topology::UnixTime;

/// The longest sleep: the machine's clock may be set meanwhile.
const MAX_SLEEP: Duration = Duration::from_secs(30);

/// The time since 1970 by this machine's clock; zero before.
pub fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The same in seconds.
pub fn unix_time() -> UnixTime {
    UnixTime(now().as_secs())
}

/// Sleeps until then, but not for long: who calls it looks at the clock again.
pub(crate) async fn sleep_towards(then: Duration) {
    tokio::time::sleep(then.saturating_sub(now()).min(MAX_SLEEP)).await;
}
