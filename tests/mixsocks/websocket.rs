//! The websocket API from other languages: the examples `chat.py` and `chat.html`.

use std::io::Write;
use std::process::{ChildStdin, Command};

use crate::people::People;
use crate::process::{Process, skip};
use crate::web_driver::Browser;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");

/// A Python that has the package websockets: Debian's is for Debian's own Python.
fn python() -> Option<&'static str> {
    ["python3", "/usr/bin/python3"].into_iter().find(|python| {
        let found = Command::new(python).args(["-c", "import websockets"]).output();
        found.is_ok_and(|output| output.status.success())
    })
}

/// `chat.py` at a client.
fn chat(python: &str, url: &str, recipient: Option<&str>) -> (Process, ChildStdin) {
    let mut command = Command::new(python);
    command.arg("-u").arg(format!("{EXAMPLES}/chat.py")).args(["--url", url]).args(recipient);
    Process::try_start_typing(&mut command).unwrap()
}

#[test]
fn two_people_chat_in_python() {
    let Some(python) = python() else {
        return skip("python3 or its package websockets is not installed");
    };
    let people = People::start(&[]);
    let (anna, mut anna_types) = chat(python, &people.anna.url, None);
    let address = anna.wait_for("you are ");
    assert_eq!(address, people.anna.proxy.client);
    let (bert, mut bert_types) = chat(python, &people.bert.url, Some(&address));
    bert_types.write_all("grüß dich\n".as_bytes()).unwrap();
    assert_eq!(anna.wait_for("< grüß "), "dich");
    anna_types.write_all(b"who is there\n").unwrap();
    assert_eq!(bert.wait_for("< who is "), "there");
    // Each ends when what was typed is delivered.
    for (person, types) in [(anna, anna_types), (bert, bert_types)] {
        drop(types);
        let ended = person.wait();
        assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    }
}

#[test]
fn two_people_chat_in_two_tabs_of_a_browser() {
    let Some(browser) = Browser::start() else { return };
    let mut command = Command::new("python3");
    command.args(["-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", EXAMPLES]);
    let server = Process::start(&mut command);
    let port = server.wait_for("Serving HTTP on 127.0.0.1 port ");
    let origin = format!("http://localhost:{}", port.split(' ').next().unwrap());
    let people = People::start(&["--websocket-origin", &origin]);

    let (anna, bert) = (browser.first_tab(), browser.new_tab());
    for (tab, person) in [(&anna, &people.anna), (&bert, &people.bert)] {
        browser.open(tab, &format!("{origin}/chat.html?url={}", person.url));
        let address = "const text = document.getElementById('address').textContent; \
                       return text.includes('@') ? text : ''";
        assert_eq!(browser.wait_for(tab, address), person.proxy.client);
    }
    let send = "const [to, message] = arguments; \
                document.getElementById('recipient').value = to; \
                document.getElementById('message').value = message; \
                document.getElementById('form').requestSubmit();";
    let line = |beginning: &str| {
        format!(
            "return [...document.querySelectorAll('#log li')].map(line => line.textContent)\
             .find(text => text.startsWith('{beginning}')) ?? ''"
        )
    };
    browser.run(&bert, send, &[&people.anna.proxy.client, "<b>hello</b> from bert"]);
    assert_eq!(browser.wait_for(&anna, &line("< ")), "< <b>hello</b> from bert");
    assert_eq!(browser.wait_for(&bert, &line("(1 is")), "(1 is delivered)");
    // Anna does not know who it is, and can answer.
    browser.run(&anna, send, &["", "hello stranger"]);
    assert_eq!(browser.wait_for(&bert, &line("< ")), "< hello stranger");

    // Pages of others are kept out, also on this machine.
    let elsewhere = origin.replace("localhost", "127.0.0.1");
    browser.open(&bert, &format!("{elsewhere}/chat.html?url={}", people.bert.url));
    let closed = line("The connection is closed");
    assert_eq!(browser.wait_for(&bert, &closed), "The connection is closed.");
}
