"""`/fits`: would this fit, and how long would it take."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query
from pydantic import BaseModel

from autosft.service.api.context import The, asking
from autosft.service.requests import limits as allowed
from autosft.service.requests.planner import FITS

router = APIRouter(tags=["plans"])

#: How long an answer is waited for; it is kept, and there when asked for again.
WAIT_S = 120.0

Method = Literal["auto", "full", "lora", "qlora", "sparse"]
Precision = Literal["auto", "fp32", "bf16-autocast", "fp16-autocast", "bf16", "bf16-stochastic", "fp16"]


class Way(BaseModel):
    """How it would run; all figures are predicted."""

    micro_batch: int
    gradient_accumulation: int
    num_devices: int
    sharding: str
    checkpointing: bool
    predicted_bytes: int  # on each device
    upper_bytes: int  # what has to be free there
    seconds: float  # of training, and evaluations where data is given
    upper_seconds: float
    tokens_per_s: float
    speed_basis: str


class Remedy(BaseModel):
    """A change with which it would fit."""

    change: str
    quality: str
    way: Way


class MethodAnswer(BaseModel):
    method: str
    memory: str
    precision: str
    fits: bool
    measures_itself: bool  # nothing bounds its memory: its first trial would measure it
    num_trained: int
    way: Way  # the smallest, where it does not fit
    would_fit: list[Remedy]


class Fits(BaseModel):
    """Whether a model fits a device, by each method."""

    fits: bool
    model: str
    num_parameters: int
    data: str | None
    seq_len: int
    num_train_examples: int
    is_assumed: bool  # without data: the number of examples, and that all are of this length
    device: str
    num_devices: int
    usable_bytes: int
    methods: list[MethodAnswer]


@router.get("/fits", response_model=Fits, dependencies=[Depends(asking)])
async def would_it_fit(
    *,
    service: The,
    model: Annotated[str, Query(min_length=1, max_length=1000, examples=["Llama-3.1-8B"])],
    data: Annotated[str | None, Query(min_length=1, max_length=1000)] = None,
    seq_len: Annotated[int | None, Query(ge=2, le=10_000_000)] = None,
    method: Method = "auto",
    device: Annotated[
        str, Query(min_length=1, max_length=100, description="auto: this server's; or 2xA100-80GB, 24GB.")
    ] = "auto",
    precision: Precision = "auto",
    memory: Literal["exact", "lean", "leanest", "auto"] = "exact",
    effective_batch_size: Annotated[int | None, Query(ge=1, le=65_536)] = None,
    epochs: Annotated[float, Query(gt=0, le=1e6, allow_inf_nan=False)] = 3.0,
) -> Any:
    """Answer as `autosft plan --json` does, in fewer words; in milliseconds for what was asked before."""
    asked = {
        "model": allowed.source("model", model, service.limits),
        "data": None if data is None else allowed.sources("data", data, service.limits),
        "seq_len": seq_len,
        "method": method,
        "device": device,
        "precision": precision,
        "memory": memory,
        "effective_batch_size": effective_batch_size,
        "epochs": epochs,
    }
    answer = service.planner.ask({"kind": "fits", "fits": asked}, urgency=FITS)
    if answer.done():
        return answer.result()
    try:
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(answer)), WAIT_S)
    except TimeoutError:
        raise HTTPException(
            503, "The planner is still at it: ask again.", headers={"Retry-After": "30"}
        ) from None
