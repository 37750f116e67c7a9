"""Recipes of diffusion and flow matching."""

from typing import Any

from onetorch.recipes import recipe


@recipe("diffusion", reaches="FID 5.9 to 6.4 with 500 samples over 3 seeds (training against held-out images: 6.7) on the digits after 23 CPU-seconds")
def diffusion(Config: Any) -> Any:
    """Diffusion and flow matching on images; by default flow matching on scikit-learn's digits with a transformer."""
    return Config()


@recipe("diffusion", reaches="FID 7.0 ± 0.3 with 1,000 samples (training against held-out images: 4.7) after 84 CPU-seconds, one seed")
def diffusion_glyphs(Config: Any) -> Any:
    """Flow matching on characters in the fonts of matplotlib, 28x28 pixels, 62 classes."""
    return Config(embedded="glyphs", shape=(1, 28, 28), levels=256, classes=62, patch=7, width=128, depth=2, steps=1000, eval_every=500)


@recipe("diffusion", reaches="FID 14.7 ± 0.7 with 500 samples on the digits after 59 CPU-seconds, one seed")
def diffusion_lucidrains(Config: Any) -> Any:
    """The set-up of lucidrains' denoising-diffusion-pytorch under our code, on the digits; the first rung of benchmarks/ladder_diffusion.py."""
    return Config(
        classes=0, objective="v", backbone="unet", width=16, stages=(1, 2, 4, 8), depth=2, batch=16, lr=1e-4, warmup=0, decay=0.0, ema=0.995, sampler="ddim",
        sample_steps=20, steps=1200, eval_every=400,
    )  # fmt: skip
