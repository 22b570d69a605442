//! `mixsocks bench` and the example of the Rust API.

use std::path::Path;
use std::process::Command;

use crate::process::{mixsocks, run, shared_network};
use crate::servers::http;

#[test]
fn bench_measures_a_network_of_its_own() {
    let arguments = ["bench", "--seconds", "2", "--mean-delay", "1ms", "--json"];
    let ended = run(mixsocks().args(arguments));
    assert!(ended.status.success(), "{ended:?}");
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    for name in [
        "/mean_delay_ms",
        "/start_seconds",
        "/first_byte/median_ms",
        "/first_byte/p95_ms",
        "/down/mib_per_second",
        "/down/cpu_seconds_per_mib",
        "/up/mib_per_second",
        "/ten_down/mib_per_second",
        "/ten_down/fastest_stream_mib_per_second",
    ] {
        let value = report.pointer(name).and_then(serde_json::Value::as_f64);
        let known = value.is_some_and(|value| value > 0.0);
        let unknowable = name.contains("cpu") && !cfg!(target_os = "linux");
        assert!(known || unknowable, "{name} in {report}");
    }
}

#[test]
fn bench_measures_a_given_proxy() {
    let network = shared_network();
    let address = network.proxy.address.to_string();
    let ended = run(mixsocks().args(["bench", "--seconds", "2", "--socks", &address]));
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.contains("every byte that arrived was right"), "{ended:?}");
}

#[test]
fn bench_without_a_proxy() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ended = run(mixsocks().args(["bench", "--socks", &nobody.to_string()]));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains(&format!("no proxy answers at {nobody}")), "{ended:?}");
}

/// `cargo test` builds the examples beside the program.
#[test]
fn the_example_fetches_a_page() {
    let program =
        Path::new(env!("CARGO_BIN_EXE_mixsocks")).with_file_name("examples").join("fetch");
    if !program.exists() {
        return println!(
            "skipped: the example was not built (cargo test without --test builds it)"
        );
    }
    let network = shared_network();
    let authority = std::fs::read_to_string(network.data_dir.path().join("authority.pub")).unwrap();
    let url = format!("http://{}/bytes/0/1", http());
    let mut command = Command::new(program);
    command.arg(network.data_dir.path().join("topology")).args([authority.trim(), &url]);
    let ended = run(&mut command);
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.starts_with("HTTP/1.1 200 OK"), "{ended:?}");
}
