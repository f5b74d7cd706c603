"""From tars to checked samples: shards are found, read and listed with a status for every sample."""
