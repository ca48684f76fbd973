"""Is this machine ready? Checks of system, torch, packages, folders and base, each with what to do about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from tailor.errors import ConfigError, TailorError
from tailor.machine import memory, usable_cores
from tailor.recipes.base_facts import BaseFacts, base_facts
from tailor.runs import home
from tailor.text.messages import Message, assistant, user

Status = Literal["PASS", "WARN", "FAIL"]

DISTRIBUTION = "tailor-llm"
GIB = 2**30
LITTLE_MEMORY = 4 * GIB
LITTLE_DISK = 5 * GIB

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
"""Instruction sets that matrix products are fast with (x86 first, then ARM)."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One thing that was looked at. `fix` says what to do unless it passed."""

    topic: str
    name: str
    status: Status
    detail: str
    fix: str | None = None


def doctor(base: str | None = None) -> list[Checked]:
    """Check everything; with `base`, also that base's tokenizer and template. A check that breaks is a FAIL."""
    checks: list[tuple[str, Callable[[], Iterable[Checked]]]] = [
        ("system", check_system),
        ("torch", check_torch),
        ("packages", check_packages),
        ("extras", check_extras),
        ("folders", check_folders),
        ("hub", check_hub),
        ("embedded base", check_embedded),
    ]
    if base is not None:
        checks.append((base, lambda: check_base(base)))
    found: list[Checked] = []
    for topic, run in checks:
        try:
            found += run()
        except TailorError as error:
            found.append(Checked(topic, "check", "FAIL", error.message, error.hint))
        except Exception as error:  # whatever is broken here is what the person came to find out
            found.append(Checked(topic, "check", "FAIL", f"{type(error).__name__}: {error}", "reinstall tailor-llm"))
    return found


def check_system() -> Iterator[Checked]:
    """Python, operating system, processor, memory, disk."""
    yield Checked("system", "Python", "PASS", f"{platform.python_version()} ({sys.executable})")
    yield Checked("system", "system", "PASS", f"{platform.system()} {platform.release()}, {platform.machine()}")
    flags = cpu_flags()
    yield Checked("system", "CPU flags", "PASS", ", ".join(flags) or "none of those that matter are known")
    yield Checked("system", "CPU cores", "PASS", f"{usable_cores()} usable of {os.cpu_count()}")
    if (found := memory()) is not None:
        free, total = found
        detail = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
        if free < LITTLE_MEMORY:
            yield Checked("system", "memory", "WARN", detail, "close programs, or keep to small bases")
        else:
            yield Checked("system", "memory", "PASS", detail)
    yield _disk()


def cpu_flags() -> list[str]:
    """Which of CPU_FLAGS the processor has, as the system tells; [] where it does not."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text("utf-8", errors="replace"), re.MULTILINE)
        words = set(found[1].split()) if found else set[str]()
    elif platform.system() == "Darwin":
        words = _mac_features()
    else:
        words = set()
    return [flag for flag in CPU_FLAGS if flag in words]


def _mac_features() -> set[str]:
    """Features of Apple's sysctl in the spelling of Linux (`hw.optional.arm.FEAT_BF16: 1` → bf16)."""
    told = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True, check=False).stdout.lower()
    words = set(re.findall(r"(?:feat_|hw\.optional\.)(\w+): 1", told))
    return words | {"asimd"} if platform.machine() == "arm64" else words | ({"avx2"} if "avx2_0" in words else set())


def _disk() -> Checked:
    folder = _existing(home())
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free at {folder}"
    if free < LITTLE_DISK:
        return Checked("system", "disk", "WARN", detail, "free some space, or set TAILOR_HOME to another disk")
    return Checked("system", "disk", "PASS", detail)


