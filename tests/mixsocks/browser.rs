//! A real browser, set up as the README says.

use std::process::Command;

use crate::process::{Process, shared_network, skip};
use crate::servers::{PAGE_PARTS, http};
use crate::web_driver::CHROMIUM_OPTIONS;

#[test]
fn chromium_shows_a_page_whose_name_only_the_provider_can_resolve() {
    let network = shared_network();
    let server = http();
    let name = "browser.here.mixsocks.test";
    let profile = tempfile::tempdir().unwrap();
    let mut chromium = Command::new("chromium");
    chromium
        .arg(format!("--proxy-server=socks5://{}", network.proxy.address))
        .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        .arg("--webrtc-ip-handling-policy=disable_non_proxied_udp")
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(CHROMIUM_OPTIONS)
        .arg("--dump-dom")
        .arg(format!("http://{name}:{}/page", server.port()));
    let browser = match Process::try_start(&mut chromium) {
        Ok(browser) => browser,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return skip("chromium is not installed");
        }
        Err(error) => panic!("chromium does not start: {error}"),
    };
    let ended = browser.wait();
    let missing: Vec<_> =
        (0..PAGE_PARTS).filter(|part| !ended.stdout.contains(&format!("part {part}."))).collect();
    assert!(missing.is_empty(), "parts {missing:?} are missing: {ended:?}");
    assert!(network.name_server.asked(name) > 0);
}
