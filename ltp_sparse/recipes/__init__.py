"""Recipes: one YAML file per table or figure of the papers, run cell by cell."""

from ltp_sparse.recipes.recipe import Cell, Recipe, load_recipe, recipe_names

__all__ = ["Cell", "Recipe", "load_recipe", "recipe_names"]
