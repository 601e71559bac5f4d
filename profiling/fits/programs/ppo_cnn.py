"""PPO on pictures of an environment: stable-baselines3 2.9.2, gymnasium 1.4.0."""

import gymnasium
import numpy as np
from stable_baselines3 import PPO


class Pictures(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = gymnasium.spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


PPO("CnnPolicy", Pictures(), n_steps=64, batch_size=32, device="cuda").learn(256)
