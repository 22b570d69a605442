//! A browser that is driven as <https://www.w3.org/TR/webdriver2/> says, by Debian's `chromedriver`.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::{DEADLINE, Process, skip};

/// What Chromium is started with: no window, no sandbox (which root cannot have), and nothing that a browser
/// does unasked.
pub(crate) const CHROMIUM_OPTIONS: [&str; 7] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/// A browser with some tabs.
pub(crate) struct Browser {
    driver: SocketAddr,
    /// Path of its session.
    session: String,
    _profile: TempDir,
    _process: Process,
}

impl Browser {
    /// `None`, with a line that says so, without `chromedriver` or `chromium`.
    pub(crate) fn start() -> Option<Self> {
        if Command::new("chromium").arg("--version").output().is_err() {
            skip("chromium is not installed");
            return None;
        }
        let process = match Process::try_start(Command::new("chromedriver").arg("--port=0")) {
            Ok(process) => process,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                skip("chromedriver is not installed");
                return None;
            }
            Err(error) => panic!("chromedriver does not start: {error}"),
        };
        let port = process.wait_for("started successfully on port ");
        let port: u16 = port.trim_end_matches('.').parse().unwrap();
        let profile = tempfile::tempdir().unwrap();
        let data_dir = format!("--user-data-dir={}", profile.path().display());
        let options: Vec<_> = CHROMIUM_OPTIONS.into_iter().chain([data_dir.as_str()]).collect();
        let capabilities = json!({ "alwaysMatch": { "goog:chromeOptions": { "args": options } } });
        let driver = ([127, 0, 0, 1], port).into();
        let new = request(driver, "POST", "/session", &json!({ "capabilities": capabilities }));
        let session = format!("/session/{}", new["sessionId"].as_str().unwrap());
        Some(Self { driver, session, _profile: profile, _process: process })
    }

    /// The tab that the browser has from the start.
    pub(crate) fn first_tab(&self) -> String {
        self.ask("GET", "/window", &Value::Null).as_str().unwrap().to_owned()
    }

    pub(crate) fn new_tab(&self) -> String {
        let tab = self.ask("POST", "/window/new", &json!({ "type": "tab" }));
        tab["handle"].as_str().unwrap().to_owned()
    }

    /// Opens a page in a tab.
    pub(crate) fn open(&self, tab: &str, url: &str) {
        self.switch_to(tab);
        self.ask("POST", "/url", &json!({ "url": url }));
    }

    /// What a script returns in a tab.
    pub(crate) fn run(&self, tab: &str, script: &str, arguments: &[&str]) -> Value {
        self.switch_to(tab);
        self.ask("POST", "/execute/sync", &json!({ "script": script, "args": arguments }))
    }

    /// Waits until a script returns a text that is not empty.
    pub(crate) fn wait_for(&self, tab: &str, script: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.run(tab, script, &[]).as_str() {
                Some(text) if !text.is_empty() => return text.to_owned(),
                _ => {
                    let page = "return document.body.innerText";
                    assert!(Instant::now() < deadline, "{:?}", self.run(tab, page, &[]));
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn switch_to(&self, tab: &str) {
        self.ask("POST", "/window", &json!({ "handle": tab }));
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        request(self.driver, method, &format!("{}{path}", self.session), body)
    }
}

/// Has the driver take the browser down, which would outlive it.
impl Drop for Browser {
    fn drop(&mut self) {
        // A test that fails already is not to abort here.
        let _ = exchange(self.driver, "DELETE", &self.session, "");
    }
}

/// What the driver answers.
fn request(driver: SocketAddr, method: &str, path: &str, body: &Value) -> Value {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let (head, body) = exchange(driver, method, path, &body).unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {head}{body}");
    let mut body: Value = serde_json::from_str(&body).unwrap();
    body["value"].take()
}

/// Head and body of an answer. The driver keeps the connection open.
fn exchange(
    driver: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
) -> std::io::Result<(String, String)> {
    let mut stream = TcpStream::connect(driver)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {driver}\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    let fields = || head.lines().filter_map(|line| line.split_once(':'));
    let length = fields().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|(_, value)| value.trim().parse().ok());
    let mut body = vec![0; length.ok_or(ErrorKind::InvalidData)?];
    reader.read_exact(&mut body)?;
    Ok((head, String::from_utf8_lossy(&body).into_owned()))
}
