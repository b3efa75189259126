//! Traces: what a request was made of, sent to a collector by OTLP over HTTP, if one was named.
//!
//! A request's span begins when it comes in, with the caller's as its parent (W3C `traceparent`). What lies inside is made afterwards of
//! the times that were taken anyway (a clone's steps, and its worker's, which come with the worker's answer), in a task of its own: a clone
//! on its way waits for nothing of it. Without a collector all this is one look at an empty cell.
//!
//! Spans wait for the exporter's thread in a queue of 2048; those beyond are dropped.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, Span};
use tonic::codegen::http::HeaderMap;

/// How long the collector may take to answer.
const EXPORT_WITHIN: Duration = Duration::from_secs(5);
/// Most of its answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// How often a failure is told in the log.
const TELL_EVERY: Duration = Duration::from_secs(60);

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

tokio::task_local! {
    /// The span of the request that a task works for.
    static CURRENT: SpanContext;
}

/// Why there are no traces.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{0:?} is no address of a collector; say http://HOST:4318 or https://HOST")]
    Address(String),
    #[error("traces cannot be sent: {0}")]
    Exporter(String),
}

/// A collector's address, as `http://127.0.0.1:4318`; without a path that of OTLP is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector(String);

impl std::str::FromStr for Collector {
    type Err = TraceError;

    fn from_str(text: &str) -> Result<Self, TraceError> {
        let wrong = || TraceError::Address(text.to_owned());
        let uri: tonic::codegen::http::Uri = text.parse().map_err(|_| wrong())?;
        let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
        if !is_http || uri.host().is_none_or(str::is_empty) {
            return Err(wrong());
        }
        Ok(Self(match uri.path() {
            "" | "/" => format!("{}/v1/traces", text.trim_end_matches('/')),
            _ => text.to_owned(),
        }))
    }
}

/// What sends traces; [`Traces::end`] sends what is left.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Begins to send traces of this process to `collector`: `share` in hundredths of the requests whose caller did not decide it.
    pub fn begin(collector: &Collector, share: u32) -> Result<Self, TraceError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Http::new())
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(collector.0.as_str())
            .with_timeout(EXPORT_WITHIN)
            .build()
            .map_err(|error| TraceError::Exporter(error.to_string()))?;
        let ratio = f64::from(share.min(100)) / 100.0;
        let resource = Resource::builder()
            .with_service_name("coldspark")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource)
            .build();
        // A second service in this process, as tests have it, goes by the first.
        let _ = TRACER.set(provider.tracer("coldspark"));
        Ok(Self(provider))
    }

    /// Sends what is left. Blocks, but not for long.
    pub fn end(self) {
        if let Err(error) = self.0.shutdown_with_timeout(EXPORT_WITHIN) {
            tracing::debug!(%error, "not all traces were sent");
        }
    }
}

/// The client that posts to the collector. It blocks, on the exporter's own thread.
#[derive(Debug)]
struct Http(ureq::Agent);

impl Http {
    fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(EXPORT_WITHIN))
            .max_redirects(0)
            .user_agent(concat!("coldspark/", env!("CARGO_PKG_VERSION")))
            .build();
        Self(config.into())
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let answer = self.0.run(Request::from_parts(parts, &body[..]))?;
        let (parts, mut body) = answer.into_parts();
        let body = body.with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }
}

#[tonic::async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.send(request);
        match &answer {
            Ok(answer) if answer.status().is_success() => {}
            Ok(answer) => tell(&format!("the collector answered {}", answer.status())),
            Err(error) => tell(&error.to_string()),
        }
        answer
    }
}

/// Says that traces are lost, but not again and again.
fn tell(problem: &str) {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    static NEXT_S: AtomicU64 = AtomicU64::new(0);
    let now = BEGAN.elapsed().as_secs();
    let next = NEXT_S.load(Ordering::Relaxed);
    let then = now + TELL_EVERY.as_secs();
    if now >= next && NEXT_S.compare_exchange(next, then, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        tracing::warn!(problem, "traces could not be sent, and are lost");
    }
}

/// The span of a request under way.
#[derive(Debug)]
pub struct RequestSpan(Span);

impl RequestSpan {
    /// Begins one, if traces are sent. `method`: `package.Service/Method`.
    pub fn begin(method: &'static str, headers: &HeaderMap) -> Option<Self> {
        let tracer = TRACER.get()?;
        let parent =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let (service, name) = method.split_once('/').unwrap_or(("", method));
        let builder = SpanBuilder::from_name(method).with_kind(SpanKind::Server).with_attributes([
            KeyValue::new("rpc.system", "grpc"),
            KeyValue::new("rpc.service", service),
            KeyValue::new("rpc.method", name),
        ]);
        Some(Self(builder.start_with_context(tracer, &parent)))
    }

