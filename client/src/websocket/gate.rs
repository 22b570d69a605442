//! Who may connect: defence against web pages and other users of the machine.
//!
//! A browser lets any page open a websocket to this machine, and says in `Origin` which one it is. A
//! page can also make its own name lead to this machine (DNS rebinding); then `Host` shows that name.
//! Other programs send no `Origin`, and could send any.

use std::fmt;
use std::net::IpAddr;

use subtle::ConstantTimeEq;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request};
use tokio_tungstenite::tungstenite::http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN};
use tokio_tungstenite::tungstenite::http::{Response, StatusCode};
use zeroize::Zeroizing;

/// Fewest and most characters of a token.
pub const TOKEN_LENGTHS: std::ops::RangeInclusive<usize> = 16..=128;

/// The origin of pages that have none, such as files; also of frames that any page can make.
const NULL_ORIGIN: &str = "null";

/// What programs must show when they connect.
pub struct Token(Zeroizing<String>);

/// A text is not a [`Token`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a token has {} to {} letters, digits, `-`, `.`, `_` or `~`",
    TOKEN_LENGTHS.start(),
    TOKEN_LENGTHS.end()
)]
pub struct TokenError;

impl Token {
    /// A token of characters that need no escape in a URL.
    ///
    /// # Errors
    /// [`TokenError`] for others, and if there are too few or too many.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        if TOKEN_LENGTHS.contains(&text.len()) && text.bytes().all(is_plain) {
            Ok(Self(Zeroizing::new(text.to_owned())))
        } else {
            Err(TokenError)
        }
    }

    /// Compares in a time that does not depend on the token.
    fn fits(&self, text: &str) -> bool {
        padded(&self.0).ct_eq(&*padded(text)).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// Length and bytes in an array of one size, so that comparing does not show the length. What is too
/// long has a length that no token has.
fn padded(text: &str) -> Zeroizing<[u8; 1 + *TOKEN_LENGTHS.end()]> {
    let mut array = Zeroizing::new([0; 1 + *TOKEN_LENGTHS.end()]);
    array[0] = u8::try_from(text.len()).unwrap_or(u8::MAX);
    let len = text.len().min(*TOKEN_LENGTHS.end());
    array[1..=len].copy_from_slice(&text.as_bytes()[..len]);
    array
}

/// Decides who may connect.
#[derive(Debug)]
pub(super) struct Gate {
    /// Where the port is.
    pub(super) bound: IpAddr,
    /// Pages that may connect, such as `http://localhost:8000`.
    pub(super) origins: Vec<String>,
    /// Further names of this machine.
    pub(super) hosts: Vec<String>,
    pub(super) token: Option<Token>,
}

/// Why somebody may not connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("the Host header is missing, double or names another machine")]
    Host,
    #[error("pages of this Origin may not connect")]
    Origin,
    #[error("the token is missing or wrong")]
    Token,
    /// Whoever misspells how it receives must not lose what it asked for.
    #[error(
        "the URL may say ?receive=no or ?receive=confirm, and token=…, each once and nothing else"
    )]
    Query,
    #[error("as many programs are connected as may be")]
    Full,
}

impl Refused {
    /// The answer in HTTP.
    pub(super) fn response(self) -> ErrorResponse {
        let mut response = Response::new(Some(format!("{self}\n")));
        *response.status_mut() = match self {
            Self::Host | Self::Origin => StatusCode::FORBIDDEN,
            Self::Token => StatusCode::UNAUTHORIZED,
            Self::Query => StatusCode::BAD_REQUEST,
            Self::Full => StatusCode::SERVICE_UNAVAILABLE,
        };
        response
    }
}

impl Gate {
    pub(super) fn check(&self, request: &Request) -> Result<(), Refused> {
        let host = single(request, &HOST).ok().flatten().ok_or(Refused::Host)?;
        if !self.is_own_host(host) {
            return Err(Refused::Host);
        }
        if let Some(origin) = single(request, &ORIGIN).map_err(|Ambiguous| Refused::Origin)?
            && !self.is_allowed_origin(origin)
        {
            return Err(Refused::Origin);
        }
        match &self.token {
            Some(token) if !shown_token(request).is_some_and(|shown| token.fits(shown)) => {
                Err(Refused::Token)
            }
            _ => Ok(()),
        }
    }

