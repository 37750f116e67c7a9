"""Recipes for reinforcement learning."""

from typing import Any

from onetorch.recipes import recipe


@recipe("ppo", reaches="mean return 475 of 500 after 90,000 steps, 0.6 s on one core")
def ppo(Config: Any) -> Any:
    """Proximal Policy Optimization (PPO-Clip), Schulman et al. 2017, arXiv:1707.06347."""
    return Config()


# For MuJoCo, of ppo, trpo and vpg alike: observations and rewards normalised, and a first policy of standard deviation one half. That smaller spread
# (Andrychowicz et al. 2020, arXiv:2006.05990) matters most: PPO on HalfCheetah ends a run of 300,000 steps near 1,200 with the usual 1, near 3,000 with this.
MUJOCO: dict[str, Any] = {
    "total_steps": 1_000_000, "num_envs": 16, "batch_size": 4096, "gamma": 0.99, "lam": 0.95, "normalize_obs": True, "normalize_reward": True,
    "activation": "tanh", "log_std": -0.7,
}  # fmt: skip
PPO_MUJOCO: dict[str, Any] = MUJOCO | {"epochs": 10, "minibatches": 8, "lr": 1e-3, "clip": 0.2, "max_grad_norm": 0.5}
TRPO_MUJOCO: dict[str, Any] = MUJOCO | {"num_envs": 8, "batch_size": 2048, "delta": 0.02}
# Spinning Up's defaults: batches of 4,000 steps of one environment, 80 passes of the critic over the whole batch, nothing normalised but the advantages.
SPINNINGUP: dict[str, Any] = {
    "env": "HalfCheetah-v5", "total_steps": 200_000, "num_envs": 1, "batch_size": 4000, "gamma": 0.99, "lam": 0.97, "value_lr": 1e-3, "normalize_obs": False,
    "normalize_reward": False, "hidden": (64, 64), "activation": "tanh", "log_std": -0.5,
}  # fmt: skip


@recipe("ppo", reaches="mean return 6,320 after 1,000,000 steps (5,410 to 6,780 over 4 seeds), 100 CPU-s on one core")
def ppo_halfcheetah(Config: Any) -> Any:
    """PPO on HalfCheetah-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="HalfCheetah-v5", **PPO_MUJOCO | {"log_std": -1.0})  # with -0.7: 5,440 to 6,080


@recipe("ppo", reaches="mean return 2,940 after 1,000,000 steps (2,360 to 3,380 over 3 seeds), 160 CPU-s on one core")
def ppo_hopper(Config: Any) -> Any:
    """PPO on Hopper-v5 (MuJoCo, needs the extra `rl`).

    16 environments and minibatches of 256 or 512 (batches of 2,048 with 5 or 8 epochs, of 4,096 with 10) take a fifth to a third less time a step. But of
    10 such runs over 5 seeds three stayed on short hops, at 606, 1,331 and, cut after 760,000 steps, 679; the others reached 2,810 to 3,450.
    """
    return Config(env="Hopper-v5", **PPO_MUJOCO | {"num_envs": 8, "batch_size": 2048, "minibatches": 16})


@recipe("ppo", reaches="mean return 4,710 after 1,000,000 steps (4,000 to 5,610 over 3 seeds), 220 CPU-s on one core")
def ppo_walker2d(Config: Any) -> Any:
    """PPO on Walker2d-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="Walker2d-v5", **PPO_MUJOCO | {"num_envs": 8, "batch_size": 2048, "minibatches": 16})


@recipe("ppo", reaches="mean return -77.1 after 1,000,000 steps (-84 to -72 over 3 seeds), 50 CPU-s on one core of a busy machine")
def ppo_acrobot(Config: Any) -> Any:
    """PPO on Acrobot-v1.

    Until the tip is first swung up every reward is the same, and a policy that moves fast settles on noise before that: a smaller step and whole episodes in
    the batch, not 64 steps of each of 64 environments. A discount of 0.999 lets the few long episodes count as much as they do in the mean.
    """
    return Config(
        env="Acrobot-v1", total_steps=1_000_000, num_envs=16, batch_size=4096, epochs=4, minibatches=32, lr=4e-4, gamma=0.999, lam=0.95, clip=0.2,
        normalize_obs=True, activation="tanh",
    )  # fmt: skip


@recipe("ppo", reaches="mean return -106 after 1,000,000 steps (-109 to -104 over 3 seeds), 17 CPU-s on one core")
def ppo_mountaincar(Config: Any) -> Any:
    """PPO on MountainCar-v0.

    Every reward is -1 until the flag is first reached. Short batches and tanh get there: values fall for states that were seen often, and the policy leaves
    them. With ReLU (three settings, a seed each) or with PPO's defaults (three seeds) no run reached it.
    """
    return Config(
        env="MountainCar-v0", total_steps=1_000_000, num_envs=16, batch_size=1024, epochs=4, minibatches=4, lr=1e-3, lam=0.98, entropy_coef=0.01,
        normalize_obs=True, activation="tanh",
    )  # fmt: skip


