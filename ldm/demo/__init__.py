"""The demo: its run, its edits and its page."""
