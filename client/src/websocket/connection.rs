//! One connection of a program, after its handshake.
//!
//! Requests are handled one after the other: while one waits for room, nothing more is read. Reading and
//! writing wait independently, so that a program may send while it is being sent to.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use mixsocks_common::message::{Received, ReceivedId, Sender};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::{Mutex, Notify, OwnedMutexGuard, watch};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tracing::debug;

use super::answer::{Answer, Form};
use super::gate::Receiving;
use super::request::{Destination, Outgoing, Request, RequestError};
use super::service::MessageService;
use super::tracker::{ConnectionNumber, Tracked, Tracker};

/// Answers of a connection that wait to be written or are still owed. At the bound no more is read from
/// the program; none is longer than a kilobyte.
pub(super) const MAX_ANSWERS: usize = 1024;

/// How long a connection that has to end takes to do so in an orderly way.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long messages wait for a program's first request, which shows whether it speaks text.
const FIRST_REQUEST_WAIT: Duration = Duration::from_secs(1);

/// Something that is to be written.
#[derive(Debug)]
pub(super) enum Writing {
    Message(Message),
    /// What the websocket has queued by itself: the answer to a ping.
    Flush,
}

/// Who is connected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    pub(super) number: ConnectionNumber,
    pub(super) receiving: Receiving,
}

/// What all connections share.
pub(super) struct Shared<S> {
    service: S,
    tracker: Tracker,
    /// Whoever holds it gets the messages. The lock is fair: that is who connected first.
    arrivals: Arc<Mutex<Arrivals>>,
    /// The last message that was confirmed. Its program may have left before it was let go.
    confirmed: std::sync::Mutex<Option<ReceivedId>>,
}

/// A message that came and was not written yet.
#[derive(Default)]
struct Arrivals(Option<Received>);

/// Why a connection ends.
enum End {
    /// The program has closed it.
    Closed,
    /// It broke.
    Broken,
    /// It is closed, with a code for the program.
    Close(CloseCode, &'static str),
}

impl<S: MessageService> Shared<S> {
    pub(super) fn new(service: S) -> Self {
        let confirmed = std::sync::Mutex::default();
        let tracker = Tracker::new(service.bytes_per_packet());
        Self { service, tracker, arrivals: Arc::default(), confirmed }
    }

    /// Tells programs what becomes of their messages, until the service stops.
    pub(super) async fn tell_outcomes(&self) {
        while let Some((id, outcome)) = self.service.next_outcome().await {
            self.tracker.finished(id, outcome);
        }
    }

    /// Waits until a message has come; `false` when the service has stopped. Nothing is lost when it is
    /// dropped.
    async fn next_arrival(&self, arrivals: &mut Arrivals) -> bool {
        let confirmed = *lock(&self.confirmed);
        arrivals.0 = arrivals.0.take().filter(|arrived| Some(arrived.received) != confirmed);
        if arrivals.0.is_none() {
            arrivals.0 = self.service.next_received().await;
        }
        arrivals.0.is_some()
    }
}

/// Serves a program until it leaves, breaks the websocket protocol, or `stop` loses its other end.
pub(super) async fn serve<S: MessageService, T: AsyncRead + AsyncWrite + Send + Unpin>(
    shared: &Shared<S>,
    Program { number, receiving }: Program,
    socket: WebSocketStream<T>,
    mut stop: watch::Receiver<()>,
) {
    let (mut sink, mut stream) = socket.split();
    let (answers, mut to_write) = mpsc::channel(MAX_ANSWERS);
    let (speaks_text, is_unfinished) = (AtomicBool::new(false), AtomicBool::new(false));
    let (unconfirmed, confirmed) = (std::sync::Mutex::default(), Notify::new());
    let spoke = Notify::new();
    let connection = Connection {
        shared,
        number,
        receiving,
        spoke: &spoke,
        unconfirmed: &unconfirmed,
        confirmed: &confirmed,
        speaks_text: &speaks_text,
        is_unfinished: &is_unfinished,
    };
    // In this order, so that no message is written to a program that is known to have left.
    let end = tokio::select! {
        biased;
        end = connection.read(&mut stream, answers) => end,
        end = connection.write(&mut sink, &mut to_write) => end,
        _ = stop.changed() => End::Close(CloseCode::Away, "the client stops"),
    };
    shared.tracker.left(number);
    if is_unfinished.load(Ordering::Relaxed) {
        // The next program gets the message. So no farewell, which would write the rest of it.
        return;
    }
    if let Ok(socket) = sink.reunite(stream) {
        // Either way the connection ends here.
        let _ = timeout(FAREWELL_TIMEOUT, say_farewell(socket, end)).await;
    }
}

struct Connection<'a, S> {
    shared: &'a Shared<S>,
    number: ConnectionNumber,
    receiving: Receiving,
    /// The program has made a request.
    spoke: &'a Notify,
    /// Whether the last request was text: messages that come are given in the same form.
    speaks_text: &'a AtomicBool,
    /// A message that was written and that the program has not confirmed yet.
    unconfirmed: &'a std::sync::Mutex<Option<ReceivedId>>,
    /// It has confirmed it.
    confirmed: &'a Notify,
    /// Whether a message that came is written in part.
    is_unfinished: &'a AtomicBool,
}

