"""What a training run takes, before it starts: bytes, tokens, operations and seconds. Pure arithmetic.

Shapes come from a pass without memory (`training.trace`), the machine's speed from a short measurement
(`training.speed`). P is the number of trained parameters.

    training memory = process + rows + weights + P (16 bytes in fp32) + best state (4 P)
                      + what one micro-batch holds at its highest point
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20

WIDE = 4
"""Bytes of a trained parameter, its gradient, its moments and its kept best value: fp32."""

PROCESS = 450 * MIB
"""A process that has trained: Python, torch, transformers, model code, thread pools, kernels. Measured on Linux with
torch's CPU build: 440 to 460 MiB resident (250 after the imports, 130 with the first model, 60 with the first pass)."""

CUDA_CONTEXT = 550 * MIB
"""What a CUDA process takes on the device besides its tensors: context, kernels, library workspaces."""

HEAP_LIMIT = 32 * MIB
"""Smaller tensors come from the C library's heap, larger ones from the system, which gets them back when they are freed
(glibc's largest dynamic M_MMAP_THRESHOLD on 64 bits, mallopt(3))."""

HEAP_SLACK = 1.4
"""Resident bytes of the heap per byte of tensors in it: holes between tensors of changing sizes, never given back.
Measured 1.2 to 1.5 after ten steps and more."""

HEAP_REUSED = 0.2
"""Share of the freed heap that lies in pieces large enough for another model's weights. Measured 0.2."""

COLD = 1.1
"""Time of a layer among others over its time alone, again and again: its weights and activations come from memory,
not from caches. Measured 1.0 to 1.2."""

ROW_BYTES_PER_TOKEN = 64
"""A row in memory: two list entries and an int object per token, and its share of the text."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch, forward and backward. Bytes of tensors made on the way; what lives longer is not in them.

    `activations` is what the decoder leaves for backward, `logits` the most that the loss head adds to it, `peak` the
    most at any moment (`heap` of it in tensors below HEAP_LIMIT). `targets` are the counted tokens.
    """

    tokens: int
    targets: int
    activations: int
    logits: int
    peak: int
    heap: int
    forward_flops: int
    flops: int


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained: P parameters, of `itemsize` bytes where the pass uses them.

    `owns_base`: they are the base's own weights, which need no room of their own.
    """

    num_parameters: int
    itemsize: int = WIDE
    owns_base: bool = False

    @property
    def parameters(self) -> int:
        """Bytes added to the base's for the parameters: all of an adapter, the fp32 copy of narrower weights."""
        return 0 if self.owns_base and self.itemsize >= WIDE else WIDE * self.num_parameters

    @property
    def gradients(self) -> int:
        """Bytes of the optimizer's gradient buffer."""
        return WIDE * self.num_parameters

    @property
    def moments(self) -> int:
        """Bytes of AdamW's two averages."""
        return 2 * WIDE * self.num_parameters

    @property
    def best(self) -> int:
        """Bytes of one kept copy, as the pass uses the parameters."""
        return self.itemsize * self.num_parameters

    @property
    def checkpoint(self) -> int:
        """Bytes of what a checkpoint clones and writes: parameters and moments; the best state is written as it is."""
        return 3 * WIDE * self.num_parameters


def slot_bytes(num_parameters: int) -> int:
    """Additional memory of one more slot trained beside others: parameters, gradients, moments, two best states.

    Its rows take none: `tokens_per_batch` holds for the pass, however many slots share it.
    """
    slot = Trained(num_parameters)
    return slot.parameters + slot.gradients + slot.moments + 2 * slot.best


