"""A package, so that `tests.ranks` is ours even where an installed distribution brings its own `tests`."""
