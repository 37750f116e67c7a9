"""The peer's half of race_diffusion.py, run by the Python of an environment that holds denoising-diffusion-pytorch.

It trains with the peer's own Trainer, batches taken from memory instead of image files (in the peer's favour), and at each milestone writes samples of the
averaged weights, which the other half compares with the held-out images. The seconds are of training alone.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()

import numpy as np  # noqa: E402 (the clock runs from here)
import torch  # noqa: E402

STUBS = torch.library.Library("torchvision", "DEF")  # torchvision's build may be for CUDA; only its transforms are imported, which need no operator
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for operator in ("nms", "qnms"):
        STUBS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet  # noqa: E402 (after the repair above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help=".npy of the training images, uint8 (N, 1, H, W)")
    parser.add_argument("--levels", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--mults", type=int, nargs="+", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--milestones", type=int, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--sampling-steps", type=int, default=50, help="of the peer's DDIM at the milestones")
    parser.add_argument("--ladder", type=int, nargs="*", default=[], help="steps of sampling to be timed in the end; 1000 is the peer's default")
    parser.add_argument("--out", type=Path, required=True, help="folder for the samples and result.json")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    pixels = np.load(given.train)
    x = torch.from_numpy(pixels).float() / (given.levels - 1)
    model = Unet(dim=given.dim, dim_mults=tuple(given.mults), channels=1)
    diffusion = GaussianDiffusion(model, image_size=pixels.shape[2])

    with tempfile.TemporaryDirectory() as place:
        from PIL import Image

        (Path(place) / "images").mkdir()
        for i in range(128):  # the Trainer wants a folder with at least 100 files to begin with
            Image.fromarray(pixels[i, 0]).save(Path(place) / "images" / f"{i}.png")
        trainer = Trainer(diffusion, str(Path(place) / "images"), calculate_fid=False, save_and_sample_every=10**9, results_folder=str(Path(place) / "results"))
        batch = trainer.batch_size

        def batches() -> Any:
            while True:
                for index in torch.randperm(len(x)).split(batch):
                    if len(index) == batch:
                        yield x[index]

        trainer.dl = batches()
        before = {"cpu": time.process_time(), "wall": time.perf_counter() - BEGUN}
        rows: list[dict[str, Any]] = []
        cpu = wall = 0.0
        for milestone in given.milestones:
            trainer.train_num_steps = milestone
            start, start_cpu = time.perf_counter(), time.process_time()
            trainer.train()
            wall, cpu = wall + time.perf_counter() - start, cpu + time.process_time() - start_cpu
            name = f"samples-{milestone}.npy"
            seconds = sample(trainer.ema.ema_model, given.sampling_steps, given.samples, given.levels, given.out / name)
            rows.append({"step": milestone, "cpu": cpu, "wall": wall, "samples": name, "sampling": seconds})
            result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "batch": batch, "before": before}
            result |= {"rows": rows, "ladder": []}
            (given.out / "result.json").write_text(json.dumps(result))
        for steps in given.ladder:
            name = f"ladder-{steps}.npy"
            seconds = sample(trainer.ema.ema_model, steps, given.samples, given.levels, given.out / name)
            result["ladder"].append({"sampling_steps": steps, "samples": name, "sampling": seconds})
            (given.out / "result.json").write_text(json.dumps(result))


def sample(diffusion: Any, steps: int, count: int, levels: int, path: Path) -> dict[str, float]:
    """CPU and wall seconds for `count` samples in so many steps; they are written to `path` as levels."""
    diffusion.eval()
    diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, steps < diffusion.num_timesteps
    start, start_cpu = time.perf_counter(), time.process_time()
    found = torch.cat([diffusion.sample(batch_size=n) for n in split(count, 125)])
    seconds = {"cpu": time.process_time() - start_cpu, "wall": time.perf_counter() - start}
    np.save(path, (found * (levels - 1)).round().clamp(0, levels - 1).to(torch.uint8).numpy())
    return seconds


def split(count: int, size: int) -> list[int]:
    return [min(size, count - i) for i in range(0, count, size)]


if __name__ == "__main__":
    sys.exit(main())
