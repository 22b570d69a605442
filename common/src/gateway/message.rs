//! The messages of the handshake and those about deliveries, and what they look like in the body of
//! a CONTROL frame.
//!
//! The first byte is the kind; numbers are big-endian; a decoder refuses every body that is not
//! exactly as long as its layout says. Only the length of a box is not its business: it is one and
//! the same on a network.

use zeroize::{Zeroize, Zeroizing};

use super::token::{MaskedToken, TOKEN_LEN, Token};
use super::transcript::{BindingKind, NONCE_LEN};
use crate::keys::{Identity, KEY_LEN, SIGNATURE_LEN, Signature};
use crate::topology::NetworkName;

/// Longest invitation in bytes.
pub const MAX_INVITATION_BYTES: usize = 512;

/// Bytes of a control message for which the shortest packets of any network (1,372 bytes) have room.
const SMALLEST_CONTROL_BYTES: usize = 1372 - 2;

/// Most numbers in a CONFIRM: 171, what fits on every network.
pub const MAX_CONFIRMED: usize = (SMALLEST_CONTROL_BYTES - CONFIRM_HEAD_LEN) / 8;

/// Longest message in bytes that has no box: a CONFIRM with as many numbers as may be.
pub const MAX_MESSAGE_BYTES: usize = CONFIRM_HEAD_LEN + 8 * MAX_CONFIRMED;

/// Bytes of a DELIVERY before its box. Boxes are at least 396 bytes shorter than packets, so that
/// each fits into a frame of its network.
pub const DELIVERY_HEAD_LEN: usize = 1 + 8;

const HELLO: u8 = 1;
const CHALLENGE: u8 = 2;
const REGISTER: u8 = 3;
const REGISTERED: u8 = 4;
const AUTHENTICATE: u8 = 5;
const WELCOME: u8 = 6;
const REFUSED: u8 = 7;
const EVICTED: u8 = 8;
const GOODBYE: u8 = 9;
const RECEIVE: u8 = 10;
const DELIVERY: u8 = 11;
const CONFIRM: u8 = 12;
const CAUGHT_UP: u8 = 13;

const REGISTER_LEN: usize = 1 + 1 + SIGNATURE_LEN + 2;
const CONFIRM_HEAD_LEN: usize = 1 + 1;
const _: () = assert!(MAX_MESSAGE_BYTES <= SMALLEST_CONTROL_BYTES);
const _: () = assert!(REGISTER_LEN + MAX_INVITATION_BYTES <= MAX_MESSAGE_BYTES);
const _: () = assert!(MAX_CONFIRMED <= u8::MAX as usize);
const _: () = assert!(NetworkName::MAX_LEN <= u8::MAX as usize);

/// Why a body is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The body ends before its layout does.
    #[error("the message is too short")]
    Truncated,
    /// The body goes on after its layout ends.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// No message has this kind, or none that this side takes.
    #[error("there is no message of kind {0} in this direction")]
    UnknownKind(u8),
    /// A field has a value that it may not have.
    #[error("the field \"{0}\" has a forbidden value")]
    Field(&'static str),
}

/// The number of a sequence of packets from a gateway to a client; never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamId(u64);

impl StreamId {
    /// Takes a number; `None` for zero, which stands for "no stream" on the wire.
    pub fn new(id: u64) -> Option<Self> {
        (id != 0).then_some(Self(id))
    }

    /// The number.
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

/// Where a client was when its connection was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The stream of its last WELCOME.
    pub stream: StreamId,
    /// How many PACKET frames of that stream it has received.
    pub received: u64,
}

/// What an operator hands to those who may register: up to [`MAX_INVITATION_BYTES`].
#[derive(Clone, PartialEq, Eq, Zeroize)]
pub struct Invitation(Vec<u8>);

impl Invitation {
    /// Takes the bytes of an invitation; `None` when there are too many or none.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (1..=MAX_INVITATION_BYTES).contains(&bytes.len()).then_some(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Invitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Invitation(secret)")
    }
}

