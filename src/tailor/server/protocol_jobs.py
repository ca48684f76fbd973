"""OpenAI's names of files and fine-tuning jobs: what requests hold, and what answers hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, WrapValidator
from pydantic_core import PydanticCustomError

from tailor.server.protocol import Body, NonEmpty, Whole
from tailor.server.responses import Answer

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
"""What a file may be uploaded for; what jobs write themselves has the purpose of `RESULTS`."""
RESULTS = "fine-tune-results"

Purpose = Literal[
    "assistants",
    "batch",
    "fine-tune",
    "vision",
    "user_data",
    "evals",
    "assistants_output",
    "batch_output",
    "fine-tune-results",
]
Order = Literal["asc", "desc"]


# --- files -----------------------------------------------------------------------------------------------------------


class FileObject(Answer):
    """An uploaded file. `status` is deprecated, and clients wait for it to be `processed`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


class FileList(Answer):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(Answer):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


# --- what a job is asked for -----------------------------------------------------------------------------------------


def _or_auto(what: str) -> WrapValidator:
    """One message in place of one per alternative."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValueError:
            raise PydanticCustomError("auto", "it must be 'auto' or {what}", {"what": what}) from None

    return WrapValidator(check)


Auto = Literal["auto"]
Epochs = Annotated[Auto | Annotated[int, Field(ge=1, le=1000)], _or_auto("a whole number from 1 to 1000")]
BatchSize = Annotated[Auto | Annotated[int, Field(ge=1, le=65_536)], _or_auto("a whole number from 1 to 65536")]
Multiplier = Annotated[Auto | Annotated[float, Field(gt=0, le=1000)], _or_auto("a number above 0, up to 1000")]
Beta = Annotated[Auto | Annotated[float, Field(gt=0, le=2)], _or_auto("a number above 0, up to 2")]

MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class Hyperparameters(Body):
    """Numbers of a supervised job, or `auto`: the technique's measured defaults."""

    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class DpoHyperparameters(Hyperparameters):
    """Numbers of a DPO job."""

    beta: Beta = "auto"


class SupervisedMethod(Body):
    """Training on examples."""

    hyperparameters: Hyperparameters | None = None


class DpoMethod(Body):
    """Training on preferences."""

    hyperparameters: DpoHyperparameters | None = None


class Method(Body):
    """How a job trains."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: dict[str, JsonValue] | None = None


class Integration(Body):
    """Another service that would be told how the job goes."""

    type: Literal["wandb"]
    wandb: dict[str, JsonValue]


class TailorJob(Body):
    """Ours: the technique (`lora`, `adapter+p_tuning`, or an object with settings) and parts of a recipe."""

    technique: NonEmpty | dict[str, JsonValue] | list[NonEmpty | dict[str, JsonValue]] | None = None
    recipe: dict[str, JsonValue] | None = None


class CreateJob(Whole):
    """The body of POST /v1/fine_tuning/jobs."""

    model: NonEmpty
    training_file: NonEmpty
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str, StringConstraints(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: list[Integration] | None = None
    tailor: TailorJob | None = None


# --- what a job is ---------------------------------------------------------------------------------------------------


class JobHyperparameters(Answer):
    """The numbers of a job, resolved as soon as its rows are known."""

    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class FineTuningJob(Answer):
    """A job. `estimated_finish` is there while it runs; `tailor` is ours."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: JobHyperparameters
    method: dict[str, JsonValue]
    seed: int
    trained_tokens: int | None
    error: JobError | None
    integrations: list[Integration]
    metadata: dict[str, str] | None
    tailor: dict[str, JsonValue]


class FineTuningJobList(Answer):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(Answer):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue] | None


class FineTuningEventList(Answer):
    """A page of events, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class CheckpointMetrics(Answer):
    """What was measured at a checkpoint's step."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class Checkpoint(Answer):
    """A state of a job's model that can be used."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class CheckpointList(Answer):
    """The checkpoints of a job."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