def check_torch() -> Iterator[Checked]:
    """torch's version and devices, and whether they compute in bfloat16."""
    import torch

    yield Checked("torch", "torch", "PASS", f"{torch.__version__}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        detail = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, bfloat16: {_yes(torch.cuda.is_bf16_supported())}"
        yield Checked("torch", f"cuda:{index}", "PASS", detail)
    if torch.backends.mps.is_available():
        yield Checked("torch", "mps", "PASS", "Apple GPU")
    fast = {"avx512_bf16", "amx_bf16", "bf16"} & {*cpu_flags()}
    detail = "bfloat16 in hardware" if fast else "bfloat16 is emulated, float32 is faster"
    yield Checked("torch", "cpu", "PASS", f"{torch.backends.cpu.get_cpu_capability()}, {detail}")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield Checked(
            "torch", "cuda", "WARN", "there is an NVIDIA driver, but torch sees no GPU", "install torch for CUDA"
        )


def check_packages() -> Iterator[Checked]:
    """The packages that tailor cannot do without."""
    for requirement in _requirements().get("", []):
        status, detail = _installed(requirement)
        fix = None if status == "PASS" else f'pip install "{requirement}"'
        yield Checked("packages", _name(requirement), "PASS" if status == "PASS" else "FAIL", detail, fix)


def check_extras() -> Iterator[Checked]:
    """Every extra of the distribution: which of its packages are missing, and the line that installs them."""
    by_extra = _requirements()
    for extra, requirements in by_extra.items():
        if not extra:
            continue
        states = {_name(one): _installed(one) for one in _expanded(requirements, by_extra)}
        missing = [f"{name} ({detail})" for name, (status, detail) in states.items() if status != "PASS"]
        if missing:
            fix = f'pip install "{DISTRIBUTION}[{extra}]"'
            yield Checked("extras", extra, "WARN", f"not there: {', '.join(missing)}", fix)
        else:
            listed = ", ".join(f"{name} {detail}" for name, (_, detail) in states.items())
            yield Checked("extras", extra, "PASS", listed)


def _requirements() -> dict[str, list[str]]:
    """Requirement strings by extra ("" for the core), as the installed distribution declares them."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"{DISTRIBUTION} is not installed, only imported", hint="pip install -e .") from error
    found: dict[str, list[str]] = {}
    for line in declared:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
        found.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return found


def _expanded(requirements: Iterable[str], by_extra: dict[str, list[str]]) -> Iterator[str]:
    """Requirements with `tailor-llm[a,b]` replaced by those of its extras."""
    for requirement in requirements:
        if _name(requirement) == DISTRIBUTION:
            inside = re.search(r"\[(.*?)\]", requirement)
            for extra in inside[1].split(",") if inside else ():
                yield from _expanded(by_extra.get(extra.strip(), []), by_extra)
        else:
            yield requirement


def _name(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]


def _installed(requirement: str) -> tuple[Status, str]:
    """(PASS, version), or (WARN, what is wrong)."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return "WARN", "not installed"
    if not wanted.specifier.contains(version, prereleases=True):
        return "WARN", f"{version}, but {wanted.specifier} is needed"
    return "PASS", version


def check_folders() -> Iterator[Checked]:
    """Can TAILOR_HOME and the hub's cache be written?"""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _writable("TAILOR_HOME", home(), "FAIL", "set TAILOR_HOME to a folder you can write")
    yield _writable("hub cache", Path(HF_HUB_CACHE), "WARN", "set HF_HOME to a folder you can write")


def _writable(name: str, folder: Path, otherwise: Status, fix: str) -> Checked:
    there = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Checked("folders", name, otherwise, f"{folder} cannot be written ({error.strerror})", fix)
    return Checked("folders", name, "PASS", str(folder) if there == folder else f"{folder} (made when needed)")


def _existing(path: Path) -> Path:
    """The path, or the nearest thing above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def check_hub() -> Iterator[Checked]:
    """What the environment tells the Hugging Face libraries. A token's value is never shown."""
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("0", "")
    ]
    if offline:
        fix = f"unset {' '.join(offline)}"
        yield Checked("hub", "downloads", "WARN", f"off ({', '.join(offline)}): only bases that are here load", fix)
    else:
        yield Checked("hub", "downloads", "PASS", "on; nothing is downloaded unless you name it")
    yield Checked(
        "hub", "HF_TOKEN", "PASS", "set" if os.environ.get("HF_TOKEN") else "not set (only gated bases need it)"
    )


