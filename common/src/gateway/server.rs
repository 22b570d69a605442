//! The gateway's side of the handshake.
//!
//! The core checks signatures and tokens; whether an identity may register, what is stored for it
//! and how often anybody may try is asked from the shell between two states.

use rand::CryptoRng;

use super::client::Rejected;
use super::message::{
    ClientMessage, GatewayMessage, Invitation, Refusal, RegistrationMode, Resume,
};
use super::token::{MaskedToken, Token, TokenHash};
use super::transcript::{Binding, NONCE_LEN, Transcript};
use crate::keys::{Identity, Signature};
use crate::topology::NetworkName;

/// What a gateway brings to a handshake.
#[derive(Clone, Debug)]
pub struct GatewaySetup {
    /// Its network.
    pub network: NetworkName,
    /// Its own identity.
    pub gateway: Identity,
    /// The TLS session, as the gateway knows it.
    pub binding: Binding,
    /// Who may register.
    pub mode: RegistrationMode,
}

/// The client broke the protocol: close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client sent {got} where {expected} belongs")]
pub struct OutOfOrder {
    /// What it sent.
    pub got: &'static str,
    /// What it should have sent.
    pub expected: &'static str,
}

/// A handshake that waits for the client.
#[derive(Debug)]
pub enum GatewayHandshake {
    /// Nothing was heard yet.
    AwaitHello(AwaitHello),
    /// CHALLENGE was sent: the client may register or authenticate.
    AwaitLogin(AwaitLogin),
    /// REGISTERED was sent: the client must authenticate.
    AwaitAuthenticate(AwaitAuthenticate),
}

/// See [`GatewayHandshake::AwaitHello`].
#[derive(Debug)]
pub struct AwaitHello {
    setup: GatewaySetup,
}

/// See [`GatewayHandshake::AwaitLogin`].
#[derive(Debug)]
pub struct AwaitLogin {
    transcript: Transcript,
}

/// See [`GatewayHandshake::AwaitAuthenticate`].
#[derive(Debug)]
pub struct AwaitAuthenticate {
    transcript: Transcript,
}

/// What a message of the client leads to.
#[derive(Debug)]
pub enum GatewayStep {
    /// Send this, and go on.
    Send {
        /// The next state.
        state: GatewayHandshake,
        /// To be sent.
        message: GatewayMessage,
    },
    /// A rightly signed registration: decide.
    Register(Registering),
    /// A login: look up what is stored for the identity.
    Authenticate(Authenticating),
    /// Send the refusal and close.
    Refuse(Refusal),
    /// The client closed.
    Ended,
}

/// A registration whose signature is right.
#[derive(Debug)]
pub struct Registering {
    transcript: Transcript,
    invitation: Option<Invitation>,
}

/// A token that must be stored before anybody else sees it.
#[derive(Debug)]
pub struct Issued {
    transcript: Transcript,
    token: Token,
}

/// A login whose token is not checked yet.
#[derive(Debug)]
pub struct Authenticating {
    transcript: Transcript,
    token: MaskedToken,
    resume: Option<Resume>,
}

/// A client that showed its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Login {
    /// Who it is.
    pub identity: Identity,
    /// Where it wants to go on.
    pub resume: Option<Resume>,
}

type Step = Result<GatewayStep, Box<Rejected<GatewayHandshake, OutOfOrder>>>;

impl GatewayHandshake {
    /// A connection on which nothing was heard yet.
    pub fn new(setup: GatewaySetup) -> Self {
        Self::AwaitHello(AwaitHello { setup })
    }

    /// Takes a message of the client.
    ///
    /// # Errors
    /// [`Rejected`] when the message is out of order; the connection is to be closed.
    pub fn handle_message(self, message: ClientMessage, rng: &mut impl CryptoRng) -> Step {
        match (self, message) {
            (Self::AwaitHello(_), ClientMessage::OtherVersion(client)) => {
                let gateway = super::VERSION;
                Ok(GatewayStep::Refuse(Refusal::WrongVersion { client, gateway }))
            }
            (Self::AwaitHello(state), ClientMessage::Hello { network, identity, nonce }) => {
                Ok(state.hello(&network, identity, nonce, rng))
            }
            (
                Self::AwaitLogin(AwaitLogin { transcript }),
                ClientMessage::Register { binding, signature, invitation },
            ) => {
                if binding != transcript.binding.kind() {
                    return Ok(GatewayStep::Refuse(Refusal::WrongBinding));
                }
                Ok(register(transcript, &signature, invitation))
            }
            (
                Self::AwaitLogin(AwaitLogin { transcript })
                | Self::AwaitAuthenticate(AwaitAuthenticate { transcript }),
                ClientMessage::Authenticate { token, resume },
            ) => Ok(GatewayStep::Authenticate(Authenticating { transcript, token, resume })),
            (_, ClientMessage::Goodbye) => Ok(GatewayStep::Ended),
            (state, message) => {
                let error = OutOfOrder { got: message.name(), expected: state.expected() };
                Err(Box::new(Rejected { state, error }))
            }
        }
    }

