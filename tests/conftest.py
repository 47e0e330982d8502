"""Every test runs on one compute thread, without a network, and as long as a busy machine takes."""

import os

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
