//! What all roles that run for long have in common: metrics over HTTP, and what they tell the system's
//! service manager.
//!
//! `GET /metrics` is text for Prometheus (exposition format 0.0.4), `GET /healthz` is 200 when the role
//! does its work, and 503 with a reason when it does not. Neither names a client or a destination.

use std::fmt::{Display, Write as _};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use mixsocks_common::topology::Topology;
use mixsocks_directory::{BoundedListener, unix_time};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Where [`Report`]s come from.
pub(crate) trait Source: Send + Sync + 'static {
    fn report(&self) -> Pin<Box<dyn Future<Output = Report> + Send + '_>>;
}

impl<F, R> Source for F
where
    F: Fn() -> R + Send + Sync + 'static,
    R: Future<Output = Report> + Send + 'static,
{
    fn report(&self) -> Pin<Box<dyn Future<Output = Report> + Send + '_>> {
        Box::pin(self())
    }
}

/// How a role is.
#[derive(Debug)]
pub(crate) struct Report {
    problem: Option<String>,
    metrics: String,
}

impl Report {
    /// It does its work.
    pub(crate) fn healthy() -> Self {
        Self { problem: None, metrics: String::new() }
    }

    /// How whoever follows documents is with the newest one.
    pub(crate) fn of_document(topology: &Topology) -> Self {
        let until = topology.valid_until;
        let mut report = match until > unix_time() {
            true => Self::healthy(),
            false => Self::sick("the newest document has ended"),
        };
        report.gauge("document_epoch", "Epoch of the newest document.", topology.epoch);
        let help = "Until when it is in force, since 1970.";
        report.gauge("document_until_seconds", help, until.0);
        report
    }

    /// It does not do its work, if nothing else is the matter.
    pub(crate) fn complain(&mut self, problem: impl Display) {
        self.problem.get_or_insert(problem.to_string());
    }

    /// It does not.
    pub(crate) fn sick(problem: impl Display) -> Self {
        Self { problem: Some(problem.to_string()), metrics: String::new() }
    }

    /// Adds what goes up and down.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.add(name, "gauge", help, &[(String::new(), value)]);
    }

    /// Adds what only goes up, since the start.
    pub(crate) fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.add(&format!("{name}_total"), "counter", help, &[(String::new(), value)]);
    }

    /// Adds counters that differ by a label.
    pub(crate) fn counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'a str, u64)>,
    ) {
        let with_label = |(of, value): (&str, u64)| (format!("{{{label}=\"{of}\"}}"), value);
        let values: Vec<_> = values.into_iter().map(with_label).collect();
        self.add(&format!("{name}_total"), "counter", help, &values);
    }

    fn add(&mut self, name: &str, kind: &str, help: &str, values: &[(String, u64)]) {
        let out = &mut self.metrics;
        // Writing to a string does not fail.
        let _ = writeln!(out, "# HELP mixsocks_{name} {help}\n# TYPE mixsocks_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(out, "mixsocks_{name}{labels} {value}");
        }
    }
}

/// A role in the eyes of its operator.
pub(crate) struct Service {
    source: watch::Sender<Option<Arc<dyn Source>>>,
    _server: JoinSet<()>,
}

impl Service {
    /// Serves metrics, if an address is given.
    pub(crate) async fn start(role: &'static str, metrics: Option<SocketAddr>) -> Result<Self> {
        let (source, sources) = watch::channel(None);
        let mut server = JoinSet::new();
        if let Some(address) = metrics {
            let listener = bind(address, "--metrics").await?;
            if !address.ip().is_loopback() {
                tracing::warn!("whoever reaches {address} can read how much traffic there is");
            }
            let router = router(Arc::new(Shared { role, sources }));
            server.spawn(async move {
                if let Err(error) = axum::serve(BoundedListener::new(listener), router).await {
                    tracing::warn!("metrics are not served any more: {error}");
                }
            });
        }
        Ok(Self { source, _server: server })
    }

    /// From now on this is what is reported.
    pub(crate) fn watch(&self, source: impl Source) {
        self.source.send_replace(Some(Arc::new(source)));
    }

    /// Tells the service manager that the role does its work.
    pub(crate) fn ready(&self) {
        notify(&[sd_notify::NotifyState::Ready]);
    }

    /// Tells the service manager that the role comes to its end.
    pub(crate) fn stopping(&self) {
        notify(&[sd_notify::NotifyState::Stopping]);
    }
}

/// Without a service manager this does nothing.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("the service manager is not told: {error}");
    }
}

struct Shared {
    role: &'static str,
    sources: watch::Receiver<Option<Arc<dyn Source>>>,
}

impl Shared {
    async fn report(&self) -> Report {
        let source = self.sources.borrow().clone();
        match source {
            Some(source) => source.report().await,
            None => Report::sick("it is starting"),
        }
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz)).with_state(shared)
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let mut report = shared.report().await;
    let healthy = u64::from(report.problem.is_none());
    report.gauge("healthy", "1 when the role does its work.", healthy);
    let role = shared.role;
    let version = env!("CARGO_PKG_VERSION");
    let text = format!(
        "# HELP mixsocks_info What runs.\n# TYPE mixsocks_info gauge\n\
         mixsocks_info{{role=\"{role}\",version=\"{version}\"}} 1\n{}",
        report.metrics
    );
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    match shared.report().await.problem {
        None => "ok\n".into_response(),
        Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")).into_response(),
    }
}

/// Listens, or says what helps.
pub(crate) async fn bind(address: SocketAddr, option: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let other = format!("choose another with {option}");
        match error.kind() {
            ErrorKind::AddrInUse => {
                anyhow!("another program listens on {address}; stop it, or {other}")
            }
            ErrorKind::AddrNotAvailable => {
                anyhow!("{address} is not an address of this machine; {other}")
            }
            ErrorKind::PermissionDenied => {
                anyhow!("this user may not listen on {address}; {other}, with a port from 1024 on")
            }
            _ => anyhow!("cannot listen on {address}: {error}; {other}"),
        }
    })
}
