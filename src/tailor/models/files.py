"""Where a base's files are, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tailor.errors import AuthError, ConfigError, NotFoundError, nearest
from tailor.runs import home

EMBEDDED = {"tailor-nano": Path(__file__).parent / "embedded"}
"""Bases that ship with the package."""

HOSTED_PREFIX = "openai:"
"""What names of models begin with whose weights are elsewhere, behind an OpenAI-compatible endpoint."""

FACT_PATTERNS = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
"""Configuration and tokenizer: kilobytes to a few megabytes."""

WEIGHT_PATTERNS = [*FACT_PATTERNS, "*.safetensors"]

OTHER_LAYOUTS = ["consolidated*", "original/*", "onnx/*"]
"""The same weights once more, in layouts that are not read."""


def resolve(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The folder of a base: embedded, a local folder, a full or merged artifact by name, or a hub id (downloads).

    Without `weights`, only a hub base's configuration and tokenizer are downloaded. Raises NotFoundError,
    AuthError for a gated one, ConfigError for a folder without safetensors.
    """
    name = str(name_or_path)
    if is_hosted(name):
        raise ConfigError(
            f"{name} is hosted: this needs the base's weights, and they stay with its provider",
            hint="with a hosted base: prompting, generate, chat, eval, compare, recommend, hosted tune",
        )
    if name in EMBEDDED:
        return EMBEDDED[name]
    for folder in (Path(name).expanduser(), home() / "artifacts" / name):
        if folder.is_dir():
            return _checked(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise NotFoundError(f"there is no folder {name}", hint=f"bundled bases: {', '.join(EMBEDDED)}")
    if "/" not in name:
        raise NotFoundError(
            f"there is no base {name!r}",
            hint=f"{nearest(name, EMBEDDED)}; or give a folder, or a hub id such as HuggingFaceTB/SmolLM2-135M",
        )
    return _download(name, weights)


def is_hosted(name: str | Path) -> bool:
    """Whether a base's name is that of a hosted model, `openai:MODEL@URL`."""
    return str(name).startswith(HOSTED_PREFIX)


def absolute_name(name: str) -> str:
    """The absolute path where a base's name is that of a local folder, so that it means the same from any folder."""
    folder = Path(name).expanduser()
    return name if name in EMBEDDED or not folder.is_dir() else str(folder.absolute())


def _checked(folder: Path, weights: bool = True) -> Path:
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"{folder} holds no config.json", hint="a base is a folder in the Hugging Face layout")
    if weights and not weight_files(folder):
        raise ConfigError(
            f"{folder} holds no safetensors weights",
            hint="pickled weights (.bin, .pt) are not read: convert them with safetensors.torch.save_file",
        )
    return folder


def _download(repository: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = WEIGHT_PATTERNS if weights else FACT_PATTERNS
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    try:
        folder = snapshot_download(repository, allow_patterns=wanted, ignore_patterns=OTHER_LAYOUTS)
    except HFValidationError as error:
        raise NotFoundError(
            f"{repository!r} is neither a folder nor can it be a hub id",
            hint=f"bundled bases: {', '.join(EMBEDDED)}; a hub id looks like HuggingFaceTB/SmolLM2-135M",
        ) from error
    except GatedRepoError as error:
        raise AuthError(
            f"{repository} is gated", hint="accept its licence on its page, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"the hub has no model {repository!r}", hint="check the spelling, or set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotFoundError(
            f"{repository} is neither here nor could it be downloaded{offline}",
            hint="give a local folder, or `tailor-nano`, which needs no network",
        ) from error
    if weights and offline and not weight_files(Path(folder)):
        raise NotFoundError(f"the weights of {repository} are not here{offline}", hint="unset it to download them")
    return _checked(Path(folder), weights)


def weight_files(folder: Path) -> list[Path]:
    """The base's own safetensors files (an adapter lying beside them is not part of it)."""
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith(("adapter_", "consolidated")))


def fingerprint(folder: Path) -> str:
    """A hash of the weights: every tensor's name, dtype and shape, and 256 bytes spread evenly over its data.

    Independent of how the tensors are split over files; reads a few pages per tensor, not the file.
    """
    digest = hashlib.sha256()
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        tensors |= {name: (path, 8 + size, entry) for name, entry in header.items() if name != "__metadata__"}
    for name in sorted(tensors):
        path, origin, entry = tensors[name]
        start, stop = entry["data_offsets"]
        digest.update(f"{name}|{entry['dtype']}|{entry['shape']}|".encode())
        if stop > start:
            data = np.memmap(path, dtype=np.uint8, mode="r", offset=origin + start, shape=(stop - start,))
            places = np.linspace(0, stop - start - 1, num=256).astype(np.int64)
            digest.update(data[places].tobytes())
    return digest.hexdigest()[:32]
