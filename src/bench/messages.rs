//! `mixsocks bench messages`: messages through one gateway of a network that is started for it.
//!
//! All clients stand at one gateway, in this process, and the network is another one. Three things are
//! measured: what the gateway's disk takes for each message that it keeps for somebody who is away; how
//! long a message is under way when there are few; and how many come when as many are sent as can be.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mixsocks_client::EndpointConfig;
use mixsocks_client::messages::{Messenger, MessengerOptions, RECEIVED_LOG_FILE};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::message::MessageEvent;
use mixsocks_common::topology::Topology;
use mixsocks_node::gateway::store::FILE_NAME;
use mixsocks_sphinx::SecretKey;
use serde::Serialize;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::network::{Member, Up};
use super::report::rank;
use crate::cli::BenchMessagesArgs;
use crate::network::DEFAULT_MEAN_DELAY;
use crate::signals::Signals;
use crate::topology_file;

/// Bytes of each message: it fits into one packet.
const MESSAGE_BYTES: usize = 1024;
/// Messages that are kept for somebody who is away.
const KEPT: usize = 5000;
/// Messages per second while there are few.
const CALM_PER_SECOND: u32 = 20;
/// Those who send as much as they can, each to one other; and messages of each that are not delivered.
const PAIRS: usize = 8;
const WINDOW: usize = 128;
/// They send for so long before anything is counted.
const RAMP_UP: Duration = Duration::from_secs(2);
/// A message that takes longer will never come.
const PATIENCE: Duration = Duration::from_secs(60);

/// All figures.
#[derive(Debug, Serialize)]
struct Report {
    cpu: String,
    mean_delay_ms: f64,
    message_bytes: usize,
    kept: Kept,
    calm: Calm,
    crowded: Crowded,
}

/// What the disk takes.
#[derive(Debug, Serialize)]
struct Kept {
    messages: usize,
    disk_bytes_per_message: f64,
}

/// From where a message is handed in until the other application has it.
#[derive(Debug, Serialize)]
struct Calm {
    messages: usize,
    per_second: u32,
    p50_ms: f64,
    p99_ms: f64,
}

/// As many messages as can be.
#[derive(Debug, Serialize)]
struct Crowded {
    senders: usize,
    window: usize,
    messages_per_second: f64,
    /// Of the network, without the clients; null where the system does not tell.
    network_cpu_ms_per_message: Option<f64>,
}

/// Measures and prints.
pub(super) async fn run(args: &BenchMessagesArgs) -> Result<()> {
    let mut signals = Signals::new()?;
    let report = tokio::select! {
        report = Box::pin(measure(args)) => report?,
        () = signals.next() => bail!("interrupted"),
    };
    crate::say(&if args.json { serde_json::to_string(&report)? } else { report.to_string() });
    Ok(())
}

async fn measure(args: &BenchMessagesArgs) -> Result<Report> {
    let up = Up::start(args.traffic, false).await?;
    let clients = Clients::new(up.data_dir())?;
    let duration = Duration::from_secs(args.seconds);
    let mean_delay = args.traffic.mean_delay.unwrap_or(DEFAULT_MEAN_DELAY);
    Ok(Report {
        cpu: super::cpu_name(),
        mean_delay_ms: mean_delay.as_secs_f64() * 1e3,
        message_bytes: MESSAGE_BYTES,
        kept: clients.keep(up.data_dir()).await?,
        calm: clients.calm(duration).await?,
        crowded: clients.crowded(duration, &up.members()).await?,
    })
}

/// Makes clients of one gateway.
struct Clients {
    topology: watch::Receiver<Arc<Topology>>,
    gateway: Identity,
    folder: TempDir,
    count: AtomicU64,
}

impl Clients {
    /// On the network of this data directory.
    fn new(data_dir: &Path) -> Result<Self> {
        let authority = std::fs::read_to_string(data_dir.join("authority.pub"))?;
        let authorities = topology_file::only(authority.trim().parse()?)?;
        let file = data_dir.join(topology_file::FILE);
        let topology = Arc::new(topology_file::read(&file, &authorities)?.topology);
        let gateway = topology.gateways().next().context("there is no gateway")?.identity;
        let topology = watch::channel(topology).1;
        Ok(Self { topology, gateway, folder: tempfile::tempdir()?, count: AtomicU64::new(0) })
    }

