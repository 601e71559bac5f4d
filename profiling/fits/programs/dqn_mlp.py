"""DQN on CartPole: stable-baselines3 2.9.2, gymnasium 1.4.0."""

from stable_baselines3 import DQN

DQN("MlpPolicy", "CartPole-v1", learning_starts=50, batch_size=128, device="cuda", verbose=1).learn(
    200
)
