"""Requests and answers of /v2, as JSON has them. Binary tensors follow the JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Given(BaseModel):
    # What the protocol lets extensions add is let through and has no effect, unless it is named.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TensorParameters(_Given):
    """Parameters of an input, or of an output that is asked for."""

    binary_data_size: Count | None = Field(
        default=None, description="Bytes of the input among the binary data."
    )
    binary_data: bool | None = Field(
        default=None, description="Whether the output is to come as binary data."
    )
    # Another answer than these ask for would be wrong, so they are refused.
    classification: SkipJsonSchema[Any] = None
    shared_memory_region: SkipJsonSchema[Any] = None


class InputTensor(_Given):
    """An input: its values, or how many bytes it has among the binary data."""

    name: str
    shape: list[Size] = Field(max_length=8)
    datatype: str = Field(description="UINT8, INT32 or FP32, as the model's metadata say.")
    parameters: TensorParameters = Field(default_factory=TensorParameters)
    data: list[Any] | None = Field(
        default=None, description="All values in row-major order, flat or nested as the shape."
    )


class OutputTensor(_Given):
    """An output that is asked for."""

    name: str
    parameters: TensorParameters = Field(default_factory=TensorParameters)


class RequestParameters(_Given):
    """Parameters of a request; others have no effect."""

    binary_data_output: bool = Field(
        default=False, description="Whether outputs come as binary data."
    )
    timeout: Count | None = Field(
        default=None, description="Time until the answer in microseconds; 0 leaves it out."
    )
    sequence_id: SkipJsonSchema[Any] = None


class InferJson(_Given):
    """A request for inference."""

    id: str = Field(default="", max_length=1000, description="Comes back in the answer.")
    inputs: list[InputTensor] = Field(min_length=1, max_length=16)
    outputs: list[OutputTensor] = Field(
        default_factory=list, max_length=16, description="By default, all of the model's."
    )
    parameters: RequestParameters = Field(default_factory=RequestParameters)


class IndexJson(_Given):
    """A request for the list of models."""

    ready: bool = Field(default=False, description="Whether only those that are ready are listed.")


class ErrorAnswerV2(BaseModel):
    """The body of every refusal."""

    error: str = Field(description="One sentence: what was given, what was expected.")


class ServerAnswer(BaseModel):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class LiveAnswer(BaseModel):
    """Whether the server answers."""

    live: Literal[True]


class ReadyAnswer(BaseModel):
    """Whether the server takes requests."""

    ready: bool


class ModelReadyAnswer(BaseModel):
    """Whether a model takes requests."""

    name: str
    ready: Literal[True]


class TensorAnswer(BaseModel):
    """An input or output of a model; -1 stands for any positive number."""

    name: str
    datatype: str
    shape: list[int]


class ModelAnswer(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorAnswer]
    outputs: list[TensorAnswer]


class ConfigTensorAnswer(BaseModel):
    """An input or output without the size of the batch."""

    name: str
    data_type: str
    dims: list[int]


class ConfigAnswer(BaseModel):
    """How a model is run, in Triton's words."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: int
    input: list[ConfigTensorAnswer]
    output: list[ConfigTensorAnswer]
    dynamic_batching: dict[str, int]


class OutputAnswer(BaseModel):
    """An output: its values, or how many bytes it has among the binary data."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | None = None


class InferAnswer(BaseModel):
    """The answer to a request for inference; `id` is there where the request had one."""

    id: str | None = None
    model_name: str
    model_version: str
    outputs: list[OutputAnswer]


class IndexEntry(BaseModel):
    """One model in the list."""

    name: str
    version: str
    state: str
    reason: str


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema in one piece, as a part of the OpenAPI document has to be."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def in_one_piece(node: Any) -> Any:
        if isinstance(node, list):
            return [in_one_piece(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return in_one_piece(parts[node["$ref"].removeprefix("#/$defs/")])
        return {key: in_one_piece(value) for key, value in node.items()}

    inlined: dict[str, Any] = in_one_piece(schema)
    return inlined
