//! Where every request meets the guard, whatever service it is for.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use super::guard::Guard;
use super::{Caller, Role};
use crate::api::status::denied;

/// Puts [`Guarded`] around the services.
#[derive(Debug, Clone)]
pub struct GuardLayer(pub Arc<Guard>);

impl<S> Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: Arc::clone(&self.0), inner }
    }
}

/// Refuses what the guard refuses; tells the services the role of what it lets through, as an extension of the request.
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    guard: Arc<Guard>,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let verdict = match request.extensions().get::<Caller>() {
            Some(caller) => self.guard.check(caller, request.headers(), request.uri().path()),
            None => Err(Status::internal("the caller of this connection is not known")),
        };
        match verdict {
            Ok(role) => {
                request.extensions_mut().insert(role);
                Box::pin(self.inner.call(request))
            }
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}

/// For what a method's role alone does not settle: whether this request was made by an admin.
pub fn admins_only<T>(request: &tonic::Request<T>, what: &str) -> Result<(), Status> {
    match request.extensions().get::<Role>() {
        Some(Role::Admin) => Ok(()),
        _ => Err(denied(format!("{what} needs the role {}", Role::Admin))),
    }
}
