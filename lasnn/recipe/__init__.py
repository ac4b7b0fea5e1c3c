"""The recipe: an experiment as one strict, typed TOML file."""

from lasnn.recipe.schema import Recipe

__all__ = ["Recipe"]
