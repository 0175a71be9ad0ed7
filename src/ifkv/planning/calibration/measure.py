"""Measure a machine's rates with small pieces of work, in turns and in passes, within seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ifkv.cost import ModelShape, causal_pairs
from ifkv.patching.handle import patch
from ifkv.planning.calibration.curves import Curve, Grid
from ifkv.planning.calibration.disk import measure_disk
from ifkv.planning.calibration.rates import Rates
from ifkv.planning.calibration.timing import Clock, Probe, grow, run_in_passes
from ifkv.planning.calibration.workloads import Workloads, ascending, few_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYER_ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = (256, 1024, 2048, 4096, 8192)
CONTEXTS = (512, 2048, 8192)
SHARES = (0.03, 0.1, 0.3)
QUERIES = (8, 32, 128)
STITCHED_TOKENS, STITCHED_DOCUMENTS = 2048, 8
# Seconds of: one probe at its largest size; one pass over all probes, if each stays within its
# share; further passes, where the first two disagree.
PROBE_SECONDS, PASS_SECONDS, MORE_SECONDS = 0.7, 2.0, 3.0


@torch.no_grad()
def measure(
    config: PretrainedConfig,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    probe_seconds: float = PROBE_SECONDS,
    pass_seconds: float = PASS_SECONDS,
    more_seconds: float = MORE_SECONDS,
    disk: Path | None = None,
) -> Rates:
    """Measure the rates of a model's layers.

    Random layers of the model's shape are run, never the model itself: one layer, or as many as
    fill 192 MiB. For an 8B model this takes about 1 GiB.

    Args:
        config: The model's config.
        shape: The model's shape.
        dtype: Dtype of weights and cache.
        device: Device to run on.
        backend: As in [ifkv.patch][].
        probe_seconds: Longest time of a single piece of work; larger ones are left out.
        pass_seconds: Intended time of one pass over all pieces.
        more_seconds: How long further passes go on over pieces on which two passes disagree.
        disk: A folder whose disk is measured too.

    Returns:
        The rates.

    Raises:
        StoreError: Nothing can be written in ``disk``.
        OSError: Nothing can be written in ``disk``.
    """
    model = few_layers(config, dtype, device, shape)
    clock, limit = Clock(device), config.max_position_embeddings
    with patch(model, backend=backend):
        work = Workloads(model, shape)
        depths: dict[int, int] = {}
        pairs: dict[tuple[int, float], float] = {}

        def layers(rows: int) -> list[Probe]:
            run, depths[rows] = work.through_layers(rows)
            return [Probe(run)]

        def scattered(context: int) -> list[Probe]:
            probes = []
            for share in SHARES:
                run, pairs[context, share] = work.rows_attention(context, share)
                probes.append(Probe(run))
            return probes

        def queries(context: int) -> list[Probe]:
            return [Probe(run) for q in QUERIES for run in work.query_attention(context, q)]

        contexts = ascending(CONTEXTS, limit)
        through = grow(
            ascending(LAYER_ROWS, limit), layers, clock, limit=probe_seconds, power=1, least=5
        )
        full = grow(
            ascending(TOKENS, limit),
            lambda tokens: [Probe(work.prefill_attention(tokens))],
            clock,
            limit=probe_seconds,
            power=2,
        )
        rows = grow(contexts, scattered, clock, limit=probe_seconds, power=2)
        asked = grow(contexts, queries, clock, limit=probe_seconds, power=1)
        tokens = min(STITCHED_TOKENS, limit)
        few, stitched_bytes = work.stitching(1, tokens)
        many, _ = work.stitching(STITCHED_DOCUMENTS, tokens)
        head, head_bytes = work.head()
        sizes, value_bytes = work.value_sizes(tokens)
        single = [Probe(few), Probe(many), Probe(head), Probe(sizes)]
        host_bytes = 0
        if device.type != "cpu":
            copying, host_bytes = work.to_device()
            single.append(Probe(copying))
        for probe in single:
            clock.time(probe.run)
        families = (through, full, rows, asked)
        every = [p for family in families for group in family.values() for p in group] + single
        folders = [] if disk is None else [disk]
        found = [measure_disk(folder) for folder in folders]
        run_in_passes(every, clock, pass_seconds=pass_seconds, more_seconds=more_seconds)
        found += [measure_disk(folder) for folder in folders]

    width = shape.attention_width
    one, several = single[0].seconds, single[1].seconds
    return Rates(
        date=time.strftime("%Y-%m-%d"),
        layer=Curve(
            tuple(map(float, through)),
            tuple(group[0].seconds / depths[size] for size, group in through.items()),
        ),
        prefill_attention=Grid(
            tuple(map(float, full)),
            (1.0,),
            tuple(
                (4 * width * causal_pairs(0, size) / group[0].seconds,)
                for size, group in full.items()
            ),
        ),
        rows_attention=Grid(
            tuple(map(float, rows)),
            SHARES,
            tuple(
                tuple(
                    4 * width * pairs[size, share] / probe.seconds
                    for share, probe in zip(SHARES, group, strict=True)
                )
                for size, group in rows.items()
            ),
        ),
        query_attention=_over_queries(asked, 0, lambda t, q: 4 * width * causal_pairs(t, q)),
        norms=_over_queries(asked, 1, lambda t, q: 2.0 * width * t * q),
        value_bytes=value_bytes / single[3].seconds,
        weight_bytes=head_bytes / single[2].seconds,
        stitch_bytes=stitched_bytes / one,
        stitch_document=max(0.0, (several - one) / (STITCHED_DOCUMENTS - 1)),
        host_bytes=host_bytes / single[4].seconds if host_bytes else None,
        warm_bytes=max((warm for warm, _, _ in found), default=None),
        cold_bytes=max((cold for _, cold, _ in found), default=None),
        open_document=min((opening for _, _, opening in found), default=0.0),
        disagreement=max(probe.disagreement for probe in every),
    )


def _over_queries(
    asked: dict[int, list[Probe]], which: int, count: Callable[[int, int], float]
) -> Grid:
    """Return rates of attention (0) or norms (1); ``count`` gives their operations."""
    return Grid(
        tuple(map(float, asked)),
        tuple(map(float, QUERIES)),
        tuple(
            tuple(
                count(context, query) / group[2 * index + which].seconds
                for index, query in enumerate(QUERIES)
            )
            for context, group in asked.items()
        ),
    )
