//! Several operations for one request at a time: all are seen to their ends.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

/// How many are in progress at most: more than any device works on at once, and few enough that one request of
/// thousands of pieces does not fill the ring.
const AT_ONCE: usize = 64;

/// Runs the futures, many at a time, and is done when all that were begun are: none of them is left in the kernel
/// with an answer given already. The result is the error of the first, in their order, that failed; after an error
/// no more are begun.
pub(super) async fn join_all<F>(futures: impl IntoIterator<Item = F>) -> io::Result<()>
where
    F: Future<Output = io::Result<()>>,
{
    let mut waiting = futures.into_iter().enumerate();
    let mut running: Vec<(usize, Pin<Box<F>>)> = Vec::new();
    let mut failed: Option<(usize, io::Error)> = None;
    poll_fn(|context| {
        running.retain_mut(|(place, future)| goes_on(*place, future, context, &mut failed));
        while running.len() < AT_ONCE && failed.is_none() {
            let Some((place, future)) = waiting.next() else { break };
            let mut future = Box::pin(future);
            if goes_on(place, &mut future, context, &mut failed) {
                running.push((place, future));
            }
        }
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    match failed {
        Some((_, e)) => Err(e),
        None => Ok(()),
    }
}

/// Polls one; its error is kept if it comes before the one that there is.
fn goes_on<F: Future<Output = io::Result<()>>>(
    place: usize,
    future: &mut Pin<Box<F>>,
    context: &mut Context<'_>,
    failed: &mut Option<(usize, io::Error)>,
) -> bool {
    let ended = match future.as_mut().poll(context) {
        Poll::Pending => return true,
        Poll::Ready(ended) => ended,
    };
    if let Err(e) = ended
        && failed.as_ref().is_none_or(|(earlier, _)| place < *earlier)
    {
        *failed = Some((place, e));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::pin::pin;
    use std::task::Waker;

    /// Ends at its `polls`th poll.
    async fn ends(polls: usize, result: Result<(), i32>, alive: &Cell<usize>) -> io::Result<()> {
        alive.set(alive.get() + 1);
        let mut left = polls;
        poll_fn(|context| {
            left -= 1;
            context.waker().wake_by_ref();
            if left == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        alive.set(alive.get() - 1);
        result.map_err(io::Error::from_raw_os_error)
    }

    fn run(future: impl Future<Output = io::Result<()>>, mut each: impl FnMut()) -> Option<i32> {
        let mut future = pin!(future);
        for _ in 0..10_000 {
            if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return done.err().and_then(|e| e.raw_os_error());
            }
            each();
        }
        panic!("it never ends");
    }

    #[test]
    fn none_is_success_and_all_are_seen_to_their_ends() {
        let alive = Cell::new(0);
        assert_eq!(run(join_all(Vec::<std::future::Ready<_>>::new()), || ()), None);
        let most = Cell::new(0);
        let futures = (0..500).map(|i| ends(1 + i % 7, Ok(()), &alive));
        assert_eq!(run(join_all(futures), || most.set(most.get().max(alive.get()))), None);
        assert_eq!((alive.get(), most.get()), (0, AT_ONCE));
    }

    #[test]
    fn the_error_is_that_of_the_first_and_comes_when_all_have_ended() {
        let alive = Cell::new(0);
        // The later one fails sooner.
        let parts = [(3, Ok(())), (5, Err(libc::ENOSPC)), (2, Err(libc::EIO)), (9, Ok(()))];
        let futures = parts.map(|(polls, result)| ends(polls, result, &alive));
        assert_eq!(run(join_all(futures), || ()), Some(libc::ENOSPC));
        assert_eq!(alive.get(), 0);
        // No more are begun.
        let begun = Cell::new(0);
        let futures = (0..500).map(|i| {
            begun.set(begun.get() + 1);
            ends(2 + i / 10, Err(libc::EIO), &alive)
        });
        assert_eq!(run(join_all(futures), || ()), Some(libc::EIO));
        assert_eq!((begun.get(), alive.get()), (AT_ONCE, 0));
    }
}
