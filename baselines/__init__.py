"""The systems that FineMoE is compared with, one file each, and the bounds."""
