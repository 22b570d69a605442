//! `mixsocks bench` and the example of the Rust API.

use std::path::Path;
use std::process::Command;

use crate::process::{mixsocks, run, shared_network, skip};
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
        "/up/cpu_seconds_per_mib",
        "/ten_down/mib_per_second",
        "/ten_down/fastest_stream_mib_per_second",
        "/ten_up/mib_per_second",
        "/ten_up/fastest_stream_mib_per_second",
        "/resident_mib",
        "/peak_resident_mib",
    ] {
        let value = report.pointer(name).and_then(serde_json::Value::as_f64);
        let known = value.is_some_and(|value| value > 0.0);
        assert!(
            known || (is_of_the_system(name) && !cfg!(target_os = "linux")),
            "{name} in {report}"
        );
    }
    // Nothing may have been used at all.
    let idle = report["idle_cpu_percent"].as_f64();
    assert!(idle.is_some_and(|percent| percent >= 0.0) || !cfg!(target_os = "linux"), "{report}");
}

/// Whether the system must tell a figure, which `bench` can only ask Linux for.
fn is_of_the_system(name: &str) -> bool {
    name.contains("cpu") || name.contains("resident")
}

#[test]
fn bench_says_nothing_of_a_given_proxy_that_it_cannot_know() {
    let network = shared_network();
    let address = network.proxy.address.to_string();
    let mut command = mixsocks();
    command.args(["bench", "--seconds", "1", "--json", "--socks", &address]);
    // Meant for another command: what is given as an option wins.
    command.env("MIXSOCKS_MEAN_DELAY", "5ms");
    let ended = run(&mut command);
    assert!(ended.status.success(), "{ended:?}");
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    for name in ["/first_byte/median_ms", "/down/mib_per_second", "/ten_up/mib_per_second"] {
        let value = report.pointer(name).and_then(serde_json::Value::as_f64);
        assert!(value.is_some_and(|value| value > 0.0), "{name} in {report}");
    }
    for name in [
        "/mean_delay_ms",
        "/profile",
        "/start_seconds",
        "/up/cpu_seconds_per_mib",
        "/idle_cpu_percent",
        "/resident_mib",
        "/peak_resident_mib",
    ] {
        assert_eq!(report.pointer(name), Some(&serde_json::Value::Null), "{name} in {report}");
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

#[test]
fn bench_sphinx_compares_packets_with_the_reference() {
    let ended = run(mixsocks().args(["bench", "sphinx", "--seconds", "1", "--json"]));
    assert!(ended.status.success(), "{ended:?}");
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    for name in ["cpu", "backend"] {
        assert!(report[name].as_str().is_some_and(|text| !text.is_empty()), "{name} in {report}");
    }
    let rows = report["rows"].as_array().unwrap();
    for row in rows {
        let figures = ["ours_us", "reference_us", "ratio"].map(|name| row[name].as_f64().unwrap());
        assert!(figures.iter().all(|figure| *figure > 0.0), "{row}");
        let [ours, reference, ratio] = figures;
        assert!((ratio * ours / reference - 1.0).abs() < 1e-6, "{row}");
    }
    let number = |row: &serde_json::Value, name: &str| row[name].as_u64().unwrap();
    let found: Vec<_> = rows
        .iter()
        .map(|row| (row["name"].as_str().unwrap(), number(row, "payload"), number(row, "batch")))
        .collect();
    let mut expected = Vec::new();
    for name in ["x25519", "peel", "build", "fill", "surb", "use", "recover"] {
        for payload in [2048, 16384] {
            expected.extend([1, 8].map(|batch| (name, payload, batch)));
        }
    }
    assert_eq!(found, expected);
}

#[test]
fn bench_sphinx_prints_a_table() {
    let ended = run(mixsocks().args(["bench", "sphinx", "--seconds", "1"]));
    assert!(ended.status.success(), "{ended:?}");
    let row = ended.stdout.lines().find(|line| line.starts_with("peel")).unwrap();
    assert!(row.contains(" 2048 ") && row.contains(" µs") && row.ends_with('×'), "{row}");
}

#[test]
fn bench_mix_compares_a_mix_with_the_reference() {
    let ended = run(mixsocks().args(["bench", "mix", "--packets", "100", "--json"]));
    assert!(ended.status.success(), "{ended:?}");
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(ended.stderr, "");
    assert_eq!(report["reference"]["backend"], "reference");
    assert_ne!(report["ours"]["backend"], "reference");
    let number = |pointer: &str| report.pointer(pointer).and_then(serde_json::Value::as_f64);
    let rates = ["/ours", "/reference"].map(|mix| number(&format!("{mix}/packets_per_second")));
    let [Some(ours), Some(reference)] = rates else { panic!("{report}") };
    assert!(ours > 0.0 && reference > 0.0, "{report}");
    let ratio = number("/ratio_per_second").unwrap();
    assert!((ratio * reference / ours - 1.0).abs() < 1e-6, "{report}");
}

/// `cargo test` builds the examples beside the program.
#[test]
fn the_example_fetches_a_page() {
    let program =
        Path::new(env!("CARGO_BIN_EXE_mixsocks")).with_file_name("examples").join("fetch");
    if !program.exists() {
        return skip("the example was not built (cargo test without --test builds it)");
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
