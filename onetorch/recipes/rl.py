"""Recipes for reinforcement learning."""

from typing import Any

from onetorch.recipes import recipe


@recipe("ppo", reaches="")
def ppo_halfcheetah(Config: Any) -> Any:
    """PPO on HalfCheetah-v5 (MuJoCo): a Gaussian policy on normalised observations, as Schulman et al. 2017 ran it; needs the extra `rl`."""
    return Config(
        env="HalfCheetah-v5", total_steps=1_000_000, num_envs=8, batch_size=2048, epochs=10, minibatches=32, lr=3e-4, gamma=0.99, lam=0.95, clip=0.2,
        max_grad_norm=0.5, normalize_obs=True, normalize_reward=True, activation="tanh",
    )  # fmt: skip