@recipe("ppo", reaches="mean return 279 after 1,000,000 steps (277 to 279 over 3 seeds), 75 CPU-s on one core")
def ppo_lunarlander(Config: Any) -> Any:
    """PPO on LunarLander-v3 (Box2D, needs the extra `rl`)."""
    return Config(
        env="LunarLander-v3", total_steps=1_000_000, num_envs=16, batch_size=16_384, epochs=4, minibatches=64, lr=1e-3, gamma=0.999, lam=0.98, clip=0.2,
        entropy_coef=0.01, max_grad_norm=0.5, activation="tanh",
    )  # fmt: skip


@recipe("ppo", reaches="")
def ppo_spinningup(Config: Any) -> Any:
    """PPO with Spinning Up's own hyper-parameters; the critic too stops where the divergence from the old policy ends the epochs."""
    return Config(**SPINNINGUP, lr=3e-4, epochs=80, minibatches=1, clip=0.2, target_kl=0.015, anneal=False, max_grad_norm=None)


@recipe("trpo", reaches="mean return 500 of 500 after 100,000 steps (10 seeds), 8 CPU-s on one core of a busy machine")
def trpo(Config: Any) -> Any:
    """Trust Region Policy Optimization (TRPO), Schulman et al. 2015, arXiv:1502.05477; with natural policy gradient (NPG), Kakade 2001."""
    return Config()


@recipe("trpo", reaches="mean return 5,910 after 1,000,000 steps (5,540 to 6,440 over 3 seeds), 90 CPU-s on one core")
def trpo_halfcheetah(Config: Any) -> Any:
    """TRPO on HalfCheetah-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="HalfCheetah-v5", **TRPO_MUJOCO)


@recipe("trpo", reaches="")
def trpo_spinningup(Config: Any) -> Any:
    """TRPO with Spinning Up's own hyper-parameters."""
    return Config(**SPINNINGUP, delta=0.01, damping=0.1, cg_steps=10, backtracks=10, backtrack=0.8, value_epochs=80, value_minibatches=1)


@recipe("vpg", reaches="mean return 500 of 500 after 100,000 steps (10 seeds), 4 CPU-s on one core")
def vpg(Config: Any) -> Any:
    """Vanilla Policy Gradient (VPG) with a critic and GAE, Sutton et al. 2000; Schulman et al. 2015, arXiv:1506.02438."""
    return Config()


@recipe("vpg", reaches="mean return 4,090 after 1,000,000 steps (3,530 to 4,780 over 3 seeds), 70 CPU-s on one core")
def vpg_halfcheetah(Config: Any) -> Any:
    """Vanilla policy gradient on HalfCheetah-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="HalfCheetah-v5", **MUJOCO | {"num_envs": 8, "batch_size": 2048}, lr=3e-3)


@recipe("vpg", reaches="")
def vpg_spinningup(Config: Any) -> Any:
    """Vanilla policy gradient with Spinning Up's own hyper-parameters."""
    return Config(**SPINNINGUP, lr=3e-4, value_epochs=80, value_minibatches=1)


@recipe("dqn", reaches="mean return 499 of 500 after 50,000 steps (494 to 500 over 10 seeds), 27 CPU-s on one core of a busy machine")
def dqn(Config: Any) -> Any:
    """Deep Q-Network (DQN), Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518."""
    return Config()


@recipe("dqn", reaches="mean return -71.9 after 100,000 steps (-77 to -64 over 10 seeds), 80 CPU-s on one core")
def dqn_acrobot(Config: Any) -> Any:
    """DQN on Acrobot-v1: RL Baselines3 Zoo's settings, which are Mnih et al.'s plain target, wider nets, larger batches and a gradient step for every step."""
    return Config(
        env="Acrobot-v1", total_steps=100_000, replay=50_000, updates=16, batch_size=128, lr=6.3e-4, anneal=False, target_every=250, tau=1.0, epsilon=0.1,
        epsilon_fraction=0.12, double=False, clipped=False, n_step=1, hidden=(256, 256),
    )  # fmt: skip


@recipe("dqn", reaches="mean return 236 after 100,000 steps (208 to 268 over 16 seeds), 139 CPU-s on one core")
def dqn_lunarlander(Config: Any) -> Any:
    """DQN on LunarLander-v3 (Box2D, needs the extra `rl`): each action is held for four steps, without which many runs hover until the time is up."""
    return Config(
        env="LunarLander-v3", total_steps=100_000, action_repeat=4, update_every=64, updates=64, update_after=250, lr=5e-4, gamma=0.992, epsilon=0.05,
        priority=0.5, huber=10.0, max_grad_norm=10.0,
    )  # fmt: skip


