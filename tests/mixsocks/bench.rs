//! `mixsocks bench` with a network of processes, row by row, and `mixsocks bench soak`.

use serde_json::Value;

use crate::process::{mixsocks, run, shared_network};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn number(report: &Value, pointer: &str) -> f64 {
    let value = report.pointer(pointer).and_then(Value::as_f64);
    value.unwrap_or_else(|| panic!("no number at {pointer} in {report}"))
}

/// The rows of a report that were measured.
fn measured(report: &Value) -> Vec<&str> {
    let rows = [
        "first_byte",
        "down",
        "up",
        "ten_down",
        "ten_up",
        "busy_first_byte",
        "page",
        "connections",
        "streams",
        "idle_cpu_percent",
    ];
    rows.into_iter().filter(|row| !report[row].is_null()).collect()
}

#[test]
fn bench_measures_the_rows_that_are_asked_for() {
    let network = shared_network();
    let address = network.proxy.address.to_string();
    let mut command = mixsocks();
    command.args(["bench", "--json", "--seconds", "1", "--socks", &address]);
    command.args(["--only", "busy-first-byte,page,connections,streams"]);
    let ended = run(&mut command);
    assert!(ended.status.success(), "{ended:?}");
    let report = json(&ended.stdout);
    assert_eq!(measured(&report), ["busy_first_byte", "page", "connections", "streams"]);
    assert!(number(&report, "/busy_first_byte/median_ms") > 0.0);
    assert!(number(&report, "/busy_first_byte/download_mib_per_second") > 0.0);
    assert!(number(&report, "/page/median_seconds") > 0.0);
    assert_eq!(number(&report, "/page/objects"), 50.0);
    for (row, connections) in [("connections", 200), ("streams", 1000)] {
        assert_eq!(report[row]["connections"], connections);
        assert!(number(&report[row], "/median_seconds") > 0.0);
        assert_eq!(report[row]["failed"], 0, "{report}");
    }
}

#[test]
fn bench_measures_messages_through_a_gateway() {
    let mut command = mixsocks();
    command.args(["bench", "messages", "--json", "--seconds", "1", "--mean-delay", "1ms"]);
    let ended = run(&mut command);
    assert!(ended.status.success(), "{ended:?}");
    let report = json(&ended.stdout);
    assert_eq!(
        (number(&report, "/message_bytes"), number(&report, "/mean_delay_ms")),
        (1024.0, 1.0)
    );
    // A box is longer than its message.
    assert!(number(&report, "/kept/disk_bytes_per_message") > 1024.0, "{report}");
    let [p50_ms, p99_ms] = ["/calm/p50_ms", "/calm/p99_ms"].map(|time| number(&report, time));
    assert!(p50_ms > 0.0 && p99_ms >= p50_ms, "{report}");
    assert!(number(&report, "/calm/messages") > 0.0);
    assert!(number(&report, "/crowded/messages_per_second") > 0.0);
}

#[cfg(target_os = "linux")]
#[test]
fn bench_measures_each_role_as_a_process() {
    let mut command = mixsocks();
    command.args(["bench", "--processes", "--json", "--seconds", "1", "--mean-delay", "1ms"]);
    let ended = run(command.args(["--only", "down,ten-up,idle"]));
    assert!(ended.status.success(), "{ended:?}");
    let report = json(&ended.stdout);
    assert_eq!(measured(&report), ["down", "ten_up", "idle_cpu_percent"]);
    let roles = report["roles"].as_array().unwrap();
    let names: Vec<_> = roles.iter().map(|role| role["name"].as_str().unwrap()).collect();
    let nodes = ["gateway-1", "gateway-2", "mix-1", "mix-2", "mix-3"];
    let expected = [&["client", "directory"][..], &nodes, &["provider"]].concat();
    assert_eq!(names, expected);
    for role in roles {
        assert!(number(role, "/resident_mib") > 0.0);
        assert!(number(role, "/peak_resident_mib") >= number(role, "/resident_mib"));
        assert!(number(role, "/idle_cpu_percent") >= 0.0);
        let is_node = nodes.contains(&role["name"].as_str().unwrap());
        assert_eq!(role["replay_tags"].as_u64().is_some_and(|tags| tags > 0), is_node, "{role}");
    }
    let parts = report["down"]["cpu_seconds_per_mib_by_role"].as_object().unwrap();
    let sum: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
    assert!((sum / number(&report, "/down/cpu_seconds_per_mib") - 1.0).abs() < 1e-6, "{report}");
    let share = number(&report, "/ten_up/slowest_share");
    assert!((0.0..=1.0).contains(&share), "{report}");
}