    fn expected(&self) -> &'static str {
        match self {
            Self::AwaitHello(_) => "HELLO",
            Self::AwaitLogin(_) => "REGISTER or AUTHENTICATE",
            Self::AwaitAuthenticate(_) => "AUTHENTICATE",
        }
    }
}

impl AwaitHello {
    fn hello(
        self,
        network: &NetworkName,
        client: Identity,
        client_nonce: [u8; NONCE_LEN],
        rng: &mut impl CryptoRng,
    ) -> GatewayStep {
        let GatewaySetup { network: own_network, gateway, binding, mode } = self.setup;
        if *network != own_network {
            return GatewayStep::Refuse(Refusal::WrongNetwork);
        }
        let mut gateway_nonce = [0u8; NONCE_LEN];
        rng.fill_bytes(&mut gateway_nonce);
        let message =
            GatewayMessage::Challenge { nonce: gateway_nonce, mode, binding: binding.kind() };
        let transcript = Transcript { gateway, client, client_nonce, gateway_nonce, binding };
        GatewayStep::Send {
            state: GatewayHandshake::AwaitLogin(AwaitLogin { transcript }),
            message,
        }
    }
}

fn register(
    transcript: Transcript,
    signature: &Signature,
    invitation: Option<Invitation>,
) -> GatewayStep {
    match transcript.client.verify(&transcript.registration(), signature) {
        Ok(()) => GatewayStep::Register(Registering { transcript, invitation }),
        Err(_) => GatewayStep::Refuse(Refusal::BadSignature),
    }
}

impl Registering {
    /// Who wants to register.
    pub fn identity(&self) -> Identity {
        self.transcript.client
    }

    /// What it was handed by the operator.
    pub fn invitation(&self) -> Option<&Invitation> {
        self.invitation.as_ref()
    }

    /// Draws the token.
    pub fn issue(self, rng: &mut impl CryptoRng) -> Issued {
        Issued { transcript: self.transcript, token: Token::generate(rng) }
    }
}

impl Issued {
    /// Whose token it is.
    pub fn identity(&self) -> Identity {
        self.transcript.client
    }

    /// What is to be stored, in place of what was stored for the identity before.
    pub fn hash(&self) -> TokenHash {
        self.token.hash()
    }

    /// Hands the token out, once its hash is stored durably.
    pub fn stored(self) -> (GatewayHandshake, GatewayMessage) {
        let state = AwaitAuthenticate { transcript: self.transcript };
        let message = GatewayMessage::Registered { token: self.token };
        (GatewayHandshake::AwaitAuthenticate(state), message)
    }
}

impl Authenticating {
    /// Who wants to log in.
    pub fn identity(&self) -> Identity {
        self.transcript.client
    }