    /// Somebody new.
    async fn connect(&self) -> Result<Messenger> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let folder = self.folder.path().join(number.to_string());
        std::fs::create_dir(&folder)?;
        let config = EndpointConfig {
            topology: self.topology.clone(),
            identity: Arc::new(IdentityKey::generate(&mut rand::rng())),
            encryption: SecretKey::generate(&mut rand::rng()),
            gateway: self.gateway,
            token_file: folder.join("token"),
            mean_delay: None,
            receives_messages: true,
        };
        let received_log = Some(folder.join(RECEIVED_LOG_FILE));
        let options = MessengerOptions { received_log, ..MessengerOptions::default() };
        Ok(Messenger::connect(config, options).await?)
    }

    /// What [`KEPT`] messages take on the gateway's disk.
    async fn keep(&self, data_dir: &Path) -> Result<Kept> {
        let away = self.connect().await?;
        let recipient = away.address();
        away.shutdown().await;
        let sender = self.connect().await?;
        let before = store_bytes(data_dir)?;
        let mut window = Window::new(sender, recipient);
        for _ in 0..KEPT {
            window.send().await?;
        }
        window.drain().await?;
        let bytes = store_bytes(data_dir)?.saturating_sub(before);
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 bytes")]
        let disk_bytes_per_message = bytes as f64 / KEPT as f64;
        Ok(Kept { messages: KEPT, disk_bytes_per_message })
    }

    /// How long messages take while there are few.
    async fn calm(&self, duration: Duration) -> Result<Calm> {
        let (sender, recipient) = (self.connect().await?, self.connect().await?);
        let mut ticks = interval(Duration::from_secs(1) / CALM_PER_SECOND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let started = Instant::now();
        let (mut sent, mut times) = (Vec::new(), Vec::new());
        while started.elapsed() < duration || times.len() < sent.len() {
            tokio::select! {
                _ = ticks.tick(), if started.elapsed() < duration => {
                    let message = numbered(sent.len());
                    sent.push(Instant::now());
                    sender.send(recipient.address(), &message, 0).await?;
                }
                event = next_event(&recipient) => {
                    if let Some(number) = taken(&recipient, event?) {
                        let at = sent.get(number).context("a message that nobody sent")?;
                        times.push(at.elapsed());
                    }
                }
                event = sender.next_event() => check(event.as_ref())?,
            }
        }
        times.sort_unstable();
        let ms = |percent| times[rank(times.len(), percent)].as_secs_f64() * 1e3;
        ensure!(!times.is_empty(), "no message was sent");
        let messages = times.len();
        Ok(Calm { messages, per_second: CALM_PER_SECOND, p50_ms: ms(50), p99_ms: ms(99) })
    }

    /// How many messages come per second.
    async fn crowded(&self, duration: Duration, network: &[Member]) -> Result<Crowded> {
        let (received, stopped) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let mut tasks = JoinSet::new();
        for _ in 0..PAIRS {
            let (sender, recipient) = (self.connect().await?, self.connect().await?);
            let (mut window, stopped) = (Window::new(sender, recipient.address()), stopped.clone());
            tasks.spawn(async move {
                while !stopped.load(Ordering::Relaxed) {
                    window.send().await?;
                }
                window.drain().await
            });
            let received = received.clone();
            tasks.spawn(async move {
                // Dropped when the senders have ended.
                while let Some(event) = recipient.next_event().await {
                    if taken(&recipient, event).is_some() {
                        received.fetch_add(1, Ordering::Relaxed);
                    }
                }
                bail!("a recipient has stopped")
            });
        }
        let count = async {
            sleep(RAMP_UP).await;
            let (before, cpu_before) = (received.load(Ordering::Relaxed), cpu_seconds(network));
            let started = Instant::now();
            sleep(duration).await;
            let came = received.load(Ordering::Relaxed) - before;
            let seconds = started.elapsed().as_secs_f64();
            let cpu = cpu_seconds(network).zip(cpu_before).map(|(after, before)| after - before);
            (came, seconds, cpu)
        };
        tokio::pin!(count);
        let (came, seconds, cpu) = loop {
            tokio::select! {
                counted = &mut count => break counted,
                Some(ended) = tasks.join_next() => ended??,
            }
        };
        ensure!(came > 0, "no message came");
        stopped.store(true, Ordering::Relaxed);
        // Recipients run until they are dropped.
        for _ in 0..PAIRS {
            tasks.join_next().await.context("nobody sends")???;
        }
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 messages")]
        let came = came as f64;
        Ok(Crowded {
            senders: PAIRS,
            window: WINDOW,
            messages_per_second: came / seconds,
            network_cpu_ms_per_message: cpu.map(|seconds| seconds * 1e3 / came),
        })
    }
}

