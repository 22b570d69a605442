//! Two people with a client each on one network, for the tests of messages with real programs.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::process::{Proxy, mixsocks};

/// `mixsocks up` with a websocket, and beside it `mixsocks client run` with another one.
pub(crate) struct People {
    pub(crate) anna: Person,
    pub(crate) bert: Person,
    _folders: [TempDir; 2],
}

/// A client that runs.
pub(crate) struct Person {
    pub(crate) proxy: Proxy,
    /// `ws://…/`.
    pub(crate) url: String,
}

impl Person {
    fn start(command: &mut Command) -> Self {
        command.args(["--socks", "127.0.0.1:0", "--websocket", "127.0.0.1:0"]);
        let proxy = Proxy::start(command);
        let url = proxy.process.wait_for("messages  ");
        Self { proxy, url }
    }

    /// Where the websocket listens.
    pub(crate) fn websocket(&self) -> &str {
        self.url.strip_prefix("ws://").and_then(|rest| rest.strip_suffix('/')).unwrap()
    }
}

impl People {
    /// Both with these further options.
    pub(crate) fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut up = mixsocks();
        up.args(["up", "--mean-delay", "1ms", "--data-dir"]).arg(folder.path()).args(options);
        let anna = Person::start(&mut up);
        let mut run = mixsocks();
        run.args(["client", "run"]).args(network(folder.path())).args(options);
        let own = tempfile::tempdir().unwrap();
        let bert = Person::start(run.arg("--data-dir").arg(own.path()));
        Self { anna, bert, _folders: [folder, own] }
    }
}

/// The options that name the network of a data directory of `up`.
pub(crate) fn network(folder: &Path) -> [String; 4] {
    let authority = std::fs::read_to_string(folder.join("authority.pub")).unwrap();
    let topology = folder.join("topology").display().to_string();
    ["--topology".into(), topology, "--authority".into(), authority.trim().into()]
}
