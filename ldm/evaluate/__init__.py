"""Measuring pictures: feature distances, CLIP score, caption retrieval, reconstruction error."""