impl Drop for Invitation {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Who may register with a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RegistrationMode {
    /// Nobody new.
    Closed = 0,
    /// Everybody.
    Open = 1,
    /// Those with an invitation.
    Invitation = 2,
}

/// Why a gateway lets a client no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The two speak different versions of the protocol.
    #[error(
        "the gateway speaks protocol version {gateway}, this client version {client}: update the older one"
    )]
    WrongVersion {
        /// The version in the client's HELLO.
        client: u16,
        /// The gateway's version.
        gateway: u16,
    },
    /// The gateway belongs to another network.
    #[error("the gateway belongs to another network: is the topology the right one?")]
    WrongNetwork,
    /// The registration is not signed by the client's identity for this gateway and connection.
    #[error("the gateway does not accept the signature of the registration")]
    BadSignature,
    /// One side holds the other's TLS session and the other does not.
    #[error("the gateway is reached through a front that it, or this client, does not expect")]
    WrongBinding,
    /// The token is not, or no longer, the one of this identity.
    #[error("the gateway does not know this client's token")]
    UnknownToken,
    /// Nobody new may register.
    #[error("the gateway takes no new clients")]
    RegistrationClosed,
    /// Registering needs an invitation, and this is not one.
    #[error("the gateway takes new clients by invitation only")]
    InvitationNeeded,
    /// Too many registrations at this gateway, or from this source.
    #[error("too many registrations: try again in {retry_after_s} s")]
    RateLimited {
        /// When to try again, in seconds.
        retry_after_s: u16,
    },
    /// The gateway serves as many clients as it can.
    #[error("the gateway serves as many clients as it can")]
    TooManyClients,
    /// As many clients as may be are connected from this source.
    #[error("as many clients as the gateway allows are connected from this address")]
    TooManyFromSource,
    /// The counter to resume with goes backwards, or beyond what the gateway sent.
    #[error("the counter to resume with cannot be right")]
    BadCounter,
    /// Something was malformed or out of order.
    #[error("the gateway could not make sense of what it got")]
    Protocol,
    /// The gateway could not store the registration.
    #[error("the gateway has a fault of its own: try again later")]
    Internal,
}

impl Refusal {
    fn to_wire(self) -> (u8, u32) {
        match self {
            Self::WrongVersion { client, gateway } => {
                (1, u32::from(gateway) << 16 | u32::from(client))
            }
            Self::WrongNetwork => (2, 0),
            Self::BadSignature => (3, 0),
            Self::WrongBinding => (4, 0),
            Self::UnknownToken => (5, 0),
            Self::RegistrationClosed => (6, 0),
            Self::InvitationNeeded => (7, 0),
            Self::RateLimited { retry_after_s } => (8, u32::from(retry_after_s)),
            Self::TooManyClients => (9, 0),
            Self::BadCounter => (10, 0),
            Self::Protocol => (11, 0),
            Self::Internal => (12, 0),
            Self::TooManyFromSource => (13, 0),
        }
    }

    fn from_wire(code: u8, detail: u32) -> Result<Self, MessageError> {
        let [a, b, c, d] = detail.to_be_bytes();
        let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let refusal = match code {
            1 => Self::WrongVersion { client: low, gateway: high },
            2 => Self::WrongNetwork,
            3 => Self::BadSignature,
            4 => Self::WrongBinding,
            5 => Self::UnknownToken,
            6 => Self::RegistrationClosed,
            7 => Self::InvitationNeeded,
            8 => Self::RateLimited { retry_after_s: low },
            9 => Self::TooManyClients,
            10 => Self::BadCounter,
            11 => Self::Protocol,
            12 => Self::Internal,
            13 => Self::TooManyFromSource,
            _ => return Err(MessageError::Field("code")),
        };
        if refusal.to_wire() != (code, detail) {
            return Err(MessageError::Field("detail"));
        }
        Ok(refusal)
    }
}

/// A box that a gateway keeps for a client.
#[derive(Clone, PartialEq, Eq)]
pub struct KeptBox {
    /// Its number: those of one client grow, and none is ever used again.
    pub number: u64,
    /// The box; only the client can open it.
    pub sealed: Vec<u8>,
}

/// Shows neither number nor contents.
impl std::fmt::Debug for KeptBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeptBox({} bytes)", self.sealed.len())
    }
}

/// The numbers of deliveries that a client has taken: 1 to [`MAX_CONFIRMED`].
#[derive(Clone, PartialEq, Eq)]
pub struct Confirmed(Vec<u64>);