    /// Whether a `Host` is this port. An address cannot be rebound, a name can; so the port does not
    /// matter, which differs where it is forwarded.
    fn is_own_host(&self, host: &str) -> bool {
        let name = without_port(host);
        if self.hosts.iter().any(|own| own.eq_ignore_ascii_case(name)) {
            return true;
        }
        match name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(ip) if self.bound.is_unspecified() => !ip.is_unspecified(),
            Ok(ip) => ip == self.bound || ip.is_loopback() && self.bound.is_loopback(),
            Err(_) => {
                let is_here = self.bound.is_loopback() || self.bound.is_unspecified();
                is_here && name.eq_ignore_ascii_case("localhost")
            }
        }
    }

    /// Pages without an origin need a token beside the permission: any page can make such a frame.
    fn is_allowed_origin(&self, origin: &str) -> bool {
        let is_listed = self.origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin));
        is_listed && (origin != NULL_ORIGIN || self.token.is_some())
    }
}

/// A header stands there twice, or is no text.
struct Ambiguous;

fn single<'a>(request: &'a Request, name: &HeaderName) -> Result<Option<&'a str>, Ambiguous> {
    let mut values = request.headers().get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| Ambiguous),
        (Some(_), Some(_)) => Err(Ambiguous),
    }
}

/// The name or address of a `Host`; addresses of IPv6 stand in brackets.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => name,
        _ => host,
    }
}

/// The token in `Authorization: Bearer …` or, as a browser's page cannot set that, in `?token=…`.
fn shown_token(request: &Request) -> Option<&str> {
    let bearer = single(request, &AUTHORIZATION).ok().flatten().and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token)
    });
    bearer.or_else(|| in_query(request, "token"))
}

/// What a program does about messages that come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving {
    /// It only sends: `?receive=no` in its URL.
    No,
    /// It has them when they are written to its connection.
    Yes,
    /// It says of each that it has it: `?receive=confirm`.
    Confirm,
}

impl Receiving {
    /// What the URL says.
    ///
    /// # Errors
    /// [`Refused::Query`] if it says something that is not known, or anything twice.
    pub(super) fn of(request: &Request) -> Result<Self, Refused> {
        let is_known = |name| ["receive", "token"].contains(&name);
        let names: Vec<_> = fields(request).map(|(name, _)| name).collect();
        let is_double = |(at, name)| names[..at].contains(name);
        if !names.iter().all(|name| is_known(name)) || names.iter().enumerate().any(is_double) {
            return Err(Refused::Query);
        }
        match in_query(request, "receive") {
            None => Ok(Self::Yes),
            Some("no") => Ok(Self::No),
            Some("confirm") => Ok(Self::Confirm),
            Some(_) => Err(Refused::Query),
        }
    }
}

/// Names and values in `?name=value&…`.
fn fields(request: &Request) -> impl Iterator<Item = (&str, &str)> {
    let query = request.uri().query().unwrap_or_default();
    let fields = query.split('&').filter(|field| !field.is_empty());
    fields.map(|field| field.split_once('=').unwrap_or((field, "")))
}

