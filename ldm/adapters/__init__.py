"""What trains and what is exported: whole weights, low-rank corrections, or new token embeddings. No loss here."""
