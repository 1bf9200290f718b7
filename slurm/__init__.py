"""The project on a SLURM cluster: scripts to send by hand."""
