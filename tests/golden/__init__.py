"""Losses of short runs, digit by digit: what a refactoring must not change."""
