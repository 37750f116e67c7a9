"""Bytes or byte pairs: bits per byte of GPT after the same CPU seconds, the learning and writing of the vocabulary included.

    python benchmarks/byte_pairs.py [--data tinyshakespeare.txt] [--seconds 40] [--seeds 2] [--vocabularies 256 512 1024] [--held_out tuning] [--out FILE]

The recipe gpt-shakespeare-256 with another vocabulary, on a text or else on the source of Python's standard library: tokens are learnt from what is trained
on, and a window holds as many of them as fit into 256 bytes on average. One thread; the number of steps is what the seconds allow, found by timing the first
ones, because the course of the rates depends on it. Every byte of the held-out tenth but the first token's is predicted; a token's spelling counts once, so
that the bits of byte pairs are an upper bound (`vocabulary.py`). No target: the figures say which to take.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from onetorch import recipes
from onetorch.generative import corpus, gpt, vocabulary
from onetorch.runs import provenance
from onetorch.runs.run import Run

HERE = Path(__file__).resolve()
TIMED = 12  # steps by which the number of steps is found


class Enough(Exception):  # noqa: N818 (no error)
    """The steps that were to be timed are done."""


def train(config: gpt.Config, stop: int = 0) -> tuple[gpt.GPT | None, float, float]:
    """(model, CPU seconds of all, CPU seconds of a step); with `stop` that many steps only."""
    begin, times = time.process_time(), list[float]()

    class Timed(Run):
        def steps(self, *args: Any, **kwargs: Any) -> Any:
            for i in super().steps(*args, **kwargs):
                times.append(time.process_time())
                if i == stop:
                    raise Enough
                yield i

    with tempfile.TemporaryDirectory() as place:
        try:
            with Timed(Path(place) / "run", config, fixed={"threads": "1"}, quiet=True, checkpoint_seconds=1e9) as run:
                model = gpt.train(config, run)
        except Enough:
            model = None
    return model, time.process_time() - begin, (times[-1] - times[2]) / (len(times) - 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--held_out", default="validation")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "byte_pairs.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.seeds):
        for size in arguments.vocabularies:
            config = recipes.find("gpt-shakespeare-256")()
            config = dataclasses.replace(config, data=arguments.data and arguments.data.resolve(), seed=seed, vocabulary=size, held_out=arguments.held_out)
            found = corpus.read(config)
            if size > vocabulary.BYTES:
                spelt = vocabulary.Vocabulary(vocabulary.learn(found.train, size)).encode(found.train)
                config = dataclasses.replace(config, context=round(256 * spelt.size / found.train.size / 16) * 16)
            config = dataclasses.replace(config, eval_every=10**9, eval_samples=0)
            _, before, step = train(dataclasses.replace(config, steps=10**6), TIMED)
            steps = round((arguments.seconds - (before - TIMED * step)) / step)
            model, seconds, _ = train(dataclasses.replace(config, steps=steps))
            assert model is not None
            scored = gpt.score(model, corpus.spell(model, found, config)[1])
            row = {"vocabulary": size, "seed": seed, "context": config.context, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}
            rows.append(row | {"cpu_seconds": seconds, "bpb": scored.bpb, "bpb_se": scored.bpb_se})
            found_bits = f"{scored.bpb:.4f} ± {scored.bpb_se:.4f} bits per byte"
            print(f"seed {seed}  {size:5} tokens  context {config.context:3}  {steps:4} steps  {seconds:5.1f} CPU-s  {found_bits}", flush=True)
    hardware = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result = {"data": arguments.data.name if arguments.data else "standard library", "held_out": arguments.held_out, "seconds": arguments.seconds, "rows": rows}
    result |= {"hardware": hardware, "versions": provenance.versions()}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
