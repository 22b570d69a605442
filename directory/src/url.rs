//! Where an authority or a mirror is.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;

/// An `http://` address, with a path if the documents lie below one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url(Uri);

/// Why a text is no address of a directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// It has another form.
    #[error("expected an address such as http://203.0.113.5:9000")]
    Form,
    /// Documents are signed, so nothing needs TLS.
    #[error("https is not spoken here: documents are signed, so give the http:// address")]
    Https,
}

impl Url {
    /// The address of something below it; `path` begins with a slash.
    pub(crate) fn join(&self, path: &str) -> Uri {
        let base = self.to_string();
        format!("{base}{path}").parse().expect("a checked address and a constant path")
    }
}

impl FromStr for Url {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<Self, BadUrl> {
        let uri: Uri = text.parse().map_err(|_| BadUrl::Form)?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(BadUrl::Https),
            _ => return Err(BadUrl::Form),
        }
        let is_plain = uri.query().is_none()
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && uri.host().is_some_and(|host| !host.is_empty());
        if is_plain { Ok(Self(uri)) } else { Err(BadUrl::Form) }
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_joined_without_double_slashes() {
        for (base, joined) in [
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000/topology"),
            ("http://127.0.0.1:9000/", "http://127.0.0.1:9000/topology"),
            ("http://example.org/mixnet/", "http://example.org/mixnet/topology"),
            ("http://[::1]:9000", "http://[::1]:9000/topology"),
        ] {
            assert_eq!(base.parse::<Url>().unwrap().join("/topology").to_string(), joined);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for wrong in ["", "x", "127.0.0.1:9000", "ftp://a", "http://", "http://u@h/", "http://h/?q"]
        {
            assert_eq!(wrong.parse::<Url>(), Err(BadUrl::Form), "{wrong}");
        }
        assert_eq!("https://example.org".parse::<Url>(), Err(BadUrl::Https));
    }
}
