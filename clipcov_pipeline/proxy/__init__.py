"""From samples to embeddings and labels: the proxy model, the LanceDB table, prompts and latent classes."""
