//! `mixsocks send`, `receive` and `address`, and the examples of messages, as programs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::people::{People, network};
use crate::process::{Ended, Process, Proxy, mixsocks, run, skip};

/// A command with the keys of a folder on the network of another one.
fn alone(word: &str, network_folder: &Path, folder: &Path) -> Command {
    let mut command = mixsocks();
    command.arg(word).args(network(network_folder)).arg("--data-dir").arg(folder);
    command
}

/// The only line that a command prints.
fn line(command: &mut Command) -> String {
    let ended = run(command);
    assert!(ended.status.success(), "{ended:?}");
    ended.stdout.trim_end().to_owned()
}

fn failed(command: &mut Command, with: &str) {
    let ended = run(command);
    assert!(!ended.status.success() && ended.stderr.contains(with), "{with:?} in {ended:?}");
}

/// Its output goes to a device that is full, where there is one.
fn no_room_for_output(command: &mut Command, complaint: &str) {
    let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") else { return };
    let ended = command.stdout(full).output().unwrap();
    let told = String::from_utf8(ended.stderr).unwrap();
    assert!(!ended.status.success() && told.contains(complaint), "{told}");
    assert!(!told.contains("--data-dir"), "{told}");
}

fn typed(command: &mut Command, text: &[u8]) -> Ended {
    let (process, mut stdin) = Process::try_start_typing(command).unwrap();
    stdin.write_all(text).unwrap();
    drop(stdin);
    process.wait()
}

#[test]
fn two_people_write_to_each_other_without_a_running_client() {
    let folder = tempfile::tempdir().unwrap();
    let _network = Proxy::up(folder.path(), &["--mean-delay", "1ms"]);
    let (anna, bert) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let to_bert = line(&mut alone("address", folder.path(), bert.path()));
    // It stays the same, and needs neither a network nor a start any more.
    assert_eq!(line(mixsocks().arg("address").arg("--data-dir").arg(bert.path())), to_bert);

    let ended = typed(alone("send", folder.path(), anna.path()).arg(&to_bert), b"hello\n");
    assert!(ended.stdout.starts_with("delivered"), "{ended:?}");
    let file = anna.path().join("file");
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    std::fs::write(&file, &bytes).unwrap();
    let sent = run(alone("send", folder.path(), anna.path()).arg(&to_bert).arg(&file).arg("-q"));
    assert!(sent.status.success() && sent.stdout.is_empty(), "{sent:?}");

    let mut receive = alone("receive", folder.path(), bert.path());
    let ended = run(receive.args(["--json", "--wait", "10s"]));
    let messages: Vec<Value> =
        ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(messages.len(), 2, "{ended:?}");
    assert!(messages.iter().any(|message| message["message"] == "hello\n"));
    let long = messages.iter().find_map(|message| message["base64"].as_str()).unwrap();
    assert!(long.starts_with("AAECAwQFBgcI") && long.len() == 100_000_usize.div_ceil(3) * 4);
    assert!(messages.iter().all(|message| message["senderTag"].is_null()));
    // Each comes once.
    assert_eq!(line(&mut alone("receive", folder.path(), bert.path())), "");

    // What cannot be printed comes again.
    run(alone("send", folder.path(), anna.path()).arg(&to_bert).arg(&file));
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let mut receive = alone("receive", folder.path(), bert.path());
    assert!(!receive.arg("--follow").stdout(Stdio::from(write)).status().unwrap().success());
    let ended = run(alone("receive", folder.path(), bert.path()).args(["--json", "--wait", "10s"]));
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");

    // As they are, and waiting for more until it is stopped.
    let out = std::fs::File::create(bert.path().join("out")).unwrap();
    let mut follow = alone("receive", folder.path(), bert.path());
    let mut child = follow.args(["--raw", "--follow"]).stdout(Stdio::from(out)).spawn().unwrap();
    run(alone("send", folder.path(), anna.path()).arg(&to_bert).arg(&file));
    let received = || std::fs::read(bert.path().join("out")).unwrap();
    while received().len() < bytes.len() {
        assert_eq!(child.try_wait().unwrap(), None);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(received() == bytes);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &id]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_terminal_uses_a_client_that_runs() {
    let people = People::start(&["--websocket-token", "0123456789abcdef"]);
    let by = |word: &str, websocket: &str| {
        let mut command = mixsocks();
        command.args([word, "--websocket", websocket]);
        command.env("MIXSOCKS_WEBSOCKET_TOKEN", "0123456789abcdef");
        command
    };
    let (anna, bert) = (people.anna.websocket(), people.bert.websocket());
    assert_eq!(line(&mut by("address", bert)), people.bert.proxy.client);
    let code = line(by("address", bert).arg("--qr"));
    let (address, code) = code.split_once('\n').unwrap();
    assert_eq!(address, people.bert.proxy.client);
    assert!(code.lines().count() > 20 && code.contains('█'), "{code}");

    let ended = typed(by("send", anna).arg(&people.bert.proxy.client), b"through both");
    assert!(ended.stdout.starts_with("delivered"), "{ended:?}");
    let receiving = Process::start(by("receive", bert).arg("--follow"));
    assert_eq!(receiving.wait_for("through"), " both");
    receiving.signal("INT");
    assert!(receiving.wait().status.success());

    // What cannot be printed waits for the next start.
    let ended = typed(by("send", anna).arg(&people.bert.proxy.client), b"printed at last");
    assert!(ended.stdout.starts_with("delivered"), "{ended:?}");
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let mut receive = by("receive", bert);
    let status = receive.arg("--follow").stdout(Stdio::from(write)).status().unwrap();
    assert!(!status.success());
    no_room_for_output(&mut by("receive", bert), "a message cannot be printed");
    no_room_for_output(&mut by("address", bert), "cannot write to the standard output");
    assert_eq!(line(by("receive", bert).args(["--wait", "10s"])), "printed at last");

    // What goes wrong there is told here.
    let (_, at) = people.bert.proxy.client.split_once('.').unwrap();
    let (elsewhere, _) = people.bert.proxy.provider.split_once('.').unwrap();
    let stranger = format!("{elsewhere}.{at}");
    let ended = typed(by("send", anna).arg(stranger), b"to nobody");
    assert!(!ended.status.success() && ended.stderr.contains("not known"), "{ended:?}");
    let mut without = mixsocks();
    failed(without.args(["address", "--websocket", anna]), "--websocket-token");
    let mut wrong = by("address", anna);
    failed(wrong.args(["--websocket-token", "0123456789abcdeF"]), "the token is not the one");
}

#[test]
fn what_cannot_be_sent_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let network = Proxy::up(folder.path(), &[]);
    let own = tempfile::tempdir().unwrap();
    let send = |address: &str, file: &str| {
        let mut command = alone("send", folder.path(), own.path());
        command.args([address, file]);
        command
    };
    failed(&mut send("nonsense", "-"), "<identity>.<encryption>@<gateway identity>");
    failed(&mut send(&network.client, "/nonexistent"), "cannot read /nonexistent");
    failed(&mut send(&network.client, "-"), "empty");
    let long = own.path().join("long");
    std::fs::File::create(&long).unwrap().set_len(16 * 1024 * 1024 + 1).unwrap();
    failed(&mut send(&network.client, &long.display().to_string()), "longer than 16 MiB");
    std::fs::write(&long, "m").unwrap();
    let (person, gateway) = network.client.split_once('@').unwrap();
    let elsewhere = format!("{person}@{}", person.split('.').next().unwrap());
    assert_ne!(elsewhere, format!("{person}@{gateway}"));
    failed(&mut send(&elsewhere, &long.display().to_string()), "not in this network");
    // Nobody there, and nothing known of a network.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut receive = mixsocks();
    receive.args(["receive", "--websocket", &nobody.to_string(), "--data-dir"]).arg(own.path());
    failed(&mut receive, "no client listens there");
    let mut receive = mixsocks();
    failed(receive.args(["receive", "--data-dir"]).arg(own.path()), "no network is given");
    // Another process has the keys.
    let mut run = mixsocks();
    run.args(["client", "run", "--socks", "127.0.0.1:0"])
        .args(crate::people::network(folder.path()));
    let _running = Proxy::start(run.arg("--data-dir").arg(own.path()));
    failed(&mut alone("receive", folder.path(), own.path()), "--websocket");
}

