//! Which code does the work: chosen when the program starts, by what the CPU can do.
//!
//! Vector code is used only after it has given the right results on this machine: see
//! [`Backend::faulty`].

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use thiserror::Error;

use crate::self_check;

/// Code for packets; all of it gives the same results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The crate `sphinx-packet` does everything, one packet after the other. Its packets have
    /// padding from the thread's generator, so a seed does not decide them.
    Reference,
    /// Points are multiplied and payloads hashed one at a time. On every machine.
    Portable,
    /// Four points and payloads at once.
    Avx2,
    /// Eight points and payloads at once, with AVX-512F and AVX-512 IFMA.
    Avx512,
}

/// Why a backend cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BackendError {
    /// There is no backend of this name.
    #[error("there is no backend {name:?}; this machine has {}", names())]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The CPU lacks the instructions, or computes wrongly with them.
    #[error("this machine cannot run the backend {backend}; it has {}", names())]
    Unavailable {
        /// What was asked for.
        backend: Backend,
    },
}

impl Backend {
    /// The environment variable that forces a backend.
    pub const VARIABLE: &str = "MIXSOCKS_SPHINX_BACKEND";

    const ALL: [Self; 4] = [Self::Reference, Self::Portable, Self::Avx2, Self::Avx512];

    /// The backends that this machine has and that compute rightly on it, the fastest one last.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::passing(Self::is_right)
    }

    /// The backends of this CPU that pass a check.
    fn passing(check: impl Fn(Self) -> bool) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |backend| backend.has_instructions() && check(*backend))
    }

    /// Backends whose instructions the CPU has, but whose results are wrong: a fault of the CPU, of a
    /// virtual machine or of the compiler. They count as not available; programs should warn of
    /// them. Each backend is checked once, which takes some milliseconds.
    pub fn faulty() -> impl Iterator<Item = Self> {
        Self::passing(|backend| !backend.is_right())
    }

    /// The backend that `MIXSOCKS_SPHINX_BACKEND` names (`reference`, `portable`, `avx2` or
    /// `avx512`); without the variable, the fastest one.
    ///
    /// # Errors
    ///
    /// When there is no such backend, or not on this machine.
    pub fn from_environment() -> Result<Self, BackendError> {
        match std::env::var_os(Self::VARIABLE) {
            Some(name) => name.to_string_lossy().parse(),
            None => Ok(Self::available().last().expect("two backends are everywhere")),
        }
    }

    /// The backend that works for this thread: that of [`Backend::scope`], else the one of
    /// [`Backend::from_environment`], which is asked once.
    ///
    /// # Panics
    ///
    /// When the environment asks for what there is not: programs find out with
    /// [`Backend::from_environment`] before.
    #[must_use]
    pub fn current() -> Self {
        static CHOSEN: OnceLock<Backend> = OnceLock::new();
        SCOPE.get().unwrap_or_else(|| {
            *CHOSEN.get_or_init(|| {
                Self::from_environment()
                    .unwrap_or_else(|error| panic!("{}: {error}", Self::VARIABLE))
            })
        })
    }

    /// Runs `work` with this backend on this thread, for comparisons.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] when the machine lacks it; then `work` is not run.
    pub fn scope<T>(self, work: impl FnOnce() -> T) -> Result<T, BackendError> {
        if !self.is_available() {
            return Err(BackendError::Unavailable { backend: self });
        }
        Ok(self.run(work))
    }

    /// As [`Backend::scope`], for a backend whose instructions the CPU has.
    pub(crate) fn run<T>(self, work: impl FnOnce() -> T) -> T {
        struct Restore(Option<Backend>);
        impl Drop for Restore {
            fn drop(&mut self) {
                SCOPE.set(self.0);
            }
        }

        let _restore = Restore(SCOPE.replace(Some(self)));
        work()
    }

    fn is_available(self) -> bool {
        self.has_instructions() && self.is_right()
    }

    fn has_instructions(self) -> bool {
        match self {
            Self::Reference | Self::Portable => true,
            Self::Avx2 => crate::x25519::has_avx2(),
            Self::Avx512 => crate::x25519::has_avx512(),
        }
    }

    /// Whether it has passed its self-check; its instructions must be there.
    fn is_right(self) -> bool {
        static AVX2: OnceLock<bool> = OnceLock::new();
        static AVX512: OnceLock<bool> = OnceLock::new();
        match self {
            Self::Reference | Self::Portable => true,
            Self::Avx2 => *AVX2.get_or_init(|| self_check::passes(self)),
            Self::Avx512 => *AVX512.get_or_init(|| self_check::passes(self)),
        }
    }
}

thread_local! {
    static SCOPE: Cell<Option<Backend>> = const { Cell::new(None) };
}

/// The names of the backends that this machine has.
fn names() -> String {
    Backend::available().map(|backend| backend.to_string()).collect::<Vec<_>>().join(", ")
}

/// The name as in the environment variable.
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reference => "reference",
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

/// Takes the name of a backend that this machine has.
impl FromStr for Backend {
    type Err = BackendError;

    fn from_str(name: &str) -> Result<Self, BackendError> {
        let backend = Self::ALL
            .into_iter()
            .find(|backend| backend.to_string() == name)
            .ok_or_else(|| BackendError::Unknown { name: name.to_owned() })?;
        if !backend.is_available() {
            return Err(BackendError::Unavailable { backend });
        }
        Ok(backend)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for backend in Backend::ALL {
            match backend.to_string().parse::<Backend>() {
                Ok(read) => assert_eq!(read, backend),
                Err(error) => assert_eq!(error, BackendError::Unavailable { backend }),
            }
        }
    }

    #[test]
    fn errors_name_what_there_is() {
        let error = "avx1024".parse::<Backend>().unwrap_err().to_string();
        assert!(error.contains("\"avx1024\"; this machine has reference, portable"), "{error}");
        let error = BackendError::Unavailable { backend: Backend::Avx512 }.to_string();
        assert!(error.contains("backend avx512; it has reference, portable"), "{error}");
    }

    #[test]
    fn a_scope_ends_also_when_its_work_panics() {
        let before = Backend::current();
        let inner = Backend::Reference.scope(|| {
            Backend::Portable.scope(Backend::current).unwrap();
            Backend::current()
        });
        assert_eq!(inner, Ok(Backend::Reference));
        let panicked = std::panic::catch_unwind(|| Backend::Reference.scope(|| panic!("work")));
        assert!(panicked.is_err());
        assert_eq!(Backend::current(), before);
    }

    /// A machine all of whose vector code is wrong.
    #[test]
    fn what_fails_its_check_is_not_chosen() {
        let portable = Backend::passing(|backend| backend == Backend::Portable).last();
        assert_eq!(portable, Some(Backend::Portable));
        let is_vector = |backend| matches!(backend, Backend::Avx2 | Backend::Avx512);
        assert_eq!(Backend::passing(|backend| !is_vector(backend)).last(), portable);
    }

    #[test]
    fn a_machine_has_two_backends_at_least() {
        let available: Vec<_> = Backend::available().collect();
        assert_eq!(available[..2], [Backend::Reference, Backend::Portable]);
        assert_eq!(Backend::Avx512.scope(|| ()).is_ok(), available.contains(&Backend::Avx512));
    }
}
