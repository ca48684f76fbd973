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
    from tailor.recipes.prompt_optimize import optimize_prompt
    from tailor.recipes.prompt_settings import PromptRecipe
    from tailor.recipes.recommend import recommend
    from tailor.recipes.sweep import sweep
    from tailor.recipes.sweep_settings import SweepRecipe
    from tailor.recipes.tune import resume, tune
    from tailor.recipes.tune_settings import TuneRecipe
    from tailor.recipes.tune_together import resume_many, tune_many
    from tailor.recipes.verify import verify
    from tailor.techniques import TECHNIQUES
    from tailor.techniques.adapter import Adapter
    from tailor.techniques.full import Full
    from tailor.techniques.ia3 import IA3
    from tailor.techniques.lora import LoRA
    from tailor.techniques.new_tokens import NewTokens
    from tailor.techniques.p_tuning import PTuning
    from tailor.techniques.prefix_tuning import PrefixTuning
    from tailor.techniques.prompt_tuning import PromptTuning
    from tailor.techniques.prompting import Prompting
    from tailor.text.messages import Message

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "CompareRecipe",
    "Full",
    "IA3",
    "LoRA",
    "Message",
    "NewTokens",
    "OBJECTIVES",
    "PTuning",
    "PrefixTuning",
    "PromptRecipe",
    "PromptTuning",
    "Prompting",
    "SamplingParams",
    "ScriptedBackend",
    "SweepRecipe",
    "TECHNIQUES",
    "TailorError",
    "TuneRecipe",
    "compare",
    "evaluate",
    "load",
    "load_base",
    "optimize_prompt",
    "plan",
    "read_records",
    "recommend",
    "resume",
    "resume_many",
    "sweep",
    "tune",
    "tune_many",
    "verify",
]

_HOMES = {
    "Adapter": "tailor.techniques.adapter",
    "CompareRecipe": "tailor.recipes.compare_settings",
    "Full": "tailor.techniques.full",
    "IA3": "tailor.techniques.ia3",
    "LoRA": "tailor.techniques.lora",
    "Message": "tailor.text.messages",
    "NewTokens": "tailor.techniques.new_tokens",
    "OBJECTIVES": "tailor.objectives",
    "PTuning": "tailor.techniques.p_tuning",
    "PrefixTuning": "tailor.techniques.prefix_tuning",
    "PromptRecipe": "tailor.recipes.prompt_settings",
    "PromptTuning": "tailor.techniques.prompt_tuning",
    "Prompting": "tailor.techniques.prompting",
    "SamplingParams": "tailor.inference.backend",
    "ScriptedBackend": "tailor.inference.scripted",
    "SweepRecipe": "tailor.recipes.sweep_settings",
    "TECHNIQUES": "tailor.techniques",
    "TailorError": "tailor.errors",
    "TuneRecipe": "tailor.recipes.tune_settings",
    "compare": "tailor.recipes.compare",
    "evaluate": "tailor.recipes.evaluate",
    "load": "tailor.inference.load",
    "load_base": "tailor.models.base",
    "optimize_prompt": "tailor.recipes.prompt_optimize",
    "plan": "tailor.recipes.plan",
    "read_records": "tailor.data.readers",
    "recommend": "tailor.recipes.recommend",
    "resume": "tailor.recipes.tune",
    "resume_many": "tailor.recipes.tune_together",
    "sweep": "tailor.recipes.sweep",
    "tune": "tailor.recipes.tune",
    "tune_many": "tailor.recipes.tune_together",
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