impl<S: MessageService> Connection<'_, S> {
    async fn read<T: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut SplitStream<WebSocketStream<T>>,
        answers: mpsc::Sender<Writing>,
    ) -> End {
        loop {
            let Ok(place) = answers.clone().reserve_owned().await else { return End::Broken };
            let (form, request) = match stream.next().await {
                Some(Ok(Message::Text(text))) => (Form::Text, Request::from_text(&text)),
                Some(Ok(Message::Binary(bytes))) => (Form::Binary, Request::from_binary(&bytes)),
                Some(Ok(Message::Ping(_))) => {
                    place.send(Writing::Flush);
                    continue;
                }
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(_))) | None => return End::Closed,
                Some(Err(error)) => return End::of(&error),
            };
            self.speaks_text.store(form == Form::Text, Ordering::Relaxed);
            let answer = |answer: &Answer<'_>, place: OwnedPermit<Writing>| {
                place.send(Writing::Message(answer.to_message(form)));
            };
            match self.fulfil(request, &answers).await {
                Ok(Some(reply)) => answer(&reply, place),
                Ok(None) => {}
                Err(error) => answer(&Answer::Error(&error), place),
            }
            self.spoke.notify_one();
        }
    }

    async fn fulfil(
        &self,
        request: Result<Request, RequestError>,
        answers: &mpsc::Sender<Writing>,
    ) -> Result<Option<Answer<'static>>, RequestError> {
        let connection_id = match request? {
            Request::SelfAddress => {
                return Ok(Some(Answer::SelfAddress(self.shared.service.address())));
            }
            Request::ClosedConnection => return Ok(None),
            Request::Taken => return self.handle_taken().map(|()| None),
            Request::QueueLength(connection_id) => connection_id,
            Request::Send(outgoing) => {
                let connection_id = outgoing.connection_id;
                self.send(outgoing, answers).await?;
                let Some(connection_id) = connection_id else { return Ok(None) };
                connection_id
            }
        };
        let packets = self.shared.tracker.queue_length(self.number, connection_id);
        Ok(Some(Answer::QueueLength { connection_id, packets }))
    }

    fn handle_taken(&self) -> Result<(), RequestError> {
        let received =
            lock(self.unconfirmed).take().ok_or_else(RequestError::nothing_to_confirm)?;
        // At once: the program may leave right after.
        self.shared.service.taken(received);
        *lock(&self.shared.confirmed) = Some(received);
        self.confirmed.notify_one();
        Ok(())
    }

    async fn send(
        &self,
        outgoing: Outgoing,
        answers: &mpsc::Sender<Writing>,
    ) -> Result<(), RequestError> {
        let Outgoing { to, message, connection_id, id } = outgoing;
        let tracked = if id.is_some() || connection_id.is_some() {
            let place = answers.clone().reserve_owned().await.ok();
            let (connection, id, bytes) = (self.number, id.clone(), message.len());
            place.map(|place| Tracked { connection, connection_id, id, place, bytes })
        } else {
            None
        };
        let begun = self.shared.tracker.begin();
        let service = &self.shared.service;
        let sent = match to {
            Destination::Recipient { recipient, reply_surbs } => {
                service.send(recipient, message, reply_surbs).await
            }
            Destination::Sender(tag) => service.reply(tag, message).await,
        };
        match (sent, tracked) {
            (Ok(message), Some(tracked)) => begun.sent(message, tracked),
            (Ok(_), None) => {}
            (Err(error), _) => return Err(RequestError::refused(error, id)),
        }
        Ok(())
    }

    async fn write<T: AsyncRead + AsyncWrite + Unpin>(
        &self,
        sink: &mut SplitSink<WebSocketStream<T>, Message>,
        to_write: &mut mpsc::Receiver<Writing>,
    ) -> End {
        // It keeps its place among those who wait.
        let mut turn = pin!(self.turn());
        let mut arrivals = None;
        // Whether the message that came was written, and is to be confirmed.
        let mut is_written = false;
        loop {
            // In this order, so that the first answer comes before messages that waited.
            let written = tokio::select! {
                biased;
                Some(writing) = to_write.recv() => write_one(sink, writing).await,
                guard = &mut turn, if self.receiving != Receiving::No && arrivals.is_none() => {
                    arrivals = Some(guard);
                    Ok(())
                }
                () = self.confirmed.notified() => {
                    is_written = false;
                    Ok(())
                }
                is_running = self.next_arrival(arrivals.as_mut()), if !is_written => {
                    if !is_running {
                        return End::Close(CloseCode::Away, "the client stops");
                    }
                    let written = self.write_arrived(sink, arrivals.as_mut()).await;
                    if self.receiving == Receiving::Confirm {
                        is_written = true;
                    } else if written.is_ok() {
                        self.arrival_taken(arrivals.as_mut());
                    }
                    written
                }
            };
            if let Err(error) = written {
                return End::of(&error);
            }
        }
    }

    /// Waits until it is this program that gets the messages.
    async fn turn(&self) -> OwnedMutexGuard<Arrivals> {
        let arrivals = self.shared.arrivals.clone().lock_owned().await;
        // Some programs never make a request.
        let _ = timeout(FIRST_REQUEST_WAIT, self.spoke.notified()).await;
        arrivals
    }

    async fn next_arrival(&self, arrivals: Option<&mut OwnedMutexGuard<Arrivals>>) -> bool {
        match arrivals {
            Some(arrivals) => self.shared.next_arrival(arrivals).await,
            None => pending().await,
        }
    }

    /// The program has the message.
    fn arrival_taken(&self, arrivals: Option<&mut OwnedMutexGuard<Arrivals>>) {
        if let Some(Received { received, .. }) = arrivals.and_then(|arrivals| arrivals.0.take()) {
            self.shared.service.taken(received);
        }
    }

    /// Writes the message that came. If that fails or is given up, the next program gets it: it was not
    /// written whole.
    async fn write_arrived<T: AsyncRead + AsyncWrite + Unpin>(
        &self,
        sink: &mut SplitSink<WebSocketStream<T>, Message>,
        arrivals: Option<&mut OwnedMutexGuard<Arrivals>>,
    ) -> Result<(), Error> {
        let Some(arrivals) = arrivals else { return Ok(()) };
        let Some(Received { received, message, sender }) = &arrivals.0 else { return Ok(()) };
        let sender_tag = match sender {
            Sender::Anonymous(tag) => Some(*tag),
            Sender::Unknown | Sender::Replier(_) => None,
        };
        let is_text = self.speaks_text.load(Ordering::Relaxed);
        let form = if is_text { Form::Text } else { Form::Binary };
        let answer = Answer::Received { message, sender_tag };
        self.is_unfinished.store(true, Ordering::Relaxed);
        if self.receiving == Receiving::Confirm {
            // It may be confirmed before this returns.
            *lock(self.unconfirmed) = Some(*received);
        }
        sink.send(answer.to_message(form)).await?;
        self.is_unfinished.store(false, Ordering::Relaxed);
        Ok(())
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn write_one<T: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut SplitSink<WebSocketStream<T>, Message>,
    writing: Writing,
) -> Result<(), Error> {
    match writing {
        Writing::Message(message) => sink.send(message).await,
        Writing::Flush => sink.flush().await,
    }
}

