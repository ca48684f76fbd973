"""tailor: customise a language model by every technique there is, and measure which one wins.

The public names are loaded when they are used, so that `import tailor` and `tailor --help` are quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailor.data.readers import read_records
    from tailor.errors import TailorError
    from tailor.inference.backend import SamplingParams
    from tailor.inference.load import load
    from tailor.inference.scripted import ScriptedBackend
    from tailor.models.base import load_base
    from tailor.objectives import OBJECTIVES
    from tailor.recipes.compare import compare
    from tailor.recipes.compare_settings import CompareRecipe
    from tailor.recipes.evaluate import evaluate
    from tailor.recipes.plan import plan
    from tailor.recipes.recommend import recommend
    from tailor.recipes.tune import TuneRecipe, resume, tune
    from tailor.recipes.verify import verify
    from tailor.techniques import TECHNIQUES
    from tailor.techniques.full import Full
    from tailor.techniques.lora import LoRA
    from tailor.techniques.prompt_tuning import PromptTuning
    from tailor.techniques.prompting import Prompting
    from tailor.text.messages import Message

__version__ = "0.1.0"

__all__ = [
    "CompareRecipe",
    "Full",
    "LoRA",
    "Message",
    "OBJECTIVES",
    "PromptTuning",
    "Prompting",
    "SamplingParams",
    "ScriptedBackend",
    "TECHNIQUES",
    "TailorError",
    "TuneRecipe",
    "compare",
    "evaluate",
    "load",
    "load_base",
    "plan",
    "read_records",
    "recommend",
    "resume",
    "tune",
    "verify",
]

_HOMES = {
    "CompareRecipe": "tailor.recipes.compare_settings",
    "Full": "tailor.techniques.full",
    "LoRA": "tailor.techniques.lora",
    "Message": "tailor.text.messages",
    "OBJECTIVES": "tailor.objectives",
    "PromptTuning": "tailor.techniques.prompt_tuning",
    "Prompting": "tailor.techniques.prompting",
    "SamplingParams": "tailor.inference.backend",
    "ScriptedBackend": "tailor.inference.scripted",
    "TECHNIQUES": "tailor.techniques",
    "TailorError": "tailor.errors",
    "TuneRecipe": "tailor.recipes.tune",
    "compare": "tailor.recipes.compare",
    "evaluate": "tailor.recipes.evaluate",
    "load": "tailor.inference.load",
    "load_base": "tailor.models.base",
    "plan": "tailor.recipes.plan",
    "read_records": "tailor.data.readers",
    "recommend": "tailor.recipes.recommend",
    "resume": "tailor.recipes.tune",
    "tune": "tailor.recipes.tune",
    "verify": "tailor.recipes.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tailor' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