impl Confirmed {
    /// Takes numbers; `None` when there are too many or none.
    pub fn new(numbers: Vec<u64>) -> Option<Self> {
        (1..=MAX_CONFIRMED).contains(&numbers.len()).then_some(Self(numbers))
    }

    /// The numbers.
    pub fn into_numbers(self) -> Vec<u64> {
        self.0
    }
}

/// Shows how many there are.
impl std::fmt::Debug for Confirmed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Confirmed({} numbers)", self.0.len())
    }
}

/// A message from a client to its gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientMessage {
    /// Kind 1, the first one: version u16 (1..3), the client's identity (3..35), its nonce
    /// (35..67), length of the network's name u8 (67), the name.
    Hello {
        /// The network of the client's topology.
        network: NetworkName,
        /// Who it is.
        identity: Identity,
        /// Fresh for this connection.
        nonce: [u8; NONCE_LEN],
    },
    /// A HELLO of another version: nothing after its version (1..3) is looked at.
    OtherVersion(u16),
    /// Kind 3: [`BindingKind`] u8 (1), signature (2..66) over
    /// [`super::transcript::Transcript::registration`], length of the invitation u16 (66..68), the
    /// invitation.
    Register {
        /// What the signature covers.
        binding: BindingKind,
        /// By the client's identity.
        signature: Signature,
        /// Not needed by open gateways and by clients that are already registered.
        invitation: Option<Invitation>,
    },
    /// Kind 5: masked token (1..33), stream u64 (33..41) or zero, received packets u64 (41..49).
    Authenticate {
        /// Masked for this connection.
        token: MaskedToken,
        /// Where to go on; `None` for a client that has just started.
        resume: Option<Resume>,
    },
    /// Kind 9: the client closes on purpose. Nothing else is in it.
    Goodbye,
    /// Kind 10: number u32 (1..5), by which it is told from others: the client wants what is kept for it,
    /// from the oldest on, and from now on what comes.
    Receive(u32),
    /// Kind 12: how many numbers u8 (1), the numbers u64 each (from 2 on): the client has taken these
    /// deliveries. There is no answer.
    Confirm(Confirmed),
}

/// A message from a gateway to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayMessage {
    /// Kind 2: the gateway's nonce (1..33), [`RegistrationMode`] u8 (33), [`BindingKind`] u8 (34).
    Challenge {
        /// Fresh for this connection.
        nonce: [u8; NONCE_LEN],
        /// Who may register.
        mode: RegistrationMode,
        /// Whether the gateway ends the TLS session itself.
        binding: BindingKind,
    },
    /// Kind 4: token (1..33).
    Registered {
        /// The new token; an older one of the identity is worth nothing any more.
        token: Token,
    },
    /// Kind 6: stream u64 (1..9), received packets u64 (9..17).
    Welcome {
        /// The stream of the packets that follow: that of the client's [`Resume`], or a new one if
        /// the gateway does not have that any more.
        stream: StreamId,
        /// How many PACKET frames of the client the gateway received in this stream.
        received: u64,
    },
    /// Kind 7: code u8 (1), detail u32 (2..6): the versions of the gateway and of the client, the
    /// seconds to wait, or zero. The gateway closes.
    Refused(Refusal),
    /// Kind 8: a newer connection of the same identity took over; the gateway closes.
    Evicted,
    /// Kind 9: the gateway shuts down.
    Goodbye,
    /// Kind 11: number u64 (1..9), the box (from 9 on), which is never empty.
    Delivery(KeptBox),
    /// Kind 13: the number of a RECEIVE u32 (1..5): all that was kept when that came has been sent; said
    /// once for each RECEIVE, unless another one comes before.
    CaughtUp(u32),
}

