//! Layouts, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::keys::IdentityKey;

fn client_messages() -> Vec<ClientMessage> {
    let key = IdentityKey::generate(&mut rand::rng());
    let stream = StreamId::new(9).unwrap();
    vec![
        ClientMessage::Hello {
            network: NetworkName::new("test").unwrap(),
            identity: key.identity(),
            nonce: [3; 32],
        },
        ClientMessage::Register {
            binding: BindingKind::Session,
            signature: key.sign(b""),
            invitation: None,
        },
        ClientMessage::Register {
            binding: BindingKind::Front,
            signature: key.sign(b""),
            invitation: Invitation::new(vec![1; MAX_INVITATION_BYTES]),
        },
        ClientMessage::Authenticate { token: MaskedToken::from_bytes([4; 32]), resume: None },
        ClientMessage::Authenticate {
            token: MaskedToken::from_bytes([4; 32]),
            resume: Some(Resume { stream, received: 77 }),
        },
        ClientMessage::Goodbye,
        ClientMessage::Receive(0x0102_0304),
        ClientMessage::Confirm(Confirmed::new(vec![u64::MAX]).unwrap()),
        ClientMessage::Confirm(Confirmed::new(vec![7; MAX_CONFIRMED]).unwrap()),
    ]
}

fn gateway_messages() -> Vec<GatewayMessage> {
    let mut messages = vec![
        GatewayMessage::Challenge {
            nonce: [5; 32],
            mode: RegistrationMode::Invitation,
            binding: BindingKind::Session,
        },
        GatewayMessage::Registered { token: Token::from_bytes([6; 32]) },
        GatewayMessage::Welcome { stream: StreamId::new(u64::MAX).unwrap(), received: 1 },
        GatewayMessage::Evicted,
        GatewayMessage::Goodbye,
        GatewayMessage::CaughtUp(0x0102_0304),
    ];
    messages.extend(
        [
            Refusal::WrongVersion { client: 2, gateway: 1 },
            Refusal::WrongNetwork,
            Refusal::BadSignature,
            Refusal::WrongBinding,
            Refusal::UnknownToken,
            Refusal::RegistrationClosed,
            Refusal::InvitationNeeded,
            Refusal::RateLimited { retry_after_s: 600 },
            Refusal::TooManyClients,
            Refusal::TooManyFromSource,
            Refusal::BadCounter,
            Refusal::Protocol,
            Refusal::Internal,
        ]
        .map(GatewayMessage::Refused),
    );
    messages
}

#[test]
fn messages_round_trip_and_no_other_length_reads() {
    for message in client_messages() {
        let mut body = message.encode().to_vec();
        assert!(body.len() <= MAX_MESSAGE_BYTES);
        assert_eq!(ClientMessage::decode(&body), Ok(message.clone()));
        for end in 0..body.len() {
            assert_eq!(ClientMessage::decode(&body[..end]), Err(MessageError::Truncated));
        }
        body.push(0);
        assert_eq!(ClientMessage::decode(&body), Err(MessageError::Trailing(1)), "{message:?}");
    }
    for message in gateway_messages() {
        let mut body = message.encode().to_vec();
        assert_eq!(GatewayMessage::decode(&body), Ok(message));
        for end in 0..body.len() {
            assert_eq!(GatewayMessage::decode(&body[..end]), Err(MessageError::Truncated));
        }
        body.push(0);
        assert_eq!(GatewayMessage::decode(&body), Err(MessageError::Trailing(1)));
    }
}

#[test]
fn layouts_are_as_documented() {
    let lengths: Vec<_> = client_messages().iter().map(|m| m.encode().len()).collect();
    assert_eq!(lengths, [68 + 4, 68, 68 + 512, 49, 49, 1, 5, 10, 2 + 171 * 8]);
    let lengths: Vec<_> = gateway_messages()[..7].iter().map(|m| m.encode().len()).collect();
    assert_eq!(lengths, [35, 33, 17, 1, 1, 5, 6]);
    assert_eq!(client_messages()[6].encode()[..], [10, 1, 2, 3, 4]);
    assert_eq!(gateway_messages()[5].encode()[..], [13, 1, 2, 3, 4]);
    let hello = client_messages()[0].encode();
    assert_eq!(&hello[..3], &[1, 0, 1]);
    assert_eq!(&hello[35..67], &[3; 32]);
    assert_eq!(&hello[67..], b"\x04test");
}

