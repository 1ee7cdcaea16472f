"""What the server of forked ranks imports once: all that `ldm train` will."""

import ldm.cli.train
import ldm.config.schema
import ldm.recipes
import ldm.recipes.run
import tests.preload  # noqa: F401

assert ldm.cli.train.main