    /// Runs a request's work, whose spans are inside this one.
    pub fn around<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        CURRENT.scope(self.0.span_context().clone(), work)
    }

    /// `code`: of gRPC, its number and name.
    pub fn end(mut self, code: i32, name: &'static str) {
        self.0.set_attribute(KeyValue::new("rpc.grpc.status_code", i64::from(code)));
        if code != 0 {
            self.0.set_status(Status::error(name));
        }
        self.0.end();
    }
}

/// Where spans that are made later belong.
#[derive(Debug, Clone)]
pub struct Place(SpanContext);

impl Place {
    /// The request that this task works for; of work that nobody asked for, one without a span. `None` if no traces are sent, or not
    /// of this request.
    pub fn here() -> Option<Self> {
        TRACER.get()?;
        let here = CURRENT.try_with(Clone::clone).unwrap_or(SpanContext::NONE);
        (here.is_sampled() || !here.is_valid()).then_some(Self(here))
    }

    /// Does work in another task that belongs here.
    pub async fn carry<F: Future>(place: Option<Self>, work: F) -> F::Output {
        match place {
            Some(place) => CURRENT.scope(place.0, work).await,
            None => work.await,
        }
    }
}

/// A part of something that was timed: its name, and how long it took. One called `outer/inner` lies in `outer`, the first of them at its beginning,
/// each next one behind the one before.
#[derive(Debug, Clone)]
pub struct Part {
    pub name: String,
    pub took: Duration,
}

/// Something that is over.
#[derive(Debug, Clone)]
pub struct Road {
    pub name: &'static str,
    pub began: Instant,
    /// In order, without gaps.
    pub parts: Vec<Part>,
    /// Names and values, for people.
    pub about: Vec<(&'static str, String)>,
}

impl Road {
    /// Makes its spans, in a task of its own. Must be called in a tokio runtime.
    pub fn tell(self, place: Place) {
        let (ended, now) = (Instant::now(), SystemTime::now());
        tokio::spawn(async move {
            if let Some(tracer) = TRACER.get() {
                self.spans(tracer, &place, ended, now);
            }
        });
    }

    fn spans(self, tracer: &SdkTracer, place: &Place, ended: Instant, now: SystemTime) {
        let wall = |at: Instant| now.checked_sub(ended.saturating_duration_since(at)).unwrap_or(now);
        // Without a request it is the root of a trace.
        let parent = match place.0.is_valid() {
            true => Context::new().with_remote_span_context(place.0.clone()),
            false => Context::new(),
        };
        let about = self.about.into_iter().map(|(name, value)| KeyValue::new(name, value));
        let mut whole = SpanBuilder::from_name(self.name)
            .with_start_time(wall(self.began))
            .with_attributes(about)
            .start_with_context(tracer, &parent);
        let inside = |span: &Span| Context::new().with_remote_span_context(span.span_context().clone());
        let whole_context = inside(&whole);
        let mut reached = self.began;
        // Of the part that inner ones may follow: its name, its place, and where the next begins.
        let mut outer: Option<(String, Context, Instant)> = None;
        for part in self.parts {
            if let Some((name, context, at)) = &mut outer
                && let Some(inner) =
                    part.name.strip_prefix(name.as_str()).and_then(|rest| rest.strip_prefix('/'))
            {
                let begin = *at;
                *at += part.took;
                let mut span = SpanBuilder::from_name(inner.to_owned())
                    .with_start_time(wall(begin))
                    .start_with_context(tracer, context);
                span.end_with_timestamp(wall(*at));
                continue;
            }
            let begin = reached;
            reached += part.took;
            let mut span = SpanBuilder::from_name(part.name.clone())
                .with_start_time(wall(begin))
                .start_with_context(tracer, &whole_context);
            outer = Some((part.name, inside(&span), begin));
            span.end_with_timestamp(wall(reached));
        }
        whole.end_with_timestamp(wall(ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_a_web_address_and_gets_the_path_of_otlp() {
        let collector = |text: &str| text.parse::<Collector>().map(|collector| collector.0);
        assert_eq!(collector("http://127.0.0.1:4318").unwrap(), "http://127.0.0.1:4318/v1/traces");
        assert_eq!(collector("https://otlp.example.org/").unwrap(), "https://otlp.example.org/v1/traces");
        assert_eq!(collector("http://h/a/v1/traces").unwrap(), "http://h/a/v1/traces");
        for wrong in ["", "127.0.0.1:4318", "grpc://h:4317", "http://", "http:///x", "/v1/traces"] {
            assert!(collector(wrong).is_err(), "{wrong:?}");
        }
    }
}
