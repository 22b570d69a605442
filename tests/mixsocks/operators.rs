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
    // Not all have the first document at once.
    let fetch = || lab.curl("one", &proxy, "http://127.0.0.1:9000/topology", &page).wait();
    while !fetch().status.success() {}
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

/// A listener that the service manager hands over is the proxy's.
#[test]
fn a_listener_may_be_handed_over() {
    const HAND_OVER: &str = "import os, socket, sys\n\
        s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n\
        print('port', s.getsockname()[1], flush=True)\n\
        os.dup2(s.fileno(), 3); os.set_inheritable(3, True)\n\
        os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n\
        os.execv(sys.argv[1], sys.argv[1:])\n";
    let dir = tempfile::tempdir().unwrap();
    let program = mixsocks();
    let mut python = Command::new("python3");
    python.args(["-c", HAND_OVER]).arg(program.get_program());
    // Not where it would listen otherwise.
    python.args(["up", "--socks", "127.0.0.1:1", "--data-dir"]).arg(dir.path());
    match Process::try_start(&mut python) {
        Ok(up) => {
            let port = up.wait_for("port ");
            assert_eq!(up.wait_for("socks5h://"), format!("127.0.0.1:{port}"));
            std::net::TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            crate::process::skip("python3 is not installed");
        }
        Err(error) => panic!("{error}"),
    }
}

/// The service manager is told when a role does its work, and when it ends.
#[cfg(unix)]
#[test]
fn the_service_manager_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(crate::process::DEADLINE)).unwrap();
    let told = || {
        let mut message = [0; 256];
        let length = manager.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).trim().to_owned()
    };
    let mut command = mixsocks();
    command.args(["directory", "run", "--listen", "127.0.0.1:0", "--data-dir"]);
    let authority =
        Process::start(command.arg(dir.path().join("data")).env("NOTIFY_SOCKET", &path));
    assert_eq!(told(), "READY=1");
    authority.signal("TERM");
    assert_eq!(told(), "STOPPING=1");
    assert!(authority.wait().status.success());
}
