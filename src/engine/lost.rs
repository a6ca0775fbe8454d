//! Word that the device is lost: said once, heard by whoever asks or waits.

use std::sync::Arc;

use tokio::sync::watch;

/// Whether the device was lost, and why. Clones say the same.
#[derive(Clone, Debug)]
pub struct Lost {
    sender: Arc<watch::Sender<Option<Arc<str>>>>,
}

impl Default for Lost {
    fn default() -> Self {
        Self { sender: Arc::new(watch::Sender::new(None)) }
    }
}

impl Lost {
    /// Says that it is lost; the first reason counts.
    pub(super) fn set(&self, reason: &str) {
        self.sender.send_if_modified(|said| {
            let first = said.is_none();
            said.get_or_insert_with(|| reason.into());
            first
        });
    }

    /// Why, if it is lost.
    pub fn reason(&self) -> Option<Arc<str>> {
        self.sender.borrow().clone()
    }

    /// Why, as soon as it is lost.
    pub async fn wait(&self) -> Arc<str> {
        let mut said = self.sender.subscribe();
        // The sender lives as long as `self`, so this cannot fail.
        match said.wait_for(Option::is_some).await.map(|reason| reason.clone()) {
            Ok(Some(reason)) => reason,
            _ => std::future::pending().await,
        }
    }
}
