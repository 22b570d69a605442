//! A whole network of separate processes: authorities, mixes, gateways, providers and a client, each on
//! an address of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::lab::{Lab, Place};
use crate::process::{DEADLINE, Ended, Process, mixsocks, run};
use crate::transfer::Ends;

/// How the network is.
pub(crate) struct Plan {
    pub(crate) authorities: usize,
    /// Seconds of an epoch.
    pub(crate) epoch: u32,
    pub(crate) key_epochs: u32,
    pub(crate) valid_epochs: u32,
    pub(crate) mixes: u8,
    pub(crate) gateways: u8,
    pub(crate) providers: u8,
    /// Whether [`Town::impair`] can be used.
    pub(crate) impaired: bool,
}

impl Plan {
    /// One authority, one route.
    pub(crate) const SMALL: Self = Self {
        authorities: 1,
        epoch: 60,
        key_epochs: 2,
        valid_epochs: 10,
        mixes: 3,
        gateways: 2,
        providers: 1,
        impaired: false,
    };

    /// Mixes, gateways and providers by name: mix-1, mix-2, …
    fn members(&self) -> Vec<String> {
        [("mix", self.mixes), ("gateway", self.gateways), ("provider", self.providers)]
            .into_iter()
            .flat_map(|(kind, count)| (1..=count).map(move |number| format!("{kind}-{number}")))
            .collect()
    }

    /// How many of each, as the authorities want it.
    fn counts(&self) -> String {
        let Self { mixes, gateways, providers, .. } = self;
        format!("mix={mixes},gateway={gateways},provider={providers}")
    }
}

const CLIENT: &str = "client";
/// The last number of the first member's address; the others follow, and the client after them.
const FIRST_MEMBER: u8 = 11;
/// What a node says when it has read how its packets are to fare.
const IMPAIRED: &str = "under test, packets fare";
const LINK_PORT: u16 = 9001;
/// Where each gateway takes its clients.
pub(crate) const CLIENT_PORT: u16 = 9002;
const DIRECTORY_PORT: u16 = 9000;
const PROXY_PORT: u16 = 1080;
/// Where each serves its metrics.
pub(crate) const METRICS_PORT: u16 = 9300;

/// A network; its processes end with it.
pub(crate) struct Town {
    plan: Plan,
    dir: TempDir,
    /// Machines of their own, or else addresses of this one's loopback network.
    lab: Option<Lab>,
    /// The second and third number of loopback addresses.
    place: (u8, u8),
    keys: Vec<String>,
    running: BTreeMap<String, Process>,
}

impl Town {
    /// On loopback addresses that no other test has.
    pub(crate) fn on_loopback(plan: Plan) -> Self {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Of all tests that run at a time on a machine, by the number of their process.
        let place = (64 + (std::process::id() % 128) as u8, number);
        Self::new(plan, None, place)
    }

    /// Each on a machine of its own.
    pub(crate) fn on_machines(plan: Plan, mut lab: Lab) -> Self {
        for number in 0..plan.authorities {
            let number = u8::try_from(number).unwrap();
            lab.add(&authority(number.into()), Some(1 + number));
        }
        for (name, last) in
            plan.members().into_iter().chain([CLIENT.to_owned()]).zip(FIRST_MEMBER..)
        {
            lab.add(&name, Some(last));
        }
        Self::new(plan, Some(lab), (0, 0))
    }

    fn new(plan: Plan, lab: Option<Lab>, place: (u8, u8)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut town = Self { plan, dir, lab, place, keys: Vec::new(), running: BTreeMap::new() };
        for number in 0..town.plan.authorities {
            let mut command = mixsocks();
            command.args(["directory", "init"]);
            if number == 0 {
                command.args(["--invite", &town.plan.counts()]);
            }
            let made = run(command.arg("--data-dir").arg(town.folder(&authority(number))));
            assert!(made.status.success(), "{}", made.stderr);
            let key = town.folder(&authority(number)).join("authority.pub");
            town.keys.push(std::fs::read_to_string(key).unwrap().trim().to_owned());
        }
        for number in 1..town.plan.authorities {
            for name in town.plan.members() {
                let folder = town.folder(&authority(number));
                let mut command = mixsocks();
                command.args(["directory", "invite", kind(&name)]);
                command.arg("--invitation").arg(town.invitation(&name));
                let made = run(command.arg("--data-dir").arg(folder));
                assert!(made.status.success(), "{}", made.stderr);
            }
        }
        if town.plan.impaired {
            for name in town.nodes() {
                std::fs::write(town.impairment(&name), "").unwrap();
            }
        }
        town
    }

    /// Mixes and gateways by name.
    pub(crate) fn nodes(&self) -> Vec<String> {
        self.plan.members().into_iter().filter(|name| kind(name) != "provider").collect()
    }

    /// Starts all, and returns when all do their work.
    pub(crate) fn start_all(&mut self) {
        self.start_members();
        self.start(CLIENT);
        self.wait_for(CLIENT, "socks5h://");
        self.wait_members();
    }

    /// Starts all but the client, and returns when all do their work.
    pub(crate) fn start_without_client(&mut self) {
        self.start_members();
        self.wait_members();
    }

