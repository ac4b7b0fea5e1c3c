"""The shipped recipes, one TOML file an experiment; `lasnn list recipes` names them."""
