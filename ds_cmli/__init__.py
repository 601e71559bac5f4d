"""Training of image-text models with all-pairs CMLI under DeepSpeed ZeRO.

After `import ds_cmli`, which imports neither PyTorch nor transformers, the auto classes of
transformers load exported models.
"""

from ds_cmli import announcement

announcement.make()
