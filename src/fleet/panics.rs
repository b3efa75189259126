//! Tasks whose panic is heard. Tokio keeps it for whoever awaits a task, and nobody awaits those that go on by themselves: what they kept would be
//! kept no more, without a word.

#![forbid(unsafe_code)]

use std::any::Any;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

/// After a panic a task is begun again after so long, and then after twice as long, up to the second.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Most of what a panic said that is told.
const SAID_CHARS_MAX: usize = 200;

/// Runs a task to its end. If it panics, gives what it said; then the task is not to be polled again, and what it had goes when it is dropped.
pub async fn caught<F: Future>(task: &mut Pin<Box<F>>) -> Result<F::Output, String> {
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(context))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(said(&*panic))),
    })
    .await
}

/// Runs a task that goes on by itself, to its end. When it panics that is logged, `told` gets what it said, and it is begun again after a rest.
pub async fn again<F: Future>(what: &str, task: impl FnMut() -> F, told: impl FnMut(&str)) -> F::Output {
    again_after(REST, what, task, told).await
}

async fn again_after<F: Future>(
    (least, most): (Duration, Duration),
    what: &str,
    mut task: impl FnMut() -> F,
    mut told: impl FnMut(&str),
) -> F::Output {
    let mut rest = least;
    loop {
        let begun = Instant::now();
        let mut run = Box::pin(task());
        let said = match caught(&mut run).await {
            Ok(output) => return output,
            Err(said) => said,
        };
        drop(run);
        if begun.elapsed() > most {
            rest = least;
        }
        tracing::error!(
            said,
            again_in_s = rest.as_secs(),
            "{what} failed, which is a fault of this program, and is begun again"
        );
        told(&said);
        tokio::time::sleep(rest).await;
        rest = (rest * 2).min(most);
    }
}

/// What a panic said, in one line.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without words");
    text.chars().take(SAID_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_told_and_what_the_task_had_goes_when_it_is_dropped() {
        let had = Arc::new(());
        let kept = Arc::clone(&had);
        let mut task = Box::pin(async move {
            tokio::task::yield_now().await;
            assert_eq!(Arc::strong_count(&kept), 0, "line one\nline two");
        });
        let said = caught(&mut task).await.unwrap_err();
        assert!(said.contains("line one") && !said.contains('\n'), "{said}");
        drop(task);
        assert_eq!(Arc::strong_count(&had), 1);
        assert_eq!(caught(&mut Box::pin(async { 7 })).await, Ok(7));
    }

    #[tokio::test]
    async fn a_task_that_panics_is_begun_again_after_a_rest_until_it_ends() {
        let (begun, ms) = (Instant::now(), Duration::from_millis);
        let (mut runs, mut told) = (0, Vec::new());
        let task = || {
            runs += 1;
            let run = runs;
            async move {
                assert!(run > 3, "run {run}");
                run
            }
        };
        let told_of = |said: &str| told.push(said.to_owned());
        assert_eq!(again_after((ms(20), ms(1000)), "a test", task, told_of).await, 4);
        assert_eq!(told, ["run 1", "run 2", "run 3"]);
        assert!(begun.elapsed() >= ms(20 + 40 + 80), "{:?}", begun.elapsed());
    }
}