impl ClientMessage {
    /// Writes the body of a CONTROL frame: at most [`MAX_MESSAGE_BYTES`].
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut body = Vec::with_capacity(MAX_MESSAGE_BYTES);
        match self {
            Self::Hello { network, identity, nonce } => {
                body.push(HELLO);
                body.extend(super::VERSION.to_be_bytes());
                body.extend(identity.as_bytes());
                body.extend(nonce);
                let name = network.as_str().as_bytes();
                body.push(u8::try_from(name.len()).expect("a name has at most 64 bytes"));
                body.extend(name);
            }
            Self::OtherVersion(version) => {
                body.push(HELLO);
                body.extend(version.to_be_bytes());
            }
            Self::Register { binding, signature, invitation } => {
                body.extend([REGISTER, *binding as u8]);
                body.extend(signature.as_bytes());
                let invitation = invitation.as_ref().map_or(&[][..], Invitation::as_bytes);
                let len = u16::try_from(invitation.len()).expect("an invitation has 512 bytes");
                body.extend(len.to_be_bytes());
                body.extend(invitation);
            }
            Self::Authenticate { token, resume } => {
                body.push(AUTHENTICATE);
                body.extend(token.as_bytes());
                let (stream, received) =
                    resume.map_or((0, 0), |resume| (resume.stream.as_u64(), resume.received));
                body.extend(stream.to_be_bytes());
                body.extend(received.to_be_bytes());
            }
            Self::Goodbye => body.push(GOODBYE),
            Self::Receive(number) => {
                body.push(RECEIVE);
                body.extend(number.to_be_bytes());
            }
            Self::Confirm(Confirmed(numbers)) => {
                let count = u8::try_from(numbers.len()).expect("at most 171 numbers");
                body.extend([CONFIRM, count]);
                body.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
            }
        }
        Zeroizing::new(body)
    }

    /// Reads the body of a CONTROL frame.
    ///
    /// # Errors
    /// [`MessageError`] unless the body is exactly one message.
    pub fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader(body);
        let message = match reader.byte()? {
            HELLO => {
                let version = u16::from_be_bytes(reader.array()?);
                if version != super::VERSION {
                    return Ok(Self::OtherVersion(version));
                }
                let identity = Identity::from_bytes(reader.array::<KEY_LEN>()?)
                    .map_err(|_| MessageError::Field("identity"))?;
                let nonce = reader.array()?;
                let len = reader.byte()?;
                let network = std::str::from_utf8(reader.slice(len.into())?)
                    .ok()
                    .and_then(NetworkName::new)
                    .ok_or(MessageError::Field("network"))?;
                Self::Hello { network, identity, nonce }
            }
            REGISTER => {
                let binding = reader.binding()?;
                let signature = Signature::from_bytes(reader.array()?);
                let len = usize::from(u16::from_be_bytes(reader.array()?));
                if len > MAX_INVITATION_BYTES {
                    return Err(MessageError::Field("invitation"));
                }
                let invitation = Invitation::new(reader.slice(len)?.to_vec());
                Self::Register { binding, signature, invitation }
            }
            AUTHENTICATE => {
                let token = MaskedToken::from_bytes(reader.array::<TOKEN_LEN>()?);
                let stream = StreamId::new(reader.u64()?);
                let received = reader.u64()?;
                if stream.is_none() && received != 0 {
                    return Err(MessageError::Field("received"));
                }
                let resume = stream.map(|stream| Resume { stream, received });
                Self::Authenticate { token, resume }
            }
            GOODBYE => Self::Goodbye,
            RECEIVE => Self::Receive(reader.u32()?),
            CONFIRM => {
                let count = reader.byte()?;
                if !(1..=MAX_CONFIRMED).contains(&count.into()) {
                    return Err(MessageError::Field("count"));
                }
                let numbers = (0..count).map(|_| reader.u64()).collect::<Result<_, _>>()?;
                Self::Confirm(Confirmed(numbers))
            }
            kind => return Err(MessageError::UnknownKind(kind)),
        };
        reader.finish()?;
        Ok(message)
    }

    /// The message's name, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } | Self::OtherVersion(_) => "HELLO",
            Self::Register { .. } => "REGISTER",
            Self::Authenticate { .. } => "AUTHENTICATE",
            Self::Goodbye => "GOODBYE",
            Self::Receive(_) => "RECEIVE",
            Self::Confirm(_) => "CONFIRM",
        }
    }
}

