//! Requests with bounds: how long they take, and how much comes back.

use std::time::Duration;

use axum::http::StatusCode;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{HeaderValue, IF_NONE_MATCH};
use hyper::{Method, Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use mixsocks_common::topology::MAX_DOCUMENT_BYTES;
use tokio::time::timeout;

use crate::url::Url;

/// For connecting and one request with its answer: the largest document at 300 kB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// For a connection alone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of a server's explanation is told.
const MAX_EXPLANATION_BYTES: usize = 500;

/// A client of authorities and mirrors; clones share connections.
#[derive(Clone, Debug)]
pub struct Http(Client<HttpConnector, Full<Bytes>>);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The server cannot be reached, or breaks off.
    #[error("no answer: {0}")]
    Connection(String),
    /// It takes too long.
    #[error("no answer within {} s", REQUEST_TIMEOUT.as_secs())]
    TimedOut,
    /// The server refuses.
    #[error("it answers {status}: {explanation}")]
    Refused {
        /// The code of HTTP.
        status: u16,
        /// What it says, with control characters taken out.
        explanation: String,
    },
    /// It sends more than there can be.
    #[error("it sends more than {0} bytes")]
    TooLong(usize),
}

/// What came of asking for something that may be known.
pub(crate) enum Fetched {
    /// The known one is the newest.
    NotModified,
    /// Another one.
    New(Bytes),
}

impl Default for Http {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        Self(Client::builder(TokioExecutor::new()).build(connector))
    }
}

impl Http {
    /// The newest document of an authority or mirror, unchecked.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn document(&self, url: &Url) -> Result<Bytes, HttpError> {
        match self.get(url.join("/topology"), None, MAX_DOCUMENT_BYTES).await? {
            Fetched::New(body) => Ok(body),
            Fetched::NotModified => Ok(Bytes::new()),
        }
    }

    /// Fetches what is at `uri`, of at most `max` bytes, unless it is what `etag` names.
    pub(crate) async fn get(
        &self,
        uri: Uri,
        etag: Option<&HeaderValue>,
        max: usize,
    ) -> Result<Fetched, HttpError> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = uri;
        if let Some(etag) = etag {
            request.headers_mut().insert(IF_NONE_MATCH, etag.clone());
        }
        match self.send(request, max).await? {
            (StatusCode::NOT_MODIFIED, _) => Ok(Fetched::NotModified),
            (_, body) => Ok(Fetched::New(body)),
        }
    }

    /// Sends `body` to `uri`; the answer has at most `max` bytes.
    pub(crate) async fn post(
        &self,
        uri: Uri,
        body: impl Into<Bytes>,
        max: usize,
    ) -> Result<Bytes, HttpError> {
        self.post_with(uri, body, None, max).await
    }

    /// The same with a header.
    pub(crate) async fn post_with(
        &self,
        uri: Uri,
        body: impl Into<Bytes>,
        header: Option<(&'static str, HeaderValue)>,
        max: usize,
    ) -> Result<Bytes, HttpError> {
        let mut request = Request::new(Full::new(body.into()));
        if let Some((name, value)) = header {
            request.headers_mut().insert(name, value);
        }
        *request.uri_mut() = uri;
        *request.method_mut() = Method::POST;
        let (_, body) = self.send(request, max).await?;
        Ok(body)
    }

    async fn send(
        &self,
        request: Request<Full<Bytes>>,
        max: usize,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        let exchange = async {
            let response = self.0.request(request).await.map_err(|e| connection(&e))?;
            let (head, body) = response.into_parts();
            let is_good = head.status.is_success() || head.status == StatusCode::NOT_MODIFIED;
            let max = if is_good { max } else { MAX_EXPLANATION_BYTES };
            let body = match Limited::new(body, max).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) if error.is::<LengthLimitError>() && is_good => {
                    return Err(HttpError::TooLong(max));
                }
                Err(error) if is_good => return Err(connection(&*error)),
                Err(_) => Bytes::new(),
            };
            if is_good {
                return Ok((head.status, body));
            }
            let explanation = String::from_utf8_lossy(&body);
            let explanation = explanation.chars().map(|c| if c.is_control() { ' ' } else { c });
            let explanation = explanation.collect::<String>().trim().to_owned();
            Err(HttpError::Refused { status: head.status.as_u16(), explanation })
        };
        timeout(REQUEST_TIMEOUT, exchange).await.unwrap_or(Err(HttpError::TimedOut))
    }
}

/// What is at the root of a failure: the library's own words say only where it came up.
fn connection(error: &(dyn std::error::Error + 'static)) -> HttpError {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    HttpError::Connection(root.to_string())
}
