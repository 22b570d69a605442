//! The port as programs see it, over loopback, with a service in memory.

use futures_util::{SinkExt, StreamExt};
use mixsocks_common::message::{FailReason, MAX_MESSAGE_BYTES, SendError, Sender, SenderTag};
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::testing::{BYTES_PER_PACKET, Control, Sent, address, memory};
use super::*;
use crate::testing::within;

const TOKEN: &str = "0123456789abcdef";
const TAG: SenderTag = SenderTag([3; 16]);

type Program = WebSocketStream<TcpStream>;

struct Port {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    control: Control,
}

impl Port {
    async fn start() -> Self {
        Self::with(WebsocketOptions::default(), MAX_CONNECTIONS).await
    }

    async fn with(options: WebsocketOptions, max_connections: usize) -> Self {
        let bound = WebsocketListener::bind("127.0.0.1:0".parse().unwrap(), options).await;
        let listener = WebsocketListener { max_connections, ..bound.unwrap() };
        let address = listener.local_addr().unwrap();
        let (service, control) = memory();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(listener.serve(service, async {
            stopped.await.unwrap();
        }));
        Self { address, stop, task, control }
    }

    async fn try_connect(&self, path: &str, origin: Option<&str>) -> Result<Program, Error> {
        let mut request = format!("ws://{}{path}", self.address).into_client_request().unwrap();
        if let Some(origin) = origin {
            request.headers_mut().insert("Origin", origin.parse().unwrap());
        }
        let config = WebSocketConfig::default().max_frame_size(None).max_message_size(None);
        let stream = TcpStream::connect(self.address).await.unwrap();
        let connecting = tokio_tungstenite::client_async_with_config(request, stream, Some(config));
        within(connecting).await.map(|(program, _)| program)
    }

    async fn connect(&self) -> Program {
        self.try_connect("/", None).await.unwrap()
    }