/// The first field of this name.
fn in_query<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    fields(request).find_map(|(of, value)| (of == name).then_some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "abcdefghijklmnop";

    fn gate(bound: &str) -> Gate {
        let bound = bound.parse().unwrap();
        Gate { bound, origins: Vec::new(), hosts: Vec::new(), token: None }
    }

    fn request(uri: &str, headers: &[(&str, &str)]) -> Request {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn check_host(gate: &Gate, host: &str) -> bool {
        gate.check(&request("/", &[("Host", host)])).is_ok()
    }

    #[test]
    fn the_host_must_be_this_machine() {
        let loopback = gate("127.0.0.1");
        for host in ["localhost:1977", "LOCALHOST", "127.0.0.1:1977", "127.0.0.1", "[::1]:1977"] {
            assert!(check_host(&loopback, host), "{host}");
        }
        for host in ["evil.example:1977", "localhost.evil.example", "10.0.0.1:1977", "", ":1977"] {
            assert!(!check_host(&loopback, host), "{host}");
        }
        let outward = gate("10.0.0.1");
        assert!(check_host(&outward, "10.0.0.1:1977"));
        assert!(!check_host(&outward, "10.0.0.2:1977") && !check_host(&outward, "localhost"));
        let everywhere = gate("::");
        assert!(check_host(&everywhere, "10.0.0.2:1977") && check_host(&everywhere, "localhost"));
        assert!(!check_host(&everywhere, "0.0.0.0") && !check_host(&everywhere, "box.example"));
        let named = Gate { hosts: vec!["box.example".into()], ..gate("::") };
        assert!(check_host(&named, "Box.example:80") && !check_host(&named, "x.box.example"));
    }

    #[test]
    fn there_must_be_one_host() {
        let gate = gate("127.0.0.1");
        assert_eq!(gate.check(&request("/", &[])), Err(Refused::Host));
        let two = request("/", &[("Host", "localhost"), ("Host", "localhost")]);
        assert_eq!(gate.check(&two), Err(Refused::Host));
    }

    #[test]
    fn pages_must_be_allowed_and_programs_need_not() {
        let mut gate = gate("127.0.0.1");
        let page = |origin| request("/", &[("Host", "localhost"), ("Origin", origin)]);
        for origin in ["http://localhost:8000", "http://localhost:1977", "null", ""] {
            assert_eq!(gate.check(&page(origin)), Err(Refused::Origin), "{origin}");
        }
        assert_eq!(gate.check(&request("/", &[("Host", "localhost")])), Ok(()));
        gate.origins = vec!["http://localhost:8000".into(), "null".into()];
        assert_eq!(gate.check(&page("http://localhost:8000")), Ok(()));
        assert_eq!(gate.check(&page("http://localhost:80")), Err(Refused::Origin));
        assert_eq!(gate.check(&page("null")), Err(Refused::Origin), "without a token");
        gate.token = Some(Token::new(TOKEN).unwrap());
        let headers = [("Host", "localhost"), ("Origin", "null")];
        assert_eq!(gate.check(&request(&format!("/?token={TOKEN}"), &headers)), Ok(()));
        let origin = ("Origin", "http://localhost:8000");
        let two = request("/", &[("Host", "localhost"), origin, origin]);
        assert_eq!(gate.check(&two), Err(Refused::Origin));
    }

    #[test]
    fn a_token_is_shown_in_the_query_or_a_header() {
        let gate = Gate { token: Some(Token::new(TOKEN).unwrap()), ..gate("127.0.0.1") };
        let check = |uri: &str, authorization: Option<&str>| {
            let mut headers = vec![("Host", "localhost")];
            headers.extend(authorization.map(|value| ("Authorization", value)));
            gate.check(&request(uri, &headers))
        };
        assert_eq!(check(&format!("/?token={TOKEN}"), None), Ok(()));
        assert_eq!(check(&format!("/?receive=no&token={TOKEN}"), None), Ok(()));
        assert_eq!(check("/", Some(&format!("Bearer {TOKEN}"))), Ok(()));
        assert_eq!(check("/", Some(&format!("bearer {TOKEN}"))), Ok(()));
        for uri in ["/", "/?token=", "/?token=abcdefghijklmnoq", "/?token=abcdefghijklmnopq"] {
            assert_eq!(check(uri, None), Err(Refused::Token), "{uri}");
        }
        assert_eq!(check("/", Some(&format!("Basic {TOKEN}"))), Err(Refused::Token));
        let long = "a".repeat(1000);
        assert_eq!(check(&format!("/?token={long}"), None), Err(Refused::Token));
    }

    #[test]
    fn tokens_have_a_form_and_show_nothing() {
        let longest = "~".repeat(*TOKEN_LENGTHS.end());
        assert!(Token::new(&longest).unwrap().fits(&longest));
        assert!(!Token::new(&longest).unwrap().fits(&format!("{longest}~")));
        for text in [
            "",
            "abcdefghijklmno",
            &format!("{longest}~"),
            "abcdefghijklmno&",
            "ä".repeat(9).as_str(),
        ] {
            assert_eq!(Token::new(text).unwrap_err(), TokenError, "{text}");
        }
        assert!(!format!("{:?}", Token::new(TOKEN).unwrap()).contains("abc"));
    }

    #[test]
    fn what_a_url_says_is_known_and_said_once() {
        let of = |uri: &str| Receiving::of(&request(uri, &[]));
        for uri in ["/", "/?", "/?token=a", "/any?&token=a&"] {
            assert_eq!(of(uri), Ok(Receiving::Yes), "{uri}");
        }
        assert_eq!(of("/?token=a&receive=no"), Ok(Receiving::No));
        assert_eq!(of("/?receive=confirm"), Ok(Receiving::Confirm));
        for query in [
            "receive=confirmed",
            "receive=",
            "receive",
            "receives=no",
            "Receive=no",
            "=",
            "token=a&x",
            "receive=no&receive=confirm",
            "receive=no&receive=no",
            "token=a&token=b",
        ] {
            assert_eq!(of(&format!("/?{query}")), Err(Refused::Query), "{query}");
        }
    }

    #[test]
    fn who_is_refused_is_told_why() {
        let response = Refused::Origin.response();
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert!(response.body().as_ref().unwrap().contains("Origin"));
        assert_eq!(Refused::Token.response().status(), StatusCode::UNAUTHORIZED);
        let response = Refused::Query.response();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert!(response.body().as_ref().unwrap().contains("?receive=no or ?receive=confirm"));
        assert_eq!(Refused::Full.response().status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