    /// Compares the token with what is stored for the identity, in constant time.
    ///
    /// # Errors
    /// [`Refusal::UnknownToken`], also when nothing is stored.
    pub fn check(self, stored: Option<&TokenHash>) -> Result<Login, Refusal> {
        match stored {
            Some(hash) if hash.matches(&self.token, &self.transcript) => {
                Ok(Login { identity: self.transcript.client, resume: self.resume })
            }
            _ => Err(Refusal::UnknownToken),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::client::{ClientError, ClientHandshake, ClientSetup, ClientStep, Welcome};
    use super::super::message::StreamId;
    use super::super::transcript::BindingKind;
    use super::*;
    use crate::keys::IdentityKey;

    /// A client and a gateway before their first message.
    struct Pair {
        client: Arc<IdentityKey>,
        gateway: Identity,
        client_binding: Binding,
        gateway_binding: Binding,
        stored: Option<TokenHash>,
    }

    impl Pair {
        fn new() -> Self {
            let mut rng = rand::rng();
            Self {
                client: Arc::new(IdentityKey::generate(&mut rng)),
                gateway: IdentityKey::generate(&mut rng).identity(),
                client_binding: Binding::Session([7; 32]),
                gateway_binding: Binding::Session([7; 32]),
                stored: None,
            }
        }

        fn client(&self, token: Option<Token>, resume: Option<Resume>) -> ClientSetup {
            ClientSetup {
                network: NetworkName::new("test").unwrap(),
                gateway: self.gateway,
                key: self.client.clone(),
                binding: self.client_binding.clone(),
                token,
                invitation: None,
                resume,
            }
        }

        fn gateway(&self) -> GatewayHandshake {
            GatewayHandshake::new(GatewaySetup {
                network: NetworkName::new("test").unwrap(),
                gateway: self.gateway,
                binding: self.gateway_binding.clone(),
                mode: RegistrationMode::Open,
            })
        }

        /// Both sides after HELLO and CHALLENGE, and what the client answers.
        fn challenged(&self, token: Option<Token>) -> (ClientStep, GatewayHandshake) {
            let (client, hello) =
                ClientHandshake::start(self.client(token, None), &mut rand::rng());
            let (gateway, challenge) = sent(handle(self.gateway(), hello));
            (client.handle_message(challenge).unwrap(), gateway)
        }

        /// Registers; the token, and what the client sends with it.
        fn register(&mut self) -> (Token, ClientMessage, GatewayHandshake) {
            let (step, gateway) = self.challenged(None);
            let (client, register) = client_sent(step);
            let GatewayStep::Register(registering) = handle(gateway, register) else {
                panic!("no registration");
            };
            assert_eq!(registering.identity(), self.client.identity());
            let issued = registering.issue(&mut rand::rng());
            self.stored = Some(issued.hash());
            let (gateway, registered) = issued.stored();
            match client.handle_message(registered).unwrap() {
                ClientStep::Store { token, message, .. } => (token, message, gateway),
                step => panic!("{step:?}"),
            }
        }
    }

    fn handle(gateway: GatewayHandshake, message: ClientMessage) -> GatewayStep {
        gateway.handle_message(message, &mut rand::rng()).unwrap()
    }

    fn sent(step: GatewayStep) -> (GatewayHandshake, GatewayMessage) {
        match step {
            GatewayStep::Send { state, message } => (state, message),
            step => panic!("{step:?}"),
        }
    }

    fn client_sent(step: ClientStep) -> (ClientHandshake, ClientMessage) {
        match step {
            ClientStep::Send { state, message } => (state, message),
            step => panic!("{step:?}"),
        }
    }

    fn login(step: GatewayStep, stored: Option<&TokenHash>) -> Result<Login, Refusal> {
        match step {
            GatewayStep::Authenticate(authenticating) => authenticating.check(stored),
            step => panic!("{step:?}"),
        }
    }

    fn refusal(step: GatewayStep) -> Refusal {
        match step {
            GatewayStep::Refuse(refusal) => refusal,
            step => panic!("{step:?}"),
        }
    }

    #[test]
    fn registers_and_logs_in() {
        let mut pair = Pair::new();
        let (token, authenticate, gateway) = pair.register();
        let login_of = Login { identity: pair.client.identity(), resume: None };
        assert_eq!(login(handle(gateway, authenticate), pair.stored.as_ref()), Ok(login_of));
        // Again, with the token that it has now.
        let (step, gateway) = pair.challenged(Some(token));
        let (client, authenticate) = client_sent(step);
        assert_eq!(login(handle(gateway, authenticate), pair.stored.as_ref()), Ok(login_of));
        let stream = StreamId::new(5).unwrap();
        let step = client.handle_message(GatewayMessage::Welcome { stream, received: 0 }).unwrap();
        let welcome = Welcome { stream, resumed: false, received: 0 };
        assert!(matches!(step, ClientStep::Established(w) if w == welcome));
    }

    #[test]
    fn resumes_the_stream_it_names() {
        let pair = Pair::new();
        let stream = StreamId::new(5).unwrap();
        let resume = Resume { stream, received: 9 };
        let token = Token::generate(&mut rand::rng());
        for (answer, resumed) in [(5, true), (6, false)] {
            let setup = pair.client(Some(token.clone()), Some(resume));
            let (client, hello) = ClientHandshake::start(setup, &mut rand::rng());
            let (gateway, challenge) = sent(handle(pair.gateway(), hello));
            let (client, authenticate) = client_sent(client.handle_message(challenge).unwrap());
            let step = handle(gateway, authenticate);
            assert_eq!(login(step, Some(&token.hash())).unwrap().resume, Some(resume));
            let stream = StreamId::new(answer).unwrap();
            let welcome = GatewayMessage::Welcome { stream, received: 3 };
            match client.handle_message(welcome).unwrap() {
                ClientStep::Established(welcome) => {
                    assert_eq!(welcome, Welcome { stream, resumed, received: 3 });
                }
                step => panic!("{step:?}"),
            }
        }
    }

    #[test]
    fn a_second_registration_ends_the_first_token() {
        let mut pair = Pair::new();
        let (first, ..) = pair.register();
        let (second, ..) = pair.register();
        for (token, expected) in [(first, Err(Refusal::UnknownToken)), (second, Ok(()))] {
            let (step, gateway) = pair.challenged(Some(token));
            let result = login(handle(gateway, client_sent(step).1), pair.stored.as_ref());
            assert_eq!(result.map(|_| ()), expected);
        }
    }

    #[test]
    fn unknown_tokens_are_refused() {
        let mut pair = Pair::new();
        pair.register();
        let guess = || Some(Token::generate(&mut rand::rng()));
        for stored in [None, pair.stored] {
            let (step, gateway) = pair.challenged(guess());
            let result = login(handle(gateway, client_sent(step).1), stored.as_ref());
            assert_eq!(result, Err(Refusal::UnknownToken));
        }
    }

    #[test]
    fn recordings_are_worth_nothing_on_another_connection() {
        let mut pair = Pair::new();
        let (token, ..) = pair.register();
        let (step, _) = pair.challenged(None);
        let register = client_sent(step).1;
        let (step, _) = pair.challenged(Some(token));
        let authenticate = client_sent(step).1;
        // The recorder repeats the HELLO too; the gateway's nonce is another one.
        let (_, gateway) = pair.challenged(None);
        assert_eq!(refusal(handle(gateway, register)), Refusal::BadSignature);
        let (_, gateway) = pair.challenged(None);
        let result = login(handle(gateway, authenticate), pair.stored.as_ref());
        assert_eq!(result, Err(Refusal::UnknownToken));
    }

    #[test]
    fn a_gateway_cannot_relay_a_registration_to_another() {
        // The client dials the evil gateway, which passes everything on to the honest one, whose
        // challenge it hands to the client. Behind fronts no exporter tells the sessions apart.
        for binding in [Binding::Session([7; 32]), Binding::Front] {
            let mut pair = Pair::new();
            pair.client_binding = binding.clone();
            pair.gateway_binding = binding;
            let evil = IdentityKey::generate(&mut rand::rng()).identity();
            let setup = ClientSetup { gateway: evil, ..pair.client(None, None) };
            let (client, hello) = ClientHandshake::start(setup, &mut rand::rng());
            let (honest, challenge) = sent(handle(pair.gateway(), hello));
            let (_, register) = client_sent(client.handle_message(challenge).unwrap());
            assert_eq!(refusal(handle(honest, register)), Refusal::BadSignature);
        }
    }

    #[test]
    fn a_registration_belongs_to_its_tls_session() {
        let mut pair = Pair::new();
        pair.gateway_binding = Binding::Session([8; 32]);
        let (step, gateway) = pair.challenged(None);
        assert_eq!(refusal(handle(gateway, client_sent(step).1)), Refusal::BadSignature);
    }

    #[test]
    fn neither_side_is_talked_out_of_its_binding() {
        for (client_binding, gateway_binding) in [
            (Binding::Session([7; 32]), Binding::Front),
            (Binding::Front, Binding::Session([7; 32])),
        ] {
            let pair = Pair { client_binding, gateway_binding, ..Pair::new() };
            let (client, hello) = ClientHandshake::start(pair.client(None, None), &mut rand::rng());
            let (gateway, challenge) = sent(handle(pair.gateway(), hello));
            let rejected = client.handle_message(challenge.clone()).unwrap_err();
            let (stated, actual) = (pair.gateway_binding.kind(), pair.client_binding.kind());
            assert_eq!(rejected.error, ClientError::WrongBinding { stated, actual });
            // Somebody between them changes what the gateway states.
            let GatewayMessage::Challenge { nonce, mode, .. } = challenge else { panic!() };
            let changed = GatewayMessage::Challenge { nonce, mode, binding: actual };
            let step = rejected.state.handle_message(changed).unwrap();
            let (_, register) = client_sent(step);
            let ClientMessage::Register { signature, invitation, .. } = register.clone() else {
                panic!()
            };
            assert_eq!(refusal(handle(gateway, register)), Refusal::WrongBinding);
            // And what the client states: the signature covers it.
            let (_, gateway) = sent_again(&pair);
            let register = ClientMessage::Register { binding: stated, signature, invitation };
            assert_eq!(refusal(handle(gateway, register)), Refusal::BadSignature);
        }
    }

    fn sent_again(pair: &Pair) -> (GatewayMessage, GatewayHandshake) {
        let (_, hello) = ClientHandshake::start(pair.client(None, None), &mut rand::rng());
        let (gateway, challenge) = sent(handle(pair.gateway(), hello));
        (challenge, gateway)
    }

    #[test]
    fn another_identity_cannot_sign() {
        let pair = Pair::new();
        let (step, _) = pair.challenged(None);
        let register = client_sent(step).1;
        let other = Pair { client: Pair::new().client, ..Pair::new() };
        let (_, gateway) = sent_again(&other);
        assert_eq!(refusal(handle(gateway, register)), Refusal::BadSignature);
    }

    #[test]
    fn other_versions_and_networks_are_refused() {
        let pair = Pair::new();
        let step = handle(pair.gateway(), ClientMessage::OtherVersion(9));
        assert_eq!(refusal(step), Refusal::WrongVersion { client: 9, gateway: 1 });
        let setup =
            ClientSetup { network: NetworkName::new("other").unwrap(), ..pair.client(None, None) };
        let (client, hello) = ClientHandshake::start(setup, &mut rand::rng());
        let refused = refusal(handle(pair.gateway(), hello));
        assert_eq!(refused, Refusal::WrongNetwork);
        let step = client.handle_message(GatewayMessage::Refused(refused)).unwrap();
        assert!(matches!(step, ClientStep::Refused(Refusal::WrongNetwork)));
    }

    #[test]
    fn whatever_is_out_of_order_is_rejected_and_changes_nothing() {
        let pair = Pair::new();
        let token = Token::generate(&mut rand::rng());
        let setup = || pair.client(None, None);
        let (_, hello) = ClientHandshake::start(setup(), &mut rand::rng());
        let register = ClientMessage::Register {
            binding: BindingKind::Session,
            signature: pair.client.sign(b""),
            invitation: None,
        };
        let authenticate = ClientMessage::Authenticate {
            token: token.mask(&super::super::transcript::tests::transcript()),
            resume: None,
        };
        let reject = |state: GatewayHandshake, message: &ClientMessage| {
            let before = format!("{state:?}");
            let rejected = state.handle_message(message.clone(), &mut rand::rng()).unwrap_err();
            assert_eq!(rejected.error.got, message.name());
            assert_eq!(format!("{:?}", rejected.state), before);
            rejected.state
        };
        let state = reject(pair.gateway(), &register);
        let state = reject(state, &authenticate);
        let (state, _) = sent(handle(state, hello.clone()));
        let state = reject(state, &hello);
        reject(state, &ClientMessage::OtherVersion(2));
        let (_, _, state) = Pair::new().register();
        let state = reject(state, &register);
        reject(state, &hello);

        let challenge = sent_again(&pair).0;
        let registered = GatewayMessage::Registered { token: token.clone() };
        let welcome = GatewayMessage::Welcome { stream: StreamId::new(1).unwrap(), received: 0 };
        let reject = |state: ClientHandshake, message: &GatewayMessage| {
            let before = format!("{state:?}");
            let rejected = state.handle_message(message.clone()).unwrap_err();
            assert!(matches!(rejected.error, ClientError::OutOfOrder { .. }));
            assert_eq!(format!("{:?}", rejected.state), before);
            rejected.state
        };
        let (state, _) = ClientHandshake::start(setup(), &mut rand::rng());
        let state = reject(state, &registered);
        let state = reject(state, &welcome);
        let (state, _) = client_sent(state.handle_message(challenge.clone()).unwrap());
        let state = reject(state, &challenge);
        let state = reject(state, &welcome);
        let ClientStep::Store { state, .. } = state.handle_message(registered.clone()).unwrap()
        else {
            panic!("no token");
        };
        let state = reject(state, &challenge);
        reject(state, &registered);
    }

    #[test]
    fn both_sides_may_end_at_any_time() {
        let pair = Pair::new();
        for message in [GatewayMessage::Goodbye, GatewayMessage::Evicted] {
            let (client, _) = ClientHandshake::start(pair.client(None, None), &mut rand::rng());
            let step = client.handle_message(message).unwrap();
            assert!(matches!(step, ClientStep::Ended(_)));
        }
        assert!(matches!(handle(pair.gateway(), ClientMessage::Goodbye), GatewayStep::Ended));
    }

    #[test]
    fn states_show_no_secret() {
        let mut pair = Pair::new();
        let (token, ..) = pair.register();
        let (client, _) =
            ClientHandshake::start(pair.client(Some(token.clone()), None), &mut rand::rng());
        let shown = format!("{client:?}");
        assert!(shown.contains("Token(secret)") && shown.contains("Binding::Session"), "{shown}");
        assert!(!shown.contains(&format!("{:?}", token.as_bytes())));
    }
}
