//! Keys that change while a stream runs.

use crate::servers::{body, http, sha256};
use crate::town::{Plan, Town};

const MIB: usize = 1024 * 1024;
const SECONDS: u32 = 200;

/// 20 epochs with a Sphinx key each, and a stream of 100 MiB through all of them.
#[test]
fn a_stream_outlives_twenty_key_epochs() {
    let origin = http();
    let plan = Plan { epoch: 10, key_epochs: 1, valid_epochs: 3, ..Plan::SMALL };
    let mut town = Town::on_loopback(plan);
    town.start_all();
    let names = ["mix-1", "mix-2", "mix-3", "gateway-1", "gateway-2", "provider-1", "client"];
    let logs = names.map(|name| town.log(name));
    let first = town.epoch();
    let to = town.folder("stream");
    let url = format!("http://{origin}/slow/{}/5/{SECONDS}", 100 * MIB);
    let curl = town.curl(&url, &to).wait();
    assert!(curl.status.success(), "{}", curl.stderr);
    assert_eq!(sha256(&std::fs::read(&to).unwrap()), sha256(&body(100 * MIB, 5)));
    let passed = town.epoch() - first;
    assert!(passed >= 19, "only {passed} epochs have passed");
    // Nothing happened of which anybody had to be told.
    assert_eq!(names.map(|name| town.log(name)), logs);
    // The keys of the past are gone.
    let keys = std::fs::read_dir(town.folder("mix-1")).unwrap().flatten();
    let keys = keys.filter(|entry| entry.file_name().to_string_lossy().starts_with("sphinx-"));
    assert!(keys.count() <= 4);
}
