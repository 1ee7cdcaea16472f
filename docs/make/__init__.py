"""What the site is built from beside its pages: hooks of mkdocs, the references of config keys and of commands."""
