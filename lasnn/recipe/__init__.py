"""The recipe: an experiment as one strict, typed TOML file."""
