//! Processes that are measured: this program once more; and `mixsocks up` in one of its own.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use crate::cli::TrafficArgs;

/// Starting takes under two seconds; a machine under load may need more.
const START_TIME: Duration = Duration::from_secs(60);

/// A running child; killed when dropped. Its data are temporary, so it needs no gentle end.
pub(super) struct Network {
    child: Child,
    proxy: SocketAddr,
    /// Kept open, so that the child can write.
    _stdout: BufReader<ChildStdout>,
    _data_dir: tempfile::TempDir,
}

/// Memory of a process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Memory {
    pub(super) resident_mib: f64,
    pub(super) peak_resident_mib: f64,
}

impl Network {
    /// Starts the network and waits until its proxy listens.
    pub(super) async fn start(traffic: TrafficArgs) -> Result<Self> {
        let data_dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        let mut command = command()?;
        command.args(["up", "--socks", "127.0.0.1:0", "--allow-private"]);
        command.arg("--data-dir").arg(data_dir.path());
        command.arg("--profile").arg(traffic.timing.profile.to_string());
        if let Some(mean_delay) = traffic.mean_delay {
            command.arg("--mean-delay").arg(humantime::format_duration(mean_delay).to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the network")?;
        let stdout = child.stdout.take().context("the network has no output")?;
        let mut stdout = BufReader::new(stdout);
        let proxy = tokio::time::timeout(START_TIME, read_proxy(&mut stdout))
            .await
            .context("the network is not ready after a minute")??;
        Ok(Self { child, proxy, _stdout: stdout, _data_dir: data_dir })
    }

    /// Where its proxy listens.
    pub(super) fn proxy(&self) -> SocketAddr {
        self.proxy
    }

    /// Ends it.
    pub(super) async fn stop(mut self) -> Result<()> {
        self.child.kill().await.context("cannot end the network")
    }

    /// CPU time that it has used; `None` where the system does not tell.
    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds(&self.child)
    }

    /// Its memory; `None` where the system does not tell.
    pub(super) fn memory(&self) -> Option<Memory> {
        parse_memory(&proc_file(&self.child, "status")?)
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

/// CPU time that a child has used; `None` where the system does not tell.
pub(super) fn cpu_seconds(child: &Child) -> Option<f64> {
    parse_cpu_seconds(&proc_file(child, "stat")?)
}

fn proc_file(child: &Child, name: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{}/{name}", child.id()?)).ok()
}

async fn read_proxy(stdout: &mut BufReader<ChildStdout>) -> Result<SocketAddr> {
    let mut line = String::new();
    stdout.read_line(&mut line).await?;
    let Some((_, address)) = line.split_once("socks5h://") else {
        bail!("the network does not start");
    };
    Ok(address.trim().parse()?)
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
