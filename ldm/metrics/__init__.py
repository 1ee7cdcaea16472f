"""Figures of pictures and features: distances, retrieval, scores. Pure: no model of ours, no files."""