    fn start_members(&mut self) {
        for number in 0..self.plan.authorities {
            self.start(&authority(number));
        }
        for name in self.plan.members() {
            self.start(&name);
        }
    }

    fn wait_members(&self) {
        for name in self.plan.members() {
            self.wait_healthy(&name);
        }
    }

    /// Waits until one of them does its work.
    pub(crate) fn wait_healthy(&self, name: &str) {
        let deadline = Instant::now() + DEADLINE;
        let url = format!("http://{}/healthz", self.address(name, METRICS_PORT));
        loop {
            let mut curl = match &self.lab {
                Some(lab) => lab.command(CLIENT, "curl"),
                None => Command::new("curl"),
            };
            let ended = run(curl.args(["-q", "--silent", "--fail", "--noproxy", "*", &url]));
            if ended.status.success() {
                return;
            }
            assert!(Instant::now() < deadline, "{name} never does its work: {}", self.log(name));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts one of them.
    pub(crate) fn start(&mut self, name: &str) {
        let process = Process::start(&mut self.command(name));
        assert!(self.running.insert(name.to_owned(), process).is_none(), "{name} runs already");
    }

    /// Kills one of them without a warning.
    pub(crate) fn kill(&mut self, name: &str) {
        self.running.remove(name).unwrap();
    }

    /// Sends one of them a signal.
    pub(crate) fn signal(&self, name: &str, signal: &str) {
        self.running[name].signal(signal);
    }

    /// Waits until one of them writes `word` to stdout.
    pub(crate) fn wait_for(&self, name: &str, word: &str) -> String {
        self.running[name].wait_for(word)
    }

    /// How much memory one of them has.
    #[cfg(target_os = "linux")]
    pub(crate) fn resident_kib(&self, name: &str) -> u64 {
        self.running[name].resident_kib()
    }

    /// What one of them has written to stderr so far.
    pub(crate) fn log(&self, name: &str) -> String {
        self.running[name].stderr_so_far()
    }

    /// The gateway that a client or provider has chosen.
    pub(crate) fn gateway_of(&self, name: &str) -> String {
        let file = if name == CLIENT { "client/gateway" } else { "gateway" };
        let chosen = std::fs::read_to_string(self.folder(name).join(file)).unwrap();
        let mut nodes = self.nodes().into_iter();
        nodes
            .find(|node| {
                self.wait_for(node, &format!("{}  ", kind(node))).starts_with(chosen.trim())
            })
            .unwrap()
    }

    /// The provider through which the client opens streams while it answers.
    pub(crate) fn provider_in_use(&self) -> String {
        let address = self.wait_for(CLIENT, "provider  ");
        let mut providers = (1..=self.plan.providers).map(|number| format!("provider-{number}"));
        providers.find(|name| self.wait_for(name, "provider  ").ends_with(&address)).unwrap()
    }

    fn impairment(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.impairment"))
    }

    /// Says what happens to the packets that a node sends to others, and returns when it does.
    pub(crate) fn impair(&self, name: &str, how: &str) {
        std::fs::write(self.impairment(name), how).unwrap();
        let times = || self.log(name).matches(IMPAIRED).count();
        let before = times();
        self.signal(name, "HUP");
        let deadline = Instant::now() + DEADLINE;
        while times() == before {
            assert!(Instant::now() < deadline, "{name} reads no {how:?}: {}", self.log(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn key(&self, number: usize) -> &str {
        &self.keys[number]
    }

    pub(crate) fn lab(&self) -> &Lab {
        self.lab.as_ref().unwrap()
    }

    /// Where one of them is.
    pub(crate) fn address(&self, name: &str, port: u16) -> SocketAddr {
        let last = match name.strip_prefix("authority-") {
            Some(number) => 1 + number.parse::<u8>().unwrap(),
            None => self.last_number(name),
        };
        let ip = match &self.lab {
            Some(lab) => lab.address(last),
            None => format!("127.{}.{}.{last}", self.place.0, self.place.1),
        };
        format!("{ip}:{port}").parse().unwrap()
    }

    /// The last number of a member's or the client's address.
    pub(crate) fn last_number(&self, name: &str) -> u8 {
        let names = self.plan.members().into_iter().chain([CLIENT.to_owned()]);
        names.zip(FIRST_MEMBER..).find(|(known, _)| known == name).unwrap().1
    }

    /// Where an authority listens.
    pub(crate) fn url(&self, number: usize) -> String {
        format!("http://{}", self.address(&authority(number), DIRECTORY_PORT))
    }

    /// Where the proxy listens.
    pub(crate) fn proxy(&self) -> String {
        match self.lab {
            Some(_) => format!("127.0.0.1:{PROXY_PORT}"),
            None => self.address(CLIENT, PROXY_PORT).to_string(),
        }
    }

    /// Programs of the client's user, and servers on the provider's machine.
    pub(crate) fn ends(&self) -> Ends {
        let place = |name| self.lab.as_ref().map_or_else(Place::default, |lab| lab.place(name));
        let proxy = self.proxy().parse().unwrap();
        Ends { proxy, program: place(CLIENT), server: place("provider-1") }
    }

    fn invitation(&self, name: &str) -> PathBuf {
        self.folder(&authority(0)).join("invite").join(name)
    }

    fn program(&self, name: &str) -> Command {
        match &self.lab {
            Some(lab) => lab.mixsocks(name),
            None => mixsocks(),
        }
    }

    /// The options that name the network.
    pub(crate) fn network(&self) -> Vec<String> {
        let urls = (0..self.plan.authorities).map(|number| self.url(number));
        let urls = urls.collect::<Vec<_>>().join(",");
        vec!["--directory".to_owned(), urls, "--authority".to_owned(), self.keys.join(",")]
    }

    fn command(&self, name: &str) -> Command {
        let mut command = self.program(name);
        match name.strip_prefix("authority-") {
            Some(number) => self.authority_options(&mut command, number.parse().unwrap()),
            None if name == CLIENT => {
                command.args(["client", "run", "--socks", &self.proxy()]).args(self.network());
            }
            None => self.member_options(&mut command, name),
        }
        let metrics = self.address(name, METRICS_PORT).to_string();
        command.args(["--metrics", &metrics]).arg("--data-dir").arg(self.folder(name));
        command
    }

    /// Waits for one of them to end.
    pub(crate) fn end(&mut self, name: &str) -> Ended {
        self.running.remove(name).unwrap().wait()
    }

    fn authority_options(&self, command: &mut Command, number: usize) {
        let listen = self.address(&authority(number), DIRECTORY_PORT).to_string();
        command.args(["directory", "run", "--private-addresses", "--listen", &listen]);
        command.args(["--minimum", &self.plan.counts()]);
        command.args(["--epoch", &format!("{}s", self.plan.epoch)]);
        command.args(["--key-epochs", &self.plan.key_epochs.to_string()]);
        command.args(["--valid-epochs", &self.plan.valid_epochs.to_string()]);
        for other in (0..self.plan.authorities).filter(|other| *other != number) {
            command.args(["--peer", &format!("{}@{}", self.keys[other], self.url(other))]);
        }
    }

    fn member_options(&self, command: &mut Command, name: &str) {
        let role = if kind(name) == "provider" { "provider" } else { "node" };
        command.args([role, "run"]).args(self.network());
        command.arg("--invitation").arg(self.invitation(name));
        if role == "provider" {
            command.args(["--allow-private", "--name", name]);
            return;
        }
        // Nodes with machines of their own may get another address.
        let ip = |port| match self.lab {
            Some(_) => format!("0.0.0.0:{port}"),
            None => self.address(name, port).to_string(),
        };
        command.args(["--kind", kind(name), "--listen", &ip(LINK_PORT)]);
        command.args(["--client-listen", &ip(CLIENT_PORT)]);
        if self.plan.impaired {
            command.arg("--impairment").arg(self.impairment(name));
        }
        if self.lab.is_some() && !self.folder(name).join("config.toml").exists() {
            let address = self.address(name, LINK_PORT).to_string();
            let client_address = self.address(name, CLIENT_PORT).to_string();
            command.args(["--address", &address, "--client-address", &client_address]);
        }
    }

    /// What `network status` says, once it says `word`.
    pub(crate) fn status_with(&self, word: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut command = self.program(CLIENT);
            let status = run(command.args(["network", "status"]).args(self.network()));
            if status.stdout.contains(word) {
                return status.stdout;
            }
            assert!(Instant::now() < deadline, "no {word:?}: {}{}", status.stdout, status.stderr);
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The epoch of the document in force.
    pub(crate) fn epoch(&self) -> u64 {
        let status = self.status_with(", epoch ");
        let (_, rest) = status.split_once(", epoch ").unwrap();
        rest.lines().next().unwrap().parse().unwrap()
    }

    /// Waits until as many documents have followed.
    pub(crate) fn wait_epochs(&self, count: u64) {
        let first = self.epoch();
        while self.epoch() < first + count {
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// `curl` through the proxy.
    pub(crate) fn curl(&self, url: &str, to: &Path) -> Process {
        match &self.lab {
            Some(lab) => lab.curl(CLIENT, &self.proxy(), url, to),
            None => {
                let mut command = Command::new("curl");
                command.args(["-q", "--silent", "--show-error", "--fail", "--max-time", "600"]);
                command.args(["--socks5-hostname", &self.proxy(), url, "--output"]).arg(to);
                Process::start(&mut command)
            }
        }
    }

    /// Asserts that the network carries: what comes through it is what `url` has.
    pub(crate) fn assert_carries(&self, url: &str, expected: &[u8]) {
        let to = self.dir.path().join("fetched");
        let curl = self.curl(url, &to).wait();
        assert!(curl.status.success(), "{}", curl.stderr);
        assert!(std::fs::read(&to).unwrap() == expected, "other bytes came");
    }
}

/// The name of an authority.
pub(crate) fn authority(number: usize) -> String {
    format!("authority-{number}")
}

fn kind(name: &str) -> &str {
    name.split('-').next().unwrap()
}