#[test]
fn a_delivery_is_its_number_and_a_box_of_any_length() {
    for len in [1, 611, 1635, 32_355] {
        let kept = KeptBox { number: 0x0102, sealed: vec![9; len] };
        let message = GatewayMessage::Delivery(kept);
        let body = message.encode();
        assert_eq!(body[..DELIVERY_HEAD_LEN], [11, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(body[DELIVERY_HEAD_LEN..], vec![9; len]);
        assert_eq!(GatewayMessage::decode(&body), Ok(message));
        for end in 0..=DELIVERY_HEAD_LEN {
            let cut = GatewayMessage::decode(&body[..end]);
            assert_eq!(cut, Err(MessageError::Truncated));
        }
    }
}

#[test]
fn a_confirm_has_some_numbers_and_no_more_than_fit() {
    for count in [0, MAX_CONFIRMED + 1] {
        assert_eq!(Confirmed::new(vec![1; count]), None);
        let mut body = vec![CONFIRM, u8::try_from(count).unwrap()];
        body.resize(2 + 8 * count, 0);
        assert_eq!(ClientMessage::decode(&body), Err(MessageError::Field("count")));
    }
}

#[test]
fn the_version_of_a_hello_is_read_whatever_follows() {
    let body = [HELLO, 0, 2, 1, 2, 3];
    assert_eq!(ClientMessage::decode(&body), Ok(ClientMessage::OtherVersion(2)));
}

#[test]
fn forbidden_values_are_refused() {
    let refused = |body: &[u8]| ClientMessage::decode(body).unwrap_err();
    let mut hello = client_messages()[0].encode().to_vec();
    hello[68] = b'T';
    assert_eq!(refused(&hello), MessageError::Field("network"));
    hello[3..35].fill(0);
    hello[3] = 1;
    assert_eq!(refused(&hello), MessageError::Field("identity"));
    let mut register = client_messages()[1].encode().to_vec();
    register[1] = 2;
    assert_eq!(refused(&register), MessageError::Field("binding"));
    let mut long = client_messages()[2].encode().to_vec();
    long[66..68].copy_from_slice(&513u16.to_be_bytes());
    long.push(0);
    assert_eq!(refused(&long), MessageError::Field("invitation"));
    let mut authenticate = client_messages()[4].encode().to_vec();
    authenticate[33..41].fill(0);
    assert_eq!(refused(&authenticate), MessageError::Field("received"));
    assert_eq!(refused(&[CHALLENGE]), MessageError::UnknownKind(CHALLENGE));
    let refused = |body: &[u8]| GatewayMessage::decode(body).unwrap_err();
    assert_eq!(refused(&[HELLO]), MessageError::UnknownKind(HELLO));
    assert_eq!(refused(&[REFUSED, 0, 0, 0, 0, 0]), MessageError::Field("code"));
    assert_eq!(refused(&[REFUSED, 2, 0, 0, 0, 1]), MessageError::Field("detail"));
    assert_eq!(refused(&[REFUSED, 8, 0, 1, 0, 1]), MessageError::Field("detail"));
    let mut welcome = gateway_messages()[2].encode().to_vec();
    welcome[1..9].fill(0);
    assert_eq!(refused(&welcome), MessageError::Field("stream"));
    let mut challenge = gateway_messages()[0].encode().to_vec();
    challenge[33] = 3;
    assert_eq!(refused(&challenge), MessageError::Field("mode"));
}

proptest! {
    #[test]
    fn what_decodes_encodes_to_the_same_bytes(
        body in proptest::collection::vec(any::<u8>(), 0..80),
        kind in 0u8..14,
    ) {
        let mut body = body;
        if let Some(first) = body.first_mut() {
            *first = kind;
        }
        match ClientMessage::decode(&body) {
            Ok(ClientMessage::OtherVersion(_)) | Err(_) => {}
            Ok(message) => prop_assert_eq!(&*message.encode(), &body),
        }
        if let Ok(message) = GatewayMessage::decode(&body) {
            prop_assert_eq!(&*message.encode(), &body);
        }
    }
}
