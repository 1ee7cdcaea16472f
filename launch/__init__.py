"""Starts processes on this machine (`local`) or on a SLURM cluster (`slurm`); imports nothing of `ldm`."""