/// `cargo test` builds the examples beside the program.
fn example(name: &str) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_BIN_EXE_mixsocks")).with_file_name("examples").join(name);
    if !program.exists() {
        skip("the example was not built (cargo test without --test builds it)");
        return None;
    }
    Some(program)
}

#[test]
fn the_examples_chat_and_echo_service_answer_each_other() {
    let (Some(chat), Some(echo)) = (example("chat"), example("echo-service")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let _network = Proxy::up(folder.path(), &["--mean-delay", "1ms"]);
    let [_, topology, _, authority] = network(folder.path());
    let start = |program: &Path, name: &str| {
        let mut command = Command::new(program);
        command.args([&topology, &authority]).arg(folder.path().join(name));
        command
    };
    let service = Process::start(&mut start(&echo, "echo"));
    let address = service.wait_for("the service is ");
    let (asking, mut typing) =
        Process::try_start_typing(start(&chat, "asking").arg(&address)).unwrap();
    typing.write_all(b"is anybody there\n").unwrap();
    assert_eq!(asking.wait_for("< is anybody"), " there");
    drop(typing);
    assert!(asking.wait().status.success());

    let (anna, mut anna_types) = Process::try_start_typing(&mut start(&chat, "anna")).unwrap();
    let address = anna.wait_for("you are ");
    let (bert, mut bert_types) =
        Process::try_start_typing(start(&chat, "bert").arg(&address)).unwrap();
    bert_types.write_all(b"hello anna\n").unwrap();
    assert_eq!(anna.wait_for("< hello "), "anna");
    anna_types.write_all(b"hello stranger\n").unwrap();
    assert_eq!(bert.wait_for("< hello "), "stranger");
    // Whoever leaves acknowledges no more, and the other one would wait for that.
    for (person, types) in [(anna, anna_types), (bert, bert_types)] {
        drop(types);
        let ended = person.wait();
        assert!(ended.status.success(), "{ended:?}");
    }
}
