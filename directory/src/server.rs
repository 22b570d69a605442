//! What an authority answers over HTTP.
//!
//! | request | answer |
//! |---|---|
//! | `GET /topology` | the newest document, with an ETag; any cache may keep and pass it on |
//! | `GET /rules` | the rules, signed |
//! | `GET /descriptors` | the texts of all descriptors that it holds, a JSON array |
//! | `GET /status` | how making documents goes, JSON |
//! | `POST /descriptors` | takes an upload of a member; its endorsement, 104 bytes |
//! | `POST /authority` | takes a message of another authority |
//!
//! What is refused is explained in a line of text.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use mixsocks_common::directory::{AuthorityStatus, MAX_MESSAGE_BYTES, MAX_UPLOAD_BYTES, Rules};
use mixsocks_common::keys::Identity;
use mixsocks_common::topology::{NetworkName, SignedTopology};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::warn;

use crate::body_pass::BodyPass;
use crate::clock::unix_time;
use crate::listener::BoundedListener;
use crate::service::{Refusal, Request};

/// A message of another authority that fits waits for nobody: a status has 220 bytes. For a larger one
/// the sender shows who it is before it is received, and has one place.
const SMALL_MESSAGE_BYTES: usize = 4096;
/// Small bodies that are being received and handled at a time.
const MAX_BODIES: usize = 256;
/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// For how long the list of descriptors is not made anew: it may have megabytes.
const LIST_TIME: Duration = Duration::from_secs(2);

/// A document as it is served.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    file: Bytes,
    etag: HeaderValue,
}

impl Published {
    pub(crate) fn of(signed: &SignedTopology) -> Self {
        Self { file: Bytes::copy_from_slice(signed.file().as_bytes()), etag: etag(signed) }
    }
}

/// What names a document: its digest, which anybody who has it can compute.
pub(crate) fn etag(signed: &SignedTopology) -> HeaderValue {
    let digest: String =
        signed.digest().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    HeaderValue::from_str(&format!("\"{digest}\"")).expect("digits are a header")
}

/// What all requests need.
pub(crate) struct Shared {
    requests: mpsc::Sender<Request>,
    newest: watch::Receiver<Option<Published>>,
    rules: Bytes,
    network: NetworkName,
    bodies: Semaphore,
    /// The one place of each authority for a large message.
    large: BTreeMap<Identity, Semaphore>,
    list: tokio::sync::Mutex<Option<(Instant, Bytes)>>,
}

impl Shared {
    pub(crate) fn new(
        requests: mpsc::Sender<Request>,
        newest: watch::Receiver<Option<Published>>,
        rules: &Rules,
        signed_rules: Bytes,
    ) -> Arc<Self> {
        let authorities = rules.authorities().keys();
        Arc::new(Self {
            requests,
            newest,
            rules: signed_rules,
            network: rules.network().clone(),
            bodies: Semaphore::new(MAX_BODIES),
            large: authorities.map(|identity| (*identity, Semaphore::new(1))).collect(),
            list: tokio::sync::Mutex::new(None),
        })
    }

    /// Asks the authority.
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Refusal> {
        let (answer, answered) = oneshot::channel();
        let gone = |_| Refusal {
            status: StatusCode::SERVICE_UNAVAILABLE,
            explanation: "this authority stops".to_owned(),
        };
        self.requests.send(request(answer)).await.map_err(|_| gone(()))?;
        answered.await.map_err(|_| gone(()))
    }

    /// A place for a body of this length, to be held until it has been handled.
    fn place(&self, headers: &HeaderMap, length: usize) -> Result<SemaphorePermit<'_>, Refusal> {
        let places = if length <= SMALL_MESSAGE_BYTES {
            &self.bodies
        } else {
            let pass = headers.get(BodyPass::HEADER).and_then(|pass| pass.to_str().ok());
            let sender = pass
                .and_then(BodyPass::parse)
                .filter(|pass| pass.is_good(&self.network, length, unix_time()));
            sender.and_then(|pass| self.large.get(&pass.sender)).ok_or(Refusal {
                status: StatusCode::FORBIDDEN,
                explanation: "only authorities send bodies of this length".to_owned(),
            })?
        };
        places.try_acquire().map_err(|_| Refusal {
            status: StatusCode::SERVICE_UNAVAILABLE,
            explanation: "this authority is busy; try again".to_owned(),
        })
    }
}

