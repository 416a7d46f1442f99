"""The types of what records hold: pydantic checks them when a record is made or read."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from quantbench.settings import MOST, MOST_SAMPLES, MOST_TEXT

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Text = Annotated[str, AfterValidator(lambda text: text.encode(errors="replace").decode()), Field(max_length=MOST_TEXT)]
Name = Annotated[Text, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Size = Annotated[int, Field(ge=-10**18, le=10**18)]  # of bytes, or of a difference of them
Whole = Annotated[int, Field(ge=1, le=MOST)]
Seconds = Annotated[float, Field(gt=0, lt=1e9)]
Amount = Annotated[float, Field(ge=0, lt=1e30)]
Many = Field(max_length=MOST_SAMPLES)
Tally = Annotated[dict[Name, Count], Many]
Versions = Annotated[dict[Name, Name | None], Many]
Weights = Literal["pretrained", "bundled", "random"]


def _typed(name: str, /, **fields: object) -> type:
    """A dict of which every key may be absent and none is unknown."""
    return with_config(STRICT)(TypedDict(name, fields, total=False))


Machine = _typed(
    "Machine", cpu=Name | None, cores=Count | None, torch_threads=Count, ram_bytes=Count, os=Name, dynamic_int8=bool,
    gpu=Name | None, gpu_count=Count, gpu_bytes=Count, gpu_multiprocessors=Count, cuda=Name | None, driver=Name | None,
    gpu_capability=Annotated[list[Count], Field(max_length=2, min_length=2)], gpu_power_limit_w=Amount | None,
    gpu_visible=Name | None)
Audit = _typed(
    "Audit", quantiser=Name, quantised=Count, quantised_bytes=Count, embedding_bytes=Count, step_bytes=Count,
    step_products=Count, crossing_bytes=Count, kv_bytes_per_token=Count, kv_state_bytes=Count, kv_windows=Tally,
    left=Tally, kept=Tally, storage_dtype=Name, compute_dtype=Name, bytes=Tally,
    gpu_bytes=Annotated[list[Count], Many] | None,  # of each, where several share the weights
    details=Annotated[dict[Name, bool | Size | float | Name | None], Many], **{"class": Name | None})
Reading = _typed(
    "Reading", load_average=Amount | None, cpu_busy=Amount | None, idle_w=float | None, gpu_busy=Amount | None,
    sm_mhz=Count | None, memory_mhz=Count | None, celsius=Count | None, throttled=Annotated[list[Name], Many] | None)
Conditions = _typed("Conditions", before=Reading, after=Reading, no_energy=Text | None)
Part = _typed(  # of a traced generation, per call of the model
    "Part", calls=Count, device_s=Amount, kernels=Amount, kinds=Annotated[dict[Name, Amount], Many])
Trace = _typed("Trace", prefill=Part, step=Part)
