"""Configurations of other trainers become ours: one file a format, each key told what became of it."""
