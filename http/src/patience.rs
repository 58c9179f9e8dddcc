//! How long the other end of a connection is waited for: bytes of a request, and that it takes those of an answer.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use crate::room::Seat;

/// For each part of what the other end has to do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// The TLS handshake, and the headers of a request: also the longest pause between two of them.
    pub(crate) head: Duration,
    /// The whole body of a request that carries no recording: a few kB.
    pub(crate) body: Duration,
    /// Between two pieces of an answer that it takes. The kernel takes a third of its buffer at a time, so nobody is cut who
    /// reads a few kB a second.
    pub(crate) write: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(10), body: Duration::from_secs(10), write: Duration::from_secs(30) }
    }
}

/// A stream whose writes fail when the other end takes nothing any more.
#[derive(Debug)]
pub(crate) struct Patient<S> {
    stream: S,
    write: Duration,
    stuck: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    pub(crate) fn new(stream: S, write: Duration) -> Self {
        Self { stream, write, stuck: None }
    }

    fn judge(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if polled.is_ready() {
            self.stuck = None;
            return polled;
        }
        let write = self.write;
        ready!(self.stuck.get_or_insert_with(|| Box::pin(sleep(write))).as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the other end takes nothing")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.judge(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A request's body that has to be there in time, and that makes its connection one that asks for something once it is.
pub(crate) struct Brief {
    body: Body,
    until: Pin<Box<Sleep>>,
    late: Arc<AtomicBool>,
    seat: Option<Seat>,
}

impl Brief {
    /// `late` is set when it did not come in time.
    pub(crate) fn new(body: Body, within: Duration, late: Arc<AtomicBool>, seat: Option<Seat>) -> Self {
        let brief = Self { body, until: Box::pin(sleep(within)), late, seat };
        if brief.body.is_end_stream() {
            brief.is_whole();
        }
        brief
    }

    fn is_whole(&self) {
        if let Some(seat) = &self.seat {
            seat.asks();
        }
    }
}

impl HttpBody for Brief {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                if frame.is_none() || self.body.is_end_stream() {
                    self.is_whole();
                }
                Poll::Ready(frame)
            }
            Poll::Pending => {
                ready!(self.until.as_mut().poll(cx));
                self.late.store(true, Ordering::Relaxed);
                Poll::Ready(Some(Err(axum::Error::new(io::Error::from(io::ErrorKind::TimedOut)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body: with its end the connection waits for the next request.
pub(crate) struct Answer {
    body: Body,
    seat: Seat,
}

impl Answer {
    pub(crate) fn new(body: Body, seat: Seat) -> Self {
        Self { body, seat }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.seat.waits();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
        time::Instant,
    };

    #[tokio::test(start_paused = true)]
    async fn who_takes_a_little_now_and_then_is_waited_for_and_who_takes_nothing_is_not() {
        let (ours, mut theirs) = duplex(64);
        let mut patient = Patient::new(ours, Duration::from_secs(30));
        let reading = async {
            let mut some = [0; 64];
            for _ in 0..10 {
                sleep(Duration::from_secs(20)).await;
                theirs.read_exact(&mut some).await.expect("read");
            }
            theirs
        };
        let begun = Instant::now();
        let (written, theirs) = tokio::join!(patient.write_all(&[1; 640]), reading);
        written.expect("it was slow, not gone");
        let waited = begun.elapsed();
        assert!(waited >= Duration::from_secs(180), "{waited:?}");
        let begun = Instant::now();
        let error = patient.write_all(&[1; 640]).await.expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 30);
        drop(theirs);
    }
}
