"""Denoising diffusion by the package's own Trainer: denoising-diffusion-pytorch 2.3.4."""

import tempfile

import numpy as np
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from PIL import Image

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for number in range(128):
            Image.fromarray(np.random.randint(0, 255, (64, 64, 3), np.uint8)).save(
                f"{folder}/{number}.png"
            )
        diffusion = GaussianDiffusion(Unet(64, dim_mults=(1, 2, 4)), image_size=64, timesteps=1000)
        Trainer(
            diffusion,
            folder,
            train_batch_size=16,
            gradient_accumulate_every=2,
            amp=True,
            calculate_fid=False,
            results_folder=folder,
            num_samples=4,
        ).train()
