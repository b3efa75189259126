//! This program's stdin as messages of a stream of requests.

use std::future::pending;
use std::io;

use prost::bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::client::leave_unended;

/// Bytes in one message.
const PIECE_BYTES: usize = 64 << 10;

/// Stdin on its way, in a task of its own: who reads our output may be who writes it.
pub struct Stdin(Option<JoinHandle<io::Result<()>>>);

impl Stdin {
    /// Passes it on until its end, then sends `end` if there is such a message, and lets go of `requests`.
    pub fn pass_on<M: Send + 'static>(
        requests: mpsc::Sender<M>,
        piece: fn(Bytes) -> M,
        end: Option<M>,
    ) -> Self {
        Self(Some(tokio::spawn(pass_on(tokio::io::stdin(), requests, piece, end))))
    }

    /// None is passed on.
    pub fn none() -> Self {
        Self(None)
    }

    /// Waits until it cannot be read: for ever if it can.
    pub async fn broken(&mut self) -> anyhow::Error {
        if let Some(task) = &mut self.0 {
            let ended = task.await;
            self.0 = None;
            if let Err(error) = ended.unwrap_or_else(|error| Err(error.into())) {
                return anyhow::Error::new(error).context("cannot read stdin");
            }
        }
        pending().await
    }
}

async fn pass_on<M>(
    mut from: impl AsyncRead + Unpin,
    requests: mpsc::Sender<M>,
    piece: fn(Bytes) -> M,
    end: Option<M>,
) -> io::Result<()> {
    let mut bytes = vec![0; PIECE_BYTES];
    loop {
        let message = match from.read(&mut bytes).await {
            Ok(0) => break,
            Ok(count) => piece(Bytes::copy_from_slice(bytes.get(..count).unwrap_or_default())),
            Err(error) => {
                leave_unended(requests);
                return Err(error);
            }
        };
        if requests.send(message).await.is_err() {
            return Ok(());
        }
    }
    if let Some(end) = end {
        // The service may have ended it.
        let _ = requests.send(end).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_is_said_once_all_was_sent() {
        let (requests, mut messages) = mpsc::channel(8);
        pass_on(&b"some"[..], requests, |bytes| bytes.to_vec(), Some(vec![])).await.unwrap();
        assert_eq!(messages.recv().await.unwrap(), b"some");
        assert_eq!(messages.recv().await.unwrap(), b"");
        assert!(messages.recv().await.is_none());
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_no_end() {
        let folder = tokio::fs::File::open("/").await.unwrap();
        let from = (&b"some"[..]).chain(folder);
        let (requests, mut messages) = mpsc::channel(8);
        assert!(pass_on(from, requests, |bytes| bytes.to_vec(), Some(vec![])).await.is_err());
        assert_eq!(messages.try_recv().unwrap(), b"some");
        assert_eq!(
            messages.try_recv(),
            Err(mpsc::error::TryRecvError::Empty),
            "it must not be told that it ended"
        );
    }
}
