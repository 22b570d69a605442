//! The client's side of the handshake.

use std::sync::Arc;

use rand::CryptoRng;

use super::message::{ClientMessage, GatewayMessage, Invitation, Refusal, Resume, StreamId};
use super::token::Token;
use super::transcript::{Binding, BindingKind, NONCE_LEN, Transcript};
use crate::keys::{Identity, IdentityKey};
use crate::topology::NetworkName;

/// What a client brings to a handshake.
#[derive(Debug)]
pub struct ClientSetup {
    /// The network of its topology.
    pub network: NetworkName,
    /// The gateway as the topology knows it.
    pub gateway: Identity,
    /// The client's own key.
    pub key: Arc<IdentityKey>,
    /// The TLS session, as the client knows it.
    pub binding: Binding,
    /// The token of an earlier registration with this gateway; without one the client registers.
    pub token: Option<Token>,
    /// Shown when it registers.
    pub invitation: Option<Invitation>,
    /// Where the last connection was cut.
    pub resume: Option<Resume>,
}

/// The gateway broke the protocol: close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// A message that does not belong here.
    #[error("the gateway sent {got} where {expected} belongs")]
    OutOfOrder {
        /// What it sent.
        got: &'static str,
        /// What it should have sent.
        expected: &'static str,
    },
    /// The gateway says that it does not hold the TLS session that this client pinned to its key,
    /// or the other way round: somebody between them may want a weaker signature.
    #[error("the gateway states a connection of kind {stated:?}, but this one is {actual:?}")]
    WrongBinding {
        /// What the gateway states.
        stated: BindingKind,
        /// What the client knows.
        actual: BindingKind,
    },
}

/// A state that refused its input, unchanged.
#[derive(Debug)]
pub struct Rejected<S, E> {
    /// The state as it was before.
    pub state: S,
    /// What was wrong.
    pub error: E,
}

/// A handshake that waits for the gateway.
#[derive(Debug)]
pub enum ClientHandshake {
    /// HELLO was sent.
    AwaitChallenge(AwaitChallenge),
    /// REGISTER was sent.
    AwaitRegistered(AwaitRegistered),
    /// AUTHENTICATE was sent.
    AwaitWelcome(AwaitWelcome),
}

/// See [`ClientHandshake::AwaitChallenge`].
#[derive(Debug)]
pub struct AwaitChallenge {
    setup: ClientSetup,
    nonce: [u8; NONCE_LEN],
}

/// See [`ClientHandshake::AwaitRegistered`].
#[derive(Debug)]
pub struct AwaitRegistered {
    transcript: Transcript,
    resume: Option<Resume>,
}

/// See [`ClientHandshake::AwaitWelcome`].
#[derive(Debug)]
pub struct AwaitWelcome {
    resume: Option<Resume>,
}

/// What a message of the gateway leads to.
#[derive(Debug)]
pub enum ClientStep {
    /// Send this, and go on.
    Send {
        /// The next state.
        state: ClientHandshake,
        /// To be sent.
        message: ClientMessage,
    },
    /// Store the token, then send this, and go on. A token that was stored before is worth nothing
    /// any more.
    Store {
        /// The new token.
        token: Token,
        /// The next state.
        state: ClientHandshake,
        /// To be sent.
        message: ClientMessage,
    },
    /// The handshake is over: packets follow.
    Established(Welcome),
    /// The gateway lets the client no further and closes.
    Refused(Refusal),
    /// The gateway shuts down, or another connection of this identity came first.
    Ended(GatewayMessage),
}

/// How an established connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The stream of the packets that follow, for the next [`Resume`].
    pub stream: StreamId,
    /// Whether it is the one that the client wanted to resume. If it is not, both sides count from
    /// zero.
    pub resumed: bool,
    /// How many PACKET frames of this client the gateway received in the stream.
    pub received: u64,
}

type Step = Result<ClientStep, Box<Rejected<ClientHandshake, ClientError>>>;