#[cfg(target_os = "linux")]
#[test]
fn bench_measures_the_processes_of_a_given_proxy() {
    let network = shared_network();
    let address = network.proxy.address.to_string();
    // Not those of the network, but of somebody who certainly uses some.
    let id = std::process::id();
    let mut command = mixsocks();
    command.args(["bench", "--json", "--seconds", "1", "--socks", &address]);
    let ended = run(command.args(["--only", "first-byte", "--pids", &id.to_string()]));
    assert!(ended.status.success(), "{ended:?}");
    let report = json(&ended.stdout);
    let name = report.pointer("/roles/0/name").and_then(Value::as_str).unwrap();
    assert!(name.ends_with(&format!("-{id}")), "{report}");
    assert_eq!(number(&report, "/resident_mib"), number(&report, "/roles/0/resident_mib"));
}

#[cfg(target_os = "linux")]
#[test]
fn an_interrupted_bench_leaves_nothing_behind() {
    use std::process::{Command, Stdio};

    use crate::process::DEADLINE;

    /// The processes whose parent is this one.
    fn children(parent: u32) -> Vec<String> {
        let pattern = format!("/proc/{parent}/task");
        let tasks = std::fs::read_dir(pattern).unwrap();
        let of_task = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default()
        };
        let ids: String = tasks.map(of_task).collect();
        ids.split_whitespace().map(str::to_owned).collect()
    }

    let scratch = tempfile::tempdir().unwrap();
    let mut command = mixsocks();
    command.args(["bench", "soak", "--seconds", "1000"]).env("TMPDIR", scratch.path());
    let mut bench = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = std::time::Instant::now() + DEADLINE;
    // An authority, six mixes, two gateways, a provider and a client.
    let ids = loop {
        let ids = children(bench.id());
        if ids.len() == 11 {
            break ids;
        }
        assert!(std::time::Instant::now() < deadline, "{ids:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let interrupt = Command::new("kill").args(["-s", "INT", &bench.id().to_string()]).status();
    assert!(interrupt.unwrap().success());
    let ended = bench.wait().unwrap();
    assert_eq!(ended.code(), Some(1));
    for id in ids {
        let program = std::fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
        assert!(!program.contains(scratch.path().to_str().unwrap()), "{program}");
    }
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn a_short_soak_finds_nothing_wrong() {
    let ended = run(mixsocks().args(["bench", "soak", "--seconds", "20", "--json"]));
    assert!(ended.status.success(), "{ended:?}");
    let report = json(&ended.stdout);
    for count in ["wrong", "stuck", "broken"] {
        assert_eq!(report[count], 0, "{report}");
    }
    let faults = report["faults"].as_object().unwrap();
    assert!(faults.values().all(|count| count.as_u64().unwrap() > 0) && !faults.is_empty());
    let downloads = number(&report, "/streams/download/right");
    assert!(downloads > 0.0 && number(&report, "/streams/download/bytes") > 0.0, "{report}");
    let memory = report["memory"].as_object().unwrap();
    assert_eq!(memory.len(), 11);
    for (name, role) in memory {
        assert!(
            ["start", "end"].iter().all(|at| role[at].as_f64().unwrap() > 0.0),
            "{name} {role}"
        );
    }
}
