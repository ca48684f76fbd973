"""Loading a base in 4 bits, layer by layer: the weights are never all in memory in their own precision."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailor.errors import ConfigError, require
from tailor.models.files import weight_files
from tailor.models.linear import is_conv1d, is_linear
from tailor.models.nf4 import NF4Linear, quantise
from tailor.models.placement import placement_of

QUANTISED = ("nf4",)
"""What `quantize` may be."""

METHOD = "tailor-nf4"


def load_quantised(folder: Path, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model of a folder with the linear layers of its decoder in NF4, everything else in `dtype`.

    Embedding, head, norms and MoE experts (which are no linear layers) stay as they are. One tensor is read, quantised
    on `device` and let go before the next. Raises MissingDependencyError, and ConfigError for float64.
    """
    require("bitsandbytes", "quant")
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, GenerationConfig

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError("quantize: nf4 goes with dtype float32, bfloat16 or float16")
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    # read, not mapped: pages of a mapped file would stay resident after the tensor is quantised
    files: list[Any] = [safe_open(path, framework="pt", backend="pread") for path in weight_files(folder)]
    model = kind.from_pretrained(
        None,
        config=config,
        state_dict={name: file.get_slice(name) for file in files for name in file.keys()},  # noqa: SIM118
        dtype=dtype,
        attn_implementation="eager",
        quantization_config=_settings_class()(device),
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, _Unread):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.read())
    _forget_the_quantiser(model)
    return model


class _Unread(nn.Module):
    """Stands for a linear layer while transformers loads: its weight becomes the 4-bit bytes, `state` says how."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
        self.transposed = is_conv1d(layer)
        self.device = device
        self.state: Any = None

    def take(self, weight: Tensor) -> Tensor:
        """Quantise what was read."""
        weight = weight.to(self.device)
        packed, self.state = quantise(weight.t() if self.transposed else weight)
        return packed

    def read(self) -> NF4Linear:
        """The layer that takes the place of this one."""
        return NF4Linear(self.weight.data, self.state, self.bias, transposed=self.transposed)


@cache
def _settings_class() -> Any:
    """The settings that make `from_pretrained` quantise each of the decoder's linear layers as soon as it is read."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class Settings(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, device: torch.device) -> None:
            self.quant_method = METHOD
            self.device = device

    class Quantise(ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: Any, *, model: Any, **kwargs: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                packed = model.get_submodule(name.rpartition(".")[0]).take(weight)
                found[name] = nn.Parameter(packed, requires_grad=False)
            return found

    @register_quantizer(METHOD)
    class Quantiser(HfQuantizer):  # type: ignore[misc]
        is_trainable = True

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            inside = placement_of(model.config).layers(model) + "."
            for name, module in list(model.named_modules()):
                if name.startswith(inside) and is_linear(module):
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, _Unread(module, self.quantization_config.device))

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            module, _, name = param_name.rpartition(".")
            return name == "weight" and isinstance(model.get_submodule(module), _Unread)

        def get_quantize_ops(self) -> Any:
            return Quantise()

    return Settings


def _forget_the_quantiser(model: Any) -> None:
    """The layers are ours now: the model is moved, copied and saved like any other."""
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if "_is_quantized" in vars(getattr(module, "config", None) or object):
            del module.config._is_quantized