impl End {
    /// How a connection ends after an error of the websocket.
    fn of(error: &Error) -> Self {
        debug!(%error, "a websocket of a program ended");
        match error {
            Error::Capacity(_) => Self::Close(CloseCode::Size, "the message is too long"),
            Error::Utf8(_) => Self::Close(CloseCode::Invalid, "the text is not UTF-8"),
            Error::Protocol(_) => Self::Close(CloseCode::Protocol, "not the websocket protocol"),
            Error::ConnectionClosed | Error::AlreadyClosed => Self::Closed,
            _ => Self::Broken,
        }
    }
}

/// Closes in an orderly way. What the program still sends is read, as a connection that is closed on
/// unread bytes is reset, and a reset may overtake the code.
async fn say_farewell<T: AsyncRead + AsyncWrite + Unpin>(
    mut socket: WebSocketStream<T>,
    end: End,
) -> Result<(), Error> {
    match end {
        End::Broken => return Ok(()),
        End::Closed => socket.flush().await?,
        End::Close(code, reason) => {
            socket.close(Some(CloseFrame { code, reason: reason.into() })).await?;
        }
    }
    let stream = socket.get_mut();
    stream.shutdown().await?;
    let mut discarded = [0; 4096];
    while stream.read(&mut discarded).await? > 0 {}
    Ok(())
}
