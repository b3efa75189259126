//! A request that was cut off is not one that has ended. tonic gives its services the same `None` for both when the
//! caller cancels (RST_STREAM with CANCEL, RFC 9113 section 7): half a file would be a whole one, and a command that
//! reads its stdin to the end would take a part for all. This layer, under all services, makes an error of it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use hyper::body::{Body as HttpBody, Frame, SizeHint};
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

const WHY: &str = "the caller cancelled the request in the middle";

/// Puts [`NotEnded`] around the services.
#[derive(Debug, Clone, Copy)]
pub struct CutOffLayer;

impl<S> Layer<S> for CutOffLayer {
    type Service = NotEnded<S>;

    fn layer(&self, inner: S) -> NotEnded<S> {
        NotEnded(inner)
    }
}

/// Gives a service requests whose bodies fail when they are cut off.
#[derive(Debug, Clone)]
pub struct NotEnded<S>(S);

impl<S> Service<Request<Body>> for NotEnded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let cut = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&cut);
        let answering = self.0.call(request.map(|body| Body::new(Incoming { body, cut })));
        Box::pin(async move {
            let response = answering.await?;
            // For the metrics and the trace: nobody else hears it.
            Ok(if seen.load(Ordering::Relaxed) { Status::cancelled(WHY).into_http() } else { response })
        })
    }
}

/// A request's body.
struct Incoming {
    body: Body,
    cut: Arc<AtomicBool>,
}

impl HttpBody for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        Poll::Ready(match frame {
            // Any other code than this one reaches the service.
            Some(Err(status)) if status.code() == Code::Cancelled => {
                self.cut.store(true, Ordering::Relaxed);
                Some(Err(Status::aborted(WHY)))
            }
            frame => frame,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