impl ClientHandshake {
    /// Starts a handshake with a fresh nonce; the message is to be sent.
    pub fn start(setup: ClientSetup, rng: &mut impl CryptoRng) -> (Self, ClientMessage) {
        let mut nonce = [0u8; NONCE_LEN];
        rng.fill_bytes(&mut nonce);
        let network = setup.network.clone();
        let hello = ClientMessage::Hello { network, identity: setup.key.identity(), nonce };
        (Self::AwaitChallenge(AwaitChallenge { setup, nonce }), hello)
    }

    /// Takes a message of the gateway.
    ///
    /// # Errors
    /// [`Rejected`] when the gateway broke the protocol; the connection is to be closed.
    pub fn handle_message(self, message: GatewayMessage) -> Step {
        match (self, message) {
            (_, GatewayMessage::Refused(refusal)) => Ok(ClientStep::Refused(refusal)),
            (_, message @ (GatewayMessage::Evicted | GatewayMessage::Goodbye)) => {
                Ok(ClientStep::Ended(message))
            }
            (
                Self::AwaitChallenge(state),
                GatewayMessage::Challenge { nonce, mode: _, binding },
            ) => state.challenge(nonce, binding),
            (Self::AwaitRegistered(state), GatewayMessage::Registered { token }) => {
                Ok(state.registered(token))
            }
            (Self::AwaitWelcome(state), GatewayMessage::Welcome { stream, received }) => {
                Ok(state.welcome(stream, received))
            }
            (state, message) => {
                let error =
                    ClientError::OutOfOrder { got: message.name(), expected: state.expected() };
                Err(Box::new(Rejected { state, error }))
            }
        }
    }

    fn expected(&self) -> &'static str {
        match self {
            Self::AwaitChallenge(_) => "CHALLENGE",
            Self::AwaitRegistered(_) => "REGISTERED",
            Self::AwaitWelcome(_) => "WELCOME",
        }
    }
}

impl AwaitChallenge {
    fn challenge(self, gateway_nonce: [u8; NONCE_LEN], stated: BindingKind) -> Step {
        let actual = self.setup.binding.kind();
        if stated != actual {
            let error = ClientError::WrongBinding { stated, actual };
            let state = ClientHandshake::AwaitChallenge(self);
            return Err(Box::new(Rejected { state, error }));
        }
        let Self { setup, nonce: client_nonce } = self;
        let transcript = Transcript {
            gateway: setup.gateway,
            client: setup.key.identity(),
            client_nonce,
            gateway_nonce,
            binding: setup.binding,
        };
        Ok(match setup.token {
            Some(token) => {
                let (state, message) = authenticate(&token, &transcript, setup.resume);
                ClientStep::Send { state, message }
            }
            None => {
                let message = ClientMessage::Register {
                    binding: actual,
                    signature: setup.key.sign(&transcript.registration()),
                    invitation: setup.invitation,
                };
                let resume = setup.resume;
                let state = AwaitRegistered { transcript, resume };
                ClientStep::Send { state: ClientHandshake::AwaitRegistered(state), message }
            }
        })
    }
}

impl AwaitRegistered {
    fn registered(self, token: Token) -> ClientStep {
        let (state, message) = authenticate(&token, &self.transcript, self.resume);
        ClientStep::Store { token, state, message }
    }
}

impl AwaitWelcome {
    fn welcome(self, stream: StreamId, received: u64) -> ClientStep {
        let resumed = self.resume.is_some_and(|resume| resume.stream == stream);
        ClientStep::Established(Welcome { stream, resumed, received })
    }
}

fn authenticate(
    token: &Token,
    transcript: &Transcript,
    resume: Option<Resume>,
) -> (ClientHandshake, ClientMessage) {
    let message = ClientMessage::Authenticate { token: token.mask(transcript), resume };
    (ClientHandshake::AwaitWelcome(AwaitWelcome { resume }), message)
}
