"""Leaves out what several models cannot draw alike. Imports no torch."""

from dataclasses import replace

from launcher.train.request import Request

DROPOUT, NEFTUNE = ("lora", "dropout"), ("train", "neftune_alpha")


def without_noise(request: Request, *keys: tuple[str, str]) -> tuple[Request, tuple[str, ...]]:
    """The request with these keys (section, name) at 0, and a note on each that it asked for: several models cannot
    draw the same numbers."""
    recipe, notes = request.recipe, []
    for section, key in keys:
        if asked := getattr(getattr(recipe, section), key):
            quiet = getattr(recipe, section).model_copy(update={key: 0.0})
            recipe = recipe.model_copy(update={section: quiet})
            notes.append(f"measured with {section}.{key}=0, not the recipe's {asked:g}")
    return replace(request, recipe=recipe), tuple(notes)
