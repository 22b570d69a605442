//! What `docs/operators.md` says, done as it says.

use std::path::Path;
use std::process::Command;

use crate::lab::Lab;
use crate::process::{Process, mixsocks, run};

const PAGE: &str = include_str!("../../docs/operators.md");

/// The block that follows a mark.
fn block(mark: &str) -> &'static str {
    let (_, rest) = PAGE.split_once(&format!("<!-- {mark} -->\n```sh\n")).unwrap();
    rest.split_once("```").unwrap().0
}

#[test]
fn ten_commands_make_a_network() {
    let Some(mut lab) = Lab::new() else { return };
    lab.add("one", None);
    let dir = tempfile::tempdir().unwrap();
    let commands = block("ten commands");
    assert_eq!(commands.lines().count(), 10);
    let program = mixsocks();
    let folder = Path::new(program.get_program()).parent().unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let script = format!("set -e\n{commands}\nwait\n");
    let mut shell = lab.command("one", "bash");
    let network =
        Process::start(shell.args(["-c", &script]).current_dir(dir.path()).env("PATH", &path));
    let proxy = network.wait_for("socks5h://");

    // The authority's own server is as good a target as any.
    let page = dir.path().join("page");
    let curl = lab.curl("one", &proxy, "http://127.0.0.1:9000/topology", &page).wait();
    assert!(curl.status.success(), "{}", curl.stderr);
    let served = std::fs::read_to_string(page).unwrap();
    assert!(served.starts_with("mixsocks-topology 1\n"), "{served}");

    let key = std::fs::read_to_string(dir.path().join("net/directory/authority.pub")).unwrap();
    let network = ["--directory", "http://127.0.0.1:9000", "--authority", key.trim()];
    let status = run(lab.mixsocks("one").args(["network", "status"]).args(network));
    for word in ["mix 1", "mix 2", "mix 3", "gateway", "exit", "signed", key.trim()] {
        assert!(status.stdout.contains(word), "{word}: {}{}", status.stdout, status.stderr);
    }
    let providers = run(lab.mixsocks("one").arg("providers").args(network));
    assert!(providers.stdout.contains("exit"), "{}", providers.stdout);
}

/// The units name options and settings that systemd and the program know.
#[test]
fn units_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let program = mixsocks();
    let program = program.get_program().to_string_lossy().into_owned();
    let mut units = Vec::new();
    for entry in std::fs::read_dir("docs/systemd").unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text
            .replace("/usr/local/bin/mixsocks", &program)
            .replace("User=mixsocks\n", "User=daemon\n");
        let unit = dir.path().join(path.file_name().unwrap());
        std::fs::write(&unit, &text).unwrap();
        if let Some((_, options)) = text.split_once(&format!("ExecStart={program} ")) {
            let options = options.lines().next().unwrap().replace("%i", "x");
            let words: Vec<_> = options.split(' ').collect();
            let (role, command) = (words[0], words[1]);
            let help = run(mixsocks().args([role, command, "--help"])).stdout;
            for option in words[2..].iter().filter(|word| word.starts_with("--")) {
                assert!(help.contains(option), "{role}: {option}");
            }
        }
        units.push(unit);
    }
    assert_eq!(units.len(), 6);
    let instance = dir.path().join("mixsocks-node@x.service");
    std::fs::copy(dir.path().join("mixsocks-node@.service"), &instance).unwrap();
    units.retain(|unit| !unit.ends_with("mixsocks-node@.service"));
    units.push(instance);
    match Command::new("systemd-analyze").arg("verify").args(&units).output() {
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let about_ours: Vec<_> =
                words.lines().filter(|line| line.contains("mixsocks")).collect();
            assert!(about_ours.is_empty(), "{about_ours:#?}");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            crate::process::skip("systemd-analyze is not installed");
        }
        Err(error) => panic!("{error}"),
    }
}
