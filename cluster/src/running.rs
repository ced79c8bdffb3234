//! Answers under way, so that a hard purge is acknowledged only once each of
//! those that it covers has ended (G2).
//!
//! An answer holds the *epoch* in which it looked at the floors. A hard purge
//! begins another and tells the holders of the one before: each looks again,
//! and ends, or lets go of the old epoch for the new. Nothing is listed: an
//! answer costs a reference count, whatever the number of answers.
//! Not here: ending them (the daemon's `front`).

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

/// The present epoch.
#[derive(Default)]
pub(crate) struct Running {
    epoch: ArcSwap<Epoch>,
}

/// Held by an answer while it runs; see [`crate::Cluster::answering`].
#[derive(Debug)]
pub struct Epoch {
    over: watch::Sender<bool>,
}

impl Default for Epoch {
    fn default() -> Self {
        Epoch {
            over: watch::Sender::new(false),
        }
    }
}

impl Epoch {
    /// Completes when a hard purge has been applied since this epoch began.
    pub async fn over(&self) {
        // The sender is ours: it cannot be gone.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }
}

/// An epoch that is over.
#[derive(Clone)]
pub(crate) struct Over(watch::Receiver<bool>);

impl Over {
    /// Completes when nobody holds it any more.
    pub(crate) async fn let_go(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

impl Running {
    /// The present epoch, to be held. Floors are to be looked at afterwards.
    pub(crate) fn enter(&self) -> Arc<Epoch> {
        self.epoch.load_full()
    }

    /// Begins another epoch, after floors have risen; returns the one before.
    pub(crate) fn turn(&self) -> Over {
        let before = self.epoch.swap(Arc::default());
        let over = Over(before.over.subscribe());
        before.over.send_replace(true);
        over
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn an_epoch_is_let_go_when_its_last_answer_is() {
        let running = Running::default();
        let (one, two) = (running.enter(), running.enter());
        assert_eq!(one.over().now_or_never(), None);
        let over = running.turn();
        let later = running.enter();
        one.over().await;
        assert_eq!(later.over().now_or_never(), None);
        drop(one);
        assert_eq!(over.clone().let_go().now_or_never(), None);
        drop(two);
        over.let_go().await;
        drop(later);
    }

    #[tokio::test]
    async fn without_answers_nothing_is_waited_for() {
        let running = Running::default();
        assert_eq!(running.turn().let_go().now_or_never(), Some(()));
    }
}
