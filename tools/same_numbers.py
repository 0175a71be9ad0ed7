"""Compare two checkouts of ifkv number by number: keys, scores, slots, recomputed rows, logits.

    python tools/same_numbers.py OLD_CHECKOUT [NEW_CHECKOUT]

Each checkout computes the same requests in a separate process, over tiny random models, one of each
family. They run in float32 and bfloat16, with documents in memory and read lazily from a disk
store, one request alone and several together. Every tensor that is not bit-equal is listed with its
largest difference, and the exit status is then 1. Run it before and after a change of structure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
PREFIX = [1, 2, 3]
DOCUMENTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20], [21, 22]]
REQUESTS = [([0, 1, 2, 3], [30, 31, 32]), ([2, 0], [33, 34]), ([3], [35]), ([1, 3, 2], [36, 37])]
SELECTORS = ("attention-norm", "sink-aware", "cacheblend", "epic", "prophetkv", "two-round")


def compute() -> Iterator[tuple[str, object]]:
    """Compute every tensor in this process; yield names and tensors."""
    import torch

    from ifkv.testing import tiny_model

    torch.set_num_threads(1)
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model(family, dtype=dtype, num_layers=4)
            for lazy in (False, True):
                where = f"{family}, {str(dtype).removeprefix('torch.')}, " + "lazy" * lazy
                for name, tensor in _requests(model, lazy):
                    yield f"{where}: {name}", tensor


def _requests(model: object, lazy: bool) -> Iterator[tuple[str, object]]:
    """Compute the tensors of one model's requests; yield names and tensors."""
    import torch

    import ifkv
    from ifkv.selectors import Budget, Request, resolve
    from ifkv.store import DiskStore

    with ifkv.patch(model), tempfile.TemporaryDirectory() as place:
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        if lazy:
            store = DiskStore(place)
            documents = [store.get(store.put(one), lazy=True) for one in documents]
        for index, one in enumerate(documents):
            yield f"document {index}", torch.stack((one.keys, one.values))
        asked = [[documents[i] for i in own] for own, _ in REQUESTS]
        prompts = [prompt for _, prompt in REQUESTS]
        for number, (own, prompt) in enumerate(zip(asked, prompts, strict=True)):
            cache = ifkv.stitch(model, own)
            yield f"request {number}, stitched", rows_of(cache)
            scores = ifkv.score(model, cache, prompt)
            yield f"request {number}, scores", scores
            for name in SELECTORS:
                found = resolve(name).select(
                    model, cache, Request(prompt, prompt, own, None), Budget(0.4)
                )
                yield f"request {number}, slots by {name}", found.slots
            slots = ifkv.select(cache, scores, ratio=0.4)
            yield (
                f"request {number}, logits",
                ifkv.recompute(model, cache, slots, prompt_ids=prompt),
            )
            yield f"request {number}, recomputed", rows_of(cache)
            said = ifkv.generate(model, cache, prompt, max_new_tokens=4, do_sample=False)
            yield f"request {number}, answer", said
        caches = ifkv.stitch_many(model, asked)
        many = ifkv.score_many(model, caches, prompts)
        chosen = [ifkv.select(c, s, ratio=0.4) for c, s in zip(caches, many, strict=True)]
        answered = ifkv.recompute_many(model, caches, chosen, prompts=prompts)
        for number, cache in enumerate(caches):
            yield f"batch, request {number}, scores", many[number]
            yield f"batch, request {number}, logits", answered[number]
            yield f"batch, request {number}, recomputed", rows_of(cache)
        for number, said in enumerate(ifkv.generate_many(model, caches, prompts, max_new_tokens=4)):
            yield f"batch, request {number}, answer", said


def rows_of(cache: object) -> object:
    """Return keys and values of all layers, ``[layers, 2, kv_heads, n, head_dim]``."""
    import torch

    layers = cache.layers  # type: ignore[attr-defined]
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])


def run(checkout: Path, out: Path) -> None:
    """Let a checkout compute in a separate process and save its tensors to a file."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "IFKV_STORE": str(out) + ".d"}
    command = [sys.executable, str(Path(__file__).resolve()), "--compute", str(out)]
    subprocess.run(command, env=environment, check=True, cwd=checkout)


def main() -> int:
    """Compare the two checkouts and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", nargs="?", type=Path)
    parser.add_argument("new", nargs="?", type=Path, default=HERE)
    parser.add_argument("--compute", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    import torch

    if given.compute:
        torch.save(dict(compute()), given.compute)
        return 0
    if given.old is None or not (given.old / "src" / "ifkv").is_dir():
        parser.error(f"{given.old} is no checkout of ifkv; give the folder that holds src/ifkv.")
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("old.pt", "new.pt")]
        for checkout, file in zip((given.old, given.new), files, strict=True):
            run(checkout.resolve(), file)
        old, new = (torch.load(file) for file in files)
    differing = sorted(old.keys() ^ new.keys())
    for name in old.keys() & new.keys():
        if not torch.equal(old[name], new[name]):
            differing.append(name)
            if old[name].shape == new[name].shape:
                difference = (old[name].double() - new[name].double()).abs().max()
                print(f"{name}: differs by up to {difference:.3g}")
            else:
                print(f"{name}: {tuple(old[name].shape)} and {tuple(new[name].shape)}")
    print(f"{len(old)} tensors compared, {len(differing)} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
