//! What may break on a fleet with one server ([`crate::faults`]), and what only one server can run out of.

use crate::faults::{Ground, limits, tests_on};

tests_on!(Ground::OneServer);

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_refuses_clearly_and_loses_nothing() -> anyhow::Result<()> {
    limits::a_full_store_refuses_clearly_and_loses_nothing().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_size_limit_refuses_clearly_and_loses_nothing() -> anyhow::Result<()> {
    limits::a_file_size_limit_refuses_clearly_and_loses_nothing().await
}
