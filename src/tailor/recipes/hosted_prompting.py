"""Prompting on a hosted base as an artifact: the technique that needs text alone. The others are refused by name."""

from __future__ import annotations

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.errors import ConfigError
from tailor.inference.hosted_endpoint import hosted_endpoint
from tailor.models.files import is_hosted
from tailor.recipes.tune_prepare import read_rows
from tailor.recipes.tune_save import labels_of
from tailor.recipes.tune_settings import TuneRecipe
from tailor.techniques.prompting import Prompting


def prompt_hosted(recipe: TuneRecipe, *, quiet: bool = False) -> Artifact:
    """Take the shots from the recipe's rows and save the prompt; nothing is asked of the endpoint.

    Raises ConfigError for techniques that need the base's weights, DataError, ConflictError.
    """
    artifacts.check_free(recipe.output.name, recipe.output.force)
    recipe = recipe.absolute()
    endpoint = hosted_endpoint(recipe.base.name)
    if any(not isinstance(technique, Prompting) for technique in recipe.technique) or len(recipe.technique) > 1:
        check_not_hosted(recipe)
    rows = read_rows(recipe, quiet=quiet).dataset
    techniques = [technique.prepare(rows.train, recipe.train.seed) for technique in recipe.technique]
    facts = {
        "techniques": [technique.model_dump(mode="json") for technique in techniques],
        "recipe": recipe.model_dump(mode="json"),
        "objective": recipe.objective,
        "data": {
            "content_hash": rows.content_hash,
            "num_train": len(rows.train),
            "num_validation": len(rows.validation),
        },
        "labels": labels_of(rows.train),
        "notes": [*recipe.notes, *rows.notes],
    }
    return artifacts.save_hosted(recipe.output.name, endpoint.name, facts, force=recipe.output.force)


def check_not_hosted(recipe: TuneRecipe) -> None:
    """Raise ConfigError when the recipe trains on a hosted base, naming the techniques and what can be done instead."""
    if not is_hosted(recipe.base.name):
        return
    kinds = [technique.type for technique in recipe.technique]
    if kinds == ["prompting"]:
        raise ConfigError(
            f"{recipe.base.name} is hosted: there is no base to be loaded",
            hint="prompting goes around it all the same: tailor tune on the command line, or recipes.hosted_prompting",
        )
    raise ConfigError(
        f"{' and '.join(kind for kind in kinds if kind != 'prompting') or 'prompting twice'} needs the base's weights, "
        f"and {recipe.base.name} is hosted",
        hint="on a hosted base: --technique prompting; or let its provider tune it: tailor hosted tune",
    )