/// The length that a request states, of at most `max` bytes.
fn length(headers: &HeaderMap, max: usize) -> Result<usize, Refusal> {
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok())
        .ok_or(Refusal {
            status: StatusCode::LENGTH_REQUIRED,
            explanation: "the length of the body is not given".to_owned(),
        })?;
    if length > max {
        return Err(Refusal {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            explanation: format!("more than {max} bytes"),
        });
    }
    Ok(length)
}

/// Receives a body of at most `max` bytes.
async fn receive(request: HttpRequest, max: usize) -> Result<Bytes, Refusal> {
    let body = Limited::new(request.into_body(), max).collect();
    match timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err(Refusal {
            status: StatusCode::BAD_REQUEST,
            explanation: "the body is not as long as was said".to_owned(),
        }),
        Err(_) => Err(Refusal {
            status: StatusCode::REQUEST_TIMEOUT,
            explanation: format!("it did not come within {} s", BODY_TIMEOUT.as_secs()),
        }),
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, format!("{}\n", self.explanation)).into_response()
    }
}

type Answer = Result<Response, Refusal>;

pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/topology", get(topology))
        .route("/rules", get(rules))
        .route("/status", get(status))
        .route("/descriptors", get(descriptors).post(upload))
        .route("/authority", axum::routing::post(message))
        // Bodies have bounds of their own.
        .layer(DefaultBodyLimit::disable())
        .with_state(shared)
}

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, router: Router) {
    if let Err(error) = axum::serve(BoundedListener::new(listener), router).await {
        warn!("the server has stopped: {error}");
    }
}

async fn topology(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let Some(Published { file, etag }) = shared.newest.borrow().clone() else {
        return (StatusCode::NOT_FOUND, "there is no document yet\n").into_response();
    };
    let known = headers.get_all(header::IF_NONE_MATCH).iter().any(|known| *known == etag);
    let head = [(header::ETAG, etag), (header::CONTENT_TYPE, TEXT)];
    match known {
        true => (StatusCode::NOT_MODIFIED, head).into_response(),
        false => (head, file).into_response(),
    }
}

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

async fn rules(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::CONTENT_TYPE, TEXT)], shared.rules.clone()).into_response()
}

async fn status(State(shared): State<Arc<Shared>>) -> Answer {
    let status = shared.ask(|answer| Request::Status { answer }).await?;
    Ok(as_json(&status_json(&status)))
}

fn status_json(status: &AuthorityStatus) -> serde_json::Value {
    let name = |identity: &Identity| identity.to_string();
    json!({
        "epoch": status.epoch,
        "in_force": status.in_force.map(|(epoch, until)| json!({"epoch": epoch, "until": until.0})),
        "making": status.making.map(|(epoch, attempt)| json!({"epoch": epoch, "attempt": attempt})),
        "problem": status.problem.as_ref().map(ToString::to_string),
        "last_heard": status.last_heard.iter()
            .map(|(id, heard)| json!({"authority": name(id), "at": heard.map(|at| at.as_secs())}))
            .collect::<Vec<_>>(),
        "signed_twice": status.signed_twice.iter()
            .map(|(id, epoch)| json!({"authority": name(id), "epoch": epoch}))
            .collect::<Vec<_>>(),
    })
}

async fn descriptors(State(shared): State<Arc<Shared>>) -> Answer {
    // Made once for all who ask at about the same time.
    let mut list = shared.list.lock().await;
    let newest = match &*list {
        Some((made, newest)) if made.elapsed() < LIST_TIME => newest.clone(),
        _ => {
            let texts = shared.ask(|answer| Request::Descriptors { answer }).await?;
            let newest = Bytes::from(format!("{}\n", json!(texts)));
            *list = Some((Instant::now(), newest.clone()));
            newest
        }
    };
    Ok(([(header::CONTENT_TYPE, JSON)], newest).into_response())
}

