"""Pages: the gallery that a run writes."""
