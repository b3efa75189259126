//! Counts and times every request, and begins and ends its trace, whatever service it is for and however it ends: refused by the guard, answered, failed in the middle of a
//! stream, given up by its caller.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use hyper::body::{Body as HttpBody, Frame, SizeHint};
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::auth::methods;
use crate::telemetry::metrics;
use crate::telemetry::trace::RequestSpan;

/// Puts [`Measured`] around the services.
#[derive(Debug, Clone, Copy)]
pub struct MeasureLayer;

impl<S> Layer<S> for MeasureLayer {
    type Service = Measured<S>;

    fn layer(&self, inner: S) -> Measured<S> {
        Measured(inner)
    }
}

/// Measures what goes through.
#[derive(Debug, Clone)]
pub struct Measured<S>(S);

impl<S> Service<Request<Body>> for Measured<S>
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
        let method = methods::name_of(request.uri().path());
        let mut under_way = UnderWay::begin(method, RequestSpan::begin(method, request.headers()));
        let answering = self.0.call(request);
        Box::pin(async move {
            let response = match &under_way.span {
                Some(span) => span.around(answering).await?,
                None => answering.await?,
            };
            // What fails before it has an answer says so at once.
            if let Some(code) = code_in(response.headers()) {
                under_way.end(code);
            }
            Ok(response.map(|body| Body::new(Tail { body, under_way })))
        })
    }
}

/// A request that has not ended. Dropped before, its caller has gone away.
struct UnderWay {
    method: &'static str,
    begun: Instant,
    ended: bool,
    span: Option<RequestSpan>,
}

impl UnderWay {
    fn begin(method: &'static str, span: Option<RequestSpan>) -> Self {
        Self { method, begun: Instant::now(), ended: false, span }
    }

    fn end(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            metrics().request(self.method, name(code), self.begun.elapsed());
            if let Some(span) = self.span.take() {
                span.end(code.into(), name(code));
            }
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

/// The body of an answer, whose trailers tell how it ended.
struct Tail {
    body: Body,
    under_way: UnderWay,
}

impl HttpBody for Tail {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.under_way.end(code_in(trailers).unwrap_or(Code::Unknown));
                }
            }
            Some(Err(status)) => self.under_way.end(status.code()),
            None => self.under_way.end(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
}

/// As the documentation of gRPC spells it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
