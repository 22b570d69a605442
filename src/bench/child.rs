//! Processes that are measured: this program once more, with other words; and what the system tells
//! of any process.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// Starting takes a few seconds; a machine under load may need more.
pub(super) const START_TIME: Duration = Duration::from_secs(120);

/// How long a process may take to go that was killed; it takes milliseconds.
const DEATH_TIME: Duration = Duration::from_secs(2);

/// A running child; killed when dropped. Its data are temporary, so it needs no gentle end.
pub(super) struct Process {
    child: Child,
    /// Kept open, so that the child can write: a few lines, which fit into a pipe.
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a [`command`].
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a process")?;
        let stdout = child.stdout.take().context("the process has no output")?;
        Ok(Self { child, stdout: BufReader::new(stdout) })
    }

    /// What follows `word` on the first line that it writes next with this word in it.
    pub(super) async fn wait_for(&mut self, word: &str) -> Result<String> {
        let found = async {
            let mut line = String::new();
            while self.stdout.read_line(&mut line).await? > 0 {
                if let Some((_, rest)) = line.split_once(word) {
                    return Ok(rest.trim().to_owned());
                }
                line.clear();
            }
            bail!("it has ended")
        };
        timeout(START_TIME, found).await.context("it takes too long to start")?
    }

    /// Its number; `None` when it has ended and that was noticed.
    pub(super) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Ends it without a warning, and waits until it is gone.
    pub(super) async fn kill(mut self) -> Result<()> {
        self.child.kill().await.context("cannot end a process")
    }
}

impl Drop for Process {
    /// Waits, so that nobody writes any more into a directory that is removed next.
    fn drop(&mut self) {
        // Fails when it has ended already, which is fine.
        let _ = self.child.start_kill();
        let started = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && started.elapsed() < DEATH_TIME {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// This very program, quiet, for a process that is killed when it is dropped.
pub(super) fn command() -> Result<Command> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    // Variables that are meant for the user's own network must not change the measured one.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MIXSOCKS_") {
            command.env_remove(name);
        }
    }
    command.arg("--quiet").kill_on_drop(true);
    Ok(command)
}

/// Memory of a process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Memory {
    pub(super) resident_mib: f64,
    pub(super) peak_resident_mib: f64,
}

/// CPU time that a process has used; `None` where the system does not tell.
pub(super) fn cpu_seconds(id: u32) -> Option<f64> {
    parse_cpu_seconds(&proc_file(id, "stat")?)
}

/// Memory of a process; `None` where the system does not tell.
pub(super) fn memory(id: u32) -> Option<Memory> {
    parse_memory(&proc_file(id, "status")?)
}

/// Name of a process's program; `None` where the system does not tell.
pub(super) fn program_name(id: u32) -> Option<String> {
    Some(proc_file(id, "comm")?.trim().to_owned())
}

fn proc_file(id: u32, name: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{id}/{name}")).ok()
}

/// Fields 14 and 15 of `/proc/<pid>/stat`, user and system time (`man 5 proc`). The second field is
/// a name that may hold anything, but ends with the last parenthesis.
fn parse_cpu_seconds(stat: &str) -> Option<f64> {
    /// `sysconf(_SC_CLK_TCK)`, which is 100 on every Linux of today.
    const TICKS_PER_SECOND: f64 = 100.0;
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

fn parse_memory(status: &str) -> Option<Memory> {
    let mib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kib / 1024.0)
    };
    Some(Memory { resident_mib: mib("VmRSS:")?, peak_resident_mib: mib("VmHWM:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 100";
        assert_eq!(parse_cpu_seconds(stat), Some(3.0));
        assert_eq!(parse_cpu_seconds("7 (a"), None);
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1536 kB\n";
        let memory = Memory { resident_mib: 1.5, peak_resident_mib: 2.0 };
        assert_eq!(parse_memory(status), Some(memory));
        assert_eq!(parse_memory("VmRSS: many kB"), None);
    }
}