def check_embedded() -> Iterator[Checked]:
    """Does `tailor-nano` load and run, with its end of turn in the loss?"""
    from tailor.models.base import load_base

    base = load_base("tailor-nano", "cpu")
    detail = f"loads: {base.num_parameters:,} parameters, context {base.max_seq_len}, packed pass equals the stock one"
    yield Checked("embedded base", "tailor-nano", "PASS", detail)
    yield _end_of_turn("embedded base", base_facts("tailor-nano"))


def check_base(name: str) -> Iterator[Checked]:
    """Tokenizer and template of a base; its weights are neither loaded nor fetched."""
    facts = base_facts(name)
    tokenizer, config = facts.tokenizer, facts.config
    yield Checked(name, "architecture", "PASS", f"{config.model_type}, {facts.num_parameters:,} parameters")
    yield Checked(name, "context", "PASS", f"{facts.max_seq_len} tokens")
    template = "chat template" if tokenizer.chat_template else "none: prompt and completion stand side by side"
    yield Checked(name, "template", "PASS", template)
    specials = sorted(tokenizer.special_texts)
    shown = ", ".join(specials[:12]) + (f" and {len(specials) - 12} more" if len(specials) > 12 else "")
    yield Checked(name, "special tokens", "PASS", shown or "none")
    yield _vocabulary(name, facts)
    yield _padding(name, facts)
    yield _end_of_turn(name, facts)


def _vocabulary(name: str, facts: BaseFacts) -> Checked:
    size, rows = facts.tokenizer.vocab_size, int(facts.config.vocab_size)
    if size > rows:
        fix = "use the tokenizer this model was trained with"
        return Checked(name, "vocabulary", "FAIL", f"the tokenizer has {size} ids, the model only {rows}", fix)
    return Checked(name, "vocabulary", "PASS", f"{size} ids, {rows} rows in the model")


def _padding(name: str, facts: BaseFacts) -> Checked:
    """Rows are packed, never padded, so this matters only to other tools."""
    pad, eos = facts.tokenizer.hf.pad_token_id, facts.tokenizer.eos_id
    if pad is not None and pad == eos:
        return Checked(name, "padding", "PASS", "pad is eos: harmless here, tools that mask pad would never train eos")
    return Checked(name, "padding", "PASS", "no pad token (none is needed)" if pad is None else "pad differs from eos")


def _end_of_turn(topic: str, facts: BaseFacts) -> Checked:
    """Render a turn as training does: the token that ends it must count, and the prompt must be its prefix."""
    turns: list[Message] = [user("Hi"), assistant("Hello")]
    rendered, prompt = facts.renderer.example(turns), facts.renderer.prompt(turns[:1])
    counted = [i for i, mask in zip(rendered.token_ids, rendered.loss_mask, strict=True) if mask]
    fix = "repair the chat template: it must end an assistant turn with a special token"
    if not counted or counted[-1] != facts.renderer.stop[0]:
        return Checked(topic, "end of turn", "FAIL", f"{facts.end_of_turn} is not in the loss", fix)
    if rendered.token_ids[: len(prompt)] != prompt:
        fix = "repair the chat template: add_generation_prompt must open the assistant turn"
        return Checked(topic, "end of turn", "FAIL", "the generation prompt is no prefix of the training row", fix)
    stops = ", ".join(facts.tokenizer.token_text(i) for i in facts.renderer.stop)
    return Checked(topic, "end of turn", "PASS", f"{facts.end_of_turn} is in the loss; generation stops at {stops}")


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
