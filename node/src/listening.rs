//! Listeners that other services can wait for.

use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::ServerApp;
use pingora_core::server::{ListenFds, ShutdownWatch};
use pingora_core::services::listening::Service;
use pingora_core::services::{self, ServiceReadyNotifier, ServiceWithDependents};

/// How often to check whether the addresses are bound.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A service that counts as ready once it listens at all its addresses.
/// Pingora's own counts as ready before it binds the first, and whoever asks
/// `/ready` then would be sent to a closed door.
pub struct Listening<A>(pub Service<A>);

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServiceWithDependents for Listening<A> {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        let addresses = services::Service::listen_addresses(&self.0).unwrap_or_default();
        let bound = {
            let fds = fds.clone();
            move || {
                let Some(fds) = &fds else { return true };
                let fds = fds.lock();
                addresses.iter().all(|address| fds.get(address).is_some())
            }
        };
        let notify = async {
            while !bound() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            ready.notify_ready();
        };
        let serve = services::Service::start_service(&mut self.0, fds, shutdown, listeners_per_fd);
        tokio::join!(serve, notify);
    }

    fn name(&self) -> &str {
        services::Service::name(&self.0)
    }

    fn threads(&self) -> Option<usize> {
        services::Service::threads(&self.0)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        services::Service::listen_addresses(&self.0)
    }
}
