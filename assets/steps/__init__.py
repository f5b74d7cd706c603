"""What the stage files share: how entries are built, and what Dagster shows of them."""