impl GatewayMessage {
    /// Writes the body of a CONTROL frame: at most [`MAX_MESSAGE_BYTES`], or [`DELIVERY_HEAD_LEN`]
    /// and a box.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut body = Vec::with_capacity(MAX_MESSAGE_BYTES);
        match self {
            Self::Challenge { nonce, mode, binding } => {
                body.push(CHALLENGE);
                body.extend(nonce);
                body.extend([*mode as u8, *binding as u8]);
            }
            Self::Registered { token } => {
                body.push(REGISTERED);
                body.extend(token.as_bytes());
            }
            Self::Welcome { stream, received } => {
                body.push(WELCOME);
                body.extend(stream.as_u64().to_be_bytes());
                body.extend(received.to_be_bytes());
            }
            Self::Refused(refusal) => {
                let (code, detail) = refusal.to_wire();
                body.extend([REFUSED, code]);
                body.extend(detail.to_be_bytes());
            }
            Self::Evicted => body.push(EVICTED),
            Self::Goodbye => body.push(GOODBYE),
            Self::Delivery(KeptBox { number, sealed }) => {
                body.reserve_exact(DELIVERY_HEAD_LEN + sealed.len());
                body.push(DELIVERY);
                body.extend(number.to_be_bytes());
                body.extend(sealed);
            }
            Self::CaughtUp(number) => {
                body.push(CAUGHT_UP);
                body.extend(number.to_be_bytes());
            }
        }
        Zeroizing::new(body)
    }

    /// Reads the body of a CONTROL frame.
    ///
    /// # Errors
    /// [`MessageError`] unless the body is exactly one message.
    pub fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader(body);
        let message = match reader.byte()? {
            CHALLENGE => {
                let nonce = reader.array()?;
                let mode = match reader.byte()? {
                    0 => RegistrationMode::Closed,
                    1 => RegistrationMode::Open,
                    2 => RegistrationMode::Invitation,
                    _ => return Err(MessageError::Field("mode")),
                };
                Self::Challenge { nonce, mode, binding: reader.binding()? }
            }
            REGISTERED => {
                Self::Registered { token: Token::from_bytes(reader.array::<TOKEN_LEN>()?) }
            }
            WELCOME => {
                let stream = StreamId::new(reader.u64()?).ok_or(MessageError::Field("stream"))?;
                Self::Welcome { stream, received: reader.u64()? }
            }
            REFUSED => {
                let code = reader.byte()?;
                let detail = u32::from_be_bytes(reader.array()?);
                Self::Refused(Refusal::from_wire(code, detail)?)
            }
            EVICTED => Self::Evicted,
            GOODBYE => Self::Goodbye,
            DELIVERY => {
                let number = reader.u64()?;
                let sealed = reader.rest();
                if sealed.is_empty() {
                    return Err(MessageError::Truncated);
                }
                Self::Delivery(KeptBox { number, sealed: sealed.to_vec() })
            }
            CAUGHT_UP => Self::CaughtUp(reader.u32()?),
            kind => return Err(MessageError::UnknownKind(kind)),
        };
        reader.finish()?;
        Ok(message)
    }

    /// The message's name, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Challenge { .. } => "CHALLENGE",
            Self::Registered { .. } => "REGISTERED",
            Self::Welcome { .. } => "WELCOME",
            Self::Refused(_) => "REFUSED",
            Self::Evicted => "EVICTED",
            Self::Goodbye => "GOODBYE",
            Self::Delivery(_) => "DELIVERY",
            Self::CaughtUp(_) => "CAUGHT_UP",
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn slice(&mut self, len: usize) -> Result<&'a [u8], MessageError> {
        let (slice, rest) = self.0.split_at_checked(len).ok_or(MessageError::Truncated)?;
        self.0 = rest;
        Ok(slice)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(MessageError::Truncated)?;
        self.0 = rest;
        Ok(*array)
    }

    fn byte(&mut self) -> Result<u8, MessageError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.array().map(u64::from_be_bytes)
    }

    fn binding(&mut self) -> Result<BindingKind, MessageError> {
        BindingKind::from_byte(self.byte()?).ok_or(MessageError::Field("binding"))
    }

    fn finish(self) -> Result<(), MessageError> {
        if self.0.is_empty() { Ok(()) } else { Err(MessageError::Trailing(self.0.len())) }
    }
}

#[cfg(test)]
mod tests;