const JSON: HeaderValue = HeaderValue::from_static("application/json");

fn as_json(value: &serde_json::Value) -> Response {
    ([(header::CONTENT_TYPE, JSON)], format!("{value}\n")).into_response()
}

async fn upload(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Answer {
    let length = length(request.headers(), MAX_UPLOAD_BYTES)?;
    let _place = shared.place(request.headers(), length)?;
    let body = receive(request, length).await?;
    let endorsement = shared.ask(|answer| Request::Upload { body, answer }).await??;
    Ok(Body::from(endorsement.to_bytes().to_vec()).into_response())
}

async fn message(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Answer {
    let length = length(request.headers(), MAX_MESSAGE_BYTES)?;
    let _place = shared.place(request.headers(), length)?;
    let body = receive(request, length).await?;
    shared.ask(|answer| Request::Message { body, answer }).await??;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[cfg(test)]
mod tests {
    use mixsocks_common::directory::{AddressRule, Minimum, Settings};
    use mixsocks_common::keys::IdentityKey;
    use mixsocks_common::topology::{Authorities, Epochs, Parameters};

    use super::*;

    const LARGE: usize = SMALL_MESSAGE_BYTES + 1;

    /// What an authority answers with whose authorities have these keys.
    fn shared(keys: &[IdentityKey]) -> Arc<Shared> {
        let rules = Rules::new(Settings {
            network: NetworkName::new("test").unwrap(),
            parameters: Parameters {
                payload_bytes: 2048,
                mean_delay: Duration::ZERO,
                max_delay: Duration::ZERO,
                epochs: Epochs { epoch_seconds: 3600, key_epochs: 24, overlap_seconds: 900 },
            },
            authorities: Authorities::new(keys.iter().map(IdentityKey::identity), 2).unwrap(),
            addresses: AddressRule::Private,
            valid_epochs: 2,
            minimum: Minimum { mixes: 3, gateways: 1, providers: 0 },
        });
        let (requests, _) = mpsc::channel(1);
        Shared::new(requests, watch::channel(None).1, &rules.unwrap(), Bytes::new())
    }

    fn pass(shared: &Shared, key: &IdentityKey) -> HeaderMap {
        let pass = BodyPass::write(key, &shared.network, LARGE, unix_time());
        HeaderMap::from_iter([(BodyPass::HEADER.parse().unwrap(), pass.parse().unwrap())])
    }

    #[test]
    fn bodies_have_a_bounded_number_of_places_and_large_ones_one_for_each_authority() {
        let keys = [1, 2, 3].map(|seed| IdentityKey::from_bytes(&[seed; 32]));
        let shared = shared(&keys);
        let nobody = HeaderMap::new();
        let small: Vec<_> =
            (0..MAX_BODIES).map(|_| shared.place(&nobody, SMALL_MESSAGE_BYTES).ok()).collect();
        assert!(small.iter().all(Option::is_some));
        let refused = |headers: &HeaderMap, length| shared.place(headers, length).err();
        let busy = StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(refused(&nobody, 1).unwrap().status, busy);
        // Strangers take no place of an authority, and none takes another's.
        let stranger = pass(&shared, &IdentityKey::from_bytes(&[4; 32]));
        for headers in [&nobody, &stranger] {
            assert_eq!(refused(headers, LARGE).unwrap().status, StatusCode::FORBIDDEN);
        }
        let held = keys.each_ref().map(|key| shared.place(&pass(&shared, key), LARGE).ok());
        assert!(held.iter().all(Option::is_some));
        assert_eq!(refused(&pass(&shared, &keys[0]), LARGE).unwrap().status, busy);
        drop((small, held));
        assert!(refused(&nobody, 1).is_none());
        assert!(refused(&pass(&shared, &keys[0]), LARGE).is_none());
    }
}
