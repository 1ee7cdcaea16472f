"""Figures of pictures and features: distances, retrieval, scores. No model of ours; judges that others published."""