@dataclass(frozen=True, slots=True)
class Component:
    """A line of the memory table."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True, slots=True)
class Moment:
    """Everything that is held at one moment of a run."""

    name: str
    components: tuple[Component, ...]

    @staticmethod
    def of(name: str, *components: Component) -> Moment:
        """Without the components that take nothing."""
        return Moment(name, tuple(component for component in components if component.bytes))

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(component.bytes for component in self.components)


@dataclass(frozen=True, slots=True)
class Needs:
    """All that the memory of a run follows from. `converted`: bytes of weight files in another precision, else 0."""

    weights: int
    converted: int
    trained: Trained
    heaviest: Pass | None
    row_tokens: int
    verifies: bool = True
    on_gpu: bool = False


def moments(needs: Needs) -> tuple[Moment, ...]:
    """The moments of a run at which memory may be highest, in order, on the device that computes."""
    held = _held(needs)
    found = [Moment.of("loading", _floor(needs), *_loading(needs))]
    if needs.heaviest is None:
        return (*found, *_verification(needs, held, ()))
    found.append(Moment.of("training", *held, *_transient(needs.heaviest, needs.on_gpu)))
    if needs.on_gpu:  # torch's cache gives freed memory to whoever asks next, and what is written is copied elsewhere
        return (*found, *_verification(needs, held, ()))
    freed = round(HEAP_SLACK * needs.heaviest.heap)
    left = (Component("freed heap", freed, "of earlier passes, kept by the C library"),)
    copies = needs.trained.checkpoint
    if copies // 3 < HEAP_LIMIT:  # each of the three tensors finds room in the heap
        copies = max(0, copies - freed)
    written = Component("checkpoint", copies, "parameters and moments, copied to be written")
    return (*found, Moment.of("checkpoint", *held, *left, written), *_verification(needs, held, left))


def highest(found: Sequence[Moment]) -> Moment:
    """The moment that decides."""
    return max(found, key=lambda moment: moment.bytes)


def host_bytes(needs: Needs) -> int:
    """Peak in main memory when a GPU computes: weights on their way there, or rows, best states and checkpoint."""
    states = 2 * needs.trained.best + needs.trained.checkpoint
    return PROCESS + max(needs.weights, ROW_BYTES_PER_TOKEN * needs.row_tokens + states)


def _floor(needs: Needs) -> Component:
    if needs.on_gpu:
        return Component("process", CUDA_CONTEXT, "CUDA context, kernels, workspaces")
    return Component("process", PROCESS, "Python, torch, transformers")


def _loading(needs: Needs) -> tuple[Component, ...]:
    files = Component("files", 0 if needs.on_gpu else needs.converted, "mapped while they are converted")
    return Component("weights", needs.weights, "the base"), files


def _held(needs: Needs) -> tuple[Component, ...]:
    trained = needs.trained
    here = [
        _floor(needs),
        Component("weights", needs.weights, "the base" + (", trained itself" if trained.owns_base else ", frozen")),
        Component("trained parameters", trained.parameters, "fp32 copy" if trained.owns_base else "fp32"),
        Component("gradients", trained.gradients, "fp32"),
        Component("optimizer", trained.moments, "AdamW's two averages"),
    ]
    if needs.on_gpu:
        return tuple(here)
    rows = Component("rows", ROW_BYTES_PER_TOKEN * needs.row_tokens, "token ids, masks, texts")
    return *here, Component("best state", trained.best, "the best validated parameters"), rows


def _transient(one: Pass, on_gpu: bool) -> tuple[Component, ...]:
    return (
        Component("activations", one.activations, f"of {one.tokens:,} tokens, kept for backward"),
        Component("logits", one.logits, "of one chunk of counted tokens"),
        Component("backward", one.peak - one.activations - one.logits, "gradients of one layer at a time"),
        Component("heap", 0 if on_gpu else round((HEAP_SLACK - 1) * one.heap), "holes between tensors"),
    )


def _verification(needs: Needs, held: Sequence[Component], left: Sequence[Component]) -> tuple[Moment, ...]:
    if not needs.verifies:
        return ()
    copies = 2 * needs.weights + needs.converted - HEAP_REUSED * sum(component.bytes for component in left)
    twin = Component("twin", max(0, round(copies)), "the base in the next higher precision, beside the heap")
    return (Moment.of("verification", *held, *left, twin),)


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed: micro-batches, tokens and counted tokens of an average optimizer step, and of a validation.

    `row_tokens` are those of the rows, of which `tokens` is what remains to compute when beginnings are shared.
    """

    num_steps: int
    row_tokens: float
    passes: float
    tokens: float
    targets: float
    num_validations: int
    validation_passes: int = 0
    validation_tokens: int = 0
    validation_targets: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens trained on."""
        return round(self.num_steps * self.row_tokens)

    def flops(self, one: Pass) -> float:
        """Operations of the whole run, when they grow with the tokens as in `one`."""
        forward = one.forward_flops * self.num_validations * self.validation_tokens
        return (one.flops * self.num_steps * self.tokens + forward) / one.tokens


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds, measured: of all layers per token (forward and backward; forward alone), of the head per counted token,
    of each micro-batch besides, and of each optimizer step besides."""

    layers: float
    layers_forward: float
    head: float
    head_forward: float
    per_pass: float
    per_step: float

    def seconds(self, work: Work) -> float:
        """Training with validation; loading, checkpoints and verification come on top."""
        step = work.passes * self.per_pass + work.tokens * COLD * self.layers + work.targets * self.head
        validation = (
            work.validation_passes * self.per_pass
            + work.validation_tokens * COLD * self.layers_forward
            + work.validation_targets * self.head_forward
        )
        return work.num_steps * (self.per_step + step) + work.num_validations * validation
