"""Protocols over models: what is drawn, how it is judged, what is kept, over one process or many."""
