//! Each role on a machine of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::lab::Lab;
use crate::process::{DEADLINE, Process, mixsocks, run};
use crate::servers::body;
use crate::town::{Plan, Town};

const PLAN: Plan = Plan { epoch: 8, valid_epochs: 5, ..Plan::SMALL };
/// Long enough to be under way when a machine is cut off.
const LENGTH: usize = 8 * 1024 * 1024;

/// A web server in the provider's machine, with one file.
fn serve(town: &Town) -> (Process, String) {
    let folder = town.folder("web");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("file"), body(LENGTH, 9)).unwrap();
    let mut command = town.lab().command("provider-1", "python3");
    command.args(["-u", "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory"]);
    let server = Process::start(command.arg(&folder));
    server.wait_for("Serving HTTP on");
    (server, "http://127.0.0.1:8000/file".to_owned())
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Waits until `done`, looking ten times a second.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn machines_move_and_are_cut_off() {
    let Some(lab) = Lab::new() else { return };
    let mut town = Town::on_machines(PLAN, lab);
    // A node whose settings are in a file, so that they can be read again.
    let settings = town.folder("mix-2").join("config.toml");
    let mut init = mixsocks();
    init.args(["node", "init", "--data-dir"]).arg(town.folder("mix-2"));
    let old = town.address("mix-2", 9001).to_string();
    let made = run(init.args(["--address", &old]));
    assert!(made.status.success(), "{}", made.stderr);
    town.start_all();
    let (_server, url) = serve(&town);
    town.assert_carries(&url, &body(LENGTH, 9));

    // A mix moves.
    let new = format!("{}:9001", town.lab().address(112));
    town.lab().readdress("mix-2", Some(12), 112);
    let text = std::fs::read_to_string(&settings).unwrap();
    assert!(text.contains(&format!("address = \"{old}\"")));
    std::fs::write(&settings, text.replace(&old, &new)).unwrap();
    town.signal("mix-2", "HUP");
    town.status_with(&new);
    let to = town.folder("fetched");
    until("the network carries after a mix has moved", || {
        town.curl(&url, &to).wait().status.success()
    });

    // The client moves, with a stream under way.
    let stream = town.folder("stream");
    let under_way = town.curl(&url, &stream);
    until("the stream runs", || size(&stream) > 0);
    town.lab().readdress("client", Some(17), 117);
    let ended = under_way.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(std::fs::read(&stream).unwrap() == body(LENGTH, 9), "other bytes came");

    // A mix of the only route is cut off, and comes back.
    std::fs::remove_file(&stream).unwrap();
    let under_way = town.curl(&url, &stream);
    until("the stream runs", || size(&stream) > 0);
    town.lab().set_up("mix-1", false);
    let mut last = (0, Instant::now());
    until("the stream stands still, or has ended", || {
        if size(&stream) != last.0 {
            last = (size(&stream), Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(2)
    });
    town.lab().set_up("mix-1", true);
    let ended = under_way.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(std::fs::read(&stream).unwrap() == body(LENGTH, 9), "other bytes came");
}
