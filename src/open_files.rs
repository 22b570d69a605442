//! How many files this process may have open; each connection is one.

use mixsocks_client::socks;
use tracing::warn;

/// What `up` needs for as many connections as its proxy takes: each has two of its own at most, and
/// one from the provider to its target. The rest is for links, listeners and files.
const NEEDED: u64 = 3 * socks::MAX_CONNECTIONS as u64 + 256;

/// Raises the limit as far as the system lets this process do it, and says so if that is not
/// enough. Systems allow few files at first, often 1,024, as old programs cannot take more.
pub(crate) fn raise_limit() {
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) => {
            if let Some(warning) = warning(limit) {
                warn!("{warning}");
            }
        }
        Err(error) => warn!("the limit of open files cannot be raised: {error}"),
    }
}

fn warning(limit: u64) -> Option<String> {
    (limit < NEEDED).then(|| {
        format!(
            "the system allows {limit} open files, too few for {} connections at once: raise the \
             hard limit to {NEEDED} (ulimit -Hn, or LimitNOFILE= of a systemd unit)",
            socks::MAX_CONNECTIONS
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_limit_is_raised_as_far_as_it_goes() {
        raise_limit();
        let (soft, hard) = rlimit::Resource::NOFILE.get().unwrap();
        // Some systems have another bound below the hard limit.
        assert!(soft == hard || soft >= NEEDED, "{soft} of {hard}");
    }

    #[test]
    fn a_limit_that_is_too_low_is_named_with_what_is_needed() {
        assert_eq!(warning(NEEDED), None);
        let warning = warning(NEEDED - 1).unwrap();
        assert!(warning.contains("12543") && warning.contains("12544"), "{warning}");
    }
}