/// A sender that keeps a bounded number of messages under way to one recipient.
struct Window {
    sender: Messenger,
    recipient: Address,
    sent: usize,
    under_way: usize,
}

impl Window {
    fn new(sender: Messenger, recipient: Address) -> Self {
        Self { sender, recipient, sent: 0, under_way: 0 }
    }

    /// Sends one more message when there is room for it.
    async fn send(&mut self) -> Result<()> {
        while self.under_way >= WINDOW {
            self.wait_for_one().await?;
        }
        self.sender.send(self.recipient, &numbered(self.sent), 0).await?;
        self.sent += 1;
        self.under_way += 1;
        Ok(())
    }

    /// Waits until all are delivered.
    async fn drain(&mut self) -> Result<()> {
        while self.under_way > 0 {
            self.wait_for_one().await?;
        }
        Ok(())
    }

    async fn wait_for_one(&mut self) -> Result<()> {
        let event = next_event(&self.sender).await?;
        check(Some(&event))?;
        self.under_way -= usize::from(matches!(event, MessageEvent::Delivered(_)));
        Ok(())
    }
}

async fn next_event(messenger: &Messenger) -> Result<MessageEvent> {
    let event = timeout(PATIENCE, messenger.next_event()).await;
    event.context("a message takes more than a minute")?.context("the client has stopped")
}

/// A message that begins with its number.
fn numbered(number: usize) -> Vec<u8> {
    let mut message = (number as u64).to_be_bytes().to_vec();
    message.resize(MESSAGE_BYTES, 0);
    message
}

/// Takes a message if one came: its number.
fn taken(messenger: &Messenger, event: MessageEvent) -> Option<usize> {
    let MessageEvent::Received { received, message, .. } = event else { return None };
    messenger.taken(received);
    usize::try_from(u64::from_be_bytes(*message.first_chunk()?)).ok()
}

/// Nothing may fail on a network that nobody disturbs.
fn check(event: Option<&MessageEvent>) -> Result<()> {
    match event {
        Some(MessageEvent::Failed(_, reason)) => bail!("a message has failed: {reason}"),
        Some(_) => Ok(()),
        None => bail!("the client has stopped"),
    }
}

fn cpu_seconds(network: &[Member]) -> Option<f64> {
    network.iter().map(Member::cpu_seconds).sum()
}

/// Bytes that the disk has given to the stores of all gateways.
fn store_bytes(data_dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(data_dir)? {
        if let Ok(metadata) = std::fs::metadata(entry?.path().join(FILE_NAME)) {
            bytes += disk_bytes(&metadata);
        }
    }
    Ok(bytes)
}

#[cfg(unix)]
fn disk_bytes(metadata: &std::fs::Metadata) -> u64 {
    // In blocks of this size, whatever the file system has.
    512 * std::os::unix::fs::MetadataExt::blocks(metadata)
}

#[cfg(not(unix))]
fn disk_bytes(metadata: &std::fs::Metadata) -> u64 {
    metadata.len()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, mean_delay_ms, message_bytes, kept, calm, crowded } = self;
        writeln!(f, "{cpu}, messages of {message_bytes} bytes, {mean_delay_ms} ms per mix")?;
        let Crowded { senders, window, messages_per_second, network_cpu_ms_per_message } = crowded;
        write!(f, "crowded {messages_per_second:>9.0} per second     ")?;
        write!(f, "{senders} senders, {window} messages of each under way")?;
        if let Some(cpu) = network_cpu_ms_per_message {
            write!(f, ", {cpu:.2} ms of the network's CPU each")?;
        }
        let Calm { messages, per_second, p50_ms, p99_ms } = calm;
        write!(f, "\ncalm    {p50_ms:>9.1} ms             ")?;
        write!(
            f,
            "median, 99 % within {p99_ms:.1} ms ({messages} messages, {per_second} per second)"
        )?;
        let Kept { messages, disk_bytes_per_message } = kept;
        write!(f, "\nkept    {disk_bytes_per_message:>9.0} bytes          ")?;
        write!(f, "of the disk for each of {messages} messages")
    }
}