    /// A program that speaks text, whose connection is known to the port.
    async fn connect_text(&self) -> Program {
        let mut program = self.connect().await;
        assert!(ask(&mut program, r#"{"type":"selfAddress"}"#).await.contains("selfAddress"));
        program
    }
}

async fn next(program: &mut Program) -> Message {
    within(program.next()).await.unwrap().unwrap()
}

async fn next_text(program: &mut Program) -> String {
    match next(program).await {
        Message::Text(text) => text.to_string(),
        other => panic!("{} bytes that are no text", other.len()),
    }
}

async fn next_binary(program: &mut Program) -> Vec<u8> {
    match next(program).await {
        Message::Binary(bytes) => bytes.to_vec(),
        other => panic!("not binary: {other:?}"),
    }
}

async fn say(program: &mut Program, message: impl Into<Message>) {
    within(program.send(message.into())).await.unwrap();
}

async fn ask(program: &mut Program, text: &str) -> String {
    say(program, text).await;
    next_text(program).await
}

fn send_text(rest: &str) -> String {
    format!(r#"{{"type":"send","recipient":"{}","message":"m"{rest}}}"#, address())
}

fn status(result: Result<Program, Error>) -> u16 {
    match result {
        Err(Error::Http(response)) => response.status().as_u16(),
        other => panic!("{other:?}"),
    }
}

/// Leaves, and waits until the port knows.
async fn leave(mut program: Program) {
    within(program.close(None)).await.unwrap();
    while let Some(Ok(message)) = within(program.next()).await {
        assert!(message.is_close());
    }
}

async fn closing_code(program: &mut Program) -> CloseCode {
    match next(program).await {
        Message::Close(Some(frame)) => frame.code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn requests_are_passed_on_and_answered_in_their_form() {
    let mut port = Port::start().await;
    let mut program = port.connect().await;
    let own = ask(&mut program, r#"{"type":"selfAddress"}"#).await;
    assert_eq!(own, format!(r#"{{"type":"selfAddress","address":"{}"}}"#, address()));
    say(&mut program, vec![3u8]).await;
    assert_eq!(next_binary(&mut program).await, [&[2][..], &address().to_bytes()].concat());

    say(&mut program, send_text("")).await;
    let recipient = address();
    let message = b"m".to_vec();
    let expected = Sent::Message { recipient, message: message.clone(), reply_surbs: 0 };
    assert_eq!(within(port.control.sent.recv()).await.unwrap(), expected);
    let anonymous = send_text(r#","replySurbs":5"#).replace(r#""send""#, r#""sendAnonymous""#);
    say(&mut program, anonymous).await;
    let expected = Sent::Message { recipient, message: message.clone(), reply_surbs: 5 };
    assert_eq!(within(port.control.sent.recv()).await.unwrap(), expected);
    let reply = [&[2][..], &TAG.0, &[0; 15], &[1], b"m"].concat();
    say(&mut program, reply).await;
    let expected = Sent::Reply { sender_tag: TAG, message };
    assert_eq!(within(port.control.sent.recv()).await.unwrap(), expected);
}

#[tokio::test]
async fn messages_come_in_binary_until_a_program_speaks_text() {
    let mut port = Port::start().await;
    let mut program = port.connect().await;
    port.control.arrive(1, b"a\xff", Sender::Unknown);
    assert_eq!(next_binary(&mut program).await, b"\x01\x00\0\0\0\0\0\0\0\x02a\xff");
    port.control.taken(1).await;
    assert!(ask(&mut program, "nonsense").await.starts_with(r#"{"type":"error""#));
    port.control.arrive(2, b"a\xff", Sender::Anonymous(TAG));
    let tag = bs58::encode(TAG.0).into_string();
    let expected =
        format!("{{\"type\":\"received\",\"message\":\"a\u{fffd}\",\"senderTag\":\"{tag}\"}}");
    assert_eq!(next_text(&mut program).await, expected);
    port.control.taken(2).await;
    say(&mut program, vec![9u8]).await;
    assert_eq!(next_binary(&mut program).await[..2], [0, 3]);
    port.control.arrive(3, b"r", Sender::Replier(address()));
    assert_eq!(next_binary(&mut program).await, b"\x01\x00\0\0\0\0\0\0\0\x01r");
}

#[tokio::test]
async fn a_message_that_waits_for_a_program_comes_in_the_form_of_its_first_request() {
    let port = Port::start().await;
    port.control.arrive(1, b"early", Sender::Unknown);
    let mut program = port.connect().await;
    assert!(ask(&mut program, r#"{"type":"selfAddress"}"#).await.contains("address"));
    assert!(next_text(&mut program).await.contains("early"));
}

#[tokio::test]
async fn wrong_requests_are_answered_and_the_connection_stays_open() {
    let port = Port::start().await;
    let mut program = port.connect().await;
    for (request, code) in [(vec![], 1), (vec![0, 1], 2), (vec![7], 3), (vec![5], 4)] {
        say(&mut program, request).await;
        assert_eq!(next_binary(&mut program).await[..2], [0, code]);
    }
    for request in ["", "{", r#"{"type":"x"}"#] {
        let answer = ask(&mut program, request).await;
        assert!(answer.starts_with(r#"{"type":"error","message":"malformed request:"#), "{answer}");
    }
    for (error, word) in [
        (SendError::Empty, "malformed request:an empty"),
        (SendError::TooLong(1), "malformed request:a message of 1"),
        (SendError::Full, "other:too many"),
        (SendError::UnknownSender, "other:the sender"),
    ] {
        port.control.refuse(Some(error));
        let answer = ask(&mut program, &send_text(r#","id":"a","connectionId":1"#)).await;
        assert!(answer.contains(word) && answer.ends_with(r#""id":"a"}"#), "{answer}");
    }
    assert!(ask(&mut program, r#"{"type":"selfAddress"}"#).await.contains("address"));
}

#[tokio::test]
async fn who_asks_is_told_what_became_of_a_message() {
    let port = Port::start().await;
    let mut program = port.connect_text().await;
    let mut other = port.connect_text().await;
    say(&mut program, send_text(r#","id":"a""#)).await;
    assert!(ask(&mut program, r#"{"type":"selfAddress"}"#).await.contains("address"));
    say(&mut other, send_text("")).await;
    say(&mut other, send_text(r#","id":8"#)).await;
    assert!(ask(&mut other, r#"{"type":"selfAddress"}"#).await.contains("address"));
    port.control.finish(1, Ok(()));
    port.control.finish(0, Ok(()));
    port.control.finish(2, Err(FailReason::UnknownClient));
    assert_eq!(next_text(&mut program).await, r#"{"type":"delivered","id":"a"}"#);
    let told = next_text(&mut other).await;
    assert!(told.starts_with(r#"{"type":"failed","id":8,"reason":"unknownClient""#), "{told}");
}

#[tokio::test]
async fn who_asks_in_binary_is_told_in_binary() {
    let port = Port::start().await;
    let mut program = port.connect().await;
    let id = [0, 0, 0, 0, 0, 0, 1, 2];
    let send = |message: &[u8]| {
        let length = u8::try_from(message.len()).unwrap();
        let head = [&[128][..], &id, &[0], &address().to_bytes(), &[0; 15], &[length]].concat();
        [&head, message].concat()
    };
    say(&mut program, send(b"hi")).await;
    say(&mut program, send(b"hi")).await;
    say(&mut program, vec![3]).await;
    assert_eq!(next_binary(&mut program).await[0], 2);
    port.control.finish(0, Ok(()));
    assert_eq!(next_binary(&mut program).await, [&[128][..], &id].concat());
    port.control.finish(1, Err(FailReason::UnknownClient));
    let told = next_binary(&mut program).await;
    assert_eq!(told[..10], [&[129][..], &id, &[4]].concat());
    port.control.refuse(Some(SendError::NoRoute));
    say(&mut program, send(b"hi")).await;
    let told = next_binary(&mut program).await;
    assert_eq!(told[..10], [&[130][..], &id, &[255]].concat());
    // Only messages have something to tell.
    say(&mut program, [&[128][..], &id, &[3]].concat()).await;
    let told = next_binary(&mut program).await;
    assert_eq!(told[..10], [&[130][..], &id, &[4]].concat());
}

#[tokio::test]
async fn who_only_sends_gets_no_messages_and_hears_of_its_own() {
    let mut port = Port::start().await;
    let mut sender = port.try_connect("/?receive=no", None).await.unwrap();
    assert!(ask(&mut sender, r#"{"type":"selfAddress"}"#).await.contains("address"));
    let mut receiver = port.connect_text().await;
    port.control.arrive(1, b"for the other", Sender::Unknown);
    assert!(next_text(&mut receiver).await.contains("for the other"));
    port.control.taken(1).await;
    leave(receiver).await;
    port.control.arrive(2, b"for nobody yet", Sender::Unknown);
    say(&mut sender, send_text(r#","id":1"#)).await;
    assert!(within(port.control.sent.recv()).await.is_some());
    port.control.finish(0, Ok(()));
    assert_eq!(next_text(&mut sender).await, r#"{"type":"delivered","id":1}"#);
    assert!(port.control.nothing_was_taken());
    let mut late = port.connect_text().await;
    assert!(next_text(&mut late).await.contains("for nobody yet"));
}

#[tokio::test]
async fn who_confirms_gets_one_message_at_a_time_and_loses_none_when_it_dies() {
    let mut port = Port::start().await;
    let mut program = port.try_connect("/?receive=confirm", None).await.unwrap();
    let answer = ask(&mut program, r#"{"type":"taken"}"#).await;
    assert!(answer.contains("no message waits"), "{answer}");
    for number in 1..=3 {
        port.control.arrive(number, format!("m{number}").as_bytes(), Sender::Unknown);
    }
    assert!(next_text(&mut program).await.contains("m1"));
    assert!(ask(&mut program, r#"{"type":"selfAddress"}"#).await.contains("address"));
    assert!(port.control.nothing_was_taken());
    say(&mut program, r#"{"type":"taken"}"#).await;
    port.control.taken(1).await;
    assert!(next_text(&mut program).await.contains("m2"));
    leave(program).await;
    let mut next_one = port.try_connect("/?receive=confirm", None).await.unwrap();
    assert!(next_binary(&mut next_one).await.ends_with(b"m2"));
    // It may leave at once.
    say(&mut next_one, vec![129]).await;
    within(next_one.close(None)).await.unwrap();
    while within(next_one.next()).await.is_some_and(|message| message.is_ok()) {}
    port.control.taken(2).await;
    let mut last = port.connect().await;
    assert!(next_binary(&mut last).await.ends_with(b"m3"));
    port.control.taken(3).await;
}

#[tokio::test]
async fn a_service_that_stops_closes_all_connections() {
    let port = Port::start().await;
    let mut sender = port.try_connect("/?receive=no", None).await.unwrap();
    assert!(ask(&mut sender, r#"{"type":"selfAddress"}"#).await.contains("address"));
    drop(port.control);
    assert_eq!(closing_code(&mut sender).await, CloseCode::Away);
    within(port.task).await.unwrap();
}

#[tokio::test]
async fn a_connection_id_asks_for_the_length_of_its_queue() {
    let port = Port::start().await;
    let mut program = port.connect().await;
    let answer = ask(&mut program, &send_text(r#","connectionId":6"#)).await;
    assert_eq!(answer, r#"{"type":"laneQueueLength","lane":6,"queue_length":1}"#);
    let answer = ask(&mut program, &send_text(r#","connectionId":6,"id":1"#)).await;
    assert_eq!(answer, r#"{"type":"laneQueueLength","lane":6,"queue_length":2}"#);
    let long = send_text(r#","connectionId":7"#)
        .replace(r#""m""#, &format!("\"{}\"", "m".repeat(BYTES_PER_PACKET + 1)));
    let answer = ask(&mut program, &long).await;
    assert_eq!(answer, r#"{"type":"laneQueueLength","lane":7,"queue_length":2}"#);
    port.control.finish(0, Ok(()));
    port.control.finish(1, Ok(()));
    assert_eq!(next_text(&mut program).await, r#"{"type":"delivered","id":1}"#);
    let id = [0, 0, 0, 0, 0, 0, 0, 6];
    say(&mut program, [&[4][..], &id].concat()).await;
    say(&mut program, [&[5][..], &id].concat()).await;
    assert_eq!(next_binary(&mut program).await, [&[3][..], &id, &[0; 8]].concat());
}

#[tokio::test]
async fn the_first_program_gets_messages_until_it_leaves() {
    let mut port = Port::start().await;
    let mut first = port.connect_text().await;
    let mut second = port.connect_text().await;
    let mut third = port.connect_text().await;
    for number in 0..3 {
        port.control.arrive(number, b"one", Sender::Unknown);
        assert!(next_text(&mut first).await.contains("one"));
        port.control.taken(number).await;
    }
    leave(first).await;
    port.control.arrive(4, b"two", Sender::Unknown);
    assert!(next_text(&mut second).await.contains("two"));
    leave(second).await;
    port.control.arrive(5, b"three", Sender::Unknown);
    assert!(next_text(&mut third).await.contains("three"));
}

#[tokio::test]
async fn without_a_program_nothing_is_asked_for() {
    let mut port = Port::start().await;
    port.control.arrive(1, b"early", Sender::Unknown);
    assert_eq!(status(port.try_connect("/", Some("http://evil.example")).await), 403);
    assert!(port.control.handed_over.try_recv().is_err());
    let mut program = port.connect().await;
    assert!(next_binary(&mut program).await.ends_with(b"early"));
    port.control.taken(1).await;
}

/// Its message is far longer than what the system takes over.
#[tokio::test]
async fn a_program_that_does_not_read_makes_messages_wait_and_its_message_is_not_lost() {
    let mut port = Port::start().await;
    let mut slow = port.connect_text().await;
    let mut next_one = port.connect_text().await;
    let long = vec![b'x'; MAX_MESSAGE_BYTES];
    port.control.arrive(1, &long, Sender::Unknown);
    port.control.arrive(2, b"second", Sender::Unknown);
    within(port.control.handed_over.recv()).await.unwrap();
    // It may send meanwhile.
    say(&mut slow, send_text("")).await;
    assert!(within(port.control.sent.recv()).await.is_some());
    assert!(port.control.nothing_was_taken() && port.control.handed_over.try_recv().is_err());
    drop(slow);
    assert_eq!(next_text(&mut next_one).await.matches('x').count(), MAX_MESSAGE_BYTES);
    port.control.taken(1).await;
    assert!(next_text(&mut next_one).await.contains("second"));
    port.control.taken(2).await;
}

#[tokio::test]
async fn the_longest_message_of_the_worst_bytes_comes_as_text() {
    let port = Port::start().await;
    let mut program = port.connect_text().await;
    port.control.arrive(1, &vec![1; MAX_MESSAGE_BYTES], Sender::Anonymous(TAG));
    let text = next_text(&mut program).await;
    assert!(text.len() > 6 * MAX_MESSAGE_BYTES && text.len() <= MAX_ANSWER_BYTES);
}

#[tokio::test]
async fn the_longest_message_can_be_sent_and_longer_requests_close_the_connection() {
    let mut port = Port::start().await;
    let mut program = port.connect().await;
    let header = |len: usize| [&[2][..], &TAG.0, &[0; 8], &(len as u64).to_be_bytes()].concat();
    let longest = [header(MAX_MESSAGE_BYTES), vec![1; MAX_MESSAGE_BYTES]].concat();
    say(&mut program, longest).await;
    match within(port.control.sent.recv()).await.unwrap() {
        Sent::Reply { message, .. } => assert_eq!(message.len(), MAX_MESSAGE_BYTES),
        other => panic!("{other:?}"),
    }
    say(&mut program, vec![0; MAX_REQUEST_BYTES]).await;
    assert_eq!(next_binary(&mut program).await[0], 0);
    say(&mut program, vec![0; MAX_REQUEST_BYTES + 1]).await;
    assert_eq!(closing_code(&mut program).await, CloseCode::Size);
}

#[tokio::test]
async fn pings_are_answered_however_many_there_are() {
    let port = Port::start().await;
    let mut program = port.connect_text().await;
    for _ in 0..2 * connection::MAX_ANSWERS {
        say(&mut program, Message::Ping("still there?".into())).await;
    }
    assert_eq!(next(&mut program).await, Message::Pong("still there?".into()));
    say(&mut program, r#"{"type":"selfAddress"}"#).await;
    let mut answer = next(&mut program).await;
    while answer.is_pong() {
        answer = next(&mut program).await;
    }
    assert!(answer.is_text());
}

/// Each message that was asked about owes an answer.
#[tokio::test]
async fn no_more_is_read_when_too_many_answers_are_owed() {
    let mut port = Port::start().await;
    let mut program = port.connect().await;
    for number in 0..connection::MAX_ANSWERS + 8 {
        say(&mut program, send_text(&format!(r#","id":{number}"#))).await;
    }
    // The last place is for the answer to the request itself.
    for _ in 0..connection::MAX_ANSWERS - 1 {
        assert!(within(port.control.sent.recv()).await.is_some());
    }
    port.control.finish(0, Ok(()));
    assert_eq!(next_text(&mut program).await, r#"{"type":"delivered","id":0}"#);
    assert!(within(port.control.sent.recv()).await.is_some());
    assert!(port.control.sent.try_recv().is_err());
}

#[tokio::test]
async fn pages_and_strangers_are_refused() {
    let origins = vec!["http://localhost:8000".to_owned(), "null".to_owned()];
    let open = WebsocketOptions { origins: origins.clone(), ..WebsocketOptions::default() };
    let port = Port::with(open, MAX_CONNECTIONS).await;
    assert!(port.try_connect("/", None).await.is_ok());
    assert_eq!(status(port.try_connect("/?receive=confirmed", None).await), 400);
    assert!(port.try_connect("/", Some("http://localhost:8000")).await.is_ok());
    assert_eq!(status(port.try_connect("/", Some("https://evil.example")).await), 403);
    assert_eq!(status(port.try_connect("/", Some("null")).await), 403);

    let token = Some(Token::new(TOKEN).unwrap());
    let closed = WebsocketOptions { origins, token, ..WebsocketOptions::default() };
    let port = Port::with(closed, MAX_CONNECTIONS).await;
    assert_eq!(status(port.try_connect("/", None).await), 401);
    assert_eq!(status(port.try_connect("/?token=0123456789abcdeF", None).await), 401);
    let path = format!("/?token={TOKEN}");
    assert!(port.try_connect(&path, None).await.is_ok());
    assert!(port.try_connect(&path, Some("null")).await.is_ok());
    assert_eq!(status(port.try_connect(&path, Some("https://evil.example")).await), 403);
}

#[tokio::test]
async fn other_machines_need_a_token() {
    let everywhere = "0.0.0.0:0".parse().unwrap();
    let bound = WebsocketListener::bind(everywhere, WebsocketOptions::default()).await;
    assert!(matches!(bound, Err(BindError::TokenNeeded(address)) if address == everywhere));
}

#[tokio::test]
async fn too_many_programs_are_turned_away_until_one_leaves() {
    let port = Port::with(WebsocketOptions::default(), 2).await;
    let first = port.connect_text().await;
    let mut second = port.connect_text().await;
    assert_eq!(status(port.try_connect("/", None).await), 503);
    assert_eq!(status(port.try_connect("/", Some("http://evil.example")).await), 403);
    leave(first).await;
    // The second becomes the first, which shows that that one has left.
    port.control.arrive(1, b"m", Sender::Unknown);
    assert!(next_text(&mut second).await.contains("received"));
}

/// Those who say nothing must not hold more and more of the machine.
#[tokio::test]
async fn so_many_are_told_that_there_is_no_room_and_others_are_closed() {
    let port = Port::with(WebsocketOptions::default(), 0).await;
    let mut silent = Vec::new();
    for _ in 0..MAX_TURNED_AWAY {
        silent.push(TcpStream::connect(port.address).await.unwrap());
    }
    let mut beyond = TcpStream::connect(port.address).await.unwrap();
    assert_eq!(within(beyond.read(&mut [0; 1])).await.unwrap(), 0);
    // The others have their time still.
    let url = format!("ws://{}/", port.address);
    let told = within(tokio_tungstenite::client_async(url, silent.remove(0))).await;
    assert_eq!(status(told.map(|(program, _)| program)), 503);
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_put_out() {
    let port = Port::start().await;
    let mut silent = TcpStream::connect(port.address).await.unwrap();
    let began = tokio::time::Instant::now();
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(began.elapsed() >= HANDSHAKE_TIMEOUT);
}

#[tokio::test]
async fn programs_are_told_when_the_client_stops() {
    let port = Port::start().await;
    let mut program = port.connect_text().await;
    port.stop.send(()).unwrap();
    assert_eq!(closing_code(&mut program).await, CloseCode::Away);
    drop(program);
    within(port.task).await.unwrap();
}
