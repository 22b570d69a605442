//! Machines for tests: network namespaces of their own with addresses of their own, joined by a bridge
//! that is a namespace as well. Nothing in them reaches anything else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::process::{Process, mixsocks, skip};

/// So many labs at a time would be a mistake.
const MAX_LABS: u32 = 200;

/// Where a thread is: on a machine of a [`Lab`], or on this one.
#[derive(Clone, Default)]
pub(crate) struct Place(Option<PathBuf>);

impl Place {
    /// Moves this thread there, and with it those that it starts.
    #[cfg(target_os = "linux")]
    pub(crate) fn enter(&self) {
        use std::os::fd::AsFd;

        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

        if let Some(namespace) = &self.0 {
            let file = std::fs::File::open(namespace).unwrap();
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn enter(&self) {
        assert!(self.0.is_none(), "there is no such machine: {:?}", self.0);
    }
}

/// Machines on one network, 10.99.x.0/24; taken down with all of their processes when dropped.
pub(crate) struct Lab {
    number: u32,
    names: Vec<String>,
}

impl Lab {
    /// A network without machines; `None`, with a line that says so, where that may not be made.
    pub(crate) fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        assert!(number < MAX_LABS);
        let mut lab = Self { number, names: Vec::new() };
        let bridge = lab.name("net");
        match ip(&["netns", "add", &bridge]) {
            Ok(()) => lab.names.push(bridge.clone()),
            Err(why) => {
                skip(&format!("network namespaces cannot be made: {why}"));
                return None;
            }
        }
        lab.within(&bridge, &["link", "add", "bridge", "type", "bridge"]);
        lab.within(&bridge, &["link", "set", "bridge", "up"]);
        Some(lab)
    }

    fn name(&self, machine: &str) -> String {
        format!("mixsocks-{}-{}-{machine}", std::process::id(), self.number)
    }

    /// The address of a machine by its last number.
    pub(crate) fn address(&self, last: u8) -> String {
        format!("10.99.{}.{last}", self.number)
    }

    /// Adds a machine. Without `last` it has only its loopback address.
    pub(crate) fn add(&mut self, machine: &str, last: Option<u8>) {
        let (name, bridge) = (self.name(machine), self.name("net"));
        ip(&["netns", "add", &name]).unwrap();
        self.names.push(name.clone());
        self.within(&name, &["link", "set", "lo", "up"]);
        let Some(last) = last else { return };
        let port = format!("p{last}");
        let pair = ["link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &bridge];
        self.within(&name, &pair);
        self.within(&bridge, &["link", "set", &port, "master", "bridge", "up"]);
        self.readdress(machine, None, last);
        self.within(&name, &["link", "set", "eth0", "up"]);
    }

    /// Gives a machine an address, in place of another one.
    pub(crate) fn readdress(&self, machine: &str, old: Option<u8>, new: u8) {
        let name = self.name(machine);
        if let Some(old) = old {
            let old = format!("{}/24", self.address(old));
            self.within(&name, &["addr", "del", &old, "dev", "eth0"]);
        }
        let new = format!("{}/24", self.address(new));
        self.within(&name, &["addr", "add", &new, "dev", "eth0"]);
    }

    /// Cuts a machine off, or brings it back.
    pub(crate) fn set_up(&self, machine: &str, is_up: bool) {
        let state = if is_up { "up" } else { "down" };
        self.within(&self.name(machine), &["link", "set", "eth0", state]);
    }

    /// Pulls a machine's cable, or plugs it in again: nobody is told.
    pub(crate) fn set_plugged(&self, last: u8, is_plugged: bool) {
        let port = format!("p{last}");
        let to: &[&str] = if is_plugged { &["master", "bridge"] } else { &["nomaster"] };
        self.within(&self.name("net"), &[&["link", "set", &port], to].concat());
    }

    fn within(&self, name: &str, words: &[&str]) {
        ip(&[&["-n", name][..], words].concat()).unwrap();
    }

    /// Where threads can go.
    pub(crate) fn place(&self, machine: &str) -> Place {
        Place(Some(Path::new("/run/netns").join(self.name(machine))))
    }

    /// A command on a machine, without the variables that would change what the program does.
    pub(crate) fn command(&self, machine: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(machine), program]);
        let variables = std::env::vars_os().map(|(name, _)| name);
        for variable in variables.filter(|name| name.to_string_lossy().starts_with("MIXSOCKS_")) {
            command.env_remove(variable);
        }
        command
    }

    /// The program on a machine.
    pub(crate) fn mixsocks(&self, machine: &str) -> Command {
        let program = mixsocks();
        let mut command = self.command(machine, &program.get_program().to_string_lossy());
        command.args(program.get_args());
        command
    }

    /// `curl` through a proxy on a machine.
    pub(crate) fn curl(&self, machine: &str, proxy: &str, url: &str, to: &Path) -> Process {
        let mut command = self.command(machine, "curl");
        command.args(["-q", "--silent", "--show-error", "--fail", "--max-time", "300"]);
        command.args(["--socks5-hostname", proxy, url, "--output"]).arg(to);
        Process::start(&mut command)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            // All processes in there were started by this test.
            let processes = Command::new("ip").args(["netns", "pids", name]).output();
            let processes = processes.map(|output| output.stdout).unwrap_or_default();
            for id in String::from_utf8_lossy(&processes).split_whitespace() {
                let _ = Command::new("kill").args(["-s", "KILL", id]).status();
            }
            let _ = ip(&["netns", "del", name]);
        }
    }
}

fn ip(words: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(words).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}