# Spinning Up's defaults for what learns from a replay memory: batches of 100, and 50 updates after every 50 steps, the first 10,000 of them random.
SPINNINGUP_REPLAY: dict[str, Any] = {
    "env": "HalfCheetah-v5", "total_steps": 400_000, "random_steps": 10_000, "update_after": 1000, "update_every": 50, "batch_size": 100, "lr": 1e-3,
    "log_every": 4000,
}  # fmt: skip
REPLAY_MUJOCO: dict[str, Any] = {"total_steps": 1_000_000, "random_steps": 10_000, "log_every": 5000}
SAC_MUJOCO: dict[str, Any] = {**REPLAY_MUJOCO, "lr": 3e-4, "q_lr": 1e-3}  # critics faster than the policy, as in CleanRL


@recipe("sac", reaches="mean return -132 on Pendulum-v1 after 20,000 steps (-137 to -131 over 10 seeds), 95 CPU-s on one core")
def sac(Config: Any) -> Any:
    """Soft Actor-Critic with twin critics and a learned temperature, Haarnoja et al. 2018, arXiv:1812.05905."""
    return Config()


@recipe("sac", reaches="mean return 9,920 after 300,000 steps (9,830 to 10,000 over 3 seeds; stable-baselines3's SAC 5,550), 1,290 CPU-s on one core")
def sac_halfcheetah(Config: Any) -> Any:
    """SAC on HalfCheetah-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="HalfCheetah-v5", **SAC_MUJOCO)


@recipe("sac", reaches="mean return 3,180 after 300,000 steps (3,000 to 3,280 over 3 seeds; stable-baselines3's SAC 3,160), 1,360 CPU-s on one core")
def sac_hopper(Config: Any) -> Any:
    """SAC on Hopper-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="Hopper-v5", **SAC_MUJOCO)


@recipe("sac", reaches="mean return 3,540 after 300,000 steps (3,230 to 4,100 over 3 seeds; stable-baselines3's SAC 3,430), 1,360 CPU-s on one core")
def sac_walker2d(Config: Any) -> Any:
    """SAC on Walker2d-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="Walker2d-v5", **SAC_MUJOCO)


@recipe("sac", reaches="")
def sac_spinningup(Config: Any) -> Any:
    """SAC with Spinning Up's own hyper-parameters: the temperature is fixed at 0.2."""
    return Config(**SPINNINGUP_REPLAY, alpha=0.2)


@recipe("td3", reaches="mean return -136 on Pendulum-v1 after 20,000 steps (-142 to -131 over 10 seeds), 65 CPU-s on one core")
def td3(Config: Any) -> Any:
    """Twin Delayed DDPG, Fujimoto et al. 2018, arXiv:1802.09477."""
    return Config()


@recipe("td3", reaches="mean return 8,480 after 300,000 steps (7,250 to 9,660 over 3 seeds; stable-baselines3's TD3 3,400), 910 CPU-s on one core")
def td3_halfcheetah(Config: Any) -> Any:
    """TD3 on HalfCheetah-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="HalfCheetah-v5", **REPLAY_MUJOCO)


@recipe("td3", reaches="mean return 1,970 after 300,000 steps (964 to 2,750 over 3 seeds; stable-baselines3's TD3 1,060), 970 CPU-s on one core")
def td3_hopper(Config: Any) -> Any:
    """TD3 on Hopper-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="Hopper-v5", **REPLAY_MUJOCO)


@recipe("td3", reaches="mean return 3,560 after 300,000 steps (3,080 to 3,830 over 3 seeds; stable-baselines3's TD3 1,960 over 3), 1,470 CPU-s on one core")
def td3_walker2d(Config: Any) -> Any:
    """TD3 on Walker2d-v5 (MuJoCo, needs the extra `rl`).

    As stable-baselines3 has it: no noise on the actions, and few random ones. With a noise of 0.1 and 10,000 random steps three seeds reach 1,940.
    """
    return Config(env="Walker2d-v5", **REPLAY_MUJOCO | {"random_steps": 1000, "act_noise": 0.0})


@recipe("td3", reaches="")
def td3_spinningup(Config: Any) -> Any:
    """TD3 with Spinning Up's own hyper-parameters."""
    return Config(**SPINNINGUP_REPLAY)


@recipe("ddpg", reaches="mean return -135 on Pendulum-v1 after 20,000 steps (-145 to -130 over 10 seeds), 50 CPU-s on one core")
def ddpg(Config: Any) -> Any:
    """Deep Deterministic Policy Gradient, Lillicrap et al. 2015, arXiv:1509.02971."""
    return Config()


@recipe("ddpg", reaches="mean return 7,970 after 300,000 steps (7,030 to 9,130 over 3 seeds; stable-baselines3's DDPG 3,050), 740 to 1,440 CPU-s on one core")
def ddpg_halfcheetah(Config: Any) -> Any:
    """DDPG on HalfCheetah-v5 (MuJoCo, needs the extra `rl`)."""
    return Config(env="HalfCheetah-v5", **REPLAY_MUJOCO)


@recipe("ddpg", reaches="")
def ddpg_spinningup(Config: Any) -> Any:
    """DDPG with Spinning Up's own hyper-parameters."""
    return Config(**SPINNINGUP_REPLAY)
